"""Campaigns: cut off as often as may be they end with the same bits, and their bundle is small, whole and told of."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dpa_jax.campaign import bundle, continue_campaign, plan, read_plan, report, run
from dpa_jax.campaign.__main__ import find_campaign, main
from dpa_jax.compare import run as compare_run
from dpa_jax.training.loop import NonFiniteError

pytestmark = pytest.mark.usefixtures("compile_quickly")
NONE = "\N{EN DASH}"
TIMES = ("images_per_second", "seconds")

# 1,437 digits in batches of 240: 6 steps an epoch.
DIGITS = """
title = "Digits"

[tables.small]
title = "Digits, a small ViT"
config = "digits_vit"
papers = { relu = 90.0, dpa = 91.5 }

[tables.small.set]
epochs = 2
batch_size = 240
"schedule.warmup_epochs" = 0
"model_options.embed_dim" = 8
"model_options.depth" = 1
"model_options.patch_size" = 4
"model_options.num_heads" = 1

[[runs]]
table = "small"
mechanisms = ["relu"]
seeds = 1

[[runs]]
table = "small"
mechanisms = ["dpa", "relu"]
seeds = 2
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "digits.toml"
    path.write_text(DIGITS)
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """What a process would build and compile anew is kept for all calls of this module."""
    kept, inner = {}, compare_run.build

    def build(config):
        key = json.dumps(config.to_dict(), default=str)
        return kept.setdefault(key, None) or kept.update({key: inner(config, jax.devices()[:1])}) or kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_run, "build", build)
        yield


def records(folder, workdir):
    """{run: its records without the times} in a bundle."""
    workdir.mkdir()
    bundle.read(folder, workdir)
    found = {}
    for path in sorted(workdir.glob("*/*/seed-*/metrics.jsonl")):
        lines = map(json.loads, path.read_text().splitlines())
        found[path.parent.relative_to(workdir).as_posix()] = [
            {name: value for name, value in line.items() if name not in TIMES} for line in lines
        ]
    return found


