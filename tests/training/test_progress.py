import io
import itertools

import pytest

from dpa_jax.training import progress
from dpa_jax.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Ten seconds pass from one look at the clock to the next."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))


def epoch(stream, **options):
    shown = Progress(5, 64, stream=stream, **options)
    shown.begin(2, 100, 110)
    return shown


def test_plain_lines_come_at_most_each_so_many_seconds_and_at_the_end(clock):
    stream = io.StringIO()
    shown = epoch(stream, every=45)
    for step in range(101, 111):
        shown.update(step, {"loss": 1.25, "top1": 0.5, "lr": 0.1})
    shown.close()
    figures = "loss 1.2500, top-1 50.00%, 6 images/s"
    assert stream.getvalue().splitlines() == [
        "compiling the training step",
        "epoch 2/5, step 101/110: loss 1.2500, top-1 50.00%, compiled in 00:10",
        f"epoch 2/5, step 106/110: {figures}, 00:40 left",
        f"epoch 2/5, step 110/110: {figures}",
    ]


def test_images_per_second_and_time_left_after_a_resume_count_from_the_resume(clock):
    stream = io.StringIO()
    shown = Progress(1, 100, every=5, stream=stream)
    shown.begin(1, 92, 110)
    shown.update(96, {})
    shown.update(100, {})
    shown.close()
    assert stream.getvalue().splitlines()[-1] == "epoch 1/1, step 100/110: 40 images/s, 00:25 left"


@pytest.mark.parametrize("terminal", [False, True])
def test_it_says_that_it_compiles_until_the_first_step_is_done_and_no_time_left_before(clock, terminal, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    stream = Terminal() if terminal else io.StringIO()
    shown = epoch(stream, every=0)
    assert "compiling the training step" in stream.getvalue()
    for step, words in ((101, ["compiled in 00:10"]), (102, ["6 images/s", "01:20 left"]), (103, ["01:10 left"])):
        stream.truncate(stream.seek(0))
        shown.update(step, {})
        if terminal:
            shown._bar.refresh()
        assert all(word in stream.getvalue() for word in words), stream.getvalue()
        assert "compiling" not in stream.getvalue() and ("left" in stream.getvalue()) == (step > 101)
    # The later epochs wait for no compiler.
    stream.truncate(stream.seek(0))
    shown.close()
    shown.begin(3, 110, 120)
    shown.update(111, {})
    assert "compil" not in stream.getvalue()
    shown.close()


def test_images_per_second_leave_the_compiler_out(monkeypatch):
    ticks = iter([0.0, 30.0, 32.0, 34.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    shown = epoch(io.StringIO(), every=100)
    for step in (101, 102, 103):
        shown.update(step, {})
    assert shown.images_per_second == 32.0


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # of whatever runs the tests
    stream = Terminal()
    shown = epoch(stream)
    shown.update(104, {})
    shown.update(105, {"loss": 0.5, "top1": 0.875})
    shown.write("checkpoint saved")  # and the bar is drawn anew below it
    shown.close()
    text = stream.getvalue()
    assert "epoch 2/5" in text
    assert "checkpoint saved\n" in text
    assert "loss 0.5000, top-1 87.50%" in text
    assert "images/s" in text
    assert "left" in text
    assert "5/10" in text
    assert text.count("\n") == 1  # the bar itself takes no lines


def test_lines_can_be_written_without_a_terminal():
    stream = io.StringIO()
    shown = Progress(5, 64, stream=stream)
    shown.write("checkpoint saved")
    shown.close()
    assert stream.getvalue() == "checkpoint saved\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_processes_stay_silent(stream, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    shown = epoch(stream, every=0)
    shown.update(110, {"loss": 1.0})
    shown.write("checkpoint saved")
    shown.close()
    assert stream.getvalue() == ""


def test_without_standard_error_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(progress.sys, "stderr", None)  # as Python has it where the stream is closed
    shown = epoch(None, every=0)
    shown.update(110, {"loss": 1.0})
    shown.write("checkpoint saved")
    shown.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pipe_that_nobody_reads_silences_the_rest(terminal):
    class Broken(Terminal):
        def isatty(self):
            return terminal

        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    shown = epoch(Terminal(), every=0)
    shown._stream = Broken()
    for step in (105, 110):
        shown.update(step, {"loss": 1.0})
        shown.write("checkpoint saved")
    shown.close()
