"""DPA against the authors' program and against the definition, and under JAX's transformations."""

import functools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.activations.dpa import CRITERIA, joint_mask
from dpa_jax.activations.penalties import RECORDS


def losses(act, variables, head, labels, coefficient):
    """(x, backward_memory) -> (loss, (mutated, y, cross-entropy, penalties))."""

    def loss_fn(x, backward_memory):
        y, mutated = act.apply(
            {**variables, "backward_memory": backward_memory}, x, labels, train=True, mutable=dpa_jax.MUTABLE
        )
        ce = optax.softmax_cross_entropy_with_integer_labels(head(y), labels).mean()
        penalty = dpa_jax.penalties(mutated)["channel"]
        return ce + coefficient * penalty, (mutated, y, ce, penalty)

    return loss_fn


def train_call(act, variables, x, head, labels, coefficient=5.0):
    """One step: the new variables, the gradient of x, (y, cross-entropy, penalty) and the mask."""
    loss_fn = losses(act, variables, head, labels, coefficient)
    (grad_x, update), (mutated, y, ce, penalty) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
        x, variables["backward_memory"]
    )
    new = {
        "forward_memory": mutated["forward_memory"],
        "backward_memory": optax.apply_updates(variables["backward_memory"], update),
    }
    record = jax.tree.map(lambda leaf: leaf[None], mutated[RECORDS]["record"].records[0])
    return new, grad_x, (y, ce, penalty), joint_mask(record)[0]


@pytest.mark.core
@pytest.mark.parametrize("name", ["dpa_token", "dpa_mean_pool"])
def test_equals_the_authors_program(golden, name):
    recorded = golden(name)
    config = json.loads(str(recorded["config"]))
    x, y, grad_x = recorded["x"], recorded["y"], recorded["grad_x"]
    if name == "dpa_mean_pool":  # channels second there
        x, y, grad_x = (np.moveaxis(a, 2, -1) for a in (x, y, grad_x))
        pool = "mean"
        head = lambda y: y.mean((1, 2)) @ recorded["head_w1"] + y[:, 0, 0] @ recorded["head_w2"]  # noqa: E731
    else:
        pool = "token"
        head = lambda y: y[:, 0] @ recorded["head_w1"] + y[:, 1:].mean(1) @ recorded["head_w2"]  # noqa: E731
    act = dpa_jax.DPA(
        num_classes=config["num_classes"],
        tau=config["tau"],
        momentum=config["momentum"],
        update_interval=config["update_interval"],
        pool=pool,
    )
    variables = act.init(jax.random.key(0), x[0])
    step = jax.jit(lambda v, x, labels: train_call(act, v, x, head, labels, config["loss_coef"]))
    for t in range(len(x)):
        variables, grad, (out, ce, penalty), mask = step(variables, x[t], recorded["labels"][t])
        np.testing.assert_array_equal(out, y[t])
        np.testing.assert_array_equal(mask, recorded["mask"][t])
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
        close(ce, recorded["loss_ce"][t])
        close(penalty, recorded["loss_channel"][t])
        close(grad, grad_x[t])
        close(variables["forward_memory"]["mean"], recorded["forward_memory"][t])
        close(variables["backward_memory"]["mean"], recorded["backward_memory"][t])
    assert recorded["mask"].any(), "the recording exercises the mask"


# ---------------- against the definition ----------------

K, C, B = 5, 8, 24


def definition(forward, backward, v, d, labels, tau, momentum, update, criterion):
    """The mechanism as the paper says it, sample by sample, in float64."""
    forward, seen = forward.astype(np.float64), []
    new_backward = backward.astype(np.float64)
    for value, grad, label in zip(v, d, labels, strict=True):
        if update and label >= 0:
            forward[label] += momentum * (value - forward[label])
            new_backward[label] += momentum * (np.where(grad > 0, 1, -1) - new_backward[label])
        seen.append(forward[label].copy())
    f, g = np.stack(seen) < tau, backward[labels] < 0
    joint = {"intersection": f & g, "union": f | g, "forward": f, "backward": g, "all": f | True}[criterion]
    mask = joint & (v > tau) & (labels >= 0)[:, None]
    return forward, new_backward, mask, (v[mask] ** 2).mean() if mask.any() else 0.0


