"""A hostile case, the program that it is tried on, and what may come of it.

`OUTCOMES` are the columns of the table that a campaign ends with. The first two are as they should be. A test of the
campaign takes the fixture `case` and says what is to come of what it does; where that does not come, it fails with one
of the others.
"""

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from multiprocessing import forkserver
from typing import NamedTuple

import dpa_jax

OUTCOMES = ("clear error", "graceful", "traceback", "silent", "hang", "lost", "code")
ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = str(pathlib.Path(dpa_jax.__file__).parent)

# A training of some seconds: 6 steps an epoch, 48 training images in batches of 8, 20 held-out ones.
TINY = (
    "--config.data.name=synthetic",
    "--config.data.image_size=8",
    "--config.data.channels=1",
    "--config.data.num_classes=4",
    "--config.data.train_examples=48",
    "--config.data.test_examples=20",
    "--config.augment.crop=none",
    "--config.model_options.patch_size=4",
    "--config.model_options.embed_dim=8",
    "--config.model_options.depth=1",
    "--config.model_options.num_heads=1",
    "--config.batch_size=8",
    "--config.eval_batch_size=8",
    "--config.schedule.warmup_epochs=0",
    "--config.epochs=2",
)

# What the programs import; a forked process has it from the start.
_PRELOADED = (
    "dpa_jax.train",
    "dpa_jax.training.loop",
    "dpa_jax.compare.__main__",
    "dpa_jax.data.preview",
    "sklearn.datasets",
    "tensorboardX",
    "tests.faults.harness",
)


@functools.cache
def environment():
    """What programs run in, beside the test's own variables."""
    compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        # Machine code that is not optimised: much is compiled here, and little computed.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        # A program that is started again, or on a damaged copy, is the same program.
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


class Fault(Exception):
    """What came of a case was not what was to come."""

    def __init__(self, outcome, what):
        assert outcome in OUTCOMES[2:]
        super().__init__(f"{outcome}: {what}")
        self.outcome = outcome


