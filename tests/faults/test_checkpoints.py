"""Checkpoints that are damaged in every file, renamed, or something else, for a run that goes on and for `--eval`."""

import functools
import hashlib
import json
import os
import shutil
import warnings

import jax
import pytest

from dpa_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from dpa_jax.training.loop import Preempted, evaluate, train
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.run import build
from tests.faults.harness import TINY, Case, Fault
from tests.helpers import tiny_config

FILES = 26  # in most checkpoints of this run at most: how the arrays are shared among files is not always the same


@functools.cache
def config():
    return tiny_config(mechanism="relu", epochs=3)


@functools.cache
def built():
    return build(config())


def stop_and_finish(folder):
    """A run that is told to stop after step 15 of 18, in ``run``, and a copy that is finished, in ``whole``."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Preemption, "requested", lambda self, step: step == 15)
        train(built(), folder / "run", [folder / "run"])
    shutil.copytree(folder / "run", folder / "whole")
    train(built(), folder / "whole", [folder / "whole"])


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Of a run with checkpoints after steps 6, 12 and 15 of 18: its folder, and what it would have ended with."""
    folder = tmp_path_factory.mktemp("half")
    stop_and_finish(folder)
    return folder / "run", left(folder / "whole"), evaluate(config(), folder / "run")


def left(workdir):
    """The record without its times, and the arrays of the last checkpoint."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_second"], line["seconds"]
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        _, state = checkpoints.restore(built().abstract_state, 18)
    return lines, [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(state))]


def told(act):
    """The warnings that came of an act, and what it returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = act()
        except (ValueError, OSError, DamagedCheckpointError):
            raise
        except Exception as error:
            raise Fault("traceback", repr(error)) from error
    return [str(warning.message) for warning in caught], result


def go_on(case):
    return told(lambda: train(built(), case.workdir, [case.workdir]))[0]


def look(case):
    return told(lambda: evaluate(config(), case.workdir))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(texts, *words):
    assert len(texts) == 1 and "\n" not in texts[0] and all(word in texts[0] for word in words), texts


def replace(path, data):
    path.unlink()
    path.write_bytes(data)


def turned(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :] if data else b"x"


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: replace(path, path.read_bytes()[:-1] or b"x"),
    "flipped": lambda path: replace(path, turned(path.read_bytes())),
    "grown": lambda path: replace(path, path.read_bytes() + b"x"),
    "replaced": lambda path: (path.unlink(), path.mkdir()),
}
HARMLESS = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # Orbax's own notes: times and class names


def file_of(checkpoint, number):
    found = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(found) > 15
    # Of more files an even choice.
    return found[number * len(found) // FILES if len(found) > FILES else number % len(found)]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("number", range(FILES))
def test_a_file_of_the_newest_checkpoint(case, half, number, how):
    folder, wanted, _ = half
    shutil.copytree(folder, case.workdir)
    path = file_of(case.workdir / "checkpoints" / "15", number)
    DAMAGE[how](path)
    texts = go_on(case)
    if path.relative_to(case.workdir / "checkpoints" / "15").as_posix() not in HARMLESS:
        one_line(texts, f"checkpoint {case.workdir}/checkpoints/15 is damaged", "moved to damaged-15")
    assert left(case.workdir) == wanted


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("number", range(0, FILES, 3))
@pytest.mark.parametrize("step", [12, 15])  # the best and the newest
def test_a_file_of_a_checkpoint_that_is_evaluated(case, half, number, how, step):
    folder, _, figures = half
    shutil.copytree(folder, case.workdir)
    path = file_of(case.workdir / "checkpoints" / str(step), number)
    DAMAGE[how](path)
    before = contents(case.workdir)
    texts, found = look(case)
    assert contents(case.workdir) == before
    if path.relative_to(case.workdir / "checkpoints" / str(step)).as_posix() in HARMLESS:
        assert (texts, found) == ([], figures)
    else:
        one_line(texts, f"checkpoint {case.workdir}/checkpoints/{step} is damaged", "left where it is")
        assert step not in found
        assert all(found[one] == figures[one] for one in figures if one != step)


def digest_with(change):
    def damage(checkpoint):
        path = checkpoint / "digest.json"
        path.write_bytes(change(json.loads(path.read_bytes())))

    return damage


def pairs(change):
    return digest_with(lambda digest: json.dumps({name: change(*pair) for name, pair in digest.items()}).encode())


def of_another_step(checkpoint):
    """Its state is that of step 12; every file is as its digest says."""
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("12"), checkpoint)


def with_a_digest(checkpoint, name, data):
    (checkpoint / name).write_bytes(data)
    digest = json.loads((checkpoint / "digest.json").read_text())
    digest[name] = [len(data), hashlib.sha256(data).hexdigest()]
    (checkpoint / "digest.json").write_text(json.dumps(digest))


