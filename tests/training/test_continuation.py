"""What a run may go on with: one rule for training, evaluation and comparison."""

import json
import shutil

import jax
import numpy as np
import pytest

import dpa_jax
from dpa_jax.compare import compare, parse_entries
from dpa_jax.config import default_config
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.continuation import check_unchanged, write_config
from dpa_jax.training.loop import Preempted, evaluate, train_and_evaluate
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.run import build
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


def cheap(**changes):
    return tiny_config(**{"mechanism": "relu", "model_options__patch_size": 8, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train_and_evaluate(cheap(), workdir)
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of a finished run of 12 steps."""
    return shutil.copytree(finished, tmp_path / "run")


def saved(workdir):
    return json.loads((workdir / "config.json").read_text())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_at(step, monkeypatch):
    monkeypatch.setattr(Preemption, "requested", lambda self, done: done == step)


# ---------------- The rule ----------------


def test_a_changed_key_that_changes_figures_is_refused_with_both_values_and_what_to_do(tmp_path):
    config = default_config()
    write_config(config, tmp_path, 48)
    assert check_unchanged(config, tmp_path) == []
    config.seed, config.optimizer.learning_rate = 3, 0.5
    with pytest.raises(ValueError) as caught:
        check_unchanged(config, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} was trained with another configuration: optimizer.learning_rate was 0.001 and is 0.5 now; seed "
        "was 0 and is 3 now. That changes its figures: keep the configuration, use another workdir, or pass "
        "--config.allow_change=optimizer.learning_rate,seed"
    )


@pytest.mark.parametrize("allowed", ["seed,optimizer.learning_rate", " seed , optimizer "])
def test_what_is_allowed_to_change_is_noted(tmp_path, allowed):
    config = default_config()
    write_config(config, tmp_path, 48)
    config.seed, config.optimizer.learning_rate, config.allow_change = 3, 0.5, allowed
    assert check_unchanged(config, tmp_path) == [
        "note: optimizer.learning_rate was 0.001 and is 0.5 now",
        "note: seed was 0 and is 3 now",
    ]
    config.batch_size = 8
    with pytest.raises(ValueError, match=r": batch_size was 256 and is 8 now\. .*allow_change=batch_size$"):
        check_unchanged(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint__keep", 7),
        ("checkpoint__every_steps", 7),
        ("log_every_seconds", 1.0),
        ("data__dir", "there"),
        ("data__download", True),
        ("data__workers", 2),
    ],
)
def test_what_changes_no_figure_is_noted(tmp_path, key, value):
    write_config(tiny_config(), tmp_path, 48)
    (note,) = check_unchanged(tiny_config(**{key: value}), tmp_path)
    assert note.startswith(f"note: {key.replace('__', '.')} was ") and note.endswith(f"{value!r} now")


def test_options_that_come_and_go_are_changes_and_younger_keys_are_none(tmp_path):
    write_config(tiny_config(mechanism_options__tau=0.5), tmp_path, 48)
    with pytest.raises(ValueError, match=r"mechanism_options\.tau was 0\.5 and is None now"):
        check_unchanged(tiny_config(), tmp_path)
    older = saved(tmp_path)
    del older["augment"]["cutmix"], older["allow_change"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert check_unchanged(tiny_config(mechanism_options__tau=0.5), tmp_path) == []
    with pytest.raises(ValueError, match=r": augment\.cutmix was 0\.0 and is 1\.0 now"):
        check_unchanged(tiny_config(mechanism_options__tau=0.5, augment__cutmix=1.0), tmp_path)


@pytest.mark.parametrize(
    "text", [b"{", b"", b"[1]", b"{}", b"\x00", b"\xff", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
)
def test_a_missing_or_damaged_record_of_the_configuration_is_noted_and_kept(tmp_path, text):
    (note,) = check_unchanged(tiny_config(), tmp_path, 48)
    assert note == f"note: {tmp_path}/config.json is missing; whether the configuration has changed is not known"
    for name in ("config.json", "position.json"):
        (tmp_path / name).write_bytes(text)
    notes = check_unchanged(tiny_config(), tmp_path, 48)
    for note, name in zip(notes, ("config.json", "position.json"), strict=True):
        assert note.startswith(f"note: {tmp_path}/{name} is damaged (") and note.count("\n") == 0
        assert note.endswith("); whether the configuration has changed is not known")
    write_config(tiny_config(), tmp_path, 48)
    assert check_unchanged(tiny_config(), tmp_path, 48) == []
    for name in ("config.json", "position.json"):
        assert (tmp_path / f"damaged-{name}").read_bytes() == text


def test_the_position_in_the_data_may_not_change_where_a_run_goes_on(tmp_path):
    write_config(tiny_config(), tmp_path, 48)
    changed = tiny_config(seed=3, batch_size=16, allow_change="seed,batch_size")
    assert len(check_unchanged(changed, tmp_path)) == 2  # to evaluate
    message = (
        r"cannot go on: batch_size was 8 and is 16 now; seed was 0 and is 3 now; training examples was 48 and is 49"
    )
    with pytest.raises(ValueError, match=message):
        check_unchanged(changed, tmp_path, 49)
    # Either file is enough, and older runs have config.json alone.
    for name, known in (("position.json", "batch_size"), ("config.json", "training examples")):
        there = (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"cannot go on: .*{known} was"):
            check_unchanged(changed, tmp_path, 49)
        there.rename(tmp_path / name)


def test_only_process_0_writes_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write_config(tiny_config(), tmp_path / "run", 48)
    assert not (tmp_path / "run").exists()


# ---------------- Where it holds ----------------


def test_training_evaluation_and_comparison_refuse_alike_and_touch_nothing(workdir, tmp_path):
    before = contents(workdir)
    changed = cheap(optimizer__learning_rate=0.5)
    for act in (train_and_evaluate, evaluate):
        with pytest.raises(ValueError, match=r"optimizer\.learning_rate was 0\.01 and is 0\.5 now"):
            act(changed, workdir)
    assert contents(workdir) == before
    # A comparison's finished run, of which nothing but the record is left.
    shutil.rmtree(workdir / "checkpoints")
    workdir.rename(tmp_path / "relu")
    (tmp_path / "relu").rename(tmp_path / "seed-0")
    (tmp_path / "all" / "relu").mkdir(parents=True)
    (tmp_path / "seed-0").rename(tmp_path / "all" / "relu" / "seed-0")
    with pytest.raises(ValueError, match=r"relu/seed-0 was trained .*: optimizer\.learning_rate was 0\.01 and is 0\.5"):
        compare(changed, parse_entries("relu", changed), 1, tmp_path / "all")


def test_the_saved_configuration_is_that_of_the_last_training(workdir, capsys):
    first = saved(workdir)
    train_and_evaluate(cheap(checkpoint__keep=5, log_every_seconds=1.0), workdir)  # nothing is left to train
    assert saved(workdir) == first
    assert "note: checkpoint.keep was 3 and is 5 now" in capsys.readouterr().err

    last = train_and_evaluate(cheap(epochs=3, allow_change="epochs"), workdir)
    assert last["step"] == 18
    assert saved(workdir) == first | {"epochs": 3, "allow_change": "epochs"}
    err = capsys.readouterr().err
    assert "continuing after step 12 of 18" in err and "note: epochs was 2 and is 3 now" in err


def test_a_checkpoint_that_is_not_restored_leaves_the_saved_configuration(workdir):
    before = contents(workdir)
    with pytest.raises(ValueError, match=r"is of another model .*params/"):
        train_and_evaluate(cheap(model_options__embed_dim=4, allow_change="model_options"), workdir)
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 16}, "batch_size was 8 and is 16 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"data__train_examples": 56}, "training examples was 48 and is 56 now"),
    ],
)
def test_another_position_in_the_data_is_refused_even_where_it_is_allowed(workdir, change, message):
    before = contents(workdir)
    allowed = ",".join(["epochs", *change]).replace("__", ".")
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(cheap(epochs=6, allow_change=allowed, **change), workdir)
    assert contents(workdir) == before
    assert evaluate(cheap(epochs=6, allow_change=allowed, **change), workdir)


def test_a_run_that_never_saved_begins_anew_with_any_configuration(tmp_path):
    write_config(cheap(seed=5), tmp_path, 48)
    assert train_and_evaluate(cheap(epochs=1), tmp_path)["step"] == 6
    assert saved(tmp_path)["seed"] == 0


# ---------------- Evaluation ----------------


def test_evaluation_by_itself_starts_the_counters_anew_as_the_loops_does(tmp_path, monkeypatch):
    """AIEC's gate loss depends on its counters, which training has left in a checkpoint within an epoch."""
    config = tiny_config(mechanism="aiec", mechanism_options__update_interval=1)
    stop_at(4, monkeypatch)
    with pytest.raises(Preempted):
        train_and_evaluate(config, tmp_path)
    run = build(config)
    with Checkpoints(tmp_path / "checkpoints", keep=1, read_only=True) as checkpoints:
        step, state = checkpoints.restore(run.abstract_state)
    assert step == 4
    variables = jax.device_get(state.variables)

    def gate_loss(variables):
        """Of the whole split at once."""
        split = run.eval_feeds["eval"].split
        images = (split.inputs / np.float32(255) - np.float32(0.498)) / np.float32(0.205)
        _, mutated = run.model.apply(variables, images, split.labels, mutable=dpa_jax.MUTABLE)
        return float(dpa_jax.penalties(mutated)["gate"])

    _, (figures,) = run.evaluate(state)
    wanted = {name.removeprefix("eval_"): figure for name, figure in figures.items()}
    assert evaluate(config, tmp_path) == {4: wanted}
    assert wanted["loss_gate"] == pytest.approx(gate_loss(dpa_jax.reset_counters(variables)), rel=1e-3)
    assert wanted["loss_gate"] != pytest.approx(gate_loss(variables), rel=0.1)