def batch(seed, *shape, tau=0.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, B).astype(np.int32)
    offsets = rng.normal(size=(K, C))[labels].reshape(B, *[1] * len(shape), C)
    return (rng.normal(size=(B, *shape, C)) + offsets + tau).astype(np.float32), labels


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize(("momentum", "tau"), [(0.9, 0.0), (0.3, 0.2), (1.0, 0.0), (0.0, 0.0)])
def test_equals_the_definition(criterion, momentum, tau):
    act = dpa_jax.DPA(K, tau=tau, momentum=momentum, update_interval=2, pool="none", criterion=criterion)
    weights = np.random.default_rng(1).normal(size=(C, K)).astype(np.float32)
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    step = jax.jit(lambda v, x, labels: train_call(act, v, x, lambda y: y @ weights, labels))
    masked = 0
    for t in range(6):
        x, labels = batch(t, tau=tau)
        logits = np.where(x < tau, 0, x) @ weights
        d = (np.asarray(jax.nn.softmax(logits)) - np.eye(K)[labels]) @ weights.T
        old = jax.tree.map(np.asarray, variables)
        variables, _, (_, _, penalty), mask = step(variables, x, labels)
        forward, backward, expected_mask, expected = definition(
            old["forward_memory"]["mean"],
            old["backward_memory"]["mean"],
            x,
            d,
            labels,
            tau,
            momentum,
            t % 2 == 1,
            criterion,
        )
        np.testing.assert_array_equal(mask, expected_mask)
        np.testing.assert_allclose(variables["forward_memory"]["mean"], forward, atol=2e-6)
        np.testing.assert_allclose(variables["backward_memory"]["mean"], backward, atol=2e-6)
        np.testing.assert_allclose(penalty, expected, rtol=1e-6)
        masked += mask.sum()
    assert masked > 0 or (momentum == 0 and criterion != "all")  # memories that never learn condemn nothing


def test_updates_only_every_interval_th_training_call():
    act = dpa_jax.DPA(K, update_interval=3, pool="none")
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    x, labels = batch(0)
    changed = []
    step = jax.jit(lambda v: train_call(act, v, x, lambda y: y[:, :K], labels)[0])
    for _ in range(6):
        old = variables["forward_memory"]["mean"], variables["backward_memory"]["mean"]
        variables = step(variables)
        new = variables["forward_memory"]["mean"], variables["backward_memory"]["mean"]
        changed.append([not np.array_equal(a, b) for a, b in zip(old, new, strict=True)])
    assert changed == [[False, False]] * 2 + [[True, True]] + [[False, False]] * 2 + [[True, True]]


def test_samples_without_a_label_take_no_part():
    act = dpa_jax.DPA(K, update_interval=1, pool="none")
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    x, labels = batch(3)
    padded = np.where(np.arange(B) < 16, labels, -1)

    @jax.jit
    def on_few(variables):
        return train_call(act, variables, x[:16], lambda y: y[:, :K], labels[:16])

    @jax.jit
    def on_padded(variables):
        def loss_fn(backward_memory):
            y, mutated = act.apply(
                {**variables, "backward_memory": backward_memory},
                x,
                padded,
                train=True,
                mutable=dpa_jax.MUTABLE,
            )
            return optax.softmax_cross_entropy_with_integer_labels(y[:16, :K], labels[:16]).mean(), mutated

        return jax.grad(loss_fn, has_aux=True)(variables["backward_memory"])

    for _ in range(2):  # the second call has something to mask with
        small, *_ = few = on_few(variables)
        update, mutated = on_padded(variables)
        np.testing.assert_allclose(dpa_jax.penalties(mutated)["channel"], few[2][2], rtol=1e-6)
        np.testing.assert_allclose(mutated["forward_memory"]["mean"], small["forward_memory"]["mean"], atol=1e-6)
        backward = optax.apply_updates(variables["backward_memory"], update)
        np.testing.assert_allclose(backward["mean"], small["backward_memory"]["mean"], atol=1e-6)
        variables = small
    assert few[3].any()


def test_without_labels_it_is_the_threshold_and_touches_nothing():
    act = dpa_jax.DPA(K, tau=0.5, pool="token")
    x = jnp.array([-1.0, 0.0, 0.25, 0.5, 2.0])[None, :, None] * jnp.ones((1, 1, 3))
    expected = jnp.array([0.0, 0.0, 0.0, 0.5, 2.0])[None, :, None] * jnp.ones((1, 1, 3))
    y, mutated = act.apply({}, x, mutable=True)  # not even a memory is needed
    np.testing.assert_array_equal(y, expected)
    assert not mutated
    gradient = jax.grad(lambda x: act.apply({}, x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, 0], [0, 0, 0, 1, 1])


def test_evaluation_reads_and_never_writes():
    act = dpa_jax.DPA(K, update_interval=1, pool="none")
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    x, labels = batch(0)
    step = jax.jit(lambda v: train_call(act, v, x, lambda y: y[:, :K], labels)[0])
    for _ in range(3):
        variables = step(variables)
    _, mutated = act.apply(variables, x, labels, mutable=dpa_jax.MUTABLE)
    chosen = np.asarray(variables["forward_memory"]["mean"])[labels] < 0
    chosen &= np.asarray(variables["backward_memory"]["mean"])[labels] < 0
    chosen &= x > 0
    assert chosen.any()
    np.testing.assert_allclose(dpa_jax.penalties(mutated)["channel"], (x[chosen] ** 2).mean(), rtol=1e-6)
    chex.assert_trees_all_equal(mutated["forward_memory"], variables["forward_memory"])