def ticking():
    """A clock that is a second later each time it is looked at: once after every step."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


# ---------------- Cut off, and gone on with ----------------


def test_cut_off_a_dozen_times_it_ends_with_the_same_bits(digits, tmp_path):
    whole, cut, calls = tmp_path / "whole", tmp_path / "cut", 0
    assert continue_campaign(read_plan(digits), whole, minutes=1e6, clock=ticking())
    done = False
    while not done:
        done, calls = continue_campaign(read_plan(digits), cut, minutes=11 / 60, clock=ticking()), calls + 1
        assert calls < 40
        files = list(cut.iterdir())
        assert len(files) <= bundle.FILES and max(path.stat().st_size for path in files) <= bundle.FILE_BYTES
    assert calls > 12
    wanted = records(whole, tmp_path / "a")
    assert sorted(wanted) == ["small/dpa/seed-0", "small/dpa/seed-1", "small/relu/seed-0", "small/relu/seed-1"]
    assert all([line["epoch"] for line in lines] == [1, 2] for lines in wanted.values())
    assert records(cut, tmp_path / "b") == wanted
    index = json.loads((cut / bundle.INDEX).read_text())
    assert index["unfinished"] == [] and len(index["calls"]) == calls
    (row, other) = index["results"]["small"]
    assert (row["mechanism"], row["seeds"], row["paper"], other["paper_margin"]) == ("relu", [0, 1], 90.0, 1.5)
    top1 = [100 * wanted[f"small/relu/seed-{seed}"][-1]["eval_top1"] for seed in (0, 1)]
    assert row["mean"] == pytest.approx(np.mean(top1)) and row["std"] == pytest.approx(np.std(top1, ddof=1))
    # Nothing left: the same table again, and nothing trained.
    assert continue_campaign(read_plan(digits), cut, minutes=1, clock=ticking())
    assert records(cut, tmp_path / "c") == wanted


def test_the_bundle_is_of_this_configuration(digits, tmp_path):
    plan_, folder = read_plan(digits), tmp_path / "bundle"
    assert not continue_campaign(plan_, folder, minutes=11 / 60, clock=ticking())
    with pytest.raises(ValueError, match=r"seed-0 was trained with .*: label_smoothing was 0\.0 and is 0\.1 now"):
        continue_campaign(read_plan(digits, ["--config.label_smoothing=0.1"]), folder, 1, clock=ticking())


def test_a_run_that_diverges_is_left_out_and_told_of(digits, tmp_path, monkeypatch, capsys):
    def diverge(group, name, seeds, folder, until):
        raise NonFiniteError("loss is nan at step 3.")

    monkeypatch.setattr(run, "train_group", diverge)
    assert continue_campaign(read_plan(digits), tmp_path, minutes=1e6, clock=ticking())
    assert "loss is nan at step 3. It is left out from now on." in capsys.readouterr().err
    assert "Failed: small: dpa, seed 1: loss is nan" in (tmp_path / "table.md").read_text()


def test_a_table_without_its_data_waits(digits, tmp_path, monkeypatch, capsys):
    def miss(group, name, seeds, folder, until):
        raise FileNotFoundError("no CIFAR-10 here")

    monkeypatch.setattr(run, "train_group", miss)
    assert not continue_campaign(read_plan(digits), tmp_path, minutes=1e6, clock=ticking())
    assert "note: small: dpa waits: no CIFAR-10 here" in capsys.readouterr().err


def test_minutes_that_are_too_few_are_told_of(digits, tmp_path, capsys):
    assert not continue_campaign(read_plan(digits), tmp_path, minutes=1 / 60, clock=ticking())
    assert "nothing was trained: the minutes are too few" in capsys.readouterr().err


# ---------------- When to stop, and how many at a time ----------------


def test_what_would_not_be_done_in_time_is_not_begun():
    times = iter([0.0, 5.0, 6.0, 7.0, 10.0, 11.0, 12.5])
    pace = run._Pace(lambda: next(times), end=13.0)
    assert not pace(False, False) and pace.begin == 5.0  # compiled
    assert not pace(False, False)  # a step takes 1 second
    assert not pace(True, False)  # at 7; an evaluation is not known, and takes no longer than compiling did
    assert not pace(False, False)  # at 10: with the evaluation it took 3
    assert pace(False, True)  # at 11: the evaluation after the next step would end at 14


@pytest.mark.parametrize(
    ("speeds", "most", "members"),
    [({1: 10, 2: 19, 4: 30, 8: 31}, 8, 4), ({1: 10, 2: 10.5}, 5, 1), ({1: 10, 2: 20, 3: 29}, 3, 3), ({}, 1, 1)],
)
def test_as_many_members_as_make_it_faster(speeds, most, members):
    assert run.members_that_pay(speeds.__getitem__, most) == members


# ---------------- The bundle ----------------


def test_packed_arrays_come_back_bit_by_bit():
    random = np.random.default_rng(0)
    special = np.array([np.nan, -0.0, np.inf, 1e-45, -1.0], np.float32)
    arrays = {
        ("params", "kernel"): random.normal(0, 0.02, (64, 33)).astype(np.float32),
        ("special",): special,
        ("step",): np.array(7, np.int32),
        ("key",): random.integers(0, 2**32, 2, np.uint32),
        ("half",): np.asarray(jnp.asarray(special, jnp.bfloat16)),
        ("flags",): np.array([[True, False]]),
        ("nothing",): np.zeros((0, 3), np.float32),
        ("double",): random.normal(size=3),
    }
    back = bundle.unpack(bundle.pack(arrays))
    assert back.keys() == arrays.keys()
    for path, array in arrays.items():
        assert (back[path].dtype, back[path].shape) == (array.dtype, array.shape), path
        assert back[path].tobytes() == array.tobytes(), path


def test_weights_and_moments_are_packed_as_small_as_is_counted_on():
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.02, 2**18).astype(np.float32)
    arrays = {("params",): weights, ("mu",): weights**3, ("nu",): weights**2 * np.float32(1e-3)}
    assert len(bundle.pack(arrays)) < bundle.PACKED * sum(array.nbytes for array in arrays.values())


def folder_of_records(workdir, text):
    (workdir / "t" / "e" / "seed-0").mkdir(parents=True, exist_ok=True)
    (workdir / "t" / "e" / "seed-0" / "metrics.jsonl").write_text(text)
    return workdir


def test_a_kill_at_any_moment_leaves_the_bundle_of_before(tmp_path, monkeypatch):
    workdir, folder = tmp_path / "work", tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr(bundle, "FILE_BYTES", 12_000)  # two pieces
    big = {"t/e/seeds-0-0/checkpoint-3": bundle.pack({("step",): np.full(2500, 3, np.int32)}) + bytes(20_000)}
    bundle.write(folder, folder_of_records(workdir, "old\n"), big, {"a": 1})
    before, inner = sorted(path.name for path in folder.iterdir()), bundle.replace_file
    assert len(before) > 2
    for moment in range(len(before)):
        written = itertools.count()

        def kill(path, content, written=written, moment=moment):
            if next(written) == moment:
                raise KeyboardInterrupt
            inner(path, content)

        monkeypatch.setattr(bundle, "replace_file", kill)
        with pytest.raises(KeyboardInterrupt):
            bundle.write(folder, folder_of_records(workdir, "new\n"), big, {"a": 2})
        (tmp_path / f"read{moment}").mkdir()
        index, packed = bundle.read(folder, tmp_path / f"read{moment}")
        assert index == {"a": 1} and packed == big
        assert (tmp_path / f"read{moment}" / "t/e/seed-0/metrics.jsonl").read_text() == "old\n"
    monkeypatch.setattr(bundle, "replace_file", inner)
    bundle.write(folder, workdir, {}, {"a": 3})
    assert len(list(folder.iterdir())) == 2  # what the kills left is gone


def test_a_checkpoint_without_room_is_left_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "ARCHIVE_BYTES", 100_000)
    small, big = bytes(1000), bytes(200_000)
    left = bundle.write(tmp_path, folder_of_records(tmp_path / "work", "x\n"), {"big": big, "small": small}, {})
    assert left == ["big"]


def test_a_damaged_bundle_is_refused(tmp_path):
    bundle.write(tmp_path, folder_of_records(tmp_path / "work", "x\n"), {}, {})
    (piece,) = tmp_path.glob("campaign-*")
    piece.write_bytes(piece.read_bytes()[:-1])
    (tmp_path / "again").mkdir()
    with pytest.raises(bundle.DamagedBundleError, match=rf"{piece.name} has other contents .*copy it there again"):
        bundle.read(tmp_path, tmp_path / "again")


# ---------------- The tables ----------------


def history(top1):
    return [{"epoch": 2, "step": 12, "eval_top1": top1, "seconds": 1.0}]


def test_the_table_is_of_finished_runs_beside_the_papers(digits, tmp_path):
    histories = {"small": {"relu": {0: history(0.8), 1: history(0.9)}, "dpa": {0: history(0.875)}}}
    call = {"device": "1 x H200", "versions": {"jax": "0.11.2"}}
    index = {"calls": [call, call], "unfinished": ["small: dpa, seed 1"]}
    report.write_tables(tmp_path, read_plan(digits), histories, index)
    text = (tmp_path / "table.md").read_text()
    assert f"| relu | 2 | 85.00 | 7.07 | {NONE} | 90.0 | {NONE} |" in text
    assert f"| dpa | 1 | 87.50 | {NONE} | +2.50 | 91.5 | +1.5 |" in text
    assert "Open: 1 runs, the first of them small: dpa, seed 1." in text
    assert "Trained on 1 x H200, jax 0.11.2." in text
    with Image.open(tmp_path / "table.png") as image:
        assert (np.asarray(image.convert("L")) < 128).mean() > 0.001


# ---------------- The file ----------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Digits"', "title = 3", r"the file: title must be of type str; got 3"),
        ("seeds = 2", "seed = 2", r"\[\[runs\]\] 2: there is no key 'seed'\. Did you mean 'seeds'\?"),
        ("seeds = 2", "seeds = 0", r"\[\[runs\]\] 2: seeds must be in \[1, 1000\]; got 0"),
        ("seeds = 2", "", r"\[\[runs\]\] 2: the key seeds is missing"),
        ('["dpa", "relu"]', '["dpaa"]', r"\[tables\.small\]: .*Did you mean 'dpa'"),
        ('table = "small"', 'table = "smal"', r"\[\[runs\]\] 1: there is no table 'smal'\. Did you mean 'small'\?"),
        (
            "dpa = 91.5",
            "dap = 91.5",
            r"\[tables\.small\]: papers has 'dap', and no \[\[runs\]\] have\. Did you mean 'dpa'\?",
        ),
        ("dpa = 91.5", "dpa = 915", r"\[tables\.small\]: papers\.dpa must be a top-1 accuracy in percent; got 915"),
        ("batch_size = 240", "batchsize = 240", r"\[tables\.small\]: .*no key batchsize\. Did you mean batch_size"),
        ("digits_vit", "digit_vit", r"\[tables\.small\]: --config: there is no file digit_vit"),
        ("epochs = 2", "epochs = ", r"no TOML: .*line 10"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path, old, new, message):
    assert old in DIGITS
    (tmp_path / "bad.toml").write_text(DIGITS.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"bad\.toml: {message}") as caught:
        read_plan(tmp_path / "bad.toml")
    assert "\n" not in str(caught.value)


def test_the_papers_campaign_begins_with_one_seed_of_five_mechanisms():
    papers = read_plan(find_campaign("papers"))
    first = papers.steps[0]
    assert first.table.config.data.name == "cifar100" and first.seeds == 1 and first.table.config.epochs == 300
    assert [entry.name for entry in first.entries] == ["relu", "dpa", "dnrt", "aiec", "gelu"]
    assert {table.config.model for table in papers.tables} == {"vit_tiny_patch4_32", "resnet18"}
    assert isinstance(papers, plan.Plan) and papers.tables[0].papers["dnrt"] == 71.4


def test_the_command_line_tells_mistakes_in_one_line_and_has_a_dry_run(digits, tmp_path, capsys):
    for arguments, message in (
        (["nowhere", "--minutes=1", f"--out={tmp_path}"], "error: there is no file nowhere; the campaigns .* papers"),
        ([str(digits), "--minutes=0", "--out=x"], "error: --minutes must be more than 0"),
        ([str(digits), "--out=x"], "error: the following arguments are required: --minutes"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["campaign", *arguments])
        assert re.match(message, ended.value.code), ended.value.code
    main(["campaign", str(digits), "--minutes=1", f"--out={tmp_path}/out", "--dry_run", "--config.epochs=5"])
    assert "Digits, a small ViT: relu, dpa; 2 seeds of 5 epochs" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