WHOLE = {
    "digest {}": digest_with(lambda digest: b"{}"),
    "digest []": digest_with(lambda digest: b"[]"),
    "digest null": digest_with(lambda digest: b"null"),
    "digest a number": digest_with(lambda digest: b"1"),
    "digest a string": digest_with(lambda digest: b'"digest"'),
    "digest true": digest_with(lambda digest: b"true"),
    "digest nested": digest_with(lambda digest: b"[" * 200_000),
    "digest nested objects": digest_with(lambda digest: b'{"a":' * 200_000),
    "digest not UTF-8": digest_with(lambda digest: b"\xff\xfe{}"),
    "digest lacks a file": digest_with(lambda digest: json.dumps(dict(list(digest.items())[1:])).encode()),
    "digest lacks all but one": digest_with(lambda digest: json.dumps(dict(list(digest.items())[:1])).encode()),
    "digest lacks the arrays": digest_with(
        lambda digest: json.dumps({k: v for k, v in digest.items() if "state" not in k}).encode()
    ),
    "digest names a file outside": digest_with(
        lambda digest: json.dumps(digest | {"../12/metrics/metrics": digest["metrics/metrics"]}).encode()
    ),
    "digest names a file far outside": digest_with(
        lambda digest: json.dumps(digest | {"../../../../../../etc/passwd": [1, "0"]}).encode()
    ),
    "digest names an absolute file": digest_with(
        lambda digest: json.dumps(digest | {"/etc/passwd": [1, "0"]}).encode()
    ),
    "digest names a folder": digest_with(lambda digest: json.dumps(digest | {"state": [1, "0"]}).encode()),
    "digest names nothing": digest_with(lambda digest: json.dumps(digest | {"": [1, "0"]}).encode()),
    "digest names a NUL": digest_with(lambda digest: json.dumps(digest | {"a\0b": [1, "0"]}).encode()),
    "digest with a list too short": pairs(lambda size, sha: [size]),
    "digest with a list too long": pairs(lambda size, sha: [size, sha, 1]),
    "digest with numbers": pairs(lambda size, sha: size),
    "digest with strings": pairs(lambda size, sha: "ab"),
    "digest with nulls": pairs(lambda size, sha: [None, None]),
    "digest with infinity": pairs(lambda size, sha: [float("inf"), sha]),
    "digest of other sizes": pairs(lambda size, sha: [size + 1, sha]),
    "digest of other contents": pairs(lambda size, sha: [size, sha[::-1]]),
    "state of another step": of_another_step,
    "nothing in it": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
    "a file": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.write_text("15")),
    "a link": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.symlink_to("12")),
    "a link to nothing": lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.symlink_to("nothing")),
    "a pipe": lambda checkpoint: (shutil.rmtree(checkpoint), os.mkfifo(checkpoint)),
    "a file too many": lambda checkpoint: (checkpoint / "state" / "more").write_text(""),
    "no list of arrays, as its digest says": lambda checkpoint: with_a_digest(checkpoint, "state/_METADATA", b"{}"),
    "noise for arrays, as its digest says": lambda checkpoint: with_a_digest(
        checkpoint, "state/manifest.ocdbt", b"noise"
    ),
}


@pytest.mark.parametrize("damage", WHOLE.values(), ids=WHOLE)
def test_a_checkpoint_that_is_none(case, half, damage):
    folder, wanted, _ = half
    shutil.copytree(folder, case.workdir)
    damage(case.workdir / "checkpoints" / "15")
    one_line(go_on(case), f"checkpoint {case.workdir}/checkpoints/15 is damaged", "moved to damaged-15")
    assert left(case.workdir) == wanted


@pytest.mark.parametrize("damage", WHOLE.values(), ids=WHOLE)
def test_a_checkpoint_that_is_none_is_not_evaluated(case, half, damage):
    folder, _, figures = half
    shutil.copytree(folder, case.workdir)
    damage(case.workdir / "checkpoints" / "15")
    before = contents(case.workdir)
    texts, found = look(case)
    one_line(texts, f"checkpoint {case.workdir}/checkpoints/15 is damaged", "left where it is")
    assert contents(case.workdir) == before
    assert found and 15 not in found and all(found[step] == figures[step] for step in found if step in figures)


NAMES = ("030", "0015", "\u0663\u0660", "\u00b3", "\u0967\u096b", "\uff11\uff16", "00", "step_30", "\u2460")


