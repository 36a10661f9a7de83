"""The comparison: that its runs are train.py's, that it can be stopped at any time, and what it reports."""

import csv
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dpa_jax.activations import Elementwise, register, registry
from dpa_jax.activations.registry import ACTIVATIONS
from dpa_jax.compare import compare, parse_entries, run, write_report
from dpa_jax.compare.__main__ import main
from dpa_jax.compare.report import summarize_runs
from dpa_jax.compare.run import seeds_that_fit
from dpa_jax.config import default_config
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.loop import train, train_and_evaluate
from dpa_jax.training.run import build
from dpa_jax.training.state import create_model

pytestmark = pytest.mark.usefixtures("compile_quickly")

ROOT = pathlib.Path(__file__).parents[1]

# 60 images in batches of 16: epochs end after steps 4, 8 and 11, two of them in the middle of a batch.
CONFIG = """
from dpa_jax.config import default_config

def get_config():
    config = default_config()
    config.model_options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    config.data.update(name="synthetic", image_size=8, channels=1, num_classes=4)
    config.data.update(train_examples=60, test_examples=40)
    config.augment.flip = 0.5
    config.update(batch_size=16, eval_batch_size=16, epochs=3)
    config.optimizer.learning_rate = 0.01
    return config
"""
ENTRIES = "dpa:criterion=union,relu"
NONE = "\N{EN DASH}"
TIMES = ("images_per_second", "seconds")

# Ends the process, or tells it to end, at a moment of the comparison: in a step, or after so many records.
DRIVER = """
import itertools, os, runpy, signal, sys
from dpa_jax.data.feeds.memory import MemoryFeed as Feed
from dpa_jax.training.record import Recorder

moment, at = sys.argv[1], int(sys.argv[2])
train, write, written = Feed.train, Recorder.write, itertools.count(1)

def told_in_a_step(feed, step):
    if step == at and feed.seed == 0 and moment == "told in a step":
        os.kill(os.getpid(), signal.SIGTERM)
    return train(feed, step)

def killed_after_a_record(recorder, record):
    write(recorder, record)
    if next(written) == at and moment == "killed after a record":
        os.kill(os.getpid(), signal.SIGKILL)

Feed.train, Recorder.write = told_in_a_step, killed_after_a_record
sys.argv = ["compare", *sys.argv[3:]]
runpy.run_module("dpa_jax.compare", run_name="__main__", alter_sys=True)
"""


