import json
import math
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dpa_jax.plots import plot_comparison, plot_curves
from dpa_jax.training.record import Recorder


def record(epoch, **more):
    losses = {"train_loss": 2.0 / epoch, "eval_loss": 2.2 / epoch, "train_top1": 1 - 0.5 / epoch}
    return {"epoch": epoch, "step": 10 * epoch, "lr": 1e-3, "eval_top1": 1 - 0.6 / epoch, **losses, **more}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """All TensorBoard events of a run; in a file each is [8-byte length, 4-byte CRC, event, 4-byte CRC]."""
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def run(workdir, epochs, start=0):
    recorder = Recorder(workdir, start)
    for epoch in epochs:
        recorder.write(record(epoch))
    recorder.close()
    return recorder


def test_writes_lines_and_scalars(tmp_path):
    recorder = Recorder(tmp_path / "run", 0)
    figures = {"epoch": 1, "lr": 0.1, "train_loss": 1 / 3, "loss_channel": 0.25, "eval_loss": 2.0, "seconds": 3.0}
    recorder.write({"step": np.int64(10), "eval_top1": jnp.float32(0.5), **figures})
    # each line is on the disk when write returns, not at the end
    assert lines(tmp_path / "run") == [{"step": 10, "eval_top1": 0.5, **figures}]
    assert recorder.history == lines(tmp_path / "run")
    recorder.close()
    values = {v.tag: (e.step, v.simple_value) for e in events(tmp_path / "run") for v in e.summary.value}
    # In groups: what is before the slash.
    assert values == {
        "run/epoch": (10, 1.0),
        "run/seconds": (10, 3.0),
        "train/lr": (10, np.float32(0.1)),
        "train/loss": (10, np.float32(1 / 3)),
        "train/loss_channel": (10, 0.25),
        "eval/loss": (10, 2.0),
        "eval/top1": (10, 0.5),
    }


def test_continuing_drops_what_came_after_the_checkpoint(tmp_path):
    run(tmp_path, [1, 2, 3])
    recorder = Recorder(tmp_path, 20)
    assert [r["epoch"] for r in recorder.history] == [1, 2]
    assert lines(tmp_path) == recorder.history
    recorder.write(record(3, note=7))
    recorder.close()
    assert [(r["epoch"], r.get("note")) for r in lines(tmp_path)] == [(1, None), (2, None), (3, 7)]
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [1, 21]  # TensorBoard hides the first run's events from step 21 on
    shown = [e.step for e in events(tmp_path) for v in e.summary.value if v.tag == "eval/loss"]
    assert shown == [10, 20, 30, 30]


def test_a_continued_run_has_the_same_lines_as_one_that_never_stopped(tmp_path):
    run(tmp_path / "whole", [1, 2, 3, 4])
    run(tmp_path / "killed", [1, 2, 3])
    run(tmp_path / "killed", [3, 4], start=20)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_a_line_cut_by_a_kill_is_taken_away(tmp_path, cut):
    run(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:cut])
    recorder = Recorder(tmp_path, 20)
    assert path.read_text() == first
    recorder.write(record(2))
    recorder.close()
    assert path.read_text() == first + second


