"""Parts that models share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpa_jax
from dpa_jax.models.layers import activate

K, B, ROWS, N, C = 3, 6, 4, 5, 8
LABELS = jnp.arange(B) % K


class Place(nn.Module):
    """One place of a model whose rows are patches, ROWS of them for each sample, as TNT's inner blocks have them."""

    module: nn.Module

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        return activate(self.module, x, labels, train, "mean", rows_per_sample=ROWS)


def memory_of(module, x):
    """The forward memory after one training call."""
    variables = Place(module).init(jax.random.key(0), x)
    _, mutated = Place(module).apply(variables, x, LABELS, True, mutable=dpa_jax.MUTABLE)
    return mutated["forward_memory"]["module"]["mean"]


@pytest.mark.parametrize(("pool", "shape"), [(None, (N, C)), ("mean", (N, C)), ("token", (C,))])
def test_a_place_says_how_to_pool_unless_the_mechanism_does(pool, shape):
    x = np.random.default_rng(0).normal(size=(B * ROWS, *shape)).astype(np.float32)
    found = memory_of(dpa_jax.DPA(K, momentum=1.0, update_interval=1, pool=pool), x)
    samples = x.reshape(B, ROWS, *shape)
    vectors = samples[:, 0] if pool == "token" else samples.mean(axis=(1, 2))
    np.testing.assert_allclose(found, vectors[-K:], rtol=1e-5)  # at momentum 1 a class's last sample is all of its row


def test_other_activations_are_called_plainly():
    x = jnp.linspace(-1, 1, B * ROWS * N * C).reshape(B * ROWS, N, C)
    np.testing.assert_array_equal(Place(dpa_jax.activation("relu")()).apply({}, x, LABELS, True), jnp.maximum(x, 0))