def small(**changes):
    module = types.ModuleType("small")
    exec(CONFIG, module.__dict__)
    config = module.get_config()
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, *arguments, moment=..., at=...) -> the ended process of the comparison, on one device."""
    folder = tmp_path_factory.mktemp("start")
    config = folder / "small.py"
    config.write_text(CONFIG)
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # what is compiled runs for a few milliseconds
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir, *arguments, moment=None, at=0):
        command = ["-m", "dpa_jax.compare"] if moment is None else ["-c", DRIVER, moment, str(at)]
        command += [f"--config={config}", f"--workdir={workdir}", "--seeds=3", *arguments]
        return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """The folder of a comparison that nothing happened to: seeds 0 and 1 together, then seed 2."""
    workdir = tmp_path_factory.mktemp("finished")
    ended = start(workdir, f"--mechanisms={ENTRIES}", "--vmap=2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith((workdir / "table.md").read_text())
    return workdir


def records(workdir):
    """{run: its records without the figures that no two runs have in common}."""
    found = {}
    for path in sorted(workdir.glob("*/seed-*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(workdir))] = [
            {name: value for name, value in line.items() if name not in TIMES} for line in lines
        ]
    return found


# ---------------- The same runs as train.py's ----------------


def test_a_member_is_the_single_run_with_its_seed():
    config = small(mechanism="dpa", seed=5)
    config.model_options.update(dropout=0.1, arr=True)  # every kind of memory
    single = build(config, jax.devices()[:1])
    config.seed = 0
    group = build(config, jax.devices()[:1], seeds=(0, 5))
    assert [member.seed for member in group.configs] == [0, 5]
    states, state = group.init(), single.init()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), states) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), group.abstract_state
    )
    chex.assert_trees_all_equal(group.members(states)[1], state)
    for step in range(6):  # the memories are updated in the fifth, in the middle of the second epoch
        batches, batch = [feed.train(step) for feed in group.feeds], single.feeds[0].train(step)
        chex.assert_trees_all_equal(batches[1], batch)
        assert not np.array_equal(batches[0].index, batch.index)
        states, metrics = group.step(states, step)
        state, wanted = single.step(state, step)
        assert metrics.keys() == wanted.keys()
        for name in wanted:
            if name.startswith("loss"):
                assert metrics[name][1] == pytest.approx(float(wanted[name]), abs=1e-5), (name, step)
        assert not np.allclose(metrics["loss"][0], wanted["loss"], atol=1e-4)


def test_the_records_are_those_of_a_single_run(finished, tmp_path):
    config = small(seed=1, mechanism="dpa", mechanism_options={"criterion": "union"})
    train_and_evaluate(config, tmp_path)
    wanted = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (config_here, config_there) = (
        json.loads((folder / "config.json").read_text())
        for folder in (finished / "dpa,criterion=union" / "seed-1", tmp_path)
    )
    assert config_here == config_there
    found = records(finished)["dpa,criterion=union/seed-1"]
    assert len(found) == len(wanted) == 3
    for mine, line in zip(found, wanted, strict=True):
        assert mine.keys() == line.keys() - set(TIMES)
        for name in ("epoch", "step", "lr", "train_loss", "eval_loss", "eval_top1"):
            assert mine[name] == pytest.approx(line[name], abs=2e-5), name


def test_the_best_checkpoint_of_a_group_is_of_its_mean(tmp_path):
    config = small(mechanism="relu", epochs=4)
    config.model_options.patch_size = 8
    group, folders = build(config, jax.devices()[:1], seeds=(0, 1)), [tmp_path / "0", tmp_path / "1"]
    records = train(group, tmp_path, folders)
    means = {one["step"]: (one["eval_top1"] + other["eval_top1"]) / 2 for one, other in zip(*records, strict=True)}
    with Checkpoints(tmp_path / "checkpoints", keep=1, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 15
        assert checkpoints.best_step == max(means, key=lambda step: (means[step], step))
    for member, folder in zip(group.configs, folders, strict=True):
        assert json.loads((folder / "config.json").read_text())["seed"] == member.seed
        assert (folder / "curves.png").is_file()


# ---------------- Stopped and started again ----------------


def test_stopped_and_started_again_it_ends_with_the_same_bits(start, finished, tmp_path):
    entries = "--mechanisms=dpa:criterion=union"
    ended = start(tmp_path, entries, "--vmap=2", moment="told in a step", at=5)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert "dpa:criterion=union, seeds 0 to 1: SIGTERM: saved step 6 of 11; start again to continue" in ended.stderr
    assert [len(lines) for lines in records(tmp_path).values()] == [1, 1]

    # Two seeds, two epochs left: the third record is the last of seed 0, and that of seed 1 never comes.
    ended = start(tmp_path, entries, "--vmap=2", moment="killed after a record", at=3)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [len(lines) for lines in records(tmp_path).values()] == [3, 2]
    assert not (tmp_path / "table.md").exists()

    # Those under way go on as they were put together, whatever is asked for now.
    ended = start(tmp_path, entries, "--vmap=1")
    assert ended.returncode == 0, ended.stderr
    # The save of step 8 was under way when the process was killed.
    assert re.match(
        r"dpa:criterion=union, seeds 0 to 1: continuing after step [68] of 11\n", ended.stderr.split("\n", 1)[1]
    )
    reference = {name: lines for name, lines in records(finished).items() if name.startswith("dpa")}
    assert len(reference) == 3 and records(tmp_path) == reference
    groups = sorted(tmp_path.glob("*/seeds-*"))
    assert [group.name for group in groups] == ["seeds-0-1", "seeds-2-2"]
    for group in groups:
        with Checkpoints(group / "checkpoints", keep=1, read_only=True) as checkpoints:
            assert checkpoints.latest_step == 11


def test_a_group_whose_last_checkpoint_never_came_is_under_way(start, finished, tmp_path):
    shutil.copytree(finished / "relu", tmp_path / "relu")
    checkpoints = tmp_path / "relu" / "seeds-0-1" / "checkpoints"
    shutil.rmtree(checkpoints / "11")  # as a kill between the last line of the records and its save leaves it
    ended = start(tmp_path, "--mechanisms=relu", "--vmap=2")
    assert ended.returncode == 0, ended.stderr
    assert "relu, seeds 0 to 1: continuing after step 8 of 11" in ended.stderr and "seed 2" not in ended.stderr
    assert (checkpoints / "11").is_dir()
    assert records(tmp_path) == {name: lines for name, lines in records(finished).items() if "relu" in name}


def test_what_is_finished_is_not_trained_again(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    (workdir / "table.md").unlink()
    monkeypatch.setattr(run, "build", None)
    config = small()
    config.checkpoint.keep = 1  # changes no figure
    compare(config, parse_entries(ENTRIES, config), 3, workdir)
    assert (workdir / "table.md").read_text().startswith("| mechanism | seeds |")
    assert records(workdir) == records(finished)


@pytest.mark.parametrize(
    ("seeds", "vmap", "groups"),
    [(5, 1, [[3], [4]]), (5, 0, [[3, 4]]), (10, 3, [[3, 4, 5], [6, 7], [8, 9]]), (2, 0, [])],
)
def test_more_seeds_are_added_to_those_there_are(finished, tmp_path, monkeypatch, seeds, vmap, groups):
    shutil.copytree(finished / "relu", tmp_path / "relu")
    trained = []
    monkeypatch.setattr(run, "build", lambda config: None)
    monkeypatch.setattr(run, "train_group", lambda run, name, seeds, folder: trained.append(list(seeds)))
    monkeypatch.setattr(run, "_whole", lambda folder, config: [])  # those that were not trained
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    monkeypatch.setattr(run, "seeds_that_fit", lambda run, wanted: wanted)
    config = small()
    compare(config, parse_entries("relu", config), seeds, tmp_path, vmap=vmap)
    assert trained == groups


def test_another_configuration_is_refused(finished):
    config = small(epochs=4)
    with pytest.raises(ValueError, match=r"relu/seed-0 was trained with .*: epochs was 3 and is 4 now\. .*workdir"):
        compare(config, parse_entries("relu", config), 3, finished)


# ---------------- As many seeds as fit ----------------


@pytest.mark.parametrize(("free", "fit"), [(1000, 1), (3.9, 3), (3.1, 2), (0.5, 1)])
def test_as_many_seeds_at_a_time_as_the_device_has_memory_for(monkeypatch, free, fit):
    size = 1_000_000
    memory = types.SimpleNamespace(
        argument_size_in_bytes=size, temp_size_in_bytes=2 * size, output_size_in_bytes=size, alias_size_in_bytes=size
    )
    compiled = types.SimpleNamespace(compile=lambda: types.SimpleNamespace(memory_analysis=lambda: memory))
    single = types.SimpleNamespace(load=lambda: None, lower=lambda: compiled)
    stats = {"bytes_limit": 7 * size + free * 3 * size, "bytes_in_use": 7 * size}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    wanted = 1 if free == 1000 else 5
    assert seeds_that_fit(single, wanted) == fit


def test_all_seeds_at_a_time_on_a_cpu():
    assert seeds_that_fit(None, 7) == 7


# ---------------- What is compared ----------------


def test_entries_and_what_they_stand_for():
    config = small()
    entries = parse_entries("relu, relu+arr,dpa:criterion=union:tau=0.25,raa:kind=scalar,dnrt", config)
    assert [entry.name for entry in entries] == [
        "relu", "relu+arr", "dpa:criterion=union:tau=0.25", "raa:kind=scalar", "dnrt"
    ]  # fmt: skip
    relu, arr, dpa, raa, dnrt = (entry.configure(config, seed=7) for entry in entries)
    assert {c.seed for c in (relu, arr, dpa, raa, dnrt)} == {7}
    assert [c.mechanism for c in (relu, arr, dpa, raa, dnrt)] == ["relu", "relu", "dpa", "raa", "dnrt"]
    assert arr.model_options.arr is True and "arr" not in relu.model_options
    assert dpa.mechanism_options.to_dict() == {"criterion": "union", "tau": 0.25}
    assert raa.mechanism_options.to_dict() == {"kind": "scalar"}
    assert config == small()  # untouched


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("relu,dpaa", r"mechanism must be one of .*got 'dpaa'\. Did you mean 'dpa'"),
        ("dpa:tua=1.0", r"mechanism_options must be .*got 'tua'\. Did you mean 'tau'"),
        ("dpa:tau=high", r"mechanism_options\.tau must be a finite float; got 'high'"),
        ("dpa:criterion=unoin", r"criterion must be one of .*got 'unoin'\. Did you mean 'union'"),
        ("relu:tau=1", r"mechanism_options must be empty here"),
        ("relu+ar", r"'relu\+ar' is not of the form NAME\[\+arr\]"),
        ("dpa:criterion", r"'dpa:criterion' is not of the form"),
        ("relu,,dpa", r"'' is not of the form"),
        ("relu,dpa,relu", r"relu is given twice"),
        ("dnrt+arr", r"model_options must be .*got 'arr'"),
        ("dpa:tau=1:tau=2", r"'dpa:tau=1:tau=2' is not of the form"),
        ("dpa:tau={[],1}", r"mechanism_options\.tau must be a finite float"),
        ("dpa:tau=" + 300 * "(", r"mechanism_options\.tau must be a finite float"),
        ("dpa:axis_name=data", r"mechanism_options must be one of .*got 'axis_name'"),
        ("dpa:momentum=2.0", r"momentum must be in \[0, 1\]"),
    ],
)
def test_bad_entries_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_entries(text, small())
    assert "\n" not in str(caught.value)


def test_options_in_the_configuration_belong_to_no_entry():
    with pytest.raises(ValueError, match=r"config\.mechanism_options must be empty in a comparison; .*'tau': 1\.0"):
        parse_entries("dpa,relu", small(mechanism_options={"tau": 1.0}))


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--config=digits_vit", f"--workdir={tmp_path}/run", "--mechanisms=relu,dpaa"])
    assert re.fullmatch(r"error: .* Did you mean 'dpa'.*", ended.value.code)
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()


def test_a_registered_mechanism_is_compared_by_its_name(monkeypatch):
    monkeypatch.setattr("dpa_jax.activations.registry.ACTIVATIONS", dict(ACTIVATIONS))
    monkeypatch.setattr("dpa_jax.training.state.ACTIVATIONS", registry.ACTIVATIONS)
    register("cube", functools.partial(Elementwise, lambda x: x**3))
    (entry,) = parse_entries("cube", small())
    assert create_model(entry.configure(small(), 0), num_classes=4, in_channels=1).activation


def test_the_configuration_has_no_default():
    ended = subprocess.run([sys.executable, "-m", "dpa_jax.compare"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "error: --config is missing, the configuration file\n")


# ---------------- The report ----------------


def history(*top1, masked=None):
    """The records of a run with these figures after its epochs, 2.5 seconds each."""
    more = {} if masked is None else {"masked_fraction": masked}
    return [
        {"epoch": e, "step": e, "eval_top1": t, "loss_cross_entropy": 1 / e, "seconds": 2.5, **more}
        for e, t in enumerate(top1, start=1)
    ]


def test_a_row_is_of_the_last_epoch():
    row = summarize_runs("dpa", {0: history(0.99, 0.5, masked=0.2), 1: history(0.1, 0.6, masked=0.4)})
    assert (row.mechanism, row.seeds, row.best, row.seconds) == ("dpa", 2, 0.6, 5.0)
    assert row.mean == pytest.approx(0.55)
    assert row.std == pytest.approx(np.std([0.5, 0.6], ddof=1))
    assert row.masked_fraction == pytest.approx(0.3)
    assert row.cells() == ["dpa", "2", "55.00", "7.07", "60.00", "30.0", "5.0"]


def test_one_seed_has_no_deviation_and_what_masks_nothing_no_fraction():
    row = summarize_runs("relu", {3: history(0.5)})
    assert (row.std, row.masked_fraction) == (None, None)
    assert row.cells() == ["relu", "1", "50.00", NONE, "50.00", NONE, "2.5"]


def test_the_report_in_all_its_forms(tmp_path):
    histories = {"relu": {0: history(0.2, 0.5)}, "dpa": {s: history(0.3, 0.6, masked=0.1) for s in (0, 1)}}
    histories |= {f"dpa:tau={i}": {s: history(0.3, 0.5 + s / 10) for s in (0, 1)} for i in range(6)}
    write_report(tmp_path, histories, command="python -m dpa_jax.compare --seeds 2")

    table = (tmp_path / "table.md").read_text()
    assert f"| relu | 1 | 50.00 | {NONE} | 50.00 | {NONE} | 5.0 |" in table
    assert "| dpa | 2 | 60.00 | 0.00 | 60.00 | 10.0 | 5.0 |" in table
    assert "last of 2 epochs" in table and "n - 1" in table
    assert f"jax {jax.__version__}" in table and jax.devices()[0].device_kind in table
    assert table.endswith("\n    python -m dpa_jax.compare --seeds 2\n")

    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["mechanism"] for row in rows] == list(histories)
    assert rows[0]["std"] == rows[0]["masked_fraction"] == ""
    assert float(rows[2]["std"]) == pytest.approx(np.std([0.5, 0.6], ddof=1))

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["epochs"] == 2 and len(results["results"]) == 8
    assert [run["seed"] for run in results["results"][1]["runs"]] == [0, 1]
    assert results["results"][0]["runs"][0]["eval_top1"] == 0.5

    for name in ("table.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 300 and (pixels < 128).mean() > 0.001, name
        edges = [pixels[:3], pixels[-3:], pixels[:, :3].T, pixels[:, -3:].T]
        assert all((edge > 200).all() for edge in edges), f"{name} is cut off"


def test_a_configuration_needs_at_least_one_seed(tmp_path):
    with pytest.raises(ValueError, match="at least 1 seed"):
        compare(default_config(), [], 0, tmp_path)


def test_seeds_beyond_the_last_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 seeds from seed 4294967295 on go beyond the last one, 4294967295"):
        compare(small(seed=2**32 - 1), parse_entries("relu", small()), 2, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_configuration_without_its_keys_is_refused():
    with pytest.raises(ValueError, match="the key mechanism is missing"):
        parse_entries("relu", ConfigDict({}))
