"""AIEC against the authors' program and against the definition; resets, evaluation, and what it refuses."""

import functools
import json

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.activations.penalties import RECORDS


def make_step(act, head=None, coefficients=(1.0, 200.0)):
    """(variables, x, labels) -> everything that a training step shows, by name."""

    @jax.jit
    def step(variables, x, labels):
        def loss_fn(params, x):
            y, mutated = act.apply({**variables, "params": params}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
            terms = dpa_jax.penalties(mutated)
            ce = 0.0 if head is None else optax.softmax_cross_entropy_with_integer_labels(head(y), labels).mean()
            total = ce + coefficients[0] * terms["aux"] + coefficients[1] * terms["gate"]
            return total, {"y": y, "loss_ce": ce, "mutated": mutated}

        (grads, grad_x), out = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(variables["params"], x)
        mutated = out.pop("mutated")
        (record,) = mutated[RECORDS]["record"].records
        summary = dpa_jax.summarize(mutated)
        terms = {f"loss_{name}": value for name, value in summary.penalties().items()}
        return {
            **out,
            **terms,
            "masked": summary.figures["masked_fraction"].value(),
            "grad_x": grad_x,
            "grad_decision_weights": grads["decision_weights"],
            "logits": record.seen["logits"],
            "correct": jnp.argmax(record.seen["logits"], -1) == labels,
            "mask": record.seen["irrelevant"],
            "counters": mutated["activity_counters"],
        }

    return step


@pytest.mark.core
def test_equals_the_authors_program(golden):
    recorded = golden("aiec_token")
    config = json.loads(str(recorded["config"]))
    act = dpa_jax.AIEC(config["num_classes"], config["tau"], config["update_interval"], config["pool"])
    head = lambda y: y[:, 0] @ recorded["head_w1"] + y[:, 1:].mean(1) @ recorded["head_w2"]  # noqa: E731
    step = make_step(act, head, (config["aux_loss_coef"], config["gate_loss_coef"]))
    variables = act.init(jax.random.key(0), recorded["x"][0])
    weights = recorded["decision_weights_init"]
    assert variables["params"]["decision_weights"].shape == weights.shape
    variables = {**variables, "params": {"decision_weights": weights}}
    for t, (x, labels) in enumerate(zip(recorded["x"], recorded["labels"], strict=True)):
        if t == config["counters_cleared_before_step"]:
            variables = dpa_jax.reset_counters(variables)
        ours = step(variables, x, labels)
        for name in ("y", "mask", "correct"):
            np.testing.assert_array_equal(ours[name], recorded[name][t])
        for name in ("logits", "loss_ce", "loss_aux", "loss_gate", "grad_x", "grad_decision_weights"):
            np.testing.assert_allclose(ours[name], recorded[name][t], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(ours["counters"]["active"], recorded["activation_counts"][t])
        np.testing.assert_array_equal(ours["counters"]["inhibited"], recorded["inhibition_counts"][t])
        np.testing.assert_array_equal(ours["counters"]["total"], recorded["total_counts"][t])
        weights = weights - np.float32(config["sgd_lr"]) * ours["grad_decision_weights"]
        variables = {"params": {"decision_weights": weights}, "activity_counters": ours["counters"]}


# ---------------- against the definition ----------------

K, C, B = 4, 6, 24


def batch(t, *shape):
    rng = np.random.default_rng(t)
    labels = rng.integers(-1, K, B).astype(np.int32)
    offsets = rng.normal(size=(K, C))[labels].reshape(B, *[1] * len(shape), C)
    return (rng.normal(size=(B, *shape, C)) + offsets).astype(np.float32), labels


def definition(counters, weights, a, labels, update):
    """The mechanism as the paper says it, sample by sample, in float64."""
    active, inhibited, total = (counters[name].copy() for name in ("active", "inhibited", "total"))
    logits = a @ weights.T.astype(np.float64)
    if update:
        for i, k in enumerate(labels):
            if k >= 0 and np.argmax(logits[i]) == k:
                active[k] += a[i] > 0
                inhibited[k] += a[i] == 0
                total[k] += 1
    irrelevant = ((active - inhibited) / total[:, None] <= 0) & (weights <= 0)
    valid = labels >= 0
    mask = irrelevant[labels] & valid[:, None]
    gate = (a[mask] ** 2).mean() if mask.any() else 0.0
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    aux = -log_p[np.arange(len(a)), labels][valid].mean()
    return {"active": active, "inhibited": inhibited, "total": total}, mask, gate, aux


@pytest.mark.parametrize(("pool", "shape", "tau", "interval"), [("none", (), 0.0, 1), ("mean", (2, 2), 0.3, 2)])
def test_equals_the_definition(pool, shape, tau, interval):
    act = dpa_jax.AIEC(K, tau, interval, pool)
    variables = dict(act.init(jax.random.key(3), jnp.zeros((B, *shape, C))))
    step = make_step(act)
    counters = {"active": np.zeros((K, C), int), "inhibited": np.zeros((K, C), int), "total": np.ones(K, int)}
    masked = set()
    for t in range(5):
        x, labels = batch(t, *shape)
        weights = np.asarray(variables["params"]["decision_weights"])
        y = np.where(x <= tau, 0, x)
        a = y.astype(np.float64).mean((1, 2)) if shape else y.astype(np.float64)
        counters, mask, gate, aux = definition(counters, weights, a, labels, (t + 1) % interval == 0)
        ours = step(variables, x, labels)
        np.testing.assert_array_equal(ours["y"], y)
        for name, expected in counters.items():
            np.testing.assert_array_equal(ours["counters"][name], expected)
        np.testing.assert_array_equal(ours["mask"], mask)
        np.testing.assert_allclose(ours["loss_gate"], gate, rtol=1e-6)
        np.testing.assert_allclose(ours["loss_aux"], aux, rtol=1e-6)
        np.testing.assert_allclose(ours["masked"], mask.sum() / ((labels >= 0).sum() * C), rtol=1e-6)
        variables["activity_counters"] = ours["counters"]
        variables["params"] = {"decision_weights": weights - 0.1 * ours["grad_decision_weights"]}
        masked.add(mask.sum())
    assert (counters["total"] > 1).sum() >= 2, "more than one class was counted"
    assert len(masked) > 2


def test_the_threshold_and_its_gradient_at_equality():
    act = dpa_jax.AIEC(K, tau=0.5)
    x = jnp.array([-1.0, 0.25, 0.5, 2.0])[None, :, None] * jnp.ones((1, 1, C))
    y, mutated = act.apply({}, x, mutable=True)  # neither weights nor counters are needed
    np.testing.assert_array_equal(y[0, :, 0], [0, 0, 0, 2])
    assert not mutated
    gradient = jax.grad(lambda x: act.apply({}, x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, 0], [0, 0, 0, 1])


def test_starts_as_documented():
    variables = dpa_jax.AIEC(100, pool="none").init(jax.random.key(0), jnp.zeros((2, 192)))
    weights = variables["params"]["decision_weights"]
    bound = (6 / (100 + 192)) ** 0.5  # Xavier, uniform
    assert weights.shape == (100, 192)
    assert 0.99 * bound < jnp.abs(weights).max() <= bound
    np.testing.assert_allclose(weights.std(), bound / 3**0.5, rtol=0.02)
    counters = variables["activity_counters"]
    assert {name: (leaf.shape, leaf.dtype, int(leaf.sum())) for name, leaf in counters.items()} == {
        "active": ((100, 192), jnp.int32, 0),
        "inhibited": ((100, 192), jnp.int32, 0),
        "total": ((100,), jnp.int32, 100),
        "step": ((), jnp.int32, 0),
    }


def test_evaluation_reads_and_never_writes():
    act = dpa_jax.AIEC(K, update_interval=1, pool="none")
    x, labels = batch(0)
    variables = dict(act.init(jax.random.key(0), x))
    variables["activity_counters"] = make_step(act)(variables, x, labels)["counters"]
    _, mutated = act.apply(variables, x, labels, mutable=dpa_jax.MUTABLE)
    chex.assert_trees_all_equal(mutated["activity_counters"], variables["activity_counters"])
    counters = {k: np.asarray(v) for k, v in variables["activity_counters"].items()}
    weights = np.asarray(variables["params"]["decision_weights"])
    _, _, gate, aux = definition(counters, weights, np.maximum(x, 0).astype(np.float64), labels, False)
    np.testing.assert_allclose(dpa_jax.penalties(mutated)["gate"], gate, rtol=1e-6)
    np.testing.assert_allclose(dpa_jax.penalties(mutated)["aux"], aux, rtol=1e-6)
    assert gate > 0
    _, mutated = act.apply(variables, x, np.full(B, -1), mutable=dpa_jax.MUTABLE)
    assert dpa_jax.penalties(mutated) == {"aux": 0, "gate": 0}


def test_bfloat16_is_judged_in_float32():
    act = dpa_jax.AIEC(K, update_interval=1, pool="token")
    x, labels = batch(0, 3)
    x = jnp.asarray(x, jnp.bfloat16)
    variables = act.init(jax.random.key(0), x)
    low, high = (make_step(act)(variables, x.astype(dtype), labels) for dtype in (jnp.bfloat16, jnp.float32))
    assert low["y"].dtype == low["grad_x"].dtype == jnp.bfloat16
    assert low["logits"].dtype == low["grad_decision_weights"].dtype == jnp.float32
    chex.assert_trees_all_equal(low["counters"], high["counters"])
    np.testing.assert_array_equal(low["mask"], high["mask"])
    np.testing.assert_array_equal(low["loss_gate"], high["loss_gate"])


# ---------------- reset ----------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_reset_returns_the_counters_and_nothing_else(transform):
    reset = transform(dpa_jax.reset_counters)
    act = dpa_jax.AIEC(K, update_interval=3, pool="none")
    x, _ = batch(0)
    fresh = act.init(jax.random.key(0), x)
    # Two layers stacked, as nn.scan has them, that have counted for a while.
    used = jax.tree.map(lambda leaf: jnp.stack([leaf + 2, leaf + 5]), fresh["activity_counters"])
    memory = {"layers": {"act": {"mean": jnp.ones((K, C)), "step": jnp.ones((), int)}}}
    variables = {
        "params": {"layers": {"act": fresh["params"]}},
        "forward_memory": memory,
        "activity_counters": {"layers": {"act": used}},
    }
    out = reset(variables)
    start = {name: jnp.stack([leaf, leaf]) for name, leaf in fresh["activity_counters"].items()}
    start["step"] = used["step"]
    expected = {**variables, "activity_counters": {"layers": {"act": start}}}
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    assert jax.tree.map(jnp.result_type, out) == jax.tree.map(jnp.result_type, expected)
    chex.assert_trees_all_equal(out, expected)
    chex.assert_trees_all_equal(reset(variables["activity_counters"]), expected["activity_counters"])
    chex.assert_trees_all_equal(reset({"forward_memory": memory}), {"forward_memory": memory})


def test_reset_keeps_a_frozen_dict_frozen():
    variables = dpa_jax.AIEC(K, pool="none").init(jax.random.key(0), jnp.zeros((B, C)))
    frozen = flax.core.freeze(variables)
    assert jax.tree.structure(dpa_jax.reset_counters(frozen)) == jax.tree.structure(frozen)


# ---------------- bad input ----------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "AIEC: num_classes must be at least 1; got 0"),
        ({"tau": -0.1}, "AIEC: tau must be at least 0; got -0.1"),
        ({"update_interval": 0}, "AIEC: update_interval must be at least 1; got 0"),
        ({"pool": "means"}, "AIEC: pool must be one of token, mean, none, auto; got 'means'. Did you mean 'mean'"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.AIEC(**{"num_classes": K, **options})


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (jnp.zeros((B, C)), jnp.zeros(B - 1, int), r"labels must have shape \(24,\).*got \(23,\)"),
        (jnp.zeros((B, C)), jnp.zeros(B), "labels must be integers.*got float32"),
        (jnp.zeros((B, C + 1)), jnp.zeros(B, int), r"memory of shape \(4, 7\); the one given has \(4, 6\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, labels, message):
    act = dpa_jax.AIEC(K, pool="none")
    apply = functools.partial(act.apply, act.init(jax.random.key(0), jnp.zeros((B, C))))
    with pytest.raises(ValueError, match=message):
        apply(x, labels, train=True, mutable=dpa_jax.MUTABLE)


def test_wrong_ranks_and_forgotten_collections_are_named():
    with pytest.raises(ValueError, match=r"pool='token' takes an input of shape \[B, N, C\]; got \(24, 6\)"):
        dpa_jax.AIEC(K, pool="token").init(jax.random.key(0), jnp.zeros((B, C)))
    act = dpa_jax.AIEC(K, pool="none")
    params = {"params": act.init(jax.random.key(0), jnp.zeros((B, C)))["params"]}
    with pytest.raises(ValueError, match=r"AIEC .*'activity_counters' is missing"):
        act.apply(params, jnp.zeros((B, C)), jnp.zeros(B, int), True, mutable=dpa_jax.MUTABLE)
