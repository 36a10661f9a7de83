"""A graph is trained on by the same loop: on several devices, stopped early, killed, continued, with several seeds."""

import jax
import numpy as np
import pytest

from dpa_jax.config import default_config
from dpa_jax.training.loop import Preempted, evaluate, train_and_evaluate
from dpa_jax.training.metrics import auc
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.record import finished, read_history
from dpa_jax.training.run import build
from tests.models.test_graph import recording


@pytest.fixture
def config(tmp_path):
    """A graph of 43 nodes, which 8 devices do not divide, in three classes."""
    random = np.random.default_rng(0)
    labels = np.arange(43) % 3
    edges = np.array([(a, b) for a in range(43) for b in range(a) if labels[a] == labels[b] or random.random() < 0.1])
    edges = edges[random.random(len(edges)) < 0.4]
    features = np.eye(3)[labels] + random.normal(size=(43, 3))
    splits = {"train": np.arange(12), "valid": np.arange(12, 20), "eval": np.arange(20, 43)}
    np.savez(tmp_path / "graph.npz", features=features, edges=edges, labels=labels, **splits)
    config = default_config()
    config.update(model="gcn", batch_size=1, eval_batch_size=1, epochs=6, clip_norm=0.0, early_stopping=0)
    config.data.name = f"npz:{tmp_path / 'graph.npz'}"
    config.optimizer.update(name="adam", learning_rate=0.05, weight_decay=5e-4, decayed="W0")
    config.schedule.name = "constant"
    config.mechanism_options.update_interval = 2
    return config


def test_shared_by_devices_it_is_the_same(config):
    states = []
    for devices in (jax.devices()[:1], jax.devices()):
        run = build(config, devices)
        state = run.init()
        for number in range(4):
            state, metrics = run.step(state, number)
        state, (figures,) = run.evaluate(state)
        states.append((metrics, state.variables, figures))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


def test_it_ends_early_and_stays_ended(config, tmp_path):
    """A learning rate that is far too high makes the validation loss rise."""
    config.update(epochs=60, early_stopping=2)
    config.optimizer.learning_rate = 5.0
    last = train_and_evaluate(config, tmp_path / "run")
    assert 4 <= last["epoch"] < 60
    assert train_and_evaluate(config, tmp_path / "run") == last  # nothing is left to do
    assert {"valid_top1", "valid_auc", "eval_auc"} <= last.keys()
    figures = evaluate(config, tmp_path / "run")[last["step"]]
    assert figures["auc"] == last["eval_auc"] and figures["valid_loss"] == last["valid_loss"]


def test_kipfs_rule():
    config = default_config()
    config.early_stopping = 2
    records = [{"epoch": i + 1, "valid_loss_cross_entropy": loss} for i, loss in enumerate([3.0, 2.0, 1.0, 1.6, 1.2])]
    assert [finished(records[:n], config) for n in range(6)] == [False, False, False, False, True, False]
    config.early_stopping = 0
    assert not finished(records, config)


def test_stopped_and_continued_it_is_the_same(config, tmp_path, monkeypatch):
    wanted = train_and_evaluate(config, tmp_path / "whole")
    monkeypatch.setattr(Preemption, "requested", lambda self, step: step == 3)
    monkeypatch.setattr(Preemption, "signal", 15, raising=False)
    with pytest.raises((Preempted, SystemExit)):
        train_and_evaluate(config, tmp_path / "cut")
    monkeypatch.undo()
    found = train_and_evaluate(config, tmp_path / "cut")
    for times in ("seconds", "images_per_second"):
        del wanted[times], found[times]
    assert found == wanted


def test_seeds_side_by_side_are_the_seeds_alone(config):
    together = build(config, seeds=[0, 1])
    state = together.init()
    for number in range(3):
        state, _ = together.step(state, number)
    _, figures = together.evaluate(state)
    for seed in (0, 1):
        config.seed = seed
        alone = build(config)
        state = alone.init()
        for number in range(3):
            state, _ = alone.step(state, number)
        _, (wanted,) = alone.evaluate(state)
        assert figures[seed] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 2}, "batch_size must be 1, for data .* is one graph; got 2"),
        ({"model": "vit"}, "in_features"),
    ],
    ids=["batch", "model"],
)
def test_what_does_not_go_with_a_graph_is_refused(config, change, message):
    config.update(change)
    with pytest.raises(ValueError, match=message):
        build(config)


def test_early_stopping_needs_a_validation_split():
    config = default_config()
    config.early_stopping = 5
    with pytest.raises(ValueError, match="early_stopping needs a validation split; data 'digits' has none"):
        build(config)


def test_auc_equals_its_recording():
    config, arrays = recording("auc")
    for case, wanted in config["cases"].items():
        found = auc(arrays[f"{case}/scores"], arrays[f"{case}/labels"])
        assert found == pytest.approx(wanted["auc"], abs=1e-12)
    assert np.isnan(auc(np.ones((2, 2)), np.array([1, 1])))


def test_the_digits_graph_is_learned_from(tmp_path):
    """The configuration that needs no data, cut short."""
    from dpa_jax.train import main

    command = ["train.py", "--config=configs/digits_gcn.py", "--config.epochs=15", f"--workdir={tmp_path / 'run'}"]
    main(command)
    last = read_history(tmp_path / "run")[-1]
    assert last["epoch"] == 15 and last["eval_top1"] > 0.5 and last["valid_auc"] > 0.9
