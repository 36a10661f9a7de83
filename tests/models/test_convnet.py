"""Parts of convolutional networks: BatchNorm, the adaptive pool, the rounding of widths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpa_jax.models.convnet import BatchNorm, adaptive_average_pool, round_channels


def updated(x, variables=None, **options):
    """The normalised batch and the running statistics after it."""
    norm = BatchNorm(use_running_average=False, **options)
    variables = variables or norm.init(jax.random.key(0), x)
    y, new = norm.apply(variables, x, mutable=["batch_stats"])
    return y, new["batch_stats"]


def test_the_running_variance_follows_the_unbiased_one():
    x = np.random.default_rng(0).normal(3, 2, (3, 2, 2, 5)).astype(np.float32)
    y, stats = updated(jnp.asarray(x))
    axes = (0, 1, 2)
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var(axes, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(y, (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5), rtol=1e-4, atol=1e-5)


def test_one_value_a_channel_leaves_the_running_variance():
    norm = BatchNorm(use_running_average=False)
    x = jnp.full((1, 1, 1, 3), 7.0)
    y, stats = updated(x, norm.init(jax.random.key(0), x))
    np.testing.assert_array_equal(y, np.zeros(x.shape))
    np.testing.assert_array_equal(stats["var"], np.ones(3))
    np.testing.assert_allclose(stats["mean"], np.full(3, 0.7), rtol=1e-6)


def test_evaluation_and_initialisation_leave_the_statistics():
    x = jnp.linspace(0, 5, 24).reshape(2, 2, 2, 3)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, use_running_average=False)
    _, new = norm.apply(variables, x, use_running_average=True, mutable=["batch_stats"])
    for stats in (variables["batch_stats"], new["batch_stats"]):
        np.testing.assert_array_equal(stats["mean"], np.zeros(3))
        np.testing.assert_array_equal(stats["var"], np.ones(3))


def test_devices_that_share_a_batch_see_all_of_it():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 2, 3)), jnp.float32)
    variables = BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    mesh = Mesh(jax.devices(), "batch")
    run = functools.partial(updated, variables=variables, axis_name="batch")
    y, stats = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("batch"), out_specs=(P("batch"), P())))(x)
    whole_y, whole = updated(x, variables)
    np.testing.assert_allclose(y, whole_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], whole["var"], rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "side"), [(6, 6, 6), (12, 7, 6), (2, 3, 6), (5, 4, 1)])
def test_adaptive_pool(height, width, side):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    expected = np.empty((2, side, side, 3), np.float32)
    for i in range(side):
        for j in range(side):
            rows = slice(int(np.floor(i * height / side)), int(np.ceil((i + 1) * height / side)))
            columns = slice(int(np.floor(j * width / side)), int(np.ceil((j + 1) * width / side)))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), side), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "width", "rounded"),
    [(32, 1.0, 32), (32, 0.04, 8), (24, 0.5, 16), (96, 0.35, 32), (160, 0.1, 16), (40, 0.47, 24)],
)
def test_widths_are_rounded_to_eights(channels, width, rounded):
    assert round_channels(channels, width) == rounded
