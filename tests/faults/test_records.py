"""Records, configurations and positions that are damaged, changed or gone, and what a run makes of them."""

import json
import shutil
import time
import warnings

import pytest

from dpa_jax.training.loop import Preempted, evaluate, train
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.run import build
from tests.faults.harness import TINY, Case, Fault
from tests.faults.test_checkpoints import built, stop_and_finish
from tests.helpers import tiny_config

RELU = ("--config.mechanism=relu", "--config.epochs=3")


def config(**changes):
    return tiny_config(mechanism="relu", epochs=3, **changes)


def figures(text):
    """Lines without the times, which no two runs have in common."""
    times = ("images_per_second", "seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in text.splitlines()]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The folder of a run that was told to stop after step 15 of 18, and the record that it would have had."""
    folder = tmp_path_factory.mktemp("half")
    stop_and_finish(folder)
    return folder / "run", figures((folder / "whole" / "metrics.jsonl").read_text())


def go_on(case, run=None):
    """Trains on in `case.workdir`: the warnings and notes that came, which begin anew."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(run or built(), case.workdir, [case.workdir])
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise Fault("traceback", repr(error)) from error
    return [str(warning.message) for warning in caught]


def anywhere(case, text):
    """A text is in some file of the folder still."""
    if not any(text in path.read_bytes() for path in case.workdir.rglob("*") if path.is_file()):
        case.lost(text[:80])


def damaged(line):
    """{what: the two lines of a record of two epochs, the first damaged}."""
    record = json.loads(line)

    def changed(**changes):
        return json.dumps(record | changes).encode()

    return {
        "cut": line[:40],
        "noise": bytes(range(1, 10)) * 7,
        "zeros": bytes(80),
        "not UTF-8": line.replace(b"epoch", b"ep\xff\xfech"),
        "UTF-16": line.decode().encode("utf-16"),
        "text": b"epoch 1: fine",
        "a list": b"[1, 2, 3]",
        "a number": b"12",
        "a string": b'"step"',
        "null": b"null",
        "an empty object": b"{}",
        "nested": b"[" * 100_000,
        "nested objects": b'{"step":' * 100_000,
        "two objects": line + line,
        "single quotes": line.replace(b'"', b"'"),
        "a comma too many": line[:-1] + b",}",
        "a quote lost": line.replace(b'"epoch"', b'"epoch', 1),
        "no step": json.dumps({k: v for k, v in record.items() if k != "step"}).encode(),
        "step a string": changed(step="6"),
        "step a bool": changed(step=True),
        "step null": changed(step=None),
        "step negative": changed(step=-6),
        "step a float": changed(step=6.0),
        "step a fraction": changed(step=6.5),
        "step a list": changed(step=[6]),
        "step an object": changed(step={"step": 6}),
        "step NaN": changed(step=float("nan")),
        "epoch a string": changed(epoch="1"),
        "epoch a list": changed(epoch=[1]),
        "NaN": changed(train_loss=float("nan")),
        "infinity": changed(train_loss=float("inf")),
        "minus infinity": changed(lr=float("-inf")),
        "1e999": line.replace(b'"lr": ', b'"lr": 1e999, "was": '),
        "a huge integer": line.replace(b'"lr": ', b'"lr": 1' + b"0" * 400 + b', "was": '),
        "more digits than Python reads": line.replace(b'"lr": ', b'"lr": 1' + b"0" * 5000 + b', "was": '),
        "loss a string": changed(train_loss="low"),
        "loss an object": changed(eval_top1={"mean": 1}),
    }


NAMES = list(damaged(b'{"epoch": 1, "step": 6, "lr": 0.1, "train_loss": 1.0, "eval_top1": 0.5}'))


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("name", NAMES)
def test_a_line_that_is_no_record(case, half, name, place):
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    path = case.workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[place] = bad = damaged(lines[place])[name]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    told = go_on(case)
    assert any(f"{path}: line {place + 1} is no record" in text for text in told), told
    assert all("\n" not in text and len(text) < 500 for text in told), told
    assert figures(path.read_text()) == [line for line in wanted if line["epoch"] != place + 1]
    anywhere(case, bad)


@pytest.mark.parametrize(
    ("order", "left", "out"),
    [
        ([0, 0, 1], [1, 2, 3], 2),
        ([1, 0], [2, 3], 2),
        ([0, 1, 0], [1, 2, 3], 3),
        ([0, 1, 1], [1, 2, 3], 3),
        ([1], [2, 3], None),
        ([0], [1, 3], None),
        ([], [3], None),
    ],
)
def test_lines_in_another_order(case, half, capsys, order, left, out):
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    path = case.workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    told = go_on(case)
    assert [any(f"line {out} is no record" in text and "rise" in text for text in told)] == [out is not None], told
    assert figures(path.read_text()) == [line for line in wanted if line["epoch"] in left]
    if lacking := [epoch for epoch in (1, 2) if epoch not in left]:
        assert f"lacks epoch {', '.join(map(str, lacking))}" in capsys.readouterr().err


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n\n", b"\r\n", b"\n   \n", b"\n{", b'\n{"epoch": 3, "st'])
def test_the_end_of_a_record(case, half, end):
    """A whole last line counts, whatever comes after it, and what a kill has cut off is no damage."""
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    path = case.workdir / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip() + end)
    assert go_on(case) == []
    assert figures(path.read_text()) == wanted


@pytest.mark.parametrize("text", [b"", b"\n\n", bytes(4096), b"noise\n", b"\xff" * 100])
def test_nothing_whole_in_a_record(case, half, text):
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    path = case.workdir / "metrics.jsonl"
    path.write_bytes(text)
    go_on(case)
    assert figures(path.read_text()) == wanted[2:]
    anywhere(case, text.strip())


def test_a_record_without_its_checkpoints_is_set_aside(case, half, capsys):
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    shutil.rmtree(case.workdir / "checkpoints")
    before = (case.workdir / "metrics.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):  # killed soon after
        patch.setattr(Preemption, "requested", lambda self, step: step == 1)
        train(built(), case.workdir, [case.workdir])
    anywhere(case, before)
    assert "2 records after step 0" in capsys.readouterr().err
    go_on(case)
    anywhere(case, before)
    assert figures((case.workdir / "metrics.jsonl").read_text()) == wanted


def test_a_finished_record_without_its_checkpoints(case, half, tmp_path):
    case.finished(case.train(*TINY, *RELU))
    before = (case.workdir / "metrics.jsonl").read_bytes()
    shutil.rmtree(case.workdir / "checkpoints")
    case.finished(case.train(*TINY, *RELU), "3 records after step 0", "metrics.discarded.jsonl")
    anywhere(case, before)
    assert len(case.record()) == 3


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [None, "checkpoint.keep=1", "log_every_seconds=1", "checkpoint.every_steps=5"])
def test_a_run_with_nothing_left_to_do_writes_nothing(case, change):
    case.finished(case.train(*TINY, *RELU))
    before = contents(case.workdir)
    time.sleep(0.02)
    more = [f"--config.{change}"] if change else []
    case.finished(case.train(*TINY, *RELU, *more), "nothing left to do")
    assert contents(case.workdir) == before


# ---------------- config.json and position.json ----------------

DAMAGED = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "zeros": lambda text: bytes(len(text)),
    "not UTF-8": lambda text: text.replace(b"e", b"\xff"),
    "a list": lambda text: b"[1]",
    "an empty object": lambda text: b"{}",
    "null": lambda text: b"null",
    "nested": lambda text: b"[" * 100_000,
    "nested objects": lambda text: b'{"a":' * 900 + b"1" + b"}" * 900,
    "grown": lambda text: text + b"}",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("file", ["config.json", "position.json"])
def test_a_damaged_file_beside_the_record(case, half, capsys, file, name):
    folder, wanted = half
    shutil.copytree(folder, case.workdir)
    path = case.workdir / file
    path.write_bytes(bad := DAMAGED[name](path.read_bytes()))
    go_on(case)
    err = capsys.readouterr().err
    assert f"note: {path} is damaged" in err and "whether the configuration has changed is not known" in err
    assert figures((case.workdir / "metrics.jsonl").read_text()) == wanted
    assert json.loads(path.read_text()) == json.loads((folder / file).read_text())
    anywhere(case, bad)


@pytest.mark.parametrize("gone", [None, "config.json", "position.json"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 16}, "batch_size was 8 and is 16 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"data__train_examples": 56}, "training examples was 48 and is 56 now"),
        ({"data__imbalance": 2.0}, "training examples was 48 and is"),
    ],
)
def test_another_position_in_the_data(case, half, changes, words, gone):
    folder, _ = half
    shutil.copytree(folder, case.workdir)
    if gone:
        (case.workdir / gone).unlink()
    allowed = ",".join(changes).replace("__", ".")
    other = build(config(allow_change=allowed, **changes))
    if gone == "position.json" and "training examples" in words:  # as the folders of older runs: it isn't known
        go_on(case, other)
        return
    before = contents(case.workdir)
    with case.raises(words):
        go_on(case, other)
    assert contents(case.workdir) == before
    assert evaluate(other.config, case.workdir)  # what it has learned can still be looked at


def test_a_changed_configuration_is_refused_as_ever(case, half):
    folder, _ = half
    shutil.copytree(folder, case.workdir)
    with case.raises("optimizer.learning_rate was 0.01 and is 0.5 now"):
        go_on(case, build(config(optimizer__learning_rate=0.5)))


# ---------------- A comparison ----------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    case = Case(tmp_path_factory.mktemp("compared"))
    case.finished(case.compare(*COMPARED))
    return case


COMPARED = (*TINY, "--mechanisms=relu", "--seeds=2")


@pytest.mark.parametrize("name", ["cut", "NaN", "a list", "step a string", "epoch a string", "loss an object"])
def test_a_comparison_whose_last_record_is_damaged(case, compared, name):
    """No row is made of what is left."""
    shutil.copytree(compared.workdir, case.workdir)
    path = case.workdir / "relu" / "seed-1" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = bad = damaged(lines[1])[name]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    table = (case.workdir / "table.md").read_text()
    case.refused(case.compare(*COMPARED), str(path), "lacks")
    assert (case.workdir / "table.md").read_text() == table
    anywhere(case, bad)


@pytest.mark.parametrize("key", ["eval_top1", "seconds", "epoch"])
def test_a_comparison_whose_records_lack_a_figure(case, compared, key):
    shutil.copytree(compared.workdir, case.workdir)
    path = case.workdir / "relu" / "seed-0" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    del records[-1][key]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    case.refused(case.compare(*COMPARED), str(path), "lacks")


@pytest.mark.parametrize("name", ["seeds-a-b", "seeds-0", "seeds-0-1-2", "seeds-\u0660-\u0661", "seeds-0-1.bak"])
def test_a_comparison_with_other_folders_in_it(case, compared, name):
    shutil.copytree(compared.workdir, case.workdir)
    (case.workdir / "relu" / name).mkdir()
    case.finished(case.compare(*COMPARED))


@pytest.mark.parametrize("name", ["cut", "empty", "a list", "nested"])
def test_a_comparison_with_a_damaged_configuration(case, compared, name):
    shutil.copytree(compared.workdir, case.workdir)
    path = case.workdir / "relu" / "seed-1" / "config.json"
    path.write_bytes(DAMAGED[name](path.read_bytes()))
    case.finished(case.compare(*COMPARED), f"{path} is damaged")
