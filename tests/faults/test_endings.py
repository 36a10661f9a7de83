"""Runs that are told to end, that nobody listens to, and whose folder is full, read-only or no folder at all."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest

from tests.faults.harness import ROOT, TINY, Ended, environment, undisturbed
from tests.helpers import told

# 18 steps; checkpoints after every second one.
RUN = (*TINY, "--config.epochs=3", "--config.checkpoint.every_steps=2")
TRAIN, COMPARE = "dpa_jax.train", "dpa_jax.compare.__main__"
COMPARED = ("--config=digits_vit", *RUN, "--mechanisms=relu", "--seeds=2")


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), *RUN)


def programs(case, what, *arguments, module=TRAIN):
    arguments = arguments or RUN
    return case.start("tests.faults.programs", what, module, f"--workdir={case.workdir}", *arguments)


def goes_on(case, undisturbed):
    """Started again, it ends as if nothing had happened."""
    case.finished(case.train(*RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


def stopped(case, ended, status, *words, lines=1):
    """It has ended with this status, and nothing but these lines tells of it."""
    case._plain(ended)
    assert ended.status == status and len(told(ended.stderr, "relu, seeds 0 to 1")) <= lines, str(ended)
    assert all(word in ended.stderr for word in words), str(ended)
    case.outcome = "graceful"


# ---------------- Signals ----------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["steps", "the beginning", "evaluation"])
def test_a_signal_saves(case, undisturbed, number, where):
    program = programs(case, f"slow:{where}")
    file = {"steps": "config.json", "the beginning": "checkpoints", "evaluation": "checkpoints/4"}[where]
    assert program.wait_for((case.workdir / file).exists)
    program.wait_for(lambda: False, 0.3)
    program.kill(number)
    stopped(case, program.wait(), 128 + number, f"{number.name}: saved step", "to continue")
    goes_on(case, undisturbed)


def test_a_second_ctrl_c_stops_at_once(case, undisturbed):
    program = programs(case, "slow:a step")
    assert program.wait_for((case.workdir / "checkpoints" / "2").exists)
    for _ in range(2):
        program.wait_for(lambda: False, 0.5)
        program.kill(signal.SIGINT)
    ended = program.wait(10)
    stopped(case, ended, 130, "Ctrl-C")
    goes_on(case, undisturbed)


def test_ctrl_c_while_the_data_is_loaded(case, undisturbed):
    program = programs(case, "slow:loading")
    program.wait_for(lambda: False, 2)
    program.kill(signal.SIGINT)
    stopped(case, program.wait(10), 130, "Ctrl-C")
    goes_on(case, undisturbed)


def test_ctrl_c_while_it_evaluates(case, undisturbed):
    shutil.copytree(undisturbed.workdir, case.workdir)
    program = programs(case, "slow:evaluation", *RUN, "--eval")
    program.wait_for(lambda: False, 2)
    program.kill(signal.SIGINT)
    stopped(case, program.wait(10), 130, "Ctrl-C")
    assert (case.record(), case.states()) == undisturbed.wanted


@pytest.mark.parametrize("seed", range(8))
def test_ctrl_c_at_any_moment(case, undisturbed, seed):
    draw = random.Random(seed)
    program = programs(case, "slow:steps" if seed % 2 else "plain")
    program.wait_for(case.workdir.exists)
    program.wait_for(lambda: False, draw.uniform(0, 3))
    program.kill(signal.SIGINT)
    ended = program.wait(20)
    stopped(case, ended, ended.status if ended.status == 0 else 130)
    goes_on(case, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_comparison(case, number):
    program = programs(case, "slow:steps", *COMPARED, module=COMPARE)
    assert program.wait_for((case.workdir / "relu" / "seeds-0-1" / "checkpoints" / "2").exists)
    program.kill(number)
    stopped(case, program.wait(), 128 + number, f"relu, seeds 0 to 1: {number.name}: saved step", "to continue")
    case.finished(case.compare(*COMPARED), "continuing after step")
    assert [line["step"] for line in case.record(case.workdir / "relu" / "seed-1")] == [6, 12, 18]


# ---------------- Streams ----------------


def shell(case, line, *arguments, module=TRAIN):
    """A command whose streams a shell has closed or led elsewhere: PROGRAM stands for it."""
    command = f"{sys.executable} -m {module.removesuffix('.__main__')} --workdir=run {' '.join(arguments)}"
    line = f"set -o pipefail; {line.replace('PROGRAM', command)}"
    env = os.environ | environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], cwd=case.folder, env=env, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr, 0)


@pytest.mark.parametrize(
    "line",
    [
        "PROGRAM 2>&-",
        "PROGRAM >&-",
        "PROGRAM <&-",
        "PROGRAM >&- 2>&- <&-",
        "PROGRAM 2>&1 | head -1",
        "PROGRAM | true",
        "PROGRAM 2> >(true)",
        "PROGRAM 2> /dev/full",
    ],
)
def test_a_stream_that_nobody_reads(case, undisturbed, line):
    case.finished(shell(case, line, *RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


@pytest.mark.parametrize("line", ["PROGRAM 2>&-", "PROGRAM >&-", "PROGRAM | true"])
def test_an_evaluation_that_nobody_reads(case, undisturbed, line):
    shutil.copytree(undisturbed.workdir, case.workdir)
    case.finished(shell(case, line, *RUN, "--eval"))


def test_standard_output_on_a_full_disk(case, undisturbed):
    case.refused(shell(case, "PROGRAM > /dev/full", *RUN), "No space left on device")
    assert (case.record(), case.states()) == undisturbed.wanted


def test_a_comparison_whose_table_nobody_reads(case):
    case.finished(shell(case, "PROGRAM >&- 2>&-", *COMPARED, module=COMPARE))
    assert "| relu |" in (case.workdir / "table.md").read_text()


# ---------------- The disk ----------------


@pytest.mark.parametrize("limit", [1500, 2500, 4000, 8000, 16000])
def test_files_may_not_grow(case, undisturbed, limit):
    ended = programs(case, f"limit:{limit}").wait()
    case.refused(ended, "could not be written", "start again")
    assert len(told(ended.stderr)) <= 1, str(ended)
    goes_on(case, undisturbed)
    case.outcome = "clear error"


@pytest.fixture
def mounted(tmp_path):
    """mounted(options) -> a folder on a file system of its own; without the right to mount there is nothing to test."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("kilobytes", [4, 12, 24, 40, 60, 80, 120, 200, 260, 320])
