"""ARR against the authors' program and against the definition; evaluation, and what it refuses."""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpa_jax


class Places(nn.Module):
    """An ARR for each of several inputs."""

    num_classes: int
    options: tuple = ()

    @nn.compact
    def __call__(self, xs, labels=None, train=False):
        place = lambda i: dpa_jax.ARR(self.num_classes, pool="none", name=f"place{i}", **dict(self.options))  # noqa: E731
        return [place(i)(x, labels, train) for i, x in enumerate(xs)]


def make_step(model):
    """(variables, inputs, labels) -> loss, gradients of the inputs, new variables."""

    @jax.jit
    def step(variables, xs, labels):
        def loss_fn(xs):
            ys, mutated = model.apply(variables, xs, labels, train=True, mutable=dpa_jax.MUTABLE)
            assert all(y is x for x, y in zip(xs, ys, strict=True))
            return dpa_jax.penalties(mutated)["arr"], mutated["response_memory"]

        (loss, memory), grads = jax.value_and_grad(loss_fn, has_aux=True)(xs)
        return loss, grads, {"response_memory": memory}

    return step


@pytest.mark.core
def test_equals_the_authors_program(golden):
    recorded = golden("arr")
    config = json.loads(str(recorded["config"]))
    places = range(len(config["dims"]))
    options = {"momentum": config["momentum"], "update_interval": config["update_interval"]}
    model = Places(config["num_classes"], tuple(options.items()))
    variables = model.init(jax.random.key(0), [recorded[f"x{i}"][0] for i in places])
    step = make_step(model)
    for t, labels in enumerate(recorded["labels"]):
        loss, grads, variables = step(variables, [recorded[f"x{i}"][t] for i in places], labels)
        np.testing.assert_allclose(loss, recorded["loss_arr"][t], rtol=0, atol=1e-6)
        for i in places:
            np.testing.assert_allclose(grads[i], recorded[f"grad_x{i}"][t], rtol=0, atol=1e-6)
            place = variables["response_memory"][f"place{i}"]
            unseen_is_zero = np.nan_to_num(recorded[f"memory{i}"][t])
            np.testing.assert_allclose(place["mean"], unseen_is_zero, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(place["count"], recorded[f"sample_count{i}"][t])
    assert not recorded["grad_x0"][0].all(), "the recording exercises the gradient at 0"


# ---------------- against the definition ----------------

K, C, B = 5, 8, 24


def batch(t):
    """Labels of more classes from step to step, some missing, most of them several times in a batch."""
    rng = np.random.default_rng(t)
    labels = rng.integers(-1, min(t + 1, K), B).astype(np.int32)
    return rng.normal(size=(B, C)).astype(np.float32), labels


def definition(memory, count, r, labels, momentum, interval):
    """The mechanism as the paper says it, sample by sample, in float64."""
    memory, count, means = memory.astype(np.float64), count.copy(), np.zeros(r.shape)
    for i, (value, k) in enumerate(zip(r.astype(np.float64), labels, strict=True)):
        if k < 0:
            continue
        if count[k] % interval == 0:
            memory[k] = value if count[k] == 0 else (1 - momentum) * memory[k] + momentum * value
        count[k] += 1
        means[i] = memory[k]
    valid = labels >= 0
    away = (r - means) * valid[:, None]
    entries = max(valid.sum() * r.shape[1], 1)
    return memory, count, np.abs(away).sum() / entries, np.sign(away) / entries


@pytest.mark.parametrize(("momentum", "interval"), [(0.1, 1), (0.9, 2), (0.4, 3), (1.0, 1), (0.0, 1), (0.5, 7)])
def test_equals_the_definition(momentum, interval):
    model = Places(K, (("momentum", momentum), ("update_interval", interval)))
    variables = model.init(jax.random.key(0), [jnp.zeros((B, C))])
    memory, count = np.zeros((K, C)), np.zeros(K, int)
    step = make_step(model)
    for t in range(7):
        x, labels = batch(t)
        loss, (grad,), variables = step(variables, [x], labels)
        memory, count, expected, expected_grad = definition(memory, count, x, labels, momentum, interval)
        place = variables["response_memory"]["place0"]
        np.testing.assert_array_equal(place["count"], count)
        np.testing.assert_allclose(place["mean"], memory, rtol=0, atol=1e-6)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)
    assert (count > interval).all()


