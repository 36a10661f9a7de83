"""DPA inside of models, under JAX's and Flax's transformations and on several devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import dpa_jax

K, C, B = 5, 8, 24


def batch(seed):
    """Features that depend on the class, so that memories come to mean something."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, B).astype(np.int32)
    offsets = rng.normal(size=(K, C))[labels]
    return (rng.normal(size=(B, C)) + offsets).astype(np.float32), labels


class Layer(nn.Module):
    """A residual layer around a DPA, as nn.scan wants it."""

    @nn.compact
    def __call__(self, x, labels, train):
        y = dpa_jax.DPA(K, update_interval=2, pool="none", name="act")(nn.Dense(C)(x), labels, train)
        return x + y, None


class Stack(nn.Module):
    """Three layers: a Python loop, rematerialised, or scanned."""

    kind: str

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        if self.kind == "scan":
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0, **dict.fromkeys(dpa_jax.COLLECTIONS, 0)},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=3,
            )
            return layers(name="layers")(x, labels, train)[0]
        layer = nn.remat(Layer, static_argnums=(3,)) if self.kind == "remat" else Layer
        for i in range(3):
            x, _ = layer(name=f"layer{i}")(x, labels, train)
        return x


def model_step(model):
    def step(variables, x, labels):
        state = {"forward_memory": variables["forward_memory"]}

        def loss_fn(params, backward_memory):
            logits, mutated = model.apply(
                {"params": params, "backward_memory": backward_memory, **state},
                x,
                labels,
                train=True,
                mutable=dpa_jax.MUTABLE,
            )
            ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, :K], labels).mean()
            return ce + 5.0 * dpa_jax.penalties(mutated)["channel"], mutated

        (loss, mutated), (grads, update) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(
            variables["params"], variables["backward_memory"]
        )
        return {
            "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads),
            "backward_memory": optax.apply_updates(variables["backward_memory"], update),
            "forward_memory": mutated["forward_memory"],
        }, loss

    return step


def run(step, variables, steps=6):
    out = []
    for t in range(steps):
        variables, loss = step(variables, *batch(t))
        out.append(loss)
    return variables, np.array(out)


@pytest.fixture(scope="module")
def plain():
    model = Stack("loop")
    variables = dict(model.init(jax.random.key(0), jnp.zeros((B, C))))
    return variables, *run(jax.jit(model_step(model)), variables)


def assert_trees_close(a, b, atol=1e-6):
    chex.assert_trees_all_close(a, b, rtol=0, atol=atol)


def test_eager_equals_jit(plain):
    variables, final, out = plain
    eager, eager_out = run(model_step(Stack("loop")), variables, steps=3)
    np.testing.assert_allclose(eager_out, out[:3], rtol=1e-6)
    jitted, _ = run(jax.jit(model_step(Stack("loop"))), variables, steps=3)
    assert_trees_close(eager, jitted)
    assert np.abs(final["backward_memory"]["layer2"]["act"]["mean"]).max() > 0


def test_remat_equals_plain(plain):
    variables, final, out = plain
    model = Stack("remat")
    fresh = model.init(jax.random.key(0), jnp.zeros((B, C)))
    assert jax.tree.structure(dict(fresh)) == jax.tree.structure(variables)
    remat, remat_out = run(jax.jit(model_step(model)), variables)
    np.testing.assert_allclose(remat_out, out, rtol=1e-6)
    assert_trees_close(remat, final)


def test_scan_over_layers_equals_plain(plain):
    variables, final, out = plain
    model = Stack("scan")

    def stacked(tree):
        return {
            name: {"layers": jax.tree.map(lambda *a: jnp.stack(a), *(layers[f"layer{i}"] for i in range(3)))}
            for name, layers in tree.items()
        }

    fresh = model.init(jax.random.key(0), jnp.zeros((B, C)))
    assert jax.tree.map(jnp.shape, dict(fresh)) == jax.tree.map(jnp.shape, stacked(variables))
    scanned, scanned_out = run(jax.jit(model_step(model)), stacked(variables))
    np.testing.assert_allclose(scanned_out, out, rtol=1e-6)
    assert_trees_close(scanned, stacked(final))


def test_vmap_over_models_equals_one_by_one():
    model = Stack("loop")
    keys = jax.random.split(jax.random.key(7), 3)
    variables = jax.vmap(lambda key: dict(model.init(key, jnp.zeros((B, C)))))(keys)
    together, together_out = run(jax.jit(jax.vmap(model_step(model), in_axes=(0, None, None))), variables)
    for i in range(3):
        one, out = run(jax.jit(model_step(model)), jax.tree.map(lambda leaf, i=i: leaf[i], variables))
        np.testing.assert_allclose(together_out[:, i], out, rtol=2e-6)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), one)


@pytest.mark.parametrize("devices", [2, 8])
def test_sharded_batch_equals_one_device(plain, devices):
    variables, final, out = plain
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    step = jax.jit(
        model_step(Stack("loop")),
        in_shardings=(replicated, sharded, sharded),
        out_shardings=(replicated, replicated),
    )
    many, many_out = run(step, jax.device_put(variables, replicated))
    np.testing.assert_allclose(many_out, out, rtol=1e-6)
    assert_trees_close(many, final, atol=2e-6)


def test_gradient_accumulation_takes_micro_batches_in_order(plain):
    """Memories follow the micro-batches as they follow batches; the parameters move once, by the mean gradient."""
    variables, *_ = plain
    model = Stack("loop")
    x, labels = batch(0)

    def loss_fn(params, backward_memory, forward_memory, x, labels):
        logits, mutated = model.apply(
            {"params": params, "backward_memory": backward_memory, "forward_memory": forward_memory},
            x,
            labels,
            train=True,
            mutable=dpa_jax.MUTABLE,
        )
        ce = optax.softmax_cross_entropy_with_integer_labels(logits[:, :K], labels).mean()
        return ce + 5.0 * dpa_jax.penalties(mutated)["channel"], mutated["forward_memory"]

    def micro_step(carry, micro_batch):
        backward, forward, total = carry
        (grads, update), forward = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
            variables["params"], backward, forward, *micro_batch
        )
        return (optax.apply_updates(backward, update), forward, jax.tree.map(jnp.add, total, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    start = variables["backward_memory"], variables["forward_memory"], zeros
    micro_batches = x.reshape(4, 6, C), labels.reshape(4, 6)
    scanned, _ = jax.jit(lambda c: jax.lax.scan(micro_step, c, micro_batches))(start)
    looped = start
    for i in range(4):
        looped, _ = micro_step(looped, (micro_batches[0][i], micro_batches[1][i]))
    assert_trees_close(scanned, looped)
    assert int(scanned[1]["layer0"]["act"]["step"]) == 0  # 4 calls, interval 2
    assert np.abs(scanned[0]["layer0"]["act"]["mean"]).max() > 0
