"""A run that was stopped, however and whenever, and started again ends as one that never was."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.run import build

ROOT = pathlib.Path(__file__).parents[2]

# 100 images in batches of 16: epochs end after steps 6, 12, 19 and 25, three of them in the middle of a batch.
# Checkpoints come after steps 4, 6, 8, 12, 16, 19, 20, 24 and 25.
CONFIG = """
from dpa_jax.config import default_config

def get_config():
    config = default_config()
    config.model_options = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    config.model_options.update(dropout=0.1, stochastic_depth=0.1)
    config.data.update(name="synthetic", image_size=8, channels=1, num_classes=4)
    config.data.update(train_examples=100, test_examples=40)
    config.augment.update(crop="pad", padding=1, flip=0.5)
    config.update(batch_size=16, eval_batch_size=16, epochs=4)
    config.optimizer.learning_rate = 0.01
    config.checkpoint.every_steps = 4
    return config
"""
LAST = 25

# Runs train.py in a process that ends itself, or tells itself to end, at a moment of its choice.
DRIVER = """
import itertools, os, pathlib, runpy, signal, sys, time

moment, at, train, *arguments = sys.argv[1:]
at, checkpoints = int(at), pathlib.Path(arguments[-1]) / "checkpoints"
from dpa_jax.data.feeds.memory import MemoryFeed as Feed
from dpa_jax.training import loop
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.record import Recorder

def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)

def wait_for(pattern):
    while not list(checkpoints.glob(pattern)):
        time.sleep(0.001)

def wrap(owner, name, before=lambda *_: None, after=lambda *_: None):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        before(*args)
        result = inner(*args, **kwargs)
        after(*args)
        return result
    setattr(owner, name, outer)

evaluations = itertools.count(1)
def evaluation(feed, batches=Feed.evaluation):
    last = next(evaluations) == at
    for number, batch in enumerate(batches(feed)):
        if last and number == 1:
            kill()
        yield batch

if moment == "after so many steps":
    wrap(Feed, "train", before=lambda feed, step: step == at and kill())
elif moment == "after the checkpoint of a step":
    wrap(Feed, "train", before=lambda feed, step: step == at + 1 and (wait_for(str(at)), kill()))
elif moment == "after the line of a step":
    wrap(Recorder, "write", after=lambda recorder, line: line["step"] == at and kill())
elif moment == "while a step is written":
    wrap(Checkpoints, "save", after=lambda self, step, *_: step == at and (wait_for(f"{at}*"), kill()))
elif moment == "before a step gets its name":
    wrap(Checkpoints, "_before_commit", after=lambda self: self._saving == at and kill())
elif moment == "in the evaluation of this number":
    Feed.evaluation = evaluation
elif moment == "before the curves":
    loop.plot_curves = lambda *_: kill()
elif moment == "told in a step":
    wrap(Feed, "train", before=lambda feed, step: step == at - 1 and kill(signal.SIGTERM))
sys.argv = [train, *arguments]
runpy.run_path(train, run_name="__main__")
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, moment, at) -> the ended process of a run; the moment is one of DRIVER's."""
    folder = tmp_path_factory.mktemp("start")
    config = folder / "small.py"
    config.write_text(CONFIG)
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # what is compiled runs for a few milliseconds
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, moment=None, at=0):
        command = ["train.py", "--config", str(config), "--workdir", str(workdir)]
        if moment is not None:
            command = ["-c", DRIVER, moment, str(at), *command]
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    ended = start(workdir)
    assert ended.returncode == 0, ended.stderr
    lines = figures(workdir)
    assert [line["step"] for line in lines] == [6, 12, 19, LAST]
    # What could go wrong is there to go wrong.
    assert lines[-1]["masked_fraction"] > 0 and lines[-1]["loss_channel"] > 0
    state = final_state(workdir)
    assert all(np.any(memory) for path, memory in state.items() if "memory" in path and "mean" in path)
    return workdir


def figures(workdir):
    """metrics.jsonl without the times, which no two runs have in common."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for line in lines:
        del line["images_per_second"], line["seconds"]
    return lines


def final_state(workdir):
    """{path: array} of all that the checkpoint of the last step holds."""
    module = types.ModuleType("small")
    exec(CONFIG, module.__dict__)
    abstract_state = build(module.get_config(), jax.devices()[:1]).abstract_state
    with Checkpoints(workdir / "checkpoints", keep=3, read_only=True) as checkpoints:
        step, state = checkpoints.restore(abstract_state)
    assert step == LAST
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def checkpoints_of(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def assert_same_run(workdir, reference):
    assert figures(workdir) == figures(reference)
    state, wanted = final_state(workdir), final_state(reference)
    assert state.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert state[path].dtype == leaf.dtype and state[path].tobytes() == leaf.tobytes(), path
    assert checkpoints_of(workdir) >= checkpoints_of(reference)
    assert (workdir / "curves.png").is_file()


def kill_again_and_again(start, workdir, kills):
    """Starts and kills a run at each moment; what is on the disk then tells that it was this moment."""
    for moment, at, saved, recorded in kills:
        ended = start(workdir, moment, at)
        assert ended.returncode == -signal.SIGKILL, (moment, at, ended.stderr)
        found = max((int(name) for name in checkpoints_of(workdir) if name.isdecimal()), default=None)
        assert found in saved, (moment, at)
        assert [line["step"] for line in figures(workdir)] == recorded, (moment, at)


@pytest.mark.core
def test_killed_in_every_part_of_an_epoch(start, uninterrupted, tmp_path):
    kill_again_and_again(
        start,
        tmp_path,
        [
            # moment, its number, the newest checkpoint then (one of), the lines of metrics.jsonl then
            ("after so many steps", 2, {None}, []),
            ("after the checkpoint of a step", 4, {4}, []),
            ("after the line of a step", 6, {4}, [6]),
            ("before a step gets its name", 12, {8}, [6, 12]),
            ("in the evaluation of this number", 1, {8}, [6]),
        ],
    )
    ended = start(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "continuing after step" in ended.stderr
    assert_same_run(tmp_path, uninterrupted)


def test_killed_near_the_end(start, uninterrupted, tmp_path):
    kill_again_and_again(
        start,
        tmp_path,
        [
            ("while a step is written", 12, {8, 12}, [6, 12]),
            ("after the line of a step", LAST, {20, 24}, [6, 12, 19, LAST]),
            ("before a step gets its name", LAST, {24}, [6, 12, 19, LAST]),
            ("before the curves", 0, {24, LAST}, [6, 12, 19, LAST]),
        ],
    )
    ended = start(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path, uninterrupted)


def test_sigterm_saves_says_so_and_the_run_goes_on(start, uninterrupted, tmp_path):
    ended = start(tmp_path, "told in a step", 10)
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr.splitlines()[-1] == (f"SIGTERM: saved step 10 of {LAST}; start again in {tmp_path} to continue")
    assert "10" in checkpoints_of(tmp_path)
    ended = start(tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"continuing after step 10 of {LAST}" in ended.stderr
    assert_same_run(tmp_path, uninterrupted)


def test_a_truncated_newest_checkpoint_is_warned_of_and_the_one_before_is_used(start, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    newest = workdir / "checkpoints" / str(LAST)
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    ended = start(workdir)
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint {newest} is damaged" in ended.stderr
    assert f"continuing after step 24 of {LAST}" in ended.stderr
    assert f"damaged-{LAST}" in checkpoints_of(workdir)
    assert_same_run(workdir, uninterrupted)
