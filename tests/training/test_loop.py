"""Whole runs, in this process."""

import itertools
import json
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from dpa_jax.config import OPTIMIZERS, SCHEDULES
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.header import note_of_rate
from dpa_jax.training.loop import NonFiniteError, evaluate, train, train_and_evaluate
from dpa_jax.training.optimizer import make_optimizer, make_schedule
from dpa_jax.training.run import build
from dpa_jax.training.state import create_model
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


def run_steps(run, steps):
    """The state after so many steps, and the metrics of each."""
    state, seen = run.init(), []
    for step in range(steps):
        state, metrics = run.step(state, step)
        seen.append(jax.device_get(metrics))
    return state, seen


def restore(config, workdir, step=None):
    """The step and state of the newest checkpoint, or the state of a step."""
    with Checkpoints(workdir / "checkpoints", keep=3, read_only=True) as checkpoints:
        return checkpoints.restore(build(config).abstract_state, step)


def normalized(split):
    """Images as the model gets them: synthetic data without augmentation."""
    return (split.inputs / np.float32(255) - np.float32(0.498)) / np.float32(0.205)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny_run():
    """A run whose compiled functions serve several tests."""
    return build(tiny_config())


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """The configuration of a run that has ended, its folder and the last line of its record."""
    workdir = tmp_path_factory.mktemp("finished")
    (records,) = train(tiny_run, workdir, [workdir])
    return tiny_run.config, workdir, records[-1]


@pytest.fixture(scope="module")
def steps_of_finished(tiny_run):
    """The metrics of each of that run's steps, trained again."""
    return run_steps(tiny_run, 12)[1]


@pytest.mark.core
def test_one_device_equals_eight():
    config = tiny_config(model_options__depth=2, augment__crop="pad", augment__padding=1)
    config.model_options.update(dropout=0.1, stochastic_depth=0.1)
    (one, on_one), (eight, on_eight) = (
        run_steps(build(config, devices), 12) for devices in (jax.devices()[:1], jax.devices())
    )
    assert len(eight.params["head"]["bias"].sharding.device_set) == 8
    for step, (a, b) in enumerate(zip(on_one, on_eight, strict=True), start=1):
        for name in ("loss", "loss_cross_entropy", "loss_channel"):
            np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-5, err_msg=f"{name} at step {step}")
    # Two updates of the memories (at steps 5 and 10), and masks that follow from them.
    assert on_one[-1]["masked_fraction"] > 0
    memories = [flat((state.backward_memory, state.model_state)) for state in (one, eight)]
    for path, memory in memories[0].items():
        assert memory.any(), path
        np.testing.assert_allclose(memories[1][path], memory, rtol=0, atol=1e-4, err_msg=path)


def test_evaluation_counts_the_whole_split(finished):
    config, workdir, last = finished
    figures = evaluate(config, workdir)[last["step"]]
    assert figures == {name[5:]: value for name, value in last.items() if name.startswith("eval_")}

    # By hand: all 20 images at once, without batches, padding or counts.
    split, state = build(config).eval_feeds["eval"].split, jax.device_get(restore(config, workdir)[1])
    logits = np.asarray(jax.jit(create_model(config, 4, in_channels=1).apply)(state.variables, normalized(split)))
    log_probabilities, taken = log_softmax(logits), np.argmax(logits, axis=1)
    scores = sklearn.metrics.precision_recall_fscore_support(split.labels, taken, average="macro", zero_division=0)
    wanted = {
        "loss_cross_entropy": -np.mean(log_probabilities[np.arange(20), split.labels]),
        "top1": np.mean(taken == split.labels),
        "top5": 1.0,
        **dict(zip(("precision", "recall", "f1"), scores[:3], strict=True)),
    }
    assert figures.keys() == {*wanted, "loss", "loss_channel"}
    for name, value in wanted.items():
        assert figures[name] == pytest.approx(value, abs=1e-5), name
    total = figures["loss_cross_entropy"] + config.coefficients.channel * figures["loss_channel"]
    assert figures["loss"] == pytest.approx(total, abs=1e-6)


