"""Activations by name: the ones here and users' own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpa_jax
from dpa_jax.activations import Elementwise, register
from dpa_jax.activations.registry import ACTIVATIONS


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    """Names that a test registers are gone after it."""
    monkeypatch.setattr("dpa_jax.activations.registry.ACTIVATIONS", dict(ACTIVATIONS))


class Mlp(nn.Module):
    """Takes an activation as models do."""

    activation: object

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        return self.activation(name="activation")(nn.Dense(4)(x), labels, train)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_name_makes_an_activation_of_a_model(name):
    options = {"num_classes": 3, "pool": "none"} if name in ("dpa", "aiec") else {}
    model = Mlp(dpa_jax.activation(name, **options))
    x, labels = jnp.ones((6, 5)), jnp.arange(6) % 3
    variables = model.init(jax.random.key(0), x)
    y, _ = jax.jit(lambda v: model.apply(v, x, labels, train=True, mutable=dpa_jax.MUTABLE))(variables)
    assert y.shape == (6, 4)
    np.testing.assert_array_equal(y, jax.jit(model.apply)(variables, x))  # labels and training change no output


def test_options_reach_the_module():
    raa = dpa_jax.activation("raa", kind="elementwise", base="relu")(name="act")
    assert (raa.kind, raa.base, raa.name) == ("elementwise", "relu", "act")
    assert dpa_jax.activation("aiec", num_classes=7, tau=0.5)().tau == 0.5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gleu", r"got 'gleu'\. Did you mean 'gelu'"),
        ("leakyrelu", "Did you mean 'leaky_relu'"),
        ("relu7", "Did you mean 'relu' or 'relu6' or 'prelu'"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name, hint):
    with pytest.raises(ValueError, match=f"activation: name must be one of aiec, dpa, .*{hint}"):
        dpa_jax.activation(name)


def test_a_name_near_none_lists_them_all():
    with pytest.raises(ValueError, match=r"one of aiec, dpa, elu, gdn, .* tanh; got 'zzz'\.$"):
        dpa_jax.activation("zzz")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("relu", {"slope": 1}, TypeError, "slope"),
        ("raa", {"kinds": "vector"}, TypeError, "kinds"),
        ("aiec", {}, TypeError, "num_classes"),
        ("aiec", {"num_classes": 3, "tau": -1}, ValueError, "tau must be at least 0; got -1"),
        ("raa", {"kind": "matrix"}, ValueError, "kind must be one of vector, scalar, elementwise; got 'matrix'"),
    ],
)
def test_wrong_options_show_when_the_factory_is_made(name, options, error, message):
    with pytest.raises(error, match=message):
        dpa_jax.activation(name, **options)


def test_users_register_their_own():
    class Snake(nn.Module):
        frequency: float = 1.0

        @nn.compact
        def __call__(self, x, labels=None, train=False):
            return x + jnp.sin(self.frequency * x) ** 2 / self.frequency

    register("snake", Snake)
    register("cube", functools.partial(Elementwise, lambda x: x**3))
    x = jnp.linspace(-2, 2, 12).reshape(3, 4)
    model = Mlp(dpa_jax.activation("snake", frequency=2.0))
    variables = model.init(jax.random.key(0), x)
    dense = nn.Dense(4).apply({"params": variables["params"]["Dense_0"]}, x)
    np.testing.assert_allclose(model.apply(variables, x), dense + np.sin(2 * dense) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(dpa_jax.activation("cube")().apply({}, x), np.asarray(x) ** 3, rtol=1e-6)
    with pytest.raises(ValueError, match="Did you mean 'snake'"):
        dpa_jax.activation("snaek")


def test_taken_names_and_what_cannot_be_called_are_refused():
    with pytest.raises(ValueError, match="register: the name 'relu' is taken"):
        register("relu", nn.PReLU)
    with pytest.raises(TypeError, match="register: factory must be a module class or another callable; got 3"):
        register("three", 3)


class Compact(nn.Module):
    """Convolutions and dense layers, with one function for all of them."""

    act: object

    @nn.compact
    def __call__(self, x):
        x = self.act(nn.Conv(4, (3, 3), name="conv")(x))
        x = jnp.mean(x, axis=(1, 2))
        for i, width in enumerate((6, 5)):
            x = self.act(nn.Dense(width, name=f"layers_{i}")(x))
        return x


class WithSetup(nn.Module):
    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.layers = [nn.Dense(6), nn.Dense(5)]
        self.act = dpa_jax.activation("dpa", num_classes=3, pool="auto", update_interval=1)

    def __call__(self, x):
        x = jnp.mean(self.act(self.conv(x)), axis=(1, 2))
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class WithField(WithSetup):
    act: object = None

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.layers = [nn.Dense(6), nn.Dense(5)]


def test_a_factory_in_setup_and_one_pool_for_convolutions_and_dense_layers():
    factory = dpa_jax.activation("dpa", num_classes=3, pool="auto", update_interval=1)
    x, labels = jax.random.normal(jax.random.key(1), (6, 4, 4, 2)), jnp.arange(6) % 3

    def run(model):
        variables = jax.jit(model.init)(jax.random.key(0), x)

        def loss_fn(backward_memory):
            with dpa_jax.supervise(labels, train=True):
                y, mutated = model.apply({**variables, "backward_memory": backward_memory}, x, mutable=dpa_jax.MUTABLE)
            return jnp.sum(y) + dpa_jax.penalties(mutated)["channel"], (y, mutated["forward_memory"])

        return variables, jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["backward_memory"])

    variables, expected = run(Compact(factory))
    assert {name: tree["mean"].shape for name, tree in variables["backward_memory"].items()} == {
        "DPA_0": (3, 4),
        "DPA_1": (3, 6),
        "DPA_2": (3, 5),
    }
    for model in (WithSetup(), WithField(factory), nn.remat(WithSetup)()):
        own, (value, update) = run(model)
        assert jax.tree.structure(own) == jax.tree.structure(variables)
        jax.tree.map(np.testing.assert_array_equal, (value, update), expected)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected[1]))


def test_a_factory_in_setup_without_state():
    class Model(nn.Module):
        def setup(self):
            self.act = dpa_jax.activation("gelu")

        def __call__(self, x):
            return self.act(self.act(x))

    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(Model().apply({}, x), jax.nn.gelu(jax.nn.gelu(x, False), False))