def test_unlabelled_batch_changes_nothing_and_costs_nothing():
    model = Places(K)
    variables = model.init(jax.random.key(0), [jnp.zeros((B, C))])
    step = make_step(model)
    x, labels = batch(4)
    _, _, variables = step(variables, [x], labels)
    loss, (grad,), after = step(variables, [x + 1], np.full(B, -1, np.int32))
    assert loss == 0
    assert not grad.any()
    chex.assert_trees_all_equal(after, variables)


def test_pools_and_bfloat16_keep_float32_memories():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 3, C)), jnp.bfloat16)
    labels = jnp.arange(6) % K
    for pool, inputs, pooled in [
        ("mean", x, x.astype(jnp.float32).mean((1, 2))),
        ("token", x[:, 0], x[:, 0, 0].astype(jnp.float32)),
    ]:
        act = dpa_jax.ARR(K, momentum=0.25, pool=pool)
        variables = act.init(jax.random.key(0), inputs)
        y, mutated = act.apply(variables, inputs, labels, train=True, mutable=dpa_jax.MUTABLE)
        assert y.dtype == jnp.bfloat16
        mean = mutated["response_memory"]["mean"]
        assert mean.dtype == jnp.float32
        expected = pooled[:K].at[0].set(0.75 * pooled[0] + 0.25 * pooled[5])
        np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6)


def test_evaluation_reads_and_never_writes_and_leaves_unseen_classes_out():
    act = dpa_jax.ARR(K, pool="none")
    x, labels = batch(2)  # classes -1 to 2
    variables = act.init(jax.random.key(0), x)
    _, mutated = act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
    variables = {"response_memory": mutated["response_memory"]}
    x, labels = batch(4)
    assert (labels > 2).any()
    y, mutated = act.apply(variables, x, labels, mutable=dpa_jax.MUTABLE)
    np.testing.assert_array_equal(y, x)
    chex.assert_trees_all_equal(mutated["response_memory"], variables["response_memory"])
    seen = (labels >= 0) & (labels <= 2)
    expected = np.abs(x - np.asarray(variables["response_memory"]["mean"])[labels])[seen].mean()
    np.testing.assert_allclose(dpa_jax.penalties(mutated)["arr"], expected, rtol=1e-6)

    halves = [slice(0, B // 2), slice(B // 2, B)]
    parts = [act.apply(variables, x[half], labels[half], mutable=dpa_jax.MUTABLE)[1] for half in halves]
    added = jax.tree.map(jnp.add, *(dpa_jax.summarize(part).terms for part in parts))
    np.testing.assert_allclose(added["arr"].value(), expected, rtol=1e-6)

    # What no class of the batch was seen for is 0 and not a division by 0.
    _, mutated = act.apply(variables, x, np.full(B, 4), mutable=dpa_jax.MUTABLE)
    assert dpa_jax.penalties(mutated)["arr"] == 0


def test_without_labels_it_is_the_identity_and_needs_no_memory():
    x = jnp.ones((2, 3, C))
    y, mutated = dpa_jax.ARR(K).apply({}, x, mutable=True)
    assert y is x
    assert not mutated


# ---------------- bad input ----------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "ARR: num_classes must be at least 1; got 0"),
        ({"momentum": -0.5}, r"ARR: momentum must be in \[0, 1\]; got -0.5"),
        ({"update_interval": 0}, "ARR: update_interval must be at least 1; got 0"),
        ({"pool": "max"}, "ARR: pool must be one of token, mean, none, auto; got 'max'"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.ARR(**{"num_classes": K, **options})


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (jnp.zeros((B, C)), jnp.zeros(B - 1, int), r"labels must have shape \(24,\).*got \(23,\)"),
        (jnp.zeros((B, C)), jnp.zeros(B), "labels must be integers.*got float32"),
        (jnp.zeros((B, C + 1)), jnp.zeros(B, int), r"memory of shape \(5, 9\); the one given has \(5, 8\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, labels, message):
    act = dpa_jax.ARR(K, pool="none")
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    with pytest.raises(ValueError, match=message):
        act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)


def test_wrong_ranks_and_forgotten_collections_are_named():
    with pytest.raises(ValueError, match=r"pool='token' takes an input of shape \[B, N, C\]; got \(24, 8\)"):
        dpa_jax.ARR(K, pool="token").init(jax.random.key(0), jnp.zeros((B, C)))
    with pytest.raises(ValueError, match=r"ARR .*'response_memory' is missing"):
        dpa_jax.ARR(K, pool="none").apply({}, jnp.zeros((B, C)), jnp.zeros(B, int), True, mutable=dpa_jax.MUTABLE)
