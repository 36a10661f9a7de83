"""The Threshold Activation Unit, the function under DPA."""

import jax
import jax.numpy as jnp


def threshold(x: jax.Array, tau: float = 0.0) -> jax.Array:
    """Zero where ``x < tau``, ``x`` elsewhere; the gradient follows the same rule (DPA, section 3).

    Unlike ReLU it passes the gradient at ``x == tau``.

    Args:
        x: array of any shape and floating dtype.
        tau: the threshold, in units of ``x``.

    Returns:
        Array of the shape and dtype of ``x``.
    """
    return jnp.where(x < tau, jnp.zeros((), x.dtype), x)
