"""Activations by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dpa_jax.activations.aiec import AIEC
from dpa_jax.activations.baselines import ELU, GDN, Elementwise, LeakyReLU, LearnableSwish, PReLU
from dpa_jax.activations.dpa import DPA
from dpa_jax.activations.raa import RAA
from dpa_jax.checks import check_choice

# Those that are a function and nothing else. The papers' GELU is the exact one, by erf.
_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "hard_tanh": jax.nn.hard_tanh,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "swish": jax.nn.silu,
    "tanh": jax.nn.tanh,
}

ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "aiec": AIEC,
    "dpa": DPA,
    "elu": ELU,
    "gdn": GDN,
    "leaky_relu": LeakyReLU,
    "learnable_swish": LearnableSwish,
    "prelu": PReLU,
    "raa": RAA,
    **{name: functools.partial(Elementwise, function) for name, function in _FUNCTIONS.items()},
}
"""Name -> factory of modules; `register` adds to it."""


def activation(name: str, **options) -> ActivationFactory:
    """A factory of activation modules, as the models' ``activation=`` takes it.

    ========================= =====================================================================
    name                      options
    ========================= =====================================================================
    ``dpa``                   those of `DPA`; ``num_classes`` is required
    ``aiec``                  those of `AIEC`; ``num_classes`` is required
    ``raa``                   ``kind``, ``base`` (`RAA`)
    ``gdn``                   ``initial_gamma`` (`GDN`)
    ``elu``                   ``alpha``
    ``leaky_relu``            ``negative_slope``
    ``prelu``                 ``initial_slope``
    ``learnable_swish``       ``initial_beta``
    none of these             ``gelu`` (exact) ``hard_sigmoid hard_swish hard_tanh mish relu relu6 selu
                              sigmoid silu softplus softsign swish`` (SiLU) ``tanh``
    ========================= =====================================================================

    Args:
        name: one of these or of those that `register` added.
        **options: attributes of the module.

    Returns:
        What makes a module, to be called as ``module(x, labels=None, train=False)``. Where a model wants a
        function instead, it serves as one: ``factory(x)`` makes a module on the spot (`ActivationFactory`), and
        `dpa_jax.supervise` hands it the labels.

    Raises:
        ValueError: for an unknown name (with the nearest ones).
        TypeError: for an option that the activation does not have.
    """
    check_choice("activation", "name", name, sorted(ACTIVATIONS))
    factory = ActivationFactory(functools.partial(ACTIVATIONS[name], **options))
    factory(parent=None)  # a wrong option shows here, not in the middle of a model
    return factory


class ActivationFactory:
    """Makes a module, or, called with an array as a plain activation is, makes one and applies it at once.

    The latter serves models that offer ``act=some_function`` and call ``self.act(x)`` in a compact method: every such
    call becomes a submodule of its own.
    """

    def __init__(self, make: Callable[..., nn.Module]):
        self._make = make

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """``factory(name=...)`` is a module; ``factory(x)`` is ``factory()(x)``."""
        module = self._make(**options)
        return module(*inputs) if inputs else module


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Adds an activation, so that `activation`, the models and the configurations know it by name.

    Example::

        class Snake(nn.Module):
            frequency: float = 1.0

            @nn.compact
            def __call__(self, x, labels=None, train=False):
                return x + jnp.sin(self.frequency * x) ** 2 / self.frequency

        dpa_jax.activations.register("snake", Snake)
        dpa_jax.activations.register("cube", functools.partial(dpa_jax.activations.Elementwise, lambda x: x**3))
        model = dpa_jax.models.create(
            "vit", num_classes=10, activation=dpa_jax.activation("snake", frequency=2.0)
        )

    Args:
        name: not taken yet.
        factory: a linen module class, or what takes its options and, like one, ``name=`` and ``parent=``; its
            modules are called as ``module(x, labels=None, train=False)``. A plain function goes into an
            `Elementwise`.

    Raises:
        ValueError: if the name is taken.
        TypeError: if ``factory`` cannot be called.
    """
    if name in ACTIVATIONS:
        raise ValueError(f"register: the name {name!r} is taken by {ACTIVATIONS[name]}; choose another")
    if not callable(factory):
        raise TypeError(f"register: factory must be a module class or another callable; got {factory!r}")
    ACTIVATIONS[name] = factory