def test_a_spoiled_line_in_the_middle_is_warned_of(tmp_path):
    run(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"epoch": 1', '"epoch: 1'))
    with pytest.warns(RuntimeWarning, match="line 1 is no record"):
        recorder = Recorder(tmp_path, 20)
    assert [r["epoch"] for r in recorder.history] == [2]
    recorder.close()


def test_a_whole_last_line_counts_without_its_newline(tmp_path):
    run(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [r["epoch"] for r in Recorder(tmp_path, 20).history] == [1, 2]
    assert path.read_bytes() == whole
    assert not (tmp_path / "metrics.discarded.jsonl").exists()


def test_a_record_is_never_emptied(tmp_path):
    run(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    recorder = Recorder(tmp_path, 0)  # the checkpoints are gone
    assert recorder.history == []
    assert re.fullmatch(
        r"note: 3 records after step 0, .* moved from .*/metrics\.jsonl to metrics\.discarded\.jsonl; .*", recorder.note
    )
    assert (tmp_path / "metrics.discarded.jsonl").read_bytes() == before
    run(tmp_path, [1])
    assert Recorder(tmp_path, 10).note == ""
    assert Recorder(tmp_path, 0).note.startswith("note: 1 record after")
    assert (tmp_path / "metrics.discarded.jsonl").read_bytes().startswith(before)


def test_a_whole_record_is_not_written_anew(tmp_path):
    run(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat()
    recorder = Recorder(tmp_path, 20)
    recorder.close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert recorder.note == ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"noise", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "not an object"),
        (b"{}", "its step is None"),
        (b'{"step": "10"}', "its step is '10'"),
        (b'{"step": true}', "its step is True"),
        (b'{"step": -10}', "its step is -10"),
        (b'{"step": 10.0}', "its step is 10.0"),
        (b'{"step": 10, "epoch": "1"}', "its epoch is '1'"),
        (b'{"step": 10, "lr": NaN}', "its lr is nan, no finite number"),
        (b'{"step": 10, "lr": 1e999}', "its lr is inf"),
        (b'{"step": 10, "lr": "low"}', "its lr is 'low'"),
        (b"[" * 100_000, "recursion"),
        (b'{"step": 20, "epoch": 2}', "its step 20 does not rise; the one before it is 20"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_line_that_is_no_record_is_named_and_kept_elsewhere(tmp_path, line, reason):
    run(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + line + b"\n" + third)
    with pytest.warns(RuntimeWarning) as caught:
        recorder = Recorder(tmp_path, 30)
    (warning,) = caught
    assert str(warning.message).startswith(f"{path}: line 3 is no record (") and reason in str(warning.message)
    assert [r["epoch"] for r in recorder.history] == [1, 2, 3] and recorder.note == ""
    assert path.read_bytes() == first + second + third
    assert (tmp_path / "metrics.discarded.jsonl").read_bytes() == line + b"\n"


def test_a_full_disk_is_told_of_by_the_file(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    recorder = Recorder(tmp_path, 0)
    recorder.write(record(1))
    with monkeypatch.context() as patch:
        patch.setattr(recorder._tensorboard, "flush", full)
        for epoch in range(2, 5):  # a SummaryWriter, whose thread has ended, waits for ever when its queue is full
            with pytest.raises(OSError, match=r"tensorboard could not be written: No space left on device\."):
                recorder.write(record(epoch))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left on device\."):
        recorder.write(record(5))
    recorder.close()


def test_what_is_not_finite_becomes_null(tmp_path):
    recorder = Recorder(tmp_path, 0)
    recorder.write(record(1, eval_f1=math.nan, loss_channel=np.float32("inf")))
    recorder.close()
    assert lines(tmp_path)[0]["eval_f1"] is None
    assert lines(tmp_path)[0]["loss_channel"] is None


def test_a_record_without_a_step_is_refused(tmp_path):
    recorder = Recorder(tmp_path, 0)
    with pytest.raises(ValueError, match=r"needs the step.*\['epoch'\]"):
        recorder.write({"epoch": 1})
    recorder.close()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    recorder = run(tmp_path / "run", [1])
    assert [r["epoch"] for r in recorder.history] == [1]
    assert not (tmp_path / "run").exists()


def test_pictures_have_a_panel_for_what_was_recorded(tmp_path):
    short = [{k: v for k, v in record(e).items() if k != "lr"} for e in (1, 2, 3)]
    plot_curves(short, tmp_path / "two.png")
    plot_curves([r | {"lr": 0.1, "masked_fraction": 0.01} for r in short], tmp_path / "four.png")
    two, four = (pixels(tmp_path / f"{name}.png") for name in ("two", "four"))
    height, width = two.shape
    assert width > 600 and four.shape == (2 * height, width)
    for row in np.array_split(four, 2):
        for panel in np.array_split(row, 2, axis=1):
            assert (panel < 128).any()  # something dark is drawn in each
    plot_comparison({"DPA": [short, short], "GELU": [short[:1]]}, tmp_path / "runs.png")
    assert (pixels(tmp_path / "runs.png") < 128).any()
    for nothing in (lambda path: plot_curves([], path), lambda path: plot_comparison({"DPA": [[]]}, path)):
        with pytest.raises(ValueError, match="no record with an epoch"):
            nothing(tmp_path / "none.png")
