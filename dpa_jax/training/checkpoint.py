"""Checkpoints of a run: asynchronous and atomic by Orbax, compared with a digest before they are used."""

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from dpa_jax.training.folder import files_in, folder_of, in_bucket, is_there, set_aside

_STATE = "state"  # Orbax's item with the arrays
_METRICS = "metrics/metrics"  # where Orbax keeps a step's metrics, as JSON
_DIGEST = "digest.json"  # {file: [bytes, sha256]}
_DISCARDED = "discarded"  # what is about to be deleted: a rename is atomic, a deletion is not
# Orbax writes these after the digest. They hold times and class names, nothing of the run.
_COMMITTED = "commit_success.txt"
_BOOKKEEPING = ("_CHECKPOINT_METADATA", _COMMITTED)


_BY_COMMIT_FILE = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


class DamagedCheckpointError(RuntimeError):
    """There are checkpoints, but none that can be read."""


class _UnreadableError(ValueError):
    """What a checkpoint holds is not what was saved at its step."""


class Checkpoints:
    """The checkpoints below one directory: the last few, and the best one.

    `save` copies the arrays to the host and returns; a background thread writes them into a temporary folder, adds a
    digest of every file, and renames the folder to the step's number. In a bucket, where no folder can be renamed, a
    checkpoint counts from the moment that it has Orbax's ``commit_success.txt``. So it is either whole or absent, and
    `restore` uses none whose files differ from their digest: neither zarr nor Orbax notices a flipped bit.

    Use it as a context manager, or call `close`, so that the last save is on the disk when the program ends.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int, best: str = "eval_top1", read_only: bool = False
    ) -> None:
        """Opens or makes the directory, local, mounted or in a bucket, and deletes what a killed save has left there.

        The ``keep`` newest checkpoints stay, and the one whose metric ``best`` is the highest. With ``read_only``
        nothing in the folder is changed, so that a training that runs there is not disturbed.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, to have something to resume from, got {keep}")
        self.directory = folder_of(directory)
        if not in_bucket(self.directory):
            self.directory = self.directory.absolute()
        self.best = best
        self._read_only = read_only
        self._damaged: set[str] = set()  # names of folders that are passed over
        self._saving: int | None = None
        self._manager: ocp.CheckpointManager | None = None
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"{self.directory} must be a folder and is a file")
        if read_only:
            return
        self._set_strangers_aside()
        self._clear_discarded()
        if jax.process_index() == 0:
            self._set_those_without_metrics_aside()  # the manager reads all as it opens, and fails on damaged ones
        _silence_orbax()
        policies = ocp.checkpoint_managers
        keep_best = policies.BestN(get_metric_fn=self._quality, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=self._quality,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), keep_best]),
                cleanup_tmp_directories=True,
                todelete_subdir=None if in_bucket(self.directory) else _DISCARDED,
                atomicity_options=_BY_COMMIT_FILE if in_bucket(self.directory) else None,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._before_commit),
            ),
        )

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts to save and returns once the arrays are copied: they may be donated or changed at once.

        The state is any pytree of arrays, random keys as key data; the metrics are of an evaluation at this step. A
        step that is there already is left alone, unless it lacks the metrics: then it is written anew. Raises what made
        the save before this one fail.
        """
        if self._manager is None:
            raise RuntimeError("these checkpoints were opened read-only; open them without read_only to save")
        self.wait()
        if step in self._steps():
            if not metrics or self._metrics(step):
                return
            self._manager.delete(step)
            self._clear_discarded()
        self._saving = step
        with self._telling():
            self._manager.save(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.StandardSave(_to_dict(state))}),
                metrics={name: float(value) for name, value in (metrics or {}).items()},
                force=True,
            )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any] | None:
        """The step and the state of the newest readable checkpoint, or of `step`; None when nothing was ever saved.

        A damaged checkpoint is warned of and moved to `damaged-STEP` beside the others (left in place when
        read-only); where no `step` was asked for, the one before it is tried. `abstract_state` has a
        `jax.ShapeDtypeStruct` with a sharding for every leaf, on whatever devices.

        Raises:
            ValueError: a leaf of `abstract_state` has no sharding, or the checkpoint is of another model:
                the first leaf that differs is named with both shapes.
            DamagedCheckpointError: there are checkpoints, but no readable one.
            FileNotFoundError: `step` was given and is not there.
        """
        _require_shardings(abstract_state)
        self.wait()
        self._set_strangers_aside()
        steps = self._steps()
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; there are {steps}")
        for candidate in [step] if step is not None else reversed(steps):
            folder = self._folder(candidate)
            reason = _damage(folder) if jax.process_index() == 0 else ""
            if not multihost_utils.broadcast_one_to_all(np.int32(bool(reason))):
                try:
                    return candidate, _read(folder, abstract_state, candidate)
                except _UnreadableError as error:  # alike in all processes
                    reason = str(error)
            self._set_aside(folder, reason)
            multihost_utils.sync_global_devices(f"damaged checkpoint {candidate}")
            if self._manager is not None:
                self._manager.reload()
        aside = sorted({*self._damaged, *(path.name for path in self.directory.glob("damaged-*"))})
        if steps or aside:
            raise DamagedCheckpointError(
                f"no readable checkpoint in {self.directory} (steps found: {steps}; set aside: {aside}). "
                "To begin again, remove these folders or choose another working directory."
            )
        return None

    @property
    def latest_step(self) -> int | None:
        """The newest step on the disk; a save still under way does not count."""
        return max(self._steps(), default=None)

    @property
    def best_step(self) -> int | None:
        """The step on the disk with the highest `best` metric (the newest of equals), or None without any."""
        if self._read_only:  # those that can be written to were looked at when they were opened
            self._set_those_without_metrics_aside()
        quality = {step: self._quality(self._metrics(step)) for step in self._steps()}
        known = [step for step in quality if quality[step] > -math.inf]
        return max(known, key=lambda step: (quality[step], step), default=None)

    def wait(self) -> None:
        """Returns when the save under way is on the disk; raises what made it fail."""
        if self._manager is not None:
            with self._telling():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What Orbax and TensorStore raise for a file system, each with classes of its own, as one line."""
        try:
            yield
        except Exception as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(number[1])) if number else f"{error}".strip().partition("\n")[0]
            raise OSError(
                f"the checkpoint of step {self._saving} could not be written to {self.directory}: {reason}. Those "
                "before it are kept; make room, or see what is wrong there, and start again."
            ) from error

    def close(self) -> None:
        """Waits for the save under way and lets go of the threads."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                manager, self._manager = self._manager, None
                with contextlib.suppress(Exception):  # it says again what `wait` has raised
                    manager.close()
            self._clear_discarded()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Calls `close`; after a KeyboardInterrupt it does not, for that waits: a save under way ends by itself."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.close()

    def _names(self) -> list[str]:
        """What looks like a checkpoint's folder, to Orbax also in other digits than ours."""
        if not self.directory.is_dir():
            return []
        paths = (path for path in self.directory.iterdir() if path.name.rpartition("_")[2].isdigit())
        names = [path.name for path in paths if not in_bucket(path) or (path / _COMMITTED).exists()]
        return sorted(name for name in names if name not in self._damaged and not name.startswith("damaged-"))

    def _steps(self) -> list[int]:
        return sorted(int(name) for name in self._names() if _is_checkpoint(self.directory / name))

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _metrics(self, step: int) -> dict[str, float]:
        if _damage(self._folder(step), only=_METRICS):
            return {}
        return json.loads((self._folder(step) / _METRICS).read_text())

    def _quality(self, metrics: dict[str, float]) -> float:
        value = metrics.get(self.best, math.nan)
        return -math.inf if math.isnan(value) else value

    def _before_commit(self) -> None:
        # Orbax calls this in its background thread, when all files are written and before the folder gets its name.
        if jax.process_index() == 0:
            self._clear_discarded()
            (folder,) = self.directory.glob(f"{self._saving}" if in_bucket(self.directory) else f"{self._saving}.*")
            digest = {name: _fingerprint(folder / name) for name in _files(folder)}
            (folder / _DIGEST).write_text(json.dumps(digest, indent=1))

    def _clear_discarded(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / _DISCARDED, ignore_errors=True)

    def _set_strangers_aside(self) -> None:
        for name in self._names():
            if not _is_checkpoint(path := self.directory / name):
                what = "a link" if os.path.islink(path) else "a file" if path.is_file() else "named as no step is"
                self._set_aside(path, f"it is {what}")

    def _set_those_without_metrics_aside(self) -> None:
        for step in self._steps():
            if reason := _damage(self._folder(step), only=_METRICS):
                self._set_aside(self._folder(step), reason)

    def _set_aside(self, folder: pathlib.Path, reason: str) -> None:
        if self._read_only:
            self._damaged.add(folder.name)
            if not is_there(folder):
                return  # a training that runs there has deleted it
        if jax.process_index() != 0:
            return
        what = "it is left where it is" if self._read_only else f"moved to {set_aside(folder).name}"
        warnings.warn(f"checkpoint {folder} is damaged: {reason}; {what}", RuntimeWarning, stacklevel=3)


