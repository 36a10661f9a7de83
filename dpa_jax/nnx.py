"""DPA, RAA, ARR and AIEC as Flax NNX modules: the same mathematics, the state in ``nnx.Variable``s.

Settings, defaults and errors are those of the linen modules of the same names. What differs is where things are: the
number of channels is given at construction, as in ``DPA(num_classes, num_features, **options)``, memories are
attributes of the module, `value_and_grad` updates the backward memories, and `recorded` hands out what penalties are
made of. ``docs/nnx.md`` has an example.
`dpa_jax.supervise`, `dpa_jax.penalties` and `dpa_jax.summarize` serve linen and NNX alike.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from dpa_jax import activations
from dpa_jax.activations.penalties import RECORDS
from dpa_jax.activations.swap import Site, Sites, name_of, replacing, with_replacements
from dpa_jax.checks import INT32, check_call, check_input, check_sizes


class ForwardMemory(nnx.Variable):
    """DPA's memory of pooled inputs, and its count of training calls."""


class BackwardMemory(nnx.Variable):
    """DPA's memory of gradient signs: the gradient with respect to it is its update."""


class ResponseMemory(nnx.Variable):
    """ARR's mean responses and sample counts."""


class ActivityCounter(nnx.Variable):
    """AIEC's counters."""


class PenaltyRecords(nnx.Variable):
    """What an activation saw during one call of `recorded`; no model keeps any."""


_TYPES: dict[str, type[nnx.Variable]] = {
    "params": nnx.Param,
    "forward_memory": ForwardMemory,
    "backward_memory": BackwardMemory,
    "response_memory": ResponseMemory,
    "activity_counters": ActivityCounter,
}


# What flax's bridge makes of these collections.
_BRIDGED: dict[str, type[nnx.Variable]] = {**_TYPES, RECORDS: PenaltyRecords}
for _collection, _type in _BRIDGED.items():
    nnx.register_variable_name(_collection, _type, overwrite=True)


def variable_type(collection: str) -> type[nnx.Variable]:
    """The type of the variables that are in this collection in linen; made where there is none yet."""
    if collection not in _TYPES:
        _TYPES[collection] = type(collection.title().replace("_", ""), (nnx.Variable,), {"__module__": __name__})
    return _TYPES[collection]


class Stateful(nnx.Module):
    """A mechanism as an NNX module.

    Example::

        class Tracker(dpa_jax.nnx.Stateful):
            mechanism = own_mechanism.Tracker

        act = Tracker(num_features=64)

    A subclass sets ``mechanism``, the linen module. Every key of the mechanism's ``kept`` is an attribute, an
    ``nnx.Variable`` of the type that `variable_type` says; ``settings`` is the linen module that holds the settings.

    Args:
        *sizes: ``num_classes``, where the mechanism has it, and ``num_features``, the number of channels.
        rngs: its ``params`` stream draws parameters; needed where the mechanism has some.
        **options: the attributes of the linen module.

    Raises:
        ValueError: for a setting out of its range, and for inputs or labels whose shape does not fit.
        TypeError: for an option that does not exist.
    """

    mechanism: ClassVar[type[activations.Mechanism]]
    records: PenaltyRecords  # there as long as `recorded` wants to know

    def __init__(self, *sizes: int, rngs: nnx.Rngs | None = None, **options: Any):
        owner, fields = self.mechanism.__name__, self.mechanism.__dataclass_fields__
        names = ["num_classes", "num_features"] if "num_classes" in fields else ["num_features"]
        if len(sizes) > len(names):
            raise TypeError(f"{owner}: at most {' and '.join(names)} may be given without a name; got {sizes}")
        by_order = dict(zip(names, sizes, strict=False))
        if twice := by_order.keys() & options.keys():
            raise TypeError(f"{owner}: {min(twice)} is given twice")
        options = by_order | options
        if "num_features" not in options:
            raise TypeError(f"{owner}: num_features is missing, the number of channels")
        if rngs is not None and not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"{owner}: rngs must be nnx.Rngs; got {rngs!r}")
        num_features = options.pop("num_features")
        check_call(owner, self.mechanism, **options)
        self.settings = self.mechanism(parent=None, **options)
        check_sizes(owner, {"num_features": num_features}, high=INT32)
        for key, variable in self.mechanism.kept.items():
            drawn = variable.collection == "params"
            if drawn and rngs is None:
                raise TypeError(f"{owner}: rngs is missing, which draws {key}")
            shape = variable.shape(options.get("num_classes", 0), num_features)
            value = variable.start(rngs.params() if drawn and rngs else None, shape, variable.dtype)
            setattr(self, key, variable_type(variable.collection)(value))

    def __call__(
        self,
        x: jax.Array,
        labels: jax.Array | None = None,
        train: bool = False,
        *,
        pool: str | None = None,
        rows_per_sample: int = 1,
    ) -> jax.Array:
        """As the linen module; what ``train`` updates are attributes of this one."""

        def read() -> dict[str, jax.Array]:
            return {key: getattr(self, key)[...] for key in self.mechanism.kept}

        recording = hasattr(self, "records")
        x, how = self.settings.prepared(x, pool, rows_per_sample)
        y, new, record = self.settings.call(x, labels, train, recording, read, how, rows_per_sample)
        for key, value in new.items():
            getattr(self, key)[...] = value
        if recording and record is not None:
            self.records.set_value((*self.records.get_value(), record))
        return y


