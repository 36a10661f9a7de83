"""Programs that want the same folder at the same time, and what killed ones leave there."""

import json
import os
import shutil
import signal
import socket
import threading

import pytest

from tests.faults.harness import TINY, undisturbed
from tests.faults.test_endings import COMPARE, COMPARED, TRAIN

# 12 steps; checkpoints after every third.
RUN = (*TINY, "--config.checkpoint.every_steps=3")


@pytest.fixture(scope="module", name="undisturbed")
def _undisturbed(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), *RUN)


def slowly(case, *arguments, module=TRAIN, where="steps"):
    return case.start("tests.faults.programs", f"slow:{where}", module, *arguments)


@pytest.fixture
def holder(case):
    """A program that trains, slowly, in `case.workdir`."""
    program = slowly(case, f"--workdir={case.workdir}", *RUN)
    assert program.wait_for((case.workdir / "config.json").exists)
    return program


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def unharmed(case, undisturbed, program):
    case.finished(program.wait(120))
    assert (case.record(), case.states()) == undisturbed.wanted
    case.outcome = "clear error"


def test_the_second_is_refused_and_the_first_unharmed(case, undisturbed, holder):
    case.refused(case.train(*RUN), "is in use", f"process {holder.pid}", socket.gethostname(), "since")
    unharmed(case, undisturbed, holder)


def test_the_second_touches_nothing(case, undisturbed, holder):
    holder.kill(signal.SIGSTOP)
    before = contents(case.workdir)
    case.refused(case.train(*RUN), "is in use", f"process {holder.pid}")
    assert contents(case.workdir) == before
    holder.kill(signal.SIGCONT)
    unharmed(case, undisturbed, holder)


def test_the_second_has_another_configuration(case, undisturbed, holder):
    case.refused(case.train(*RUN, "--config.seed=3"), "is in use")
    unharmed(case, undisturbed, holder)


def test_the_folder_by_another_name(case, undisturbed, holder):
    (case.folder / "link").symlink_to(case.workdir)
    for name in ("run", "./run/../run", "link"):
        case.refused(case.train(*RUN, f"--workdir={name}"), "is in use", f"process {holder.pid}")
    unharmed(case, undisturbed, holder)


def test_the_default_folder(case, undisturbed):
    first = slowly(case, *RUN)
    (case.folder / "runs").mkdir(exist_ok=True)
    assert first.wait_for(lambda: list((case.folder / "runs").glob("*/config.json")))
    case.refused(case.start(TRAIN, *RUN).wait(), "is in use", "runs/digits_vit", f"process {first.pid}")
    (case.workdir,) = (case.folder / "runs").iterdir()
    unharmed(case, undisturbed, first)


def test_while_the_first_loads_its_data(case, undisturbed):
    first = slowly(case, f"--workdir={case.workdir}", *RUN, where="loading")
    first.wait_for(lambda: False, 2)
    case.refused(case.train(*RUN), "is in use", f"process {first.pid}")
    first.kill()
    case.finished(case.train(*RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_at_the_same_moment(case, undisturbed, count):
    programs = [case.start(TRAIN, f"--workdir={case.workdir}", *RUN) for _ in range(count)]
    ended = [program.wait(120) for program in programs]
    assert any(one.status == 0 for one in ended), ended
    for one in ended:  # one that came late finds a finished run
        if one.status:
            case.refused(one, "is in use")
        else:
            case.finished(one)
    assert (case.record(), case.states()) == undisturbed.wanted


def test_two_comparisons(case):
    first = slowly(case, f"--workdir={case.workdir}", *COMPARED, module=COMPARE)
    assert first.wait_for((case.workdir / "relu" / "seeds-0-1" / "checkpoints").exists)
    case.refused(case.compare(*COMPARED), "is in use", f"process {first.pid}")
    case.refused(case.train(*RUN), "is in use", f"process {first.pid}")
    case.finished(first.wait(120))
    for seed in range(2):
        assert [line["step"] for line in case.record(case.workdir / "relu" / f"seed-{seed}")] == [6, 12, 18]


@pytest.mark.parametrize("wait", [0, 1, 3])
def test_an_evaluation_may_look(case, undisturbed, holder, wait):
    assert holder.wait_for((case.workdir / "checkpoints" / "3").exists)
    holder.wait_for(lambda: False, wait)
    case.finished(case.train(*RUN, "--eval"), "top1")
    unharmed(case, undisturbed, holder)


def test_a_killed_holder_leaves_no_lock(case, undisturbed, holder):
    holder.kill()
    holder.wait()
    case.finished(case.train(*RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


def test_killed_many_times(case, undisturbed):
    for number in range(8):
        program = slowly(case, f"--workdir={case.workdir}", *RUN)
        program.wait_for((case.workdir / ".lock").exists, 20)
        program.wait_for(lambda: False, 0.1 * number)
        program.kill()
        program.wait()
    case.finished(case.train(*RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


STALE = {
    "empty": b"",
    "noise": os.urandom(50),
    "text": b"locked\n",
    "a list": b"[1, 2]",
    "nested": b"[" * 100_000,
    "process 1": json.dumps({"pid": 1, "host": socket.gethostname(), "since": "now"}).encode(),
    "this process": json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}).encode(),
    "a dead process": json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "since": "now"}).encode(),
    "another host": json.dumps({"pid": 1, "host": "elsewhere", "since": "now"}).encode(),
    "long": b"x" * 1_000_000,
}


@pytest.mark.parametrize("text", STALE.values(), ids=STALE)
def test_a_stale_lock(case, undisturbed, text):
    case.workdir.mkdir()
    (case.workdir / ".lock").write_bytes(text)
    case.finished(case.train(*RUN))
    assert (case.record(), case.states()) == undisturbed.wanted


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[" * 100_000, b'{"pid": 1}'], ids=["empty", "noise", "nested", "part"]
)
def test_a_holder_that_cannot_be_named(case, undisturbed, holder, text):
    (case.workdir / ".lock").write_bytes(text)
    case.refused(case.train(*RUN), "is in use", "another process")
    unharmed(case, undisturbed, holder)


def test_a_finished_run_leaves_no_lock(case, undisturbed):
    shutil.copytree(undisturbed.workdir, case.workdir)
    before = contents(case.workdir)
    case.finished(case.train(*RUN), "nothing left to do")
    assert contents(case.workdir) == before


def test_two_threads_of_one_program(case):
    from dpa_jax.training.loop import train
    from dpa_jax.training.run import build
    from tests.helpers import tiny_config

    run = build(tiny_config())
    inside, leave, step = threading.Event(), threading.Event(), run.step

    def slow(state, number):
        inside.set()
        assert leave.wait(60)
        return step(state, number)

    run.step = slow
    first = threading.Thread(target=train, args=(run, case.workdir, [case.workdir]))
    first.start()
    try:
        assert inside.wait(60)
        with case.raises("is in use", f"process {os.getpid()}"):
            train(build(tiny_config()), case.workdir, [case.workdir])
    finally:
        leave.set()
        first.join()
    assert [line["step"] for line in case.record()] == [6, 12]