def _is_checkpoint(path: pathlib.Path) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None and path.is_dir() and not os.path.islink(path)


def _silence_orbax() -> None:
    """Takes away the tracebacks of a save that fails, for `wait` raises what has made it fail."""
    for name in ("absl", "asyncio"):  # adding a filter again does nothing
        logging.getLogger(name).addFilter(_is_news)
    if sys.unraisablehook is not _hook:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _hook


def _is_news(record: logging.LogRecord) -> bool:
    if not record.exc_info or record.exc_info[2] is None:
        return True
    files = [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    return not any("orbax" in file for file in (record.pathname, *files))


def _hook(unraisable: Any) -> None:
    # TensorStore's threads end up here with what they still have to say to an event loop that the failure has closed.
    if str(unraisable.exc_value) != "Event loop is closed":
        _hooks[-1](unraisable)


_hooks: list[Callable[[Any], Any]] = []  # those that were there before ours


def _fingerprint(path: pathlib.Path) -> list[int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _files(folder: pathlib.Path) -> list[str]:
    """What a digest names: every file but Orbax's bookkeeping and the digest itself."""
    names = (path.relative_to(folder).as_posix() for path in files_in(folder))
    return [name for name in names if name not in (*_BOOKKEEPING, _DIGEST)]


def _damage(folder: pathlib.Path, only: str | None = None) -> str:
    """Says what is wrong with the files of a checkpoint (or with one of them); empty when nothing is."""
    try:
        try:
            digest = json.loads((folder / _DIGEST).read_text())
            named = {name: (int(size), str(sha256)) for name, (size, sha256) in digest.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            return f"{_DIGEST} is unreadable"
        found = _files(folder)
        if missing := [name for name in found if name not in named and not name.rpartition("/")[2].startswith(".")]:
            return f"{_DIGEST} does not name {missing[0]}"
        for name in [only] if only else named:
            if name not in found:
                return f"{name} is missing"
            size, sha256 = _fingerprint(folder / name)
            if size != named[name][0]:
                return f"{name} has {size} bytes instead of {named[name][0]}"
            if sha256 != named[name][1]:
                return f"{name} has other contents than were written"
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename or _DIGEST).name} is missing"
    except OSError as error:
        return f"{error.filename or folder} is unreadable: {error.strerror or error}"
    return ""


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a pytree by their paths, as a checkpoint names them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}