def test_a_full_disk(case, undisturbed, mounted, kilobytes):
    case.workdir = mounted(f"size={kilobytes}k") / "run"
    ended = case.train(*RUN)
    case.refused(ended, "No space left on device", "start again")
    assert len(told(ended.stderr)) <= 1, str(ended)
    mounted("remount,size=10m")
    goes_on(case, undisturbed)
    case.outcome = "clear error"


def test_a_read_only_disk(case, undisturbed, mounted):
    folder = mounted("size=10m")
    mounted("remount,ro")
    case.workdir = folder / "run"
    case.refused(case.train(*RUN), str(folder), "Read-only file system")
    mounted("remount,rw")
    goes_on(case, undisturbed)
    mounted("remount,ro")
    case.finished(case.train(*RUN, "--eval"), "top1")
    case.outcome = "clear error"


# ---------------- What is no folder ----------------


def put(path, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("something\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("", "checkpoints", "tensorboard") for kind in ("file", "link to nothing", "pipe")),
        *(
            (name, kind)
            for name in ("metrics.jsonl", "config.json", "curves.png")
            for kind in ("folder", "pipe", "device", "link to nothing")
        ),
    ],
)
def test_something_else_is_where_a_file_or_folder_is_to_be(case, name, kind):
    put(case.workdir / name, kind)
    ended = case.train(*RUN, timeout=30)
    case.refused(ended, str(case.workdir / name))
    assert "epoch" not in ended.stderr and os.path.lexists(case.workdir / name)


@pytest.mark.parametrize("name", ["checkpoints", ""])
def test_something_else_is_where_an_evaluation_looks(case, name):
    put(case.workdir / name, "file")
    case.refused(case.train(*RUN, "--eval"), str(case.workdir / name), "file")


@pytest.mark.parametrize("name", ["table.md", "results.json", "curves.png", "relu", "relu/seed-0/metrics.jsonl"])
def test_something_else_is_where_a_comparison_writes(case, name):
    put(case.workdir / name, "file" if name == "relu" else "folder")
    ended = case.compare(*COMPARED)
    case.refused(ended, str(case.workdir / name))
    assert "epoch" not in ended.stderr


def test_a_file_further_up(case):
    (case.folder / "up").write_text("")
    case.workdir = pathlib.Path("up") / "and" / "down"
    case.refused(case.train(*RUN), "up must be a folder and is a file")