@pytest.mark.parametrize("kind", ["a copy", "an empty folder", "a file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_step_has(case, half, name, kind):
    folder, wanted, figures = half
    shutil.copytree(folder, case.workdir)
    checkpoints = case.workdir / "checkpoints"
    if kind == "a copy":
        shutil.copytree(checkpoints / "15", checkpoints / name)
    elif kind == "a file":
        (checkpoints / name).write_text("")
    else:
        (checkpoints / name).mkdir()
    texts, found = look(case)
    one_line(texts, f"checkpoint {checkpoints}/{name} is damaged", "left where it is")
    assert found == figures
    one_line(go_on(case), f"checkpoint {checkpoints}/{name} is damaged", f"moved to damaged-{name}")
    assert left(case.workdir) == wanted


@pytest.mark.parametrize("name", ["3.orbax-checkpoint-tmp", "16.orbax-checkpoint-tmp", "notes", "damaged-15", "1e1"])
def test_something_else_among_the_checkpoints(case, half, name):
    folder, wanted, figures = half
    shutil.copytree(folder, case.workdir)
    (case.workdir / "checkpoints" / name).mkdir()
    assert look(case) == ([], figures)
    assert go_on(case) == []
    assert left(case.workdir) == wanted


@pytest.mark.parametrize("steps", [(15,), (12, 15), (6, 15)])
def test_several_damaged_ones(case, half, steps):
    folder, wanted, _ = half
    shutil.copytree(folder, case.workdir)
    for step in steps:
        (case.workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt").write_bytes(b"")
    texts = go_on(case)
    # One that is older than the newest whole one is not looked into.
    assert [text.split(" is damaged")[0][-2:] for text in texts] == [f"{s}" for s in reversed(steps) if s > 6]
    assert left(case.workdir) == wanted


def test_all_of_them_damaged(case, half):
    folder, _, _ = half
    shutil.copytree(folder, case.workdir)
    for path in (case.workdir / "checkpoints").iterdir():
        (path / "digest.json").write_text("{}")
    record = (case.workdir / "metrics.jsonl").read_bytes()
    with case.raises("no readable checkpoint", "remove these folders", kinds=DamagedCheckpointError):
        look(case)
    for _ in range(2):
        with case.raises("no readable checkpoint", "remove these folders", kinds=DamagedCheckpointError):
            go_on(case)
    assert (case.workdir / "metrics.jsonl").read_bytes() == record


# ---------------- The command line ----------------

RUN = (*TINY, "--config.mechanism=relu")
SOME = ("digest {}", "digest nested", "state of another step", "digest names a file outside", "a file", "a link")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A case that has trained; checkpoints after steps 6 and 12."""
    case = Case(tmp_path_factory.mktemp("trained"))
    case.finished(case.train(*RUN))
    return case


def at_12(damage, checkpoints):
    """The damage was written for 12 and 15: here they are 6 and 12."""
    (checkpoints / "12").rename(checkpoints / "15")
    (checkpoints / "6").rename(checkpoints / "12")
    damage(checkpoints / "15")
    (checkpoints / "12").rename(checkpoints / "6")
    (checkpoints / "15").rename(checkpoints / "12")


@pytest.mark.parametrize("name", [name for name in SOME if name != "a link"])
def test_the_command_line(case, trained, name):
    shutil.copytree(trained.workdir, case.workdir)
    at_12(WHOLE[name], case.workdir / "checkpoints")
    ended = case.train(*RUN, "--eval")
    case.finished(ended, "checkpoints/12 is damaged", "left where it is")
    assert ended.stdout.split()[:2] == ["step", "6"] and len(ended.stderr.splitlines()) == 1, str(ended)
    case.finished(case.train(*RUN), "checkpoints/12 is damaged", "moved to damaged-12", "continuing after step 6")
    assert (case.record(), case.states()) == (trained.record(), trained.states())


@pytest.mark.parametrize("name", ["digest {}", "state of another step", "a file"])
def test_a_comparison(case, name):
    arguments = (*TINY, "--mechanisms=relu", "--seeds=2")
    case.finished(case.compare(*arguments))
    wanted = [case.record(case.workdir / "relu" / f"seed-{seed}") for seed in range(2)]
    at_12(WHOLE[name], case.workdir / "relu" / "seeds-0-1" / "checkpoints")
    for seed in range(2):  # as a kill before the last line leaves it
        path = case.workdir / "relu" / f"seed-{seed}" / "metrics.jsonl"
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    case.finished(case.compare(*arguments), "checkpoints/12 is damaged", "continuing after step 6 of 12")
    assert [case.record(case.workdir / "relu" / f"seed-{seed}") for seed in range(2)] == wanted


def test_a_state_saved_under_another_number(case, half):
    """By the library itself, so that nothing but the step in the state tells."""
    folder, wanted, _ = half
    shutil.copytree(folder, case.workdir)
    with Checkpoints(case.workdir / "checkpoints", keep=9) as checkpoints:
        _, state = checkpoints.restore(built().abstract_state, 12)
        checkpoints.save(17, jax.tree.map(lambda leaf: leaf, state))
    one_line(go_on(case), "checkpoints/17 is damaged", "step 12", "moved to damaged-17")
    assert left(case.workdir) == wanted