class Ended(NamedTuple):
    """A program that has ended: its exit status, minus the number of a signal; None where it hung and was killed."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float

    def __str__(self):
        return f"exit status {self.status} after {self.seconds:.1f} s\n{self.stdout}\n{self.stderr}"


class Program:
    """A program that runs, in a process group of its own."""

    def __init__(self, module, arguments, folder, env):
        self.started = time.monotonic()
        self._streams = [folder / f".{os.urandom(4).hex()}.{name}" for name in ("out", "err")]
        command = (module, [module, *map(str, arguments)], str(folder))
        if env:  # JAX reads its own when it is imported
            code = f"from tests.faults.harness import _run; _run(*{command!r})"
            with contextlib.ExitStack() as stack:
                out, err = (stack.enter_context(path.open("wb")) for path in self._streams)
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env=os.environ | environment() | env,
                    cwd=ROOT,
                    stdout=out,
                    stderr=err,
                    stdin=subprocess.DEVNULL,
                )
        else:
            self._process = _forks().Process(target=_run, args=(*command, *map(str, self._streams)))
            self._process.start()

    @property
    def pid(self):
        return self._process.pid

    def kill(self, number=signal.SIGKILL):
        """Sends a signal; SIGKILL goes to its worker processes as well."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)

    def wait_for(self, condition, timeout=60):
        """Waits until the condition, a function, holds or the program has ended; whether it holds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._status() is None and not condition():
            time.sleep(0.005)
        return bool(condition())

    def wait(self, timeout=60):
        """Waits for its end, and kills it where that does not come in so many seconds: an `Ended`."""
        deadline = time.monotonic() + timeout
        while (status := self._status()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if status is None:
            self.kill()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._streams)
        return Ended(status, out, err, time.monotonic() - self.started)

    def _status(self):
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode


class Case:
    """What a test of the campaign does, and what came of it.

    Attributes:
        folder: an empty folder, in which programs run.
        workdir: the folder of the runs; it is made by the first.
        outcome: what came of it.
        tried: how many inputs were tried.
    """

    def __init__(self, folder):
        self.folder, self.workdir = folder, folder / "run"
        self.outcome, self.tried = "graceful", 0
        self._programs = []

    # ---------------- Programs ----------------

    def start(self, module, *arguments, env=None):
        """Starts ``python -m module arguments`` in `folder`."""
        program = Program(module, arguments, self.folder, env)
        self._programs.append(program)
        return program

    def train(self, *arguments, env=None, timeout=60):
        """Trains in `workdir`, unless the arguments name another one, to the end: an `Ended`."""
        workdir = () if any(str(a).startswith("--workdir") for a in arguments) else (f"--workdir={self.workdir}",)
        return self.start("dpa_jax.train", *workdir, *arguments, env=env).wait(timeout)

    def compare(self, *arguments, env=None, timeout=60):
        """Compares, from the configuration digits_vit unless another one is given, in `workdir`: an `Ended`."""
        config = () if any(str(a).startswith("--config=") for a in arguments) else ("--config=digits_vit",)
        arguments = (*config, f"--workdir={self.workdir}", *arguments)
        return self.start("dpa_jax.compare.__main__", *arguments, env=env).wait(timeout)

    def close(self):
        for program in self._programs:
            program.kill()

    # ---------------- What is to come ----------------

    def refused(self, ended, *words):
        """The program has ended with one line that says ``error: ...`` and has all the words."""
        self._plain(ended)
        if ended.status == 0:
            raise Fault("silent", f"no error\n{ended}")
        lines = ended.stderr.strip().splitlines() or [""]
        if ended.status not in (1, 2) or not lines[-1].startswith("error: "):
            raise Fault("traceback", f"the last line is no error of ours\n{ended}")
        if missing := [word for word in words if word not in lines[-1]]:
            raise Fault("traceback", f"the error does not say {missing}\n{ended}")
        self.outcome = "clear error"

    def finished(self, ended, *words):
        """The program has ended well, and its output has all the words."""
        self._plain(ended)
        if ended.status != 0:
            raise Fault("traceback", f"it did not finish\n{ended}")
        if missing := [word for word in words if word not in ended.stdout + ended.stderr]:
            raise Fault("silent", f"nothing says {missing}\n{ended}")
        self.outcome = "graceful"

    def _plain(self, ended):
        if ended.status is None:
            raise Fault("hang", str(ended))
        if "Traceback" in ended.stdout + ended.stderr or ended.status < 0:
            raise Fault("traceback", str(ended))

    @contextlib.contextmanager
    def raises(self, *words, kinds=(ValueError, TypeError, OSError)):
        """The block raises an error of the library that has all the words."""
        try:
            yield
        except kinds as error:
            frame = error.__traceback__
            while frame.tb_next:
                frame = frame.tb_next
            ours = frame.tb_frame.f_code.co_filename.startswith(PACKAGE) or isinstance(error, OSError)
            missing = [word for word in words if word not in str(error)]
            if not ours or missing or type(error) is UnicodeDecodeError:
                raise Fault("traceback", f"no error of ours that says {missing}: {error!r}") from error
        except Fault:
            raise
        except Exception as error:
            raise Fault("traceback", repr(error)) from error
        else:
            raise Fault("silent", "nothing was raised")
        self.outcome = "clear error"

    def lost(self, what):
        """Something that there was is gone."""
        raise Fault("lost", what)

    def code(self, what):
        """A file was able to run code."""
        raise Fault("code", what)

    # ---------------- What a run has left ----------------

    def record(self, workdir=None):
        """``metrics.jsonl`` as parsed lines, without the times, which no two runs have in common."""
        path = (workdir or self.workdir) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{k: v for k, v in line.items() if k not in ("images_per_second", "seconds")} for line in lines]

    def states(self, workdir=None):
        """{step: {name: bytes}} of every array of every checkpoint."""
        found = {}
        for folder in sorted(((workdir or self.workdir) / "checkpoints").iterdir()):
            if folder.name.isdecimal():
                found[int(folder.name)] = arrays_of(folder)
        return found


def undisturbed(folder, *arguments):
    """A case whose training nothing happened to; ``wanted`` is what it has left, its record and its states."""
    case = Case(folder)
    case.finished(case.train(*arguments))
    case.wanted = case.record(), case.states()
    return case


def arrays_of(checkpoint):
    """{name: bytes} of the arrays in the folder of a checkpoint, whatever the model."""
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(checkpoint / "state")
    found, waiting = {}, [("", tree)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{name}/{key}", child) for key, child in value.items()]
        else:
            found[name] = bytes(memoryview(value).tobytes())
    return found


def _run(module, argv, folder, out=None, err=None):
    """In the process of a program: goes to its folder and calls ``main`` of its module."""
    os.setsid()
    if out:
        sys.stdout.flush()
        for path, number in ((out, 1), (err, 2)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
            os.close(descriptor)
    os.chdir(folder)
    sys.argv = argv
    # The loader's workers import the program, as they do where it was started from a shell.
    sys.modules["__main__"] = types.ModuleType("__main__")
    main = __import__(module, fromlist=["main"])
    main.main(argv)


@functools.cache
def _forks():
    """Processes that begin with everything imported: what is tried takes seconds less."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    before = dict(os.environ)
    os.environ.update(environment())
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context
