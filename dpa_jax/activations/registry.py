"""Activations by name, and what follows from the mechanisms among them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from dpa_jax.activations.aiec import AIEC
from dpa_jax.activations.arr import ARR
from dpa_jax.activations.baselines import ELU, GDN, Elementwise, LeakyReLU, LearnableSwish, PReLU
from dpa_jax.activations.dpa import DPA
from dpa_jax.activations.mechanism import Mechanism, Variable
from dpa_jax.activations.penalties import RECORDS
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


def mechanisms() -> list[type[Mechanism]]:
    """`DPA`, `ARR` (which is no activation by name), `AIEC` and those that `register` added."""
    named = [getattr(factory, "func", factory) for factory in ACTIVATIONS.values()]
    return list(
        dict.fromkeys([DPA, ARR, AIEC, *(m for m in named if isinstance(m, type) and issubclass(m, Mechanism))])
    )


def mutable_collections() -> tuple[str, ...]:
    """`dpa_jax.MUTABLE`: the collections to pass to ``apply`` as ``mutable=``."""
    gradients = ("params", "backward_memory")  # whose updates are gradients
    return (*dict.fromkeys(v.collection for v in _kept() if v.collection not in gradients), RECORDS)


def collections() -> tuple[str, ...]:
    """`dpa_jax.COLLECTIONS`: those and ``backward_memory``, as ``nn.scan`` and ``nn.vmap`` want them."""
    return (*mutable_collections(), "backward_memory")


def default_coefficients() -> dict[str, float]:
    """{penalty: its default weight in a loss} of every mechanism; these are the papers' for CIFAR-100."""
    return {name: value for mechanism in mechanisms() for name, value in mechanism.coefficients.items()}


def reset_counters(variables: Mapping[str, Any]) -> Any:
    """The return to the start on entering evaluation: of AIEC's counters, and of what else has ``resets`` set.

    Args:
        variables: what ``model.init`` returned or any part of it, such as the collection ``activity_counters``
            alone; other variables, the steps and the decision weights among them, stay as they are.

    Returns:
        The same structure.
    """
    groups: dict[str, list[dict[str, Variable]]] = {}
    for mechanism in mechanisms():
        for collection in {v.collection for v in mechanism.kept.values() if v.resets}:
            kept = {v.name: v for v in mechanism.kept.values() if v.collection == collection}
            groups.setdefault(collection, []).append(kept)

    def reset(node: Mapping[str, Any], collection: str | None) -> Any:
        among = groups.get(collection, []) if collection else [kept for some in groups.values() for kept in some]
        kept = next((kept for kept in among if kept.keys() == node.keys()), {})
        new = {}
        for name, child in node.items():
            if isinstance(child, Mapping):
                new[name] = reset(child, collection or (name if name in known else None))
            elif name in kept and kept[name].resets:
                new[name] = kept[name].start(None, child.shape, child.dtype)
            else:
                new[name] = child
        same_mapping: Any = type(node)  # a dict, or flax's FrozenDict
        return same_mapping(new)

    known = {"params", *collections()}
    return reset(variables, None)


def _kept() -> Iterator[Variable]:
    for mechanism in mechanisms():
        yield from mechanism.kept.values()
