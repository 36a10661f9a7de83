"""Activations by name, and what follows from the mechanisms among them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import AssignSubModuleError

from dpa_jax.activations.aiec import AIEC
from dpa_jax.activations.arr import ARR
from dpa_jax.activations.baselines import ELU, GDN, Elementwise, LeakyReLU, LearnableSwish, PReLU
from dpa_jax.activations.dpa import DPA
from dpa_jax.activations.mechanism import Mechanism, Variable, innermost_module
from dpa_jax.activations.penalties import RECORDS
from dpa_jax.activations.raa import RAA
from dpa_jax.checks import add_factory, check_call, check_choice

# Those that are a function and nothing else. The papers' GELU is the exact one, by erf.
_NAMES = "hard_sigmoid hard_swish hard_tanh mish relu relu6 selu sigmoid silu softplus swish tanh"
_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "softsign": jax.nn.soft_sign,
    **{name: getattr(jax.nn, name) for name in _NAMES.split()},
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


def activation(name: str, **options) -> Callable[..., Any]:
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

    ``factory(name=...)`` makes a module, to be called as ``module(x, labels=None, train=False)``. ``factory(x)`` makes
    one and applies it at once, for models that take ``act=some_function``, or set ``self.act`` in ``setup``, and call
    ``self.act(x)``: every such call becomes a submodule of its own, and `dpa_jax.supervise` hands it the labels.

    Raises:
        ValueError: for an unknown name (with the nearest ones).
        TypeError: for an option that the activation does not have, and a registered factory that makes no module.
    """
    check_choice("activation", "name", name, sorted(ACTIVATIONS))
    check_call(f"activation {name!r}", ACTIVATIONS[name], **options)
    make = functools.partial(ACTIVATIONS[name], **options)
    made = make(parent=None)  # a wrong option shows here, not in the middle of a model
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation: the factory of {name!r} must make linen modules; it made a {type(made).__name__}")

    def factory(*inputs: Any, **attributes: Any) -> Any:
        if not inputs:
            return make(**attributes)
        try:
            module = make(**attributes)
        except AssignSubModuleError:  # in a method of a module with `setup`: flax makes submodules in compact ones only
            scope = innermost_module().scope
            module = make(parent=scope.push(scope.default_name(f"{type(made).__name__}_")), **attributes)
        return module(*inputs)

    return factory


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
        model = dpa_jax.models.create("vit", num_classes=10, activation=dpa_jax.activation("snake", frequency=2.0))

    The factory is a linen module class, or what takes its options and, like one, ``name=`` and ``parent=``. Its modules
    are called as ``module(x, labels=None, train=False)``; a plain function goes into an `Elementwise`.

    Raises:
        ValueError: if the name is taken.
        TypeError: if the name is no string or ``factory`` cannot be called.
    """
    add_factory(ACTIVATIONS, name, factory)


def mechanisms() -> list[type[Mechanism]]:
    """`DPA`, `ARR` (which is no activation by name), `AIEC` and those that `register` added."""
    named = [getattr(factory, "func", factory) for factory in ACTIVATIONS.values()]
    found = [DPA, ARR, AIEC, *(m for m in named if isinstance(m, type) and issubclass(m, Mechanism))]
    return list(dict.fromkeys(found))


def mutable_collections() -> tuple[str, ...]:
    """`dpa_jax.MUTABLE`: the collections to pass to ``apply`` as ``mutable=``."""
    found = dict.fromkeys(v.collection for mechanism in mechanisms() for v in mechanism.kept.values())
    # The updates of the two left out are gradients.
    return (*(name for name in found if name not in ("params", "backward_memory")), RECORDS)


def collections() -> tuple[str, ...]:
    """`dpa_jax.COLLECTIONS`: those and ``backward_memory``, as ``nn.scan`` and ``nn.vmap`` want them."""
    return (*mutable_collections(), "backward_memory")


def call_counters() -> set[tuple[str, str]]:
    """The counters of training calls that mechanisms keep, (collection, name): their variables that are one integer."""
    kept = [v for mechanism in mechanisms() for v in mechanism.kept.values() if v.collection != "params"]
    return {(v.collection, v.name) for v in kept if v.axes == "" and jnp.issubdtype(v.dtype, jnp.integer)}


def default_coefficients() -> dict[str, float]:
    """{penalty: its default weight in a loss} of every mechanism; these are the papers' for CIFAR-100."""
    return {name: value for mechanism in mechanisms() for name, value in mechanism.coefficients.items()}


def apply_updates(backward_memory: Any, update: Any) -> Any:
    """The collection ``backward_memory`` with its gradient, a pytree of its structure, added to it.

    As `optax.apply_updates`, and every memory stays within the bounds that its mechanism declares, [-1, 1] for DPA's:
    needed where gradients are summed that were each taken of the same memory, over micro-batches or several calls of
    the model. Their mean needs no bounds. ``docs/drop_in.md`` says what every use of one memory means.

    Raises ValueError if the structures differ.
    """
    bounds = {v.name: v.bounds for mechanism in mechanisms() for v in mechanism.kept.values() if v.bounds}

    def add(path: tuple[Any, ...], memory: jax.Array, change: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        new = memory + change
        return jnp.clip(new, *bounds[name]) if name in bounds else new

    return jax.tree_util.tree_map_with_path(add, backward_memory, update)


def reset_counters(variables: Mapping[str, Any]) -> Any:
    """The return to the start on entering evaluation: of AIEC's counters, and of what else has ``resets`` set.

    Takes what ``model.init`` returned or any part of it, such as the collection ``activity_counters`` alone, and
    returns the same structure. Other variables, the steps and the decision weights among them, stay as they are.
    Raises TypeError if ``variables`` is no mapping.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"reset_counters: takes variables by collection; got a {type(variables).__name__}")
    known = {"params", *collections()}
    groups: list[tuple[str, dict[str, Variable]]] = []  # a collection, and what one mechanism keeps in it, by name
    for mechanism in mechanisms():
        for collection in {v.collection for v in mechanism.kept.values() if v.resets}:
            groups.append((collection, {v.name: v for v in mechanism.kept.values() if v.collection == collection}))

    def reset(node: Mapping[str, Any], collection: str | None) -> Any:
        alike = (kept for own, kept in groups if collection in (own, None) and kept.keys() == node.keys())
        kept, new = next(alike, {}), dict(node)
        for name, child in node.items():
            if isinstance(child, Mapping):
                new[name] = reset(child, collection or (name if name in known else None))
            elif name in kept and kept[name].resets:
                new[name] = kept[name].start(None, child.shape, child.dtype)
        same_mapping: Any = type(node)  # a dict, or flax's FrozenDict
        return same_mapping(new)

    return reset(variables, None)
