"""Two processes of one run on this machine: the numbers of one, each with its own share of the data."""

import json
import os
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

from dpa_jax.command_line import load_config
from dpa_jax.training import sharding
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.folder import files_in
from dpa_jax.training.loop import train
from dpa_jax.training.record import read_history
from dpa_jax.training.run import build
from tests.bucket import Bucket
from tests.faults.harness import environment
from tests.helpers import free_port

# 12 steps on 24 images that are read at every step; saved after each.
CONFIG = """
from tests.helpers import tiny_config

def get_config():
    config = tiny_config(epochs=4, data__name="folder", data__dir="images", data__resident="host")
    config.sharding, config.checkpoint.every_steps = "fsdp", 1
    config.augment.update(image_size=8, crop="resized")
    return config
"""

# `train.py`; says which rows of the batches it has read, and which files Python has written in the run's folder. Given
# a step it sends SIGTERM to itself when it reads for that.
PROGRAM = """
import json, os, signal, sys
from dpa_jax.data.feeds import examples
from dpa_jax.training import sharding

sharding.LEAST = 1
report, told_at, argv = sys.argv[1], int(sys.argv[2]), ["train.py", *sys.argv[3:]]
rows, written = {"TrainExamples": set(), "EvalExamples": set()}, set()

def counted(kind):
    at = kind.at
    def count(self, position):
        global told_at
        rows[kind.__name__].add(position % 8)
        if told_at and kind is examples.TrainExamples and position // 8 >= told_at:
            told_at = 0
            os.kill(os.getpid(), signal.SIGTERM)
        return at(self, position)
    kind.at = count

counted(examples.TrainExamples)
counted(examples.EvalExamples)

def watch(event, arguments):
    opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if (opened or event in ("os.mkdir", "os.rename", "os.remove")) and isinstance(arguments[0], (str, bytes)):
        path = os.path.relpath(os.fsdecode(arguments[0]))
        if path.startswith("run/"):
            written.add(path.split("/")[1])

sys.addaudithook(watch)
from dpa_jax import train
try:
    train.main(argv)
finally:
    with open(report, "w") as file:
        json.dump([{kind: sorted(some) for kind, some in rows.items()}, sorted(written)], file)
"""


def start(folder, told_at, workdir="run", env=None):
    """Trains in two processes of two devices each: of both the status, the output, the rows read, the files written."""
    command = [sys.executable, "-c", PROGRAM]
    by_hand = ["--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    two_devices = {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = ["--config=config.py", f"--workdir={workdir}", *by_hand]
    processes = [
        subprocess.Popen(
            [*command, f"report{index}", str(told_at * index), *arguments, f"--process_id={index}"],
            cwd=folder,
            env=os.environ | environment() | two_devices | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    print(*outputs, sep="\n")
    return [
        types.SimpleNamespace(status=process.returncode, output=output, rows=rows, written=written)
        for index, (process, output) in enumerate(zip(processes, outputs, strict=True))
        for rows, written in [json.loads((folder / f"report{index}").read_text())]
    ]


def own_lines(process):
    """The lines of its output, but for what libraries say in every process."""
    others = re.compile(r"\[Gloo\] |[IWE]\d{4} |WARNING:absl:")
    return [line for line in process.output.splitlines() if not others.match(line)]


def same(first, second):
    for one, other in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of two processes that SIGTERM to the second stops, and that goes on; beside it one of one process."""
    folder, noise = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("ant", "bee", "cat"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{i}.png")
    (folder / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sharding, "LEAST", 1)
        config = load_config(folder / "config.py")
        yield types.SimpleNamespace(folder=folder, stopped=start(folder, told_at=4), config=config)


def test_sigterm_to_one_makes_both_save_and_stop(runs):
    first, second = runs.stopped
    assert (first.status, second.status) == (143, 143)


def test_each_reads_its_own_share(runs):
    for index, process in enumerate(runs.stopped):
        own = [4 * index + i for i in range(4)]
        assert process.rows == {"TrainExamples": own, "EvalExamples": own}


def test_only_process_0_writes_and_tells(runs):
    first, second = runs.stopped
    assert "epoch 1/4" in first.output and "SIGTERM: saved step" in first.output
    assert own_lines(second) == []
    assert {"metrics.jsonl", "curves.png", "config.json.new", "tensorboard"} <= set(first.written)
    assert set(second.written) == {"checkpoints"}


def test_their_checkpoint_is_that_of_any_devices_and_back(runs):
    alone, devices = build(runs.config, jax.devices()[:4]), jax.devices()
    ways = [(sharding.make_mesh(devices[:n]), how) for n, how in ((1, "data"), (8, "data"), (4, "fsdp"))]
    abstract = [
        sharding.placed(alone.abstract_state, sharding.of_state(alone.abstract_state, mesh, how)) for mesh, how in ways
    ]
    folder, by_two = runs.folder / "run" / "checkpoints", runs.folder / "run" / "by_two"
    with Checkpoints(folder, keep=1, read_only=True) as checkpoints:
        step = checkpoints.latest_step
        restored = [checkpoints.restore(wanted)[1] for wanted in abstract]
    assert 4 <= step < 12
    same(restored[0], restored[1])
    same(restored[0], restored[2])
    assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(restored[2].params))

    # Back: the two processes go on, in a bucket, from what four devices have saved, each its part.
    folder.rename(by_two)
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(step, restored[2], {})
    with Bucket() as bucket:
        for path in files_in(runs.folder / "run"):
            if by_two not in path.parents:
                bucket.put(path.relative_to(runs.folder).as_posix(), path.read_bytes())
        ended = start(runs.folder, told_at=0, workdir="gs://bucket/run", env=bucket.environment)
        for name in bucket.names():
            (path := runs.folder / "from" / name).parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bucket.objects[name][1])
    assert [process.status for process in ended] == [0, 0]
    assert own_lines(ended[1]) == [] and f"continuing after step {step} of 12" in ended[0].output

    train(alone, runs.folder / "alone", [runs.folder / "alone"])
    states, records = [], []
    for name in ("from/run", "alone"):
        with Checkpoints(runs.folder / name / "checkpoints", keep=1, read_only=True) as checkpoints:
            states.append(checkpoints.restore(alone.abstract_state))
        records.append([{k: v for k, v in r.items() if "second" not in k} for r in read_history(runs.folder / name)])
    # As the processes add in another order than one does, what they add is equal but for rounding.
    for ours, theirs in zip(*records, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