def test_what_a_run_leaves(finished):
    config, workdir, last = finished
    records = lines(workdir)
    assert records[-1] == last
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 6), (2, 12)]
    promised = {"epoch", "step", "lr", "train_loss", "train_top1", "eval_loss", "eval_top1", "images_per_second"}
    promised |= {"loss_channel", "loss_cross_entropy", "masked_fraction"}
    promised |= {f"eval_{name}" for name in ("top5", "recall", "precision", "f1")}
    for record in records:
        assert promised <= record.keys()
        assert all(math.isfinite(value) for value in record.values())
        assert record["images_per_second"] > 0
        total = record["loss_cross_entropy"] + config.coefficients.channel * record["loss_channel"]
        assert record["train_loss"] == pytest.approx(total, abs=1e-5)
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text())["optimizer"]["learning_rate"] == 0.01
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert {"6", "12"} <= {path.name for path in (workdir / "checkpoints").iterdir()}


def test_a_finished_run_started_again_changes_nothing(finished, capsys):
    config, workdir, last = finished
    before = contents(workdir)
    assert train_and_evaluate(config, workdir) == last
    assert contents(workdir) == before
    assert f"nothing left to do after step 12 of 12 in {workdir}" in capsys.readouterr().err


def test_a_learning_rate_that_ends_at_zero_is_told_of():
    config = tiny_config(mechanism="relu", epochs=10, schedule__warmup_epochs=2)
    (note,) = note_of_rate(build(config))
    # The cosine ends 2 epochs of 6 steps before the end; a step takes the rate of the one before it.
    assert note.startswith("note: the learning rate is 0 from step 50 of 60 on ") and "min_learning_rate" in note
    config.schedule.min_learning_rate = 1e-5
    assert note_of_rate(build(config)) == []
    config.schedule.update(name="multistep", milestones=(5,), gamma=2e-38, min_learning_rate=0.0)
    (note,) = note_of_rate(build(config))
    assert note.startswith("note: the learning rate is 0 from step 43 of 60 on ") and "schedule.gamma" in note
    config.schedule.update(warmup_epochs=0, name="cosine")
    assert note_of_rate(build(config)) == []


def test_a_seed_reproduces_a_run_whose_figures_are_means_over_an_epoch(finished, steps_of_finished):
    _, workdir, _ = finished
    for number, record in enumerate(lines(workdir)):
        steps = steps_of_finished[6 * number : 6 * number + 6]
        for name, key in {"loss": "train_loss", "top1": "train_top1", "loss_channel": "loss_channel"}.items():
            assert record[key] == pytest.approx(np.mean([metrics[name] for metrics in steps]), abs=1e-6)


def test_another_seed_gives_another_run(tiny_run, steps_of_finished):
    run = tiny_run.with_seeds((1,))
    _, seen = run_steps(run, 3)
    for metrics, others in zip(seen, steps_of_finished, strict=False):
        assert abs(metrics["loss"] - others["loss"]) > 1e-4
    configured = build(tiny_config(seed=1))
    orders = [some.feeds[0].sampler.indices(0)[0] for some in (tiny_run, run, configured)]
    assert configured.seeds == (1,) and np.array_equal(orders[1], orders[2]) and np.any(orders[0] != orders[1])


@pytest.mark.parametrize(("mechanism", "precision"), [("dpa", "bfloat16"), ("gelu", "bfloat16"), ("relu", "float32")])
def test_learns_with_every_mechanism_and_precision(mechanism, precision, tmp_path):
    config = tiny_config(mechanism=mechanism, precision=precision, label_smoothing=0.1, model_options__patch_size=8)
    config.update(epochs=4, eval_every_epochs=3)
    last = train_and_evaluate(config, tmp_path)
    first, *_ = records = lines(tmp_path)
    assert last["train_loss"] < first["train_loss"]
    assert ("masked_fraction" in last) == ("loss_channel" in last) == (mechanism == "dpa")
    assert ["eval_loss" in record for record in records] == [False, False, True, True]
    _, state = restore(config, tmp_path)
    kept = flat((state.params, state.backward_memory, state.model_state, state.opt_state))
    assert {str(leaf.dtype) for leaf in kept.values()} == {"float32", "int32"}