class DPA(Stateful):
    """`dpa_jax.DPA` with attributes ``forward_memory`` and ``backward_memory`` [K, C] float32, ``step`` [] int32."""

    mechanism = activations.DPA


class ARR(Stateful):
    """`dpa_jax.ARR` with attributes ``mean`` [K, C] float32 and ``count`` [K] int32."""

    mechanism = activations.ARR


class AIEC(Stateful):
    """`dpa_jax.AIEC` with attributes ``decision_weights`` [K, C] float32, drawn from ``rngs``, and int32 counters.

    They are ``active`` and ``inhibited`` [K, C], ``total`` [K] and ``step`` [].
    """

    mechanism = activations.AIEC


class RAA(nnx.Module):
    """`dpa_jax.RAA`, made as ``RAA(num_features, **options)``.

    ``nnx.Param`` attributes ``shift_kernel`` [C], [C, C] or none and ``shift_bias`` [] or [C], by the kind.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs | None = None, **options: Any):
        del rngs
        self.settings = activations.RAA(parent=None, **options)
        check_sizes("RAA", {"num_features": num_features}, high=INT32)
        # All zeros, whatever the key.
        parameters = self.settings.init(jax.random.key(0), jnp.zeros((1, num_features)))["params"]
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As `dpa_jax.RAA`: the shifted GELU or ReLU of ``x`` [..., C]; ``labels`` and ``train`` change nothing."""
        parameters = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        x, kernel = check_input("RAA", x), parameters.get("shift_kernel")
        if kernel is not None and kernel.shape[0] != x.shape[-1]:
            raise ValueError(f"RAA: it was made for {kernel.shape[0]} features; the input {x.shape} has {x.shape[-1]}")
        y: Any = self.settings.apply({"params": parameters}, x, labels, train)
        return y


