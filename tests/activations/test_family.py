"""RAA, ARR and AIEC together in one stack of layers: under JAX's transformations it is always the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dpa_jax
from dpa_jax.activations.penalties import RECORDS

K, C, B, LAYERS = 4, 8, 16, 2


class Layer(nn.Module):
    """A residual layer with all three, as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, labels, train):
        y = dpa_jax.AIEC(K, update_interval=2, pool="none", name="aiec")(nn.Dense(C)(x), labels, train)
        x = x + dpa_jax.RAA(name="raa")(nn.Dense(C)(y))
        return dpa_jax.ARR(K, update_interval=2, pool="none", name="arr")(x, labels, train), None


class Stack(nn.Module):
    """Layers: a Python loop, rematerialised, or scanned."""

    kind: str

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        if self.kind == "scan":
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0, **dict.fromkeys(dpa_jax.COLLECTIONS, 0)},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )
            return layers(name="layers")(x, labels, train)[0]
        layer = nn.remat(Layer, static_argnums=(3,)) if self.kind == "remat" else Layer
        for i in range(LAYERS):
            x, _ = layer(name=f"layer{i}")(x, labels, train)
        return x


def batch(t):
    rng = np.random.default_rng(t)
    labels = rng.integers(-1, K, B).astype(np.int32)
    return rng.normal(size=(B, C)).astype(np.float32), labels


def make_step(model):
    def step(variables, x, labels):
        state = {name: variables[name] for name in ("response_memory", "activity_counters")}

        def loss_fn(params):
            _, mutated = model.apply({"params": params, **state}, x, labels, train=True, mutable=dpa_jax.MUTABLE)
            terms = dpa_jax.penalties(mutated)
            return terms["arr"] + terms["aux"] + 2.0 * terms["gate"], mutated

        (loss, mutated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        params = optax.apply_updates(variables["params"], jax.tree.map(lambda g: -0.1 * g, grads))
        return {"params": params, **{name: mutated[name] for name in state}}, loss

    return step


def run(step, variables, steps=5):
    losses = []
    for t in range(steps):
        variables, loss = step(variables, *batch(t))
        losses.append(loss)
    return variables, np.array(losses)


def init(model, key=0):
    return dict(model.init(jax.random.key(key), jnp.zeros((B, C))))


def assert_trees_close(a, b):
    """Integers, the counters among them, are equal; the rest is close."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=0 if x.dtype == int else 2e-6), a, b)


plain_step = jax.jit(make_step(Stack("loop")))


@pytest.fixture(scope="module")
def plain():
    variables = init(Stack("loop"))
    return variables, *run(plain_step, variables)


def test_eager_equals_jit(plain):
    variables, *_ = plain
    variables, _ = plain_step(variables, *batch(0))
    expected, expected_loss = plain_step(variables, *batch(1))  # in this step AIEC counts
    eager, loss = make_step(Stack("loop"))(variables, *batch(1))
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-6)
    assert_trees_close(eager, expected)


def test_remat_equals_plain(plain):
    variables, final, losses = plain
    remat, remat_losses = run(jax.jit(make_step(Stack("remat"))), variables)
    np.testing.assert_allclose(remat_losses, losses, rtol=2e-6)
    assert_trees_close(remat, final)
    assert final["activity_counters"]["layer1"]["aiec"]["total"].max() > 1
    assert (final["response_memory"]["layer1"]["arr"]["count"] > 2).all()


def test_scan_over_layers_equals_plain(plain):
    variables, final, losses = plain

    def stacked(tree):
        layers = lambda part: [part[f"layer{i}"] for i in range(LAYERS)]  # noqa: E731
        return {name: {"layers": jax.tree.map(lambda *a: jnp.stack(a), *layers(part))} for name, part in tree.items()}

    assert jax.tree.map(jnp.shape, init(Stack("scan"))) == jax.tree.map(jnp.shape, stacked(variables))
    scanned, scanned_losses = run(jax.jit(make_step(Stack("scan"))), stacked(variables))
    np.testing.assert_allclose(scanned_losses, losses, rtol=2e-6)
    assert_trees_close(scanned, stacked(final))
    reset = dpa_jax.reset_counters(scanned)["activity_counters"]["layers"]["aiec"]
    assert (int(reset["active"].sum()), int(reset["total"].sum())) == (0, LAYERS * K)


def test_vmap_over_models_equals_one_by_one():
    step = make_step(Stack("loop"))
    models = [init(Stack("loop"), key) for key in range(2)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together, losses = run(jax.jit(jax.vmap(step, in_axes=(0, None, None))), together)
    for i, variables in enumerate(models):
        one, expected = run(plain_step, variables)
        np.testing.assert_allclose(losses[:, i], expected, rtol=2e-6)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one)


def test_sharded_batch_equals_one_device(plain):
    variables, final, losses = plain
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    step = jax.jit(
        make_step(Stack("loop")), in_shardings=(replicated, sharded, sharded), out_shardings=(replicated, replicated)
    )
    many, many_losses = run(step, jax.device_put(variables, replicated))
    np.testing.assert_allclose(many_losses, losses, rtol=2e-6)
    assert_trees_close(many, final)


def test_penalties_are_means_over_layers_and_mechanisms_keep_apart():
    """One model with DPA, AIEC and ARR of two widths has all four terms, each as if it were alone."""

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, labels=None, train=False):
            dpa_jax.DPA(K, pool="none", criterion="all", name="dpa")(x, labels, train)
            dpa_jax.AIEC(K, pool="none", name="aiec0")(x, labels, train)
            dpa_jax.AIEC(K, pool="none", name="aiec1")(2 * x[:, :4], labels, train)
            dpa_jax.ARR(K, pool="none", name="arr0")(x, labels, train)
            dpa_jax.ARR(K, pool="none", name="arr1")(3 * x[:, :4], labels, train)
            return dpa_jax.ARR(K, pool="none", name="arr2")(5 * x, labels, train)

    x, labels = batch(0)
    variables = Mixed().init(jax.random.key(0), x)

    @jax.jit
    def summaries(variables):
        _, mutated = Mixed().apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        records = mutated[RECORDS].items()
        return dpa_jax.summarize(mutated), {name: dpa_jax.penalties({RECORDS: {name: one}}) for name, one in records}

    summary, alone = summaries(variables)
    penalties = summary.penalties()
    assert penalties.keys() == {"channel", "aux", "gate", "arr"}
    np.testing.assert_allclose(penalties["channel"], alone["dpa"]["channel"], rtol=1e-6)
    np.testing.assert_allclose(penalties["aux"], (alone["aiec0"]["aux"] + alone["aiec1"]["aux"]) / 2, rtol=1e-6)
    wide = (alone["arr0"]["arr"] + alone["arr2"]["arr"]) / 2
    np.testing.assert_allclose(penalties["arr"], (wide + alone["arr1"]["arr"]) / 2, rtol=1e-6)
    a = np.maximum(x, 0)
    masked = []
    for name, values in ("aiec0", a), ("aiec1", 2 * a[:, :4]):
        irrelevant = np.asarray(variables["params"][name]["decision_weights"]) <= 0  # nothing is counted yet
        masked.append(values[irrelevant[labels] & (labels >= 0)[:, None]])
    np.testing.assert_allclose(penalties["gate"], np.square(np.concatenate(masked)).mean(), rtol=1e-6)
    valid = (labels >= 0).sum()
    positive = ((x > 0) & (labels >= 0)[:, None]).sum()
    expected = (positive + sum(map(len, masked))) / (valid * (C + C + 4))
    np.testing.assert_allclose(summary.figures["masked_fraction"].value(), expected, rtol=1e-6)