def test_label_smoothing():
    config = tiny_config(label_smoothing=0.5, mechanism="relu", model_options__patch_size=8)
    run = build(config, jax.devices()[:1])
    state, split = run.init(), run.feeds[0].split
    index, _ = run.feeds[0].sampler.indices(0)
    logits = jax.jit(create_model(config, 4, in_channels=1).apply)(state.variables, normalized(split)[index])
    targets = 0.5 * np.eye(4)[split.labels[index]] + 0.5 / 4
    _, metrics = run.step(state, 0)
    wanted = -np.mean(np.sum(targets * log_softmax(logits), axis=1))
    assert metrics["loss"].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("optimizer", "schedule"), list(zip(OPTIMIZERS, SCHEDULES, strict=True)))
def test_every_optimizer_and_every_schedule_learns(optimizer, schedule):
    # A batch is the whole split: batches without replacement raise each other's loss more than SGD lowers it so soon.
    config = tiny_config(mechanism="gelu", optimizer__name=optimizer, schedule__name=schedule, batch_size=48, epochs=24)
    config.model_options.patch_size = 8
    config.schedule.update(warmup_epochs=2, step_epochs=10, milestones=(16,))
    config.optimizer.learning_rate = {"sgd": 0.05, "rmsprop": 0.001}.get(optimizer, 0.01)
    _, seen = run_steps(build(config, jax.devices()[:1]), 24)
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.02


@pytest.mark.parametrize(("optimizer", "schedule"), list(itertools.product(OPTIMIZERS, SCHEDULES)))
def test_every_optimizer_with_every_schedule_descends(optimizer, schedule):
    # The warm-up may take as long as the run.
    for warmup_epochs in (0, 4):
        config = tiny_config(optimizer__name=optimizer, schedule__name=schedule, epochs=4)
        config.schedule.update(warmup_epochs=warmup_epochs, step_epochs=2, milestones=(2,))
        transform = make_optimizer(config, make_schedule(config.schedule, 0.01, 6.0, 24))
        params = {"w": jnp.array([1.0, -2.0])}
        state, update = transform.init(params), jax.jit(transform.update)
        for _ in range(24):
            updates, state = update(params, state, params)  # the gradient of |w|^2 / 2 is w
            params = optax.apply_updates(params, updates)
        assert np.all(np.abs(params["w"]) < np.array([1.0, 2.0])), warmup_epochs


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    config = tiny_config(mechanism="relu", model_options__patch_size=8, optimizer__name="sgd", clip_norm=0.0)
    config.schedule.update(name="multistep", milestones=(1,), gamma=1e30)  # the first update of epoch 2 breaks all
    with pytest.raises(NonFiniteError, match=r"loss_cross_entropy is (nan|inf) at step 8\. .* kept in .*lower"):
        train_and_evaluate(config, tmp_path)
    step, state = restore(config, tmp_path)
    assert step == 6
    assert all(np.all(np.isfinite(leaf)) for leaf in flat(state).values())
    assert [record["step"] for record in lines(tmp_path)] == [6]