def _to_dict(tree: Any) -> dict[str, Any]:
    # Nested dicts of names: what is on the disk then depends on no class of Flax, Optax or ours.
    return traverse_util.unflatten_dict(flatten(tree))


def _require_shardings(abstract_state: Any) -> None:
    for path, leaf in flatten(abstract_state).items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"abstract_state: {'/'.join(path)} needs a sharding; without one the arrays can't be put on "
                "other devices than they were saved from"
            )


def _require_same_leaves(folder: pathlib.Path, saved: dict[tuple[str, ...], Any], abstract_state: Any) -> None:
    wanted = flatten(abstract_state)
    for path in [*wanted, *(path for path in saved if path not in wanted)]:
        there, here = _describe(saved.get(path)), _describe(wanted.get(path))
        if there != here:
            raise ValueError(
                f"checkpoint {folder} is of another model or configuration: {'/'.join(path)} is {there} "
                f"there and {here} here. Use the configuration that it was trained with, or another workdir."
            )


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


# What Orbax and TensorStore raise for files that are not theirs. A device's or a host's lack of memory is none of them.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, AssertionError, FileNotFoundError)


def _read(folder: pathlib.Path, abstract_state: Any, step: int) -> Any:
    """The state in a checkpoint.

    Raises:
        ValueError: it is of another model.
        _UnreadableError: its files are as they were written, but no state of this step.
    """
    handler, wanted = ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(_to_dict(abstract_state))
    try:
        saved = traverse_util.flatten_dict(handler.metadata(epath.Path(folder) / _STATE).tree)
    except _UNREADABLE as error:
        raise _UnreadableError(f"there is no list of its arrays ({type(error).__name__})") from error
    _require_same_leaves(folder, saved, abstract_state)
    try:
        arrays = traverse_util.flatten_dict(handler.restore(epath.Path(folder) / _STATE, args=wanted))
    except _UNREADABLE as error:
        raise _UnreadableError(f"its arrays cannot be read ({type(error).__name__})") from error
    if (inside := arrays.get(("step",))) is not None and np.any(np.asarray(inside) != step):
        raise _UnreadableError(f"the state in it is that of step {np.max(np.asarray(inside))}")
    leaves = [arrays[path] for path in flatten(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
