"""RAA against the authors' program, its start, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpa_jax

RECORDED = {
    "RAA": {"kind": "vector", "base": "gelu"},
    "RAA_CNN": {"kind": "vector", "base": "gelu"},
    "RAA2": {"kind": "vector", "base": "relu"},
    "RAA2_CNN": {"kind": "vector", "base": "relu"},
    "SimpleRAA": {"kind": "scalar", "base": "gelu"},
    "SimpleRAA2": {"kind": "scalar", "base": "relu"},
    "ElementWiseRAA": {"kind": "elementwise", "base": "gelu"},
    "ElementWiseRAA2": {"kind": "elementwise", "base": "relu"},
}


def ours(recorded, kind, which):
    """The recorded parameters or gradients, named and shaped as here."""
    if kind == "scalar":
        return {"shift_bias": recorded[f"{which}/shift"].reshape(())}
    kernel, bias = recorded[f"{which}/shift_proj_weight"], recorded[f"{which}/shift_proj_bias"]
    if kind == "vector":
        return {"shift_kernel": kernel[0], "shift_bias": bias.reshape(())}
    return {"shift_kernel": kernel.T, "shift_bias": bias}


@pytest.mark.core
@pytest.mark.parametrize("name", RECORDED)
def test_equals_the_authors_program(golden, name):
    everything = golden("raa")
    recorded = {key.removeprefix(f"{name}/"): value for key, value in everything.items() if key.startswith(f"{name}/")}
    x, cotangent, y, grad_x = everything["x"], everything["cotangent"], recorded["y"], recorded["grad_x"]
    if name.endswith("_CNN"):  # channels second there
        x, cotangent = everything["x_cnn_nchw"], everything["cotangent_cnn_nchw"]
        x, cotangent, y, grad_x = (np.moveaxis(a, 1, -1) for a in (x, cotangent, y, grad_x))
    act = dpa_jax.RAA(**RECORDED[name])
    params = ours(recorded, act.kind, "param")
    fresh = act.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)

    def vjp(params, x, cotangent):
        out, pullback = jax.vjp(lambda params, x: act.apply({"params": params}, x), params, x)
        return out, *pullback(cotangent)

    out, _, grad = jax.jit(vjp)(params, x, cotangent)
    np.testing.assert_allclose(out, y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, grad_x, rtol=0, atol=1e-6)
    # The parameters' gradients are sums over all positions, of up to 66: in float64, so that only the recording rounds.
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, cotangent))
        _, grads, _ = jax.jit(vjp)(*exact)
        for key, expected in ours(recorded, act.kind, "grad").items():
            np.testing.assert_allclose(grads[key], expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", ["vector", "scalar", "elementwise"])
def test_starts_as_its_base(kind):
    x = jnp.linspace(-6, 6, 4 * 3 * 5).reshape(4, 3, 5)
    for base, function in {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}.items():
        act = dpa_jax.RAA(kind, base)
        variables = act.init(jax.random.key(0), x)
        assert not any(leaf.any() for leaf in jax.tree.leaves(variables))
        np.testing.assert_allclose(act.apply(variables, x), function(x), rtol=1e-6)
        labelled, mutated = act.apply(variables, x, jnp.zeros(4, int), train=True, mutable=dpa_jax.MUTABLE)
        np.testing.assert_array_equal(labelled, act.apply(variables, x))
        assert not mutated


@pytest.mark.parametrize("kind", ["vector", "scalar", "elementwise"])
def test_bfloat16_is_computed_with_float32_parameters(kind):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.bfloat16)
    act = dpa_jax.RAA(kind)
    params = act.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    y = act.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    exact = act.apply({"params": params}, x.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vectors"}, "kind must be one of vector, scalar, elementwise; got 'vectors'. Did you mean 'vector'"),
        ({"base": "glu"}, "base must be one of gelu, relu; got 'glu'. Did you mean 'gelu'"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.RAA(**options)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="RAA: the input must be floating; got int32"):
        dpa_jax.RAA().init(jax.random.key(0), jnp.ones((2, 3), jnp.int32))
