"""The activations that the papers compare with, under one signature."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import check_input, check_range


class Stateless(nn.Module):
    """Base class of activations without a memory, under the signature that all activations here share.

    Raises:
        ValueError: for a setting that should be a number and is none, and for an input that is not floating [..., C].
    """

    def __post_init__(self):
        for name, field in self.__dataclass_fields__.items():
            if isinstance(field.default, float):
                check_range(type(self).__name__, name, getattr(self, name))
        super().__post_init__()

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Applies the activation to ``x`` [..., C]; ``labels`` and ``train`` change nothing."""
        del labels, train
        return self._activate(check_input(type(self).__name__, x))

    def _activate(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError


class Elementwise(Stateless):
    """A plain function, from an array to one of the same shape, as an activation module."""

    function: Callable[[jax.Array], jax.Array]

    def _activate(self, x: jax.Array) -> jax.Array:
        return self.function(x)


class ELU(Stateless):
    """Exponential linear unit (Clevert et al., 2016): ``x`` where positive, ``alpha * (exp(x) - 1)`` elsewhere."""

    alpha: float = 1.0

    def _activate(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x, self.alpha)


class LeakyReLU(Stateless):
    """Leaky ReLU (Maas et al., 2013): ``x`` where positive, ``negative_slope * x`` elsewhere."""

    negative_slope: float = 0.01

    def _activate(self, x: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(x, self.negative_slope)


class PReLU(Stateless):
    """Parametric ReLU (He et al., 2015): a leaky ReLU that learns each channel's slope.

    Its parameter is ``negative_slope`` [C] float32, at the start ``initial_slope`` everywhere.
    """

    initial_slope: float = 0.25

    @nn.compact
    def _activate(self, x: jax.Array) -> jax.Array:
        slope = self.param("negative_slope", nn.initializers.constant(self.initial_slope), x.shape[-1:], jnp.float32)
        return jnp.where(x >= 0, x, jnp.broadcast_to(slope.astype(x.dtype), x.shape) * x)


class LearnableSwish(Stateless):
    """Swish with its trainable beta (Ramachandran et al., 2017, section 4): ``x * sigmoid(beta * x)``.

    Its parameter is ``beta`` [] float32, at the start ``initial_beta``; with 1 it starts as SiLU.
    """

    initial_beta: float = 1.0

    @nn.compact
    def _activate(self, x: jax.Array) -> jax.Array:
        beta = self.param("beta", nn.initializers.constant(self.initial_beta), (), jnp.float32)
        return x * jax.nn.sigmoid(beta.astype(x.dtype) * x)


@jax.custom_vjp
def lower_bound(x: jax.Array, bound: float) -> jax.Array:
    """``max(x, bound)``; below the bound, a gradient that would push ``x`` up passes all the same (Balle, 2018)."""
    return jnp.maximum(x, bound)


def _lower_bound_forward(x, bound):
    return jnp.maximum(x, bound), x >= bound


def _lower_bound_backward(free, gradient):
    return jnp.where(free | (gradient < 0), gradient, 0.0), None


lower_bound.defvjp(_lower_bound_forward, _lower_bound_backward)

PEDESTAL = 2.0**-36  # GDN's squares are taken above it, so that a weight of 0 still has a gradient
MINIMUM_BETA = 1e-6  # GDN's least beta: an input of zeros must not divide by zero


class GDN(Stateless):
    """Generalised divisive normalisation (Balle et al., 2016): each channel is divided by its neighbours' energy.

    ``y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)`` over the channels, the last axis. As published, what is
    learned are ``beta_root = sqrt(beta + 2^-36)`` [C] and ``gamma_root = sqrt(gamma + 2^-36)`` [C, C] (row i, column
    j), float32, bounded from below by `lower_bound`: beta stays at least 1e-6 and gamma at least 0, and none stays
    there if the loss wants it larger. At the start beta is 1 and gamma the identity times ``initial_gamma``.

    Raises:
        ValueError: for a negative ``initial_gamma``, and for an input that is not floating.
    """

    initial_gamma: float = 0.1

    def __post_init__(self):
        check_range("GDN", "initial_gamma", self.initial_gamma, low=0)
        super().__post_init__()

    @nn.compact
    def _activate(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        beta = self._positive("beta_root", lambda: jnp.ones(channels, jnp.float32), MINIMUM_BETA)
        gamma = self._positive("gamma_root", lambda: self.initial_gamma * jnp.eye(channels, dtype=jnp.float32), 0.0)
        energy = jnp.matmul(jnp.square(x), gamma.T.astype(x.dtype), preferred_element_type=jnp.float32)
        return x * jax.lax.rsqrt(energy + jnp.broadcast_to(beta, energy.shape)).astype(x.dtype)

    def _positive(self, name: str, initial: Callable[[], jax.Array], minimum: float) -> jax.Array:
        root = self.param(name, lambda key: jnp.sqrt(initial() + PEDESTAL))
        return jnp.square(lower_bound(root, (minimum + PEDESTAL) ** 0.5)) - PEDESTAL
