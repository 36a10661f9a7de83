"""The activations that the papers compare with, against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.activations.baselines import lower_bound

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


DEFINITIONS = {
    ("elu", ()): lambda x: x if x > 0 else math.expm1(x),
    ("elu", (("alpha", 0.5),)): lambda x: x if x > 0 else 0.5 * math.expm1(x),
    ("gelu", ()): lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    ("hard_sigmoid", ()): lambda x: min(max(x + 3, 0), 6) / 6,
    ("hard_swish", ()): lambda x: x * min(max(x + 3, 0), 6) / 6,
    ("hard_tanh", ()): lambda x: min(max(x, -1), 1),
    ("leaky_relu", ()): lambda x: x if x > 0 else 0.01 * x,
    ("leaky_relu", (("negative_slope", 0.2),)): lambda x: x if x > 0 else 0.2 * x,
    ("learnable_swish", ()): lambda x: x * sigmoid(x),
    ("learnable_swish", (("initial_beta", 1.5),)): lambda x: x * sigmoid(1.5 * x),
    ("mish", ()): lambda x: x * math.tanh(math.log1p(math.exp(x))),
    ("prelu", ()): lambda x: x if x > 0 else 0.25 * x,
    ("prelu", (("initial_slope", 0.1),)): lambda x: x if x > 0 else 0.1 * x,
    ("relu", ()): lambda x: max(x, 0),
    ("relu6", ()): lambda x: min(max(x, 0), 6),
    ("selu", ()): lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * math.expm1(x)),
    ("sigmoid", ()): sigmoid,
    ("silu", ()): lambda x: x * sigmoid(x),
    ("softplus", ()): lambda x: math.log1p(math.exp(x)),
    ("softsign", ()): lambda x: x / (1 + abs(x)),
    ("swish", ()): lambda x: x * sigmoid(x),
    ("tanh", ()): math.tanh,
}


@pytest.mark.parametrize(("name", "options"), DEFINITIONS)
def test_equals_its_definition_whatever_labels_and_mode(name, options):
    x = np.linspace(-8, 8, 54).reshape(3, 6, 3)
    act = dpa_jax.activation(name, **dict(options))()
    variables = act.init(jax.random.key(0), jnp.asarray(x, jnp.float32))
    for dtype, tolerance in (jnp.float32, 2e-6), (jnp.bfloat16, 0.03):
        inputs = jnp.asarray(x, dtype)
        expected = np.vectorize(DEFINITIONS[name, options], otypes=[float])(np.asarray(inputs, np.float64))
        y = act.apply(variables, inputs)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance)
        trained, mutated = act.apply(variables, inputs, jnp.zeros(3, int), train=True, mutable=dpa_jax.MUTABLE)
        np.testing.assert_array_equal(trained, y)
        assert not mutated


def test_learned_parameters_are_per_channel_or_shared():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), jnp.float32)
    prelu = dpa_jax.activation("prelu")()
    slopes = jnp.array([0.0, 0.5, -1.0])
    y = prelu.apply({"params": {"negative_slope": slopes}}, x)
    np.testing.assert_allclose(y, np.where(x > 0, x, np.asarray(x) * np.asarray(slopes)), rtol=1e-6)
    beta = jax.grad(lambda beta: dpa_jax.activation("learnable_swish")().apply({"params": {"beta": beta}}, x).sum())
    s = np.asarray(jax.nn.sigmoid(x))
    np.testing.assert_allclose(beta(jnp.ones(())), (np.asarray(x) ** 2 * s * (1 - s)).sum(), rtol=1e-5)


# ---------------- GDN ----------------

C = 5


def test_gdn_equals_its_definition():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, C)).astype(np.float32)
    act = dpa_jax.activations.GDN()
    start = act.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(act.apply({"params": start}, x), x / np.sqrt(1 + 0.1 * x.astype(float) ** 2), rtol=1e-6)

    beta, gamma = rng.uniform(0.5, 2, C), rng.uniform(0, 1, (C, C))  # gamma is not symmetric
    params = {"beta_root": np.sqrt(beta).astype(np.float32), "gamma_root": np.sqrt(gamma).astype(np.float32)}
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, params)
    expected = np.empty(x.shape)
    for position in np.ndindex(x.shape[:-1]):
        v = x[position].astype(float)
        for i in range(C):
            expected[(*position, i)] = v[i] / math.sqrt(beta[i] + sum(gamma[i, j] * v[j] ** 2 for j in range(C)))
    np.testing.assert_allclose(act.apply({"params": params}, x), expected, rtol=1e-5)
    low = act.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=0.05, atol=0.01)


def test_gdn_stays_positive_and_its_weights_come_back_from_their_bounds():
    """Trained to shrink its outputs, then to grow them, and to shrink them again."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, C)), jnp.float32)
    act = dpa_jax.activations.GDN()
    params = act.init(jax.random.key(0), x)["params"]
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(params, direction):
        def step(carry, _):
            params, state = carry
            energy = lambda params: direction * jnp.square(act.apply({"params": params}, x)).sum()  # noqa: E731
            updates, state = optimizer.update(jax.grad(energy)(params), state)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=40)
        return params, act.apply({"params": params}, x)

    params, small = train(params, 1.0)
    off_diagonal = ~np.eye(C, dtype=bool)
    assert (np.asarray(params["gamma_root"])[off_diagonal] > 0.1).all(), "weights of 0 learn"
    params, large = train(params, -1.0)
    assert np.isfinite(large).all()
    assert (jnp.sign(large) == jnp.sign(x)).all()
    assert np.abs(large).sum() > 5 * np.abs(small).sum()
    assert np.asarray(params["beta_root"]).min() < 1e-3, "at its bound"
    _, again = train(params, 1.0)
    assert np.abs(again).sum() < 0.5 * np.abs(large).sum()
    assert np.isfinite(act.apply({"params": params}, jnp.zeros((1, C)))).all()


def test_lower_bound_passes_what_pushes_up():
    x = jnp.array([-1.0, -1.0, 1.0, 1.0])
    _, pullback = jax.vjp(lambda x: lower_bound(x, 0.0), x)
    np.testing.assert_array_equal(pullback(jnp.array([2.0, -2.0, 2.0, -2.0]))[0], [0, -2, 2, -2])


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="GDN: initial_gamma must be at least 0; got -1"):
        dpa_jax.activations.GDN(initial_gamma=-1)
    for name in ("gdn", "prelu", "learnable_swish"):
        with pytest.raises(ValueError, match="the input must be floating; got int32"):
            dpa_jax.activation(name)().init(jax.random.key(0), jnp.ones((2, 3), jnp.int32))