def test_an_update_that_breaks_the_model_is_not_saved_as_the_best(tmp_path):
    config = tiny_config(mechanism="relu", model_options__patch_size=8, optimizer__name="sgd", batch_size=48)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(NonFiniteError, match=r"eval_loss_cross_entropy is (nan|inf) at step 1\."):
        train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_penalty_that_is_not_finite_is_named(finished, tmp_path):
    config, workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    step, state = restore(config, workdir)
    params = jax.tree.map(lambda leaf: leaf, state.params)
    bias = params["blocks"]["mlp"]["expand"]["bias"]
    params["blocks"]["mlp"]["expand"]["bias"] = jnp.full_like(bias, 3e19)  # its square is no float32
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        checkpoints.save(step + 1, state.replace(params=params, step=state.step + 1))
    config = tiny_config(epochs=3, allow_change="epochs")
    with pytest.raises(NonFiniteError, match=r"loss_channel is inf at step 14\."):
        train_and_evaluate(config, tmp_path)
    assert restore(config, tmp_path)[0] == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism_options__tau": "high"}, r"mechanism_options\.tau must be a finite float; got 'high'"),
        ({"mechanism_options__tau": -1.0}, r"DPA: tau must be at least 0; got -1\.0"),
        ({"mechanism_options__num_classes": 7}, r"a key of mechanism_options must be one of tau"),
        ({"mechanism": "relu", "mechanism_options__tau": 1.0}, r"mechanism_options must be empty .*'tau'"),
        ({"model_options__dpeth": 2}, r"a key of model_options must be .*Did you mean 'depth'"),
        ({"model_options__dropout": "high"}, r"model_options\.dropout must be a finite float; got 'high'"),
        ({"model_options__in_channels": 3}, r"a key of model_options must be one of"),
        ({"model_options__patch_size": 3}, r"patch_size 3 does not divide image_size 8"),
        ({"data__name": "digit"}, r"got 'digit'\. Did you mean 'digits'"),
        ({"batch_size": 64}, r"batch_size must be between 1 and the 48 examples"),
        ({"batch_size": 12}, r"batch_size must be a positive multiple of the 8 devices, not 12"),
        (
            {"schedule__warmup_epochs": 3},
            r"warmup_epochs must be less than half of epochs.*; got 3 of 2, where it may be only 0$",
        ),
        ({"augment__rand_augment": "rand-k3"}, r"'rand-k3' is no RandAugment policy"),
        ({"coefficients": {}}, r"config\.coefficients has no entry for the penalty 'channel'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_build_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_config(**changes))


def test_the_response_memory_is_in_the_checkpoint(tmp_path):
    """The loss of an evaluation after a restart has its ARR term, equal to the one before."""
    config = tiny_config(mechanism="dnrt", epochs=1)
    record = train_and_evaluate(config, tmp_path)
    (figures,) = evaluate(config, tmp_path).values()
    assert record["eval_loss_arr"] > 0
    assert figures["loss_arr"] == record["eval_loss_arr"]
    assert figures["loss"] == pytest.approx(figures["loss_cross_entropy"] + 20 * figures["loss_arr"], rel=1e-5)


def test_activity_counters_start_anew_on_entering_evaluation(tmp_path):
    config = tiny_config(mechanism="aiec", epochs=1)
    train_and_evaluate(config, tmp_path)
    _, state = restore(config, tmp_path)
    (counters,) = (block["mlp"]["activation"] for block in state.model_state["activity_counters"].values())
    assert not counters["active"].any() and not counters["inhibited"].any()
    np.testing.assert_array_equal(counters["total"], 1)
    assert counters["step"] == 6 % 5  # which goes on


def test_no_evaluation_leaves_the_counters(tmp_path):
    config = tiny_config(mechanism="aiec", epochs=2, eval_every_epochs=2, batch_size=48)
    config.mechanism_options.update_interval = 1
    run = build(config)
    state, _ = run_steps(run, 1)
    (counters,) = (block["mlp"]["activation"] for block in state.model_state["activity_counters"].values())
    assert counters["total"].sum() > 4  # samples the layer has classified correctly were counted
    train(run, tmp_path, [tmp_path])
    _, first = restore(config, tmp_path, step=1)
    (kept,) = (block["mlp"]["activation"] for block in first.model_state["activity_counters"].values())
    chex.assert_trees_all_equal(kept, counters)


def test_the_first_epoch_says_what_is_wrong_with_a_mechanism(tmp_path, capsys):
    train_and_evaluate(tiny_config(epochs=2, mechanism_options={"tau": 1e6}), tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any("layer 0: none of its channels was ever on" in line for line in said)
    assert len(said) == len(set(said))  # once, and not after every epoch