def test_bfloat16_inputs_keep_float32_memories():
    act = dpa_jax.DPA(K, update_interval=1, pool="token")
    x, labels = batch(0, 4)
    x = jnp.asarray(x, jnp.bfloat16)
    variables = act.init(jax.random.key(0), x)
    new, grad_x, (y, *_), _ = train_call(act, variables, x, lambda y: y[:, 0, :K].astype(jnp.float32), labels)
    assert y.dtype == grad_x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    in_float32, *_ = train_call(act, variables, x.astype(jnp.float32), lambda y: y[:, 0, :K], labels)
    np.testing.assert_array_equal(new["forward_memory"]["mean"], in_float32["forward_memory"]["mean"])


def test_a_module_used_twice_is_updated_twice():
    class Twice(nn.Module):
        def setup(self):
            self.act = dpa_jax.DPA(K, update_interval=1, pool="none")

        def __call__(self, x, labels=None, train=False):
            return self.act(x, labels, train) + self.act(-x, labels, train)

    x, labels = batch(0)
    variables = Twice().init(jax.random.key(0), x)

    def update_of(module, variables, *inputs):
        def loss_fn(backward_memory):
            y, mutated = module.apply(
                {**variables, "backward_memory": backward_memory},
                *inputs,
                labels,
                train=True,
                mutable=dpa_jax.MUTABLE,
            )
            return jnp.sum(y[:, :4]) - jnp.sum(y[:, 4:]), mutated

        return jax.grad(loss_fn, has_aux=True)(variables["backward_memory"])

    both, mutated = update_of(Twice(), variables, x)
    alone = {name: value["act"] for name, value in variables.items()}
    once, _ = update_of(dpa_jax.DPA(K, update_interval=1, pool="none"), alone, x)
    again, _ = update_of(dpa_jax.DPA(K, update_interval=1, pool="none"), {**alone, "backward_memory": once}, x)
    np.testing.assert_allclose(both["act"]["mean"], once["mean"] + again["mean"], rtol=1e-6)
    assert len(mutated[RECORDS]["act"]["record"].records) == 2


def test_an_unused_output_leaves_the_backward_memory_alone():
    act = dpa_jax.DPA(K, update_interval=1, pool="none")
    x, labels = batch(0)
    variables = act.init(jax.random.key(0), x)

    def loss_fn(backward_memory):
        act.apply({**variables, "backward_memory": backward_memory}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        return 0.0

    assert not jax.grad(loss_fn)(variables["backward_memory"])["mean"].any()


# ---------------- bad input ----------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -0.1}, "tau must be at least 0; got -0.1"),
        ({"tau": float("nan")}, "tau must be at least 0; got nan"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\]; got 1.5"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\]; got -0.1"),
        ({"update_interval": 0}, "update_interval must be at least 1; got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1; got 0"),
        ({"pool": "tokens"}, "pool must be one of token, mean, none, auto; got 'tokens'. Did you mean 'token'"),
        (
            {"criterion": "both"},
            "criterion must be one of intersection, union, forward, backward, all; got 'both'",
        ),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.DPA(**{"num_classes": K, **options})


@pytest.mark.parametrize(
    ("pool", "shape", "message"),
    [
        ("token", (4, 8), r"pool='token' takes an input of shape \[B, N, C\]; got \(4, 8\)"),
        ("mean", (4, 8), r"pool='mean' takes .* got \(4, 8\)"),
        ("none", (4, 2, 8), r"pool='none' takes an input of shape \[B, C\]; got \(4, 2, 8\)"),
    ],
)
def test_inputs_that_the_pool_does_not_take_are_refused(pool, shape, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.DPA(K, pool=pool).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("x", "labels", "message"),
    [
        (jnp.zeros((B, C)), jnp.zeros(B - 1, int), r"labels must have shape \(24,\).*got \(23,\)"),
        (jnp.zeros((B, C)), jnp.zeros((B, K), int), r"labels must have shape \(24,\).*got \(24, 5\)"),
        (jnp.zeros((B, C)), jnp.zeros(B), "labels must be integers.*got float32"),
        (jnp.zeros((B, C + 1)), jnp.zeros(B, int), r"memory of shape \(5, 9\); the one given has \(5, 8\)"),
    ],
)
def test_labels_and_memories_that_do_not_fit_are_refused(x, labels, message):
    act = dpa_jax.DPA(K, pool="none")
    variables = act.init(jax.random.key(0), jnp.zeros((B, C)))
    with pytest.raises(ValueError, match=message):
        act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)


def test_a_forgotten_collection_is_named():
    act = dpa_jax.DPA(K, pool="none")
    x, labels = batch(0)
    variables = act.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="'backward_memory' is missing"):
        act.apply({"forward_memory": variables["forward_memory"]}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
