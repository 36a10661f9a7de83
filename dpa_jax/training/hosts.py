"""Several processes of one run, each on its own host: they join, agree before anything is trained, and end together.

They talk through the key-value store of JAX's coordination service, which process 0 keeps. Collectives on the devices
would hang, or abort the program, on just those differences that are looked for here.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

import jax
from jax._src import distributed  # the key-value store has no public way in

from dpa_jax.config import changes_figures
from dpa_jax.data.batch import Spec
from dpa_jax.training.folder import in_bucket

HEARTBEAT_SECONDS = 50  # without a heartbeat of JAX's own thread, sent every half of it: the process is lost
GRACE_SECONDS = 1  # between the last word of the other processes and the end of process 0
ANSWER_SECONDS = 10  # within which a living process says that it was told of a failure
FOLDER_SECONDS = 10  # within which a file that process 0 has written must be seen by the others
_DAY = 24 * 3600

_FAILED, _TOLD, _LEFT = "dpa_jax/failed", "dpa_jax/told", "dpa_jax/left"
_DIFFER = "the processes of the run differ: "
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ROUNDS = itertools.count()  # of `agree`: a key is set once
# Keys of a configuration that change no figure, and in which processes must be alike nevertheless: all save together.
_ALIKE = (
    "checkpoint.keep",
    "checkpoint.every_steps",
    "checkpoint.every_epochs",
    "sharding",
    "remat",
    "steps_per_dispatch",
)
_KNOWN = "Slurm, Open MPI, Kubernetes (with jax[k8s]) and Cloud TPU"


@dataclasses.dataclass(frozen=True)
class Runtime:
    """JAX's distributed runtime, as far as it is needed here."""

    client: Any
    index: int
    count: int

    def set(self, key: str, value: str) -> None:
        """Sets a key once; RuntimeError if it is there already, or process 0 is not."""
        self.client.key_value_set(key, value)

    def get(self, key: str, seconds: float = _DAY) -> str:
        """Waits for a key; RuntimeError if it does not come, or process 0 is lost. Other threads run meanwhile."""
        return self.client.blocking_key_value_get(key, int(1000 * seconds))

    def silent(self, key: str, lost: Sequence[int] = ()) -> list[int]:
        """Waits until the other processes have set ``key/NUMBER``; the numbers of those that have not in time.

        Those that are lost already are not waited for.
        """
        missing, deadline = list(lost), time.monotonic() + ANSWER_SECONDS
        for other in range(self.count):
            try:
                if other != self.index and other not in missing:
                    self.get(f"{key}/{other}", max(deadline - time.monotonic(), 0.01))
            except RuntimeError:
                missing.append(other)
        return missing


def runtime() -> Runtime:
    """The runtime that this process has joined."""
    state = distributed.global_state
    return Runtime(state.client, state.process_id, state.num_processes)


# ---------------- Join, and end together ----------------


