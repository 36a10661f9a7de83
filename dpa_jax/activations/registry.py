"""Activations by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from dpa_jax.activations.checks import check_choice
from dpa_jax.activations.dpa import DPA


class Elementwise(nn.Module):
    """A plain function as an activation module, with the signature that all activations here share.

    Attributes:
        function: from an array to one of the same shape.
    """

    function: Callable[[jax.Array], jax.Array]

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Applies the function to ``x``; ``labels`` and ``train`` change nothing."""
        del labels, train
        return self.function(x)


# The papers' GELU is the exact one, by erf.
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "dpa": DPA,
    "relu": functools.partial(Elementwise, jax.nn.relu),
    "gelu": functools.partial(Elementwise, functools.partial(jax.nn.gelu, approximate=False)),
}


def activation(name: str, **options) -> Callable[..., nn.Module]:
    """A factory of activation modules, as the models' ``activation=`` takes it.

    Args:
        name: a key of the registry: ``"dpa"``, ``"relu"``, ``"gelu"``.
        **options: attributes of the module, such as ``num_classes`` for ``"dpa"``.

    Returns:
        A callable that makes a module; its modules are called as ``module(x, labels=None, train=False)``.

    Raises:
        ValueError: for an unknown name (with the nearest one).
        TypeError: for an option that the activation does not have.
    """
    check_choice("activation", "name", name, ACTIVATIONS)
    factory = functools.partial(ACTIVATIONS[name], **options)
    factory(parent=None)  # a wrong option shows here, not in the middle of a model
    return factory