def recorded(call: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A model's call, or that of a method as ``model.encode``, which also returns what `dpa_jax.penalties` takes.

    Example::

        logits, records = dpa_jax.nnx.recorded(model)(images, labels, train=True)
        loss += 5.0 * dpa_jax.penalties(records)["channel"]

    Without labels the records are empty. Raises TypeError if ``call`` is no NNX module and no method of one.
    """
    model = call.__self__ if inspect.ismethod(call) else call
    if not isinstance(model, nnx.Module):
        raise TypeError(f"recorded: takes an nnx.Module or a method of one; got {call!r}")

    def recorded_call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Stateful):
                module.records = PenaltyRecords(())
        try:
            result = call(*args, **kwargs)
        finally:
            records = nnx.pop(model, PenaltyRecords)
        return result, {RECORDS: records}

    return recorded_call


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, wrt: nnx.filterlib.Filter = nnx.Param
) -> Callable[..., tuple[Any, Any]]:
    """``nnx.value_and_grad`` that also updates the model's backward memories.

    ``loss_fn`` takes the model first and returns the loss or, with ``has_aux``, (loss, anything else). The result is a
    function of the same arguments. It returns what ``loss_fn`` does and the gradients with respect to ``wrt``, for
    ``optimizer.update(model, gradients)``.

    Raises:
        TypeError: if ``loss_fn`` cannot be called, and if its first argument is no model.
    """
    if not callable(loss_fn):
        raise TypeError(f"value_and_grad: takes a function of a model; got {loss_fn!r}")
    state = nnx.DiffState(0, nnx.Any(wrt, BackwardMemory))
    differentiated = nnx.value_and_grad(loss_fn, argnums=state, has_aux=has_aux)

    @functools.wraps(loss_fn)
    def value_and_gradients(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, gradients = differentiated(model, *args, **kwargs)
        if not isinstance(gradients, nnx.State):
            raise TypeError(f"value_and_grad: the first argument must be an nnx.Module; got a {type(model).__name__}")
        # The gradient with respect to a backward memory is its update.
        update, gradients = nnx.split_state(gradients, BackwardMemory, ...)
        nnx.update(model, jax.tree.map(jnp.add, nnx.state(model, BackwardMemory), update))
        return value, gradients

    return value_and_gradients


def variables(model: nnx.Module) -> dict[str, Any]:
    """The mechanisms' variables as linen has them, by collection, path and name: what `dpa_jax.diagnose` compares.

    Example::

        before = dpa_jax.nnx.variables(model)
        ...  # some training steps
        for line in dpa_jax.diagnose(before, dpa_jax.nnx.variables(model), records):
            print(line)

    Copies, which later steps do not change. Raises TypeError if ``model`` is no NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"variables: takes an nnx.Module; got a {type(model).__name__}")
    found: dict[str, Any] = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Stateful):
            for key, variable in module.mechanism.kept.items():
                node = found.setdefault(variable.collection, {})
                for part in map(str, path):
                    node = node.setdefault(part, {})
                node[variable.name] = jnp.copy(getattr(module, key)[...])
    return found


class ForBridge(nn.Module):
    """A linen model with mechanisms in it, as `flax.nnx.bridge.ToNNX` takes one.

    Example::

        model = nnx.bridge.ToNNX(dpa_jax.nnx.ForBridge(linen_model), rngs=nnx.Rngs(0)).lazy_init(images)

        def loss_fn(model):
            logits = model(images, labels, train=True, mutable=list(dpa_jax.MUTABLE))
            records = {"penalty_records": nnx.pop(model, dpa_jax.nnx.PenaltyRecords)}
            return cross_entropy(logits) + 5.0 * dpa_jax.penalties(records)["channel"]

        loss, gradients = dpa_jax.nnx.value_and_grad(loss_fn)(model)

    NNX has one name space in a module, where linen has one a collection: a backward memory ``mean`` is
    ``backward_mean`` there, and everything is below ``inner``.
    """

    inner: nn.Module

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model itself."""
        call = nn.map_variables(
            lambda inner, *args, **kwargs: inner(*args, **kwargs),
            "backward_memory",
            trans_in_fn=lambda tree: _renamed(tree, lambda name: name.removeprefix("backward_")),
            trans_out_fn=lambda tree: _renamed(tree, lambda name: f"backward_{name}"),
            init=self.is_initializing(),
            mutable=True,
        )
        return call(self.inner, *args, **kwargs)


def _renamed(tree: Any, name: Callable[[str], str]) -> dict[str, Any]:
    """Nested dicts with other names for the arrays in them."""
    return {
        key if isinstance(v, dict) else name(key): _renamed(v, name) if isinstance(v, dict) else v
        for key, v in tree.items()
    }


def reset_counters(model: nnx.Module) -> None:
    """`dpa_jax.reset_counters` of every mechanism in the model, in place: whenever it enters evaluation.

    Raises TypeError if ``model`` is no NNX module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"reset_counters: takes an nnx.Module; got a {type(model).__name__}")
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Stateful):
            for key, variable in module.mechanism.kept.items():
                if variable.resets:
                    old = getattr(module, key)
                    old[...] = variable.start(None, old[...].shape, variable.dtype)


