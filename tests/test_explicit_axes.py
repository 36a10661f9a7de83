"""A batch spread over eight devices of a mesh with Auto or with Explicit axes: the numbers of one device."""

import contextlib
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dpa_jax
from dpa_jax.activations import Ratio, Summary, Variable
from tests.helpers import train_step

Auto, Explicit = AxisType.Auto, AxisType.Explicit
pytestmark = pytest.mark.usefixtures("compile_quickly")

K, B, C, STEPS = 4, 16, 6, 3
COEFFICIENTS = {"channel": 5.0, "arr": 2.0, "aux": 1.0, "gate": 10.0}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, labels, train):
        x = dpa_jax.DPA(K, update_interval=2)(nn.Dense(C)(x), labels, train)
        x = dpa_jax.AIEC(K, update_interval=2)(nn.Dense(C)(x), labels, train)
        return dpa_jax.ARR(K, update_interval=2)(x, labels, train)


class Layers(nn.Module):
    """The mechanisms in a row, rematerialised. (ViT's blocks are a loop, ``nn.scan``.)"""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        return nn.remat(Layer, static_argnums=(3,))()(x, labels, train)[:, 0]


class FourRows(nn.Module):
    """Samples of four rows each: there are fewer of them than devices."""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        labels = None if labels is None else np.arange(B // 4) % K
        x = nn.Dense(C)(x)
        return dpa_jax.DPA(K, pool="mean", update_interval=1)(x, labels, train, rows_per_sample=4)[:, 0]


class Tokens(nn.Module):
    """A label for each token."""

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        labels = None if labels is None else jnp.broadcast_to(labels[:, None], x.shape[:2])
        return dpa_jax.DPA(K, update_interval=1)(nn.Dense(C)(x), labels, train)[:, 0]


class Tracker(dpa_jax.Mechanism):
    """Somebody's own: indexes and sums over the batch, and sees a memory as well as samples."""

    num_classes: int

    kept: ClassVar = {"seen": Variable("seen", "count")}

    def plain(self, x):
        return nn.relu(x)

    def observe(self, x, labels, state, train, pool):
        counts = state["seen"].at[labels].add(pool(x))
        return nn.relu(x), {"seen": counts}, {"rows": counts[labels], "total": counts, "rate": jnp.float32(0.5)}

    @staticmethod
    def summarize(records):
        total = sum(jnp.sum(jnp.square(record.seen["rows"]) * record.seen["rate"][:, None, None]) for record in records)
        return Summary(terms={"rows": Ratio(total, jnp.float32(B))})


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, labels=None, train=False):
        return Tracker(K)(nn.Dense(C)(x), labels, train)[:, 0]


MODELS = {
    "layers": Layers(),
    "rows": FourRows(),
    "tokens": Tokens(),
    "own": Own(),
    "vit": dpa_jax.models.create(
        "vit",
        K,
        activation=dpa_jax.activation("dpa", num_classes=K, update_interval=2),
        arr=True,
        dropout=0.1,
        stochastic_depth=0.1,
        **{"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2},
    ),
    "resnet": dpa_jax.models.create(
        "resnet",
        K,
        activation=dpa_jax.activation("aiec", num_classes=K, update_interval=2),
        arr=True,
        **{"image_size": 8, "stage_sizes": (1, 1), "width": 4},
    ),
}


def batch(name, t):
    rng = np.random.default_rng(t)
    labels = rng.integers(0, K, B).astype(np.int32)
    shape = (8, 8, 3) if name in ("vit", "resnet") else (5, C)
    offsets = np.random.default_rng(99).normal(size=(K, *shape))
    return (rng.normal(size=(B, *shape)) + offsets[labels]).astype(np.float32), labels


def loss_of(outputs, x, labels, penalties):
    # Not with_integer_labels: JAX 0.12 differentiates an index only where the mesh was entered.
    entropy = optax.softmax_cross_entropy(outputs, jax.nn.one_hot(labels, outputs.shape[-1])).mean()
    return entropy + sum(COEFFICIENTS.get(name, 0.1) * value for name, value in penalties.items())


@functools.cache
def initial(name):
    return dict(jax.jit(MODELS[name].init)(jax.random.key(0), batch(name, 0)[0]))


def run(name, mesh=None, enter=True, axes=("data",)):
    """Three steps: what each makes of the variables, its loss, penalties and gradients."""
    model, variables = MODELS[name], initial(name)
    inputs = [batch(name, t) for t in range(STEPS)]
    if mesh:
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec(axes)))
    apply = functools.partial(model.apply, train=True, rngs={"dropout": jax.random.key(1)})
    step, steps = jax.jit(train_step(apply, loss_of)), []
    with jax.set_mesh(mesh) if mesh and enter else contextlib.nullcontext():
        for x, labels in inputs:
            before = variables
            variables, seen = step(variables, x, labels)
            steps.append((variables, seen.loss, seen.penalties, seen.gradients))
            assert jax.tree.map(jax.typeof, before) == jax.tree.map(jax.typeof, variables)  # the next step fits
    return jax.device_get(steps)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), ours, theirs)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "layers"])
def test_both_kinds_of_axes_give_equal_numbers(name):
    auto, explicit = (run(name, jax.make_mesh((8,), ("data",), axis_types=(kind,))) for kind in (Auto, Explicit))
    assert_close(explicit, auto)
    assert all(penalty > 0 for penalty in explicit[-1][2].values())


@pytest.fixture(scope="module")
def one_device():
    return run("layers")


@pytest.mark.parametrize(
    ("shape", "kinds", "enter"),
    [
        ((8,), (Auto,), True),
        ((8,), (Explicit,), True),
        ((8,), (Explicit,), False),
        ((4, 2), (Explicit, Explicit), True),
        ((4, 2), (Explicit, Auto), True),
    ],
    ids=["auto", "explicit", "not-entered", "two-axes", "mixed"],
)
def test_many_devices_equal_one(one_device, shape, kinds, enter):
    axes = ("data", "more")[: len(shape)]
    spread = tuple(axis for axis, kind in zip(axes, kinds, strict=True) if kind is Explicit) or axes
    assert_close(run("layers", jax.make_mesh(shape, axes, axis_types=kinds), enter, spread), one_device)


@pytest.mark.parametrize("name", sorted(dpa_jax.activations.registry.ACTIVATIONS))
def test_every_activation_keeps_how_its_input_is_spread(name):
    stateful = name in ("dpa", "aiec")
    act = dpa_jax.activation(name, **({"num_classes": K} if stateful else {}))()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(Explicit,))
    with jax.set_mesh(mesh):
        x, labels = jax.device_put(batch("layers", 0), NamedSharding(mesh, PartitionSpec("data")))
        variables = act.init(jax.random.key(0), x)
        spread = []

        def call(variables, x, labels):
            y, _ = act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
            spread.append(jax.typeof(y).sharding.spec)

        jax.eval_shape(call, variables, x, labels)
    assert spread == [PartitionSpec("data", None, None)]