class Hosts:
    """A command's part in a run on several hosts: ``with Hosts(...): command()``.

    All processes join at the start. One that fails, at whatever time and for whatever reason, tells the others, and
    all end with exit status 1 and a line on standard error. JAX watches for processes that end without a word: its
    heartbeats come from a thread of its own, so that one that compiles, or holds Python's lock, is not taken for lost.
    It ends the program by an abort; the line is said here.

    Args:
        coordinator: ``HOST:PORT`` of process 0.
        num_processes: how many there are.
        process_id: the number of this one. What is None is asked of the cluster that started this process.
        join_seconds: how long the processes wait for each other at the start.
    """

    def __init__(
        self,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
        join_seconds: int = 60,
    ) -> None:
        """Joins nothing yet."""
        self._coordinator, self._num_processes, self._process_id = coordinator, num_processes, process_id
        self._join_seconds = join_seconds
        self._ending = threading.Lock()  # of the thread that says the last line
        self._said = self._joined = False

    def __enter__(self) -> Self:
        """Returns when all processes are here; ends the program with a line where that can't be."""
        if self._coordinator:
            _check_address(self._coordinator, listens=self._process_id == 0)
        # JAX ends a program by LOG(FATAL), from any thread, and takes no callback (it can't hand its status to Python).
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: self._end(self._why_aborted(), alone=True))
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
        try:
            jax.distributed.initialize(
                self._coordinator,
                self._num_processes,
                self._process_id,
                initialization_timeout=self._join_seconds,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except Exception as error:  # RuntimeError, ValueError and others, after the cluster and what is wrong
            self._end(self._why_not_joined(error))
        self._joined, self._runtime = True, runtime()
        self._listener = threading.Thread(target=self._listen, name="dpa_jax hosts", daemon=True)
        self._listener.start()
        try:  # before JAX looks for the devices, for which processes with other ones would wait in vain
            agree({"JAX_PLATFORMS": jax.config.jax_platforms})  # type: ignore[attr-defined]
        except ValueError as error:
            self._end(str(error), self._tell(str(error)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leaves together with the others; where the command has failed it ends the program."""
        if error is None or (isinstance(error, SystemExit) and not isinstance(error.code, str)):
            try:
                jax.distributed.shutdown()
            except RuntimeError:
                self._end(self._why_aborted())
            self._listener.join()
            ctypes.CDLL(None).signal(signal.SIGABRT, None)
            return
        said = str(error.code).removeprefix("error: ") if isinstance(error, SystemExit) else _first_line(error)
        lost = self._tell(said)
        if lost:
            said = f"{_processes(lost)} lost ({said}). {_SAFE}"
        elif not isinstance(error, SystemExit | KeyboardInterrupt):
            traceback.print_exception(error)
        self._end(said, lost)

    def _tell(self, said: str) -> list[int]:
        """Tells the others that this process has failed; the numbers of those that do not answer."""
        with contextlib.suppress(RuntimeError):  # another one was first
            self._runtime.set(_FAILED, json.dumps([self._runtime.index, said]))
        with contextlib.suppress(RuntimeError):
            self._runtime.set(f"{_TOLD}/{self._runtime.index}", "")
        return self._runtime.silent(_TOLD)

    def _listen(self) -> None:
        """In a thread: waits until another process tells of its failure."""
        here = self._runtime
        try:
            index, said = json.loads(here.get(_FAILED))
        except RuntimeError as error:
            if "CANCELLED" not in str(error):  # which is the end of the run
                self._end(self._why_aborted(), alone=True)
            return
        if index != here.index:
            with contextlib.suppress(RuntimeError):
                here.set(f"{_TOLD}/{here.index}", "")
            self._end(said if said.startswith(_DIFFER) else f"process {index}: {said}")

    def _end(self, said: str, lost: Sequence[int] = (), alone: bool = False) -> NoReturn:
        """Says the last line, unless another thread has, and ends the process: a clean end would wait for the others.

        Process 0 goes last, as JAX aborts the others without it; but ``alone`` nothing is asked of JAX any more.
        """
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with self._ending:
            if not self._said:
                os.write(2, f"error: {said}\n".encode(errors="replace"))
            self._said = True
        if self._joined and not alone:
            with contextlib.suppress(RuntimeError):
                if self._runtime.index == 0:
                    self._runtime.silent(_LEFT, lost)
                    time.sleep(GRACE_SECONDS)
                else:
                    self._runtime.set(f"{_LEFT}/{self._runtime.index}", "")
        os._exit(1)

    def _why_aborted(self) -> str:
        if self._joined:
            return f"another process of the run is lost; the lines above say more. {_SAFE}"
        state = distributed.global_state
        return (
            f"process {state.process_id} could not join: within {self._join_seconds} s the coordinator, process 0 at "
            f"{state.coordinator_address}, was not reached, or not all processes had started. Start the same command "
            "on every host, and see that its address is right and open to all"
        )

    def _why_not_joined(self, error: Exception) -> str:
        state, by_hand = distributed.global_state, "--coordinator=HOST:PORT --num_processes=N --process_id=I"
        if "should be defined" in str(error) or "must be defined" in str(error):
            return (
                f"--distributed: no cluster that JAX knows has started this process ({_KNOWN}). "
                f"Say it by hand, with the I of each process from 0 to N - 1: {by_hand}"
            )
        if "RPC server" in str(error):
            return f"process 0 can't listen at {state.coordinator_address}: the port is taken, or not allowed"
        return f"--distributed: {_first_line(error)} (by hand: {by_hand})"


def _check_address(address: str, listens: bool) -> None:
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if not port or not 0 < int(port[1]) < 2**16:
        sys.exit(f"error: --coordinator must be HOST:PORT; got {address!r}")
    if listens:  # where the port is taken JAX 0.10 to 0.12 may end by a segmentation fault
        try:
            socket.create_server(("", int(port[1]))).close()
        except OSError as error:
            sys.exit(f"error: process 0 can't listen at --coordinator={address}: {error.strerror}")


_SAFE = "What was saved is whole: start all processes again to go on"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    name = "" if isinstance(error, ValueError | OSError | jax.errors.JaxRuntimeError) else type(error).__name__
    return ": ".join(part for part in (name, lines[0]) if part)


def _processes(indices: Sequence[int]) -> str:
    """As in "process 3 is", "processes 1, 2 and 5 more are"."""
    shown = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
    return f"process {shown} is" if len(indices) == 1 else f"processes {shown} are"


# ---------------- Agree ----------------


def agree(facts: Mapping[str, Any], workdir: pathlib.Path | None = None) -> None:
    """Returns once all processes have come here with the same facts and versions, and see the same folder.

    Args:
        facts: {what: a value that JSON has}.
        workdir: the folder of the run; process 0 makes it, and shortly keeps a file there. None: no folder is compared.

    Raises:
        ValueError: the same in every process; it names the fact, both values, and the processes that differ.
        OSError: process 0 can't write to the folder.
    """
    if not jax.distributed.is_initialized():
        return
    here, word, token = runtime(), secrets.token_hex(8), None
    place = f"dpa_jax/agree/{next(_ROUNDS)}"
    facts = {**_versions(), **facts}
    try:
        if workdir is not None and here.index == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            token = workdir / f".hosts-{word}"
            token.write_text(word)
            here.set(f"{place}/word", word)
        if workdir is not None:
            facts["workdir"] = _seen(workdir, here.get(f"{place}/word"))
        here.set(f"{place}/{here.index}", json.dumps(facts, default=str))
        if here.index == 0:
            found = {index: json.loads(here.get(f"{place}/{index}")) for index in range(here.count)}
            if token:  # all have looked; with the verdict a process may end
                token.unlink()
            here.set(f"{place}/verdict", _difference(found.pop(0), found))
        if verdict := here.get(f"{place}/verdict"):
            raise ValueError(verdict)
    finally:
        if token:
            token.unlink(missing_ok=True)


def facts_of(config: Mapping[str, Any], spec: Spec, command: str) -> dict[str, Any]:
    """What all processes of a run must have in common: the command, the configuration and the data."""
    keys = {f"config.{key}": value for key, value in _flat(config).items() if changes_figures(key) or key in _ALIKE}
    names = json.dumps(spec.class_names).encode()
    return {
        "the command": command,
        **keys,
        "the number of classes": spec.num_classes,
        "the number of training examples": spec.train_examples,
        "the number of test examples": spec.test_examples,
        "the digest of the class names": hashlib.sha256(names).hexdigest()[:8],
    }


def _versions() -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in _PACKAGES}
    found |= {"dpa_jax": sys.modules["dpa_jax"].__version__, "Python": platform.python_version()}
    return {f"the version of {name}": version for name, version in found.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return found


def _seen(workdir: pathlib.Path, word: str) -> str:
    """Says whether this process sees what process 0 has written; a mounted folder may take its time."""
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if not in_bucket(workdir):
                os.listdir(workdir)  # makes a network's file system look anew
            if (workdir / f".hosts-{word}").read_text() == word:
                return "the same"
        if time.monotonic() > deadline:
            where = workdir if in_bucket(workdir) else workdir.absolute()
            return f"{where} on {platform.node()}, and has not the file that process 0 has written"
        time.sleep(0.1)


def _difference(first: Mapping[str, Any], others: Mapping[int, Mapping[str, Any]]) -> str:
    """One line on what the other processes have otherwise than process 0; empty if nothing."""
    said: list[str] = []
    for key in first:
        different = [index for index, facts in others.items() if facts.get(key) != first.get(key)]
        if different:
            who, there = different[0], others[different[0]].get(key)
            if key == "workdir":
                said.append(f"the work folder is not shared: that of process {who} is {there}")
            else:
                said.append(f"{key} is {first.get(key)!r} in process 0 and {there!r} in process {who}")
            if key == "the command":  # it decides what else is compared
                break
            if len(different) > 1:
                said[-1] += f" and {len(different) - 1} more"
    more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
    return f"{_DIFFER}{'; '.join(said[:3])}{more}" if said else ""