def swap(model: nnx.Module, factory: Callable[..., nnx.Module], *inputs: Any, **named_inputs: Any) -> Sites:
    """Puts stateful activations in place of every `relu`, `gelu` and `silu` that a model's modules hold as attributes.

    Example::

        sites = dpa_jax.nnx.swap(model, functools.partial(dpa_jax.nnx.DPA, 10, pool="auto"), images)
        print(sites)

    Such are ``self.act = nnx.relu``, those in lists, as in `nnx.Sequential`, and in `functools.partial`. The model is
    changed in place; its parameters stay. It is called once, without computing, to see the channels of each.

    Args:
        model: what is changed.
        factory: called with ``num_features=``, the number of channels; makes a module.
        *inputs: what the model is called with; shapes will do, `jax.ShapeDtypeStruct`.
        **named_inputs: likewise, by name.

    Returns:
        The sites by path. A function that no attribute holds, such as that of ``nnx.relu(x)`` in a method, cannot be
        replaced: a warning names the lines that call one. One that the model holds and does not call stays.

    Raises:
        ValueError: if the model calls one of them with different numbers of channels.
    """
    attributes = {
        "/".join(map(str, (*path, name))): (module, name, value)
        for path, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if with_replacements(value) is not value
    }
    calls: dict[str, list[jax.Array]] = {}
    unreached: dict[str, None] = {}

    def seen(path: str, function: Callable[..., jax.Array], x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        calls.setdefault(path, []).append(x)
        return function(x, *args, **kwargs)

    def unreachable(
        name: str, original: Callable[..., jax.Array], x: jax.Array, args: tuple, kwargs: dict
    ) -> jax.Array:
        caller = sys._getframe(2)  # beyond the replacement
        unreached[f"{name} in {caller.f_code.co_filename}, line {caller.f_lineno}"] = None
        return original(x, *args, **kwargs)

    try:
        for path, (module, name, value) in attributes.items():
            watched = functools.partial(seen, path, value) if name_of(value) else with_replacements(value)
            _set(module, name, watched)
        graph, state = nnx.split(model)

        def call(state: Any, inputs: Any, named_inputs: Any) -> None:
            nnx.merge(graph, state)(*inputs, **named_inputs)

        with replacing(unreachable):
            jax.eval_shape(call, state, inputs, named_inputs)
    finally:
        for module, name, value in attributes.values():
            _set(module, name, value)

    sites = Sites()
    for path, given in calls.items():
        channels = {x.shape[-1] for x in given}
        if len(channels) > 1:
            raise ValueError(f"swap: {path} is called with {sorted(channels)} channels; a memory has one number")
        sites[path] = Site(path, name_of(attributes[path][2]) or "", given[0].shape, given[0].dtype)
    for path, site in sites.items():
        module, name, _ = attributes[path]
        _set(module, name, nnx.data(factory(num_features=site.shape[-1])))
    if unreached:
        lines = "; ".join(unreached)
        warnings.warn(f"swap: no attribute of the model holds these, which stay: {lines}", stacklevel=2)
    return sites


def _set(module: nnx.Module, name: str, value: Any) -> None:
    """Sets an attribute, or what a list has at an index."""
    if isinstance(module, nnx.List):
        module[int(name)] = value
    else:
        setattr(module, name, value)
