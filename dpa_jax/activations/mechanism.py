"""The shape that all mechanisms have, and the linen module that runs any of them.

A mechanism is settings, the variables that it keeps, the penalties that it may add to a loss, and the functions
`plain`, `observe` and `summarize`. `Mechanism`, for linen, and `dpa_jax.nnx.Stateful` make the variables, take labels
from `supervise`, check shapes, write memories back and record for `dpa_jax.penalties`.
"""

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.linen import module as linen_module
from jax.sharding import PartitionSpec

from dpa_jax.activations import memory as mem
from dpa_jax.activations.penalties import RECORDS, Record, Summary
from dpa_jax.activations.sharding import on_auto_axes, spec, spec_of_samples
from dpa_jax.activations.supervision import supervised
from dpa_jax.checks import INT32, check_choice, check_input, check_labels, check_sizes

Pool = Callable[[jax.Array], jax.Array]
"""From an array of the input's shape to one float32 vector per sample, [B, C]."""
State = Mapping[str, jax.Array]
Observed = tuple[jax.Array, dict[str, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable that a mechanism keeps.

    Attributes:
        collection: ``"params"`` for what is learned, ``"backward_memory"`` for what its own gradient updates
            (`dpa_jax.activations.memory.remember_gradient`), any other name for what `Mechanism.observe` returns anew.
        name: its name in the collection.
        axes: its shape in letters, ``"K"`` for the classes, ``"C"`` for the channels; ``""`` for a scalar.
        start: the initializer, called as ``start(key, shape, dtype)``; the key is None outside of ``params``.
        resets: whether `dpa_jax.reset_counters` returns it to its start.
        bounds: the least and the greatest value that `dpa_jax.apply_updates` leaves in it.
    """

    collection: str
    name: str
    axes: str = "KC"
    dtype: Any = jnp.float32
    start: Callable[..., jax.Array] = nn.initializers.zeros
    resets: bool = False
    bounds: tuple[float, float] | None = None

    def shape(self, num_classes: int, channels: int) -> tuple[int, ...]:
        """Its shape for K classes and C channels."""
        return tuple({"K": num_classes, "C": channels}[axis] for axis in self.axes)


class Mechanism(nn.Module):
    """Base class of `DPA`, `ARR`, `AIEC` and of your own: ``docs/own_mechanism.md`` writes one.

    A subclass declares its settings as attributes, as any linen module does. ``num_classes``, ``pool`` and
    ``axis_name`` are known here: declare those that it has. It sets the class attributes below and writes `plain`,
    `observe`, `summarize` and, where settings can be wrong, `check`: functions of their arguments and the settings,
    which make no variables and no submodules.

    Class attributes:
        kept: {key: `Variable`}, what it keeps. The keys are those of `observe`'s state, and attributes in NNX.
        coefficients: {penalty: its default weight in a loss}, for every penalty that `summarize` may return.
        class_wise: whether it needs labels. Without labels a class-wise mechanism is its plain function.
    """

    kept: ClassVar[Mapping[str, Variable]] = {}
    coefficients: ClassVar[Mapping[str, float]] = {}
    class_wise: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any):
        for name in ("check", "plain", "observe"):
            if name in vars(cls):
                nn.nowrap(vars(cls)[name])  # functions of the settings: flax need not name or trace them
        super().__init_subclass__(**options)

    def __post_init__(self):
        owner = type(self).__name__
        for name in self.__dataclass_fields__:
            if isinstance(value := getattr(self, name, None), np.generic):
                # NumPy's numbers have a dtype, which would spread.
                object.__setattr__(self, name, value.item())
        if hasattr(self, "num_classes"):
            check_sizes(owner, {"num_classes": self.num_classes}, high=INT32)
        if not isinstance(getattr(self, "axis_name", None), Hashable):
            raise TypeError(f"{owner}: axis_name must be the name of a mapped axis; got {self.axis_name!r}")
        if getattr(self, "pool", None) is not None:
            check_choice(owner, "pool", self.pool, mem.POOLS)
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Raises ValueError for settings outside of their range."""

    def plain(self, x: jax.Array) -> jax.Array:
        """The activation alone, as inference has it: [...] -> [...]."""
        raise NotImplementedError

    def observe(self, x: jax.Array, labels: Any, state: State, train: bool, pool: Pool) -> Observed:
        """The activation with its state.

        Args:
            x: the input, [B, ..., C], or [B * R, ..., C] where R rows belong to a sample, or [B, N, ..., C] where
                samples are counted by two axes, or more; then there are B * N samples, here called B.
            labels: [B] integers, -1 for samples without one; None only where the mechanism is not class-wise.
            state: {key of ``kept``: array}, before this batch.
            train: whether the state is updated.
            pool: makes one float32 vector per sample, [B, C], of anything of ``x``'s shape.

        Returns:
            The output; {key: new array} of what changes, without ``params``, and of ``backward_memory`` what
            `remember_gradient` returns, for the next use; and a pytree of arrays for `summarize`.
        """
        raise NotImplementedError

    @staticmethod
    def summarize(records: Sequence[Record]) -> Summary:
        """What all modules of this class saw in one call of the model, summed up.

        Records of equal shapes and settings are one: each array of ``record.seen`` has a leading axis of layers, and
        ``record.settings`` is the mechanism.
        """
        del records
        return Summary()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        labels: jax.Array | None = None,
        train: bool = False,
        *,
        pool: str | None = None,
        rows_per_sample: int = 1,
        samples: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the activation and, given labels, takes part in the penalties.

        Args:
            x: [B, ..., C], of a rank that the pool takes; any floating dtype. The output is like it.
            labels: [B] integers, -1 for samples to be left out; [B, N] where a sample is a token of ``x`` [B, N, C] (or
                a node, a box), so of several axes what several axes count. None: those of `dpa_jax.supervise`, and
                outside of it the plain activation and nothing else.
            train: whether the state is updated. Without, it is read for the penalties where the call's ``mutable``
                asks for them.
            pool: as the attribute, where that is not set.
            rows_per_sample: R, where ``x`` has B * R rows, R after each other for each sample.
            samples: int [M], the positions of the samples that memories and penalties are about, in ascending order;
                positions from B on are none. None: all B, of which those that are labelled -1 cost as much as others.

        Raises:
            ValueError: for labels, inputs or memories whose shapes or dtypes do not fit, a collection that is missing
                or that ``train`` updates and that is not mutable, or a pool that both the attribute and the call name.
        """
        x, how = self.prepared(x, pool, rows_per_sample)
        if self.is_initializing():
            if hasattr(self, "pool"):
                how(x)  # a wrong shape shows here, not in the first training step
            for variable in self.kept.values():
                if not self.is_mutable_collection(variable.collection):
                    where = f"{type(self).__name__} {'/'.join(self.path)!r}"
                    raise ValueError(
                        f"{where}: {variable.collection!r} is not passed on to it. "
                        "nn.scan and nn.vmap need an axis for every collection: "
                        "variable_axes={..., **dict.fromkeys(dpa_jax.COLLECTIONS, 0)}"
                    )
                shape = variable.shape(getattr(self, "num_classes", 0), x.shape[-1])
                if variable.collection == "params":
                    self.param(variable.name, variable.start, shape, variable.dtype)
                else:
                    self.variable(variable.collection, variable.name, variable.start, None, shape, variable.dtype)
            return self.plain(x)

        stored: dict[str, nn.Variable] = {}
        earlier = self._recorded()

        def read() -> dict[str, jax.Array]:
            for key, variable in self.kept.items():
                if not self.has_variable(variable.collection, variable.name):
                    raise ValueError(
                        f"{type(self).__name__} {'/'.join(self.path)!r}: {variable.collection!r} is missing from the "
                        "variables. Pass every collection that model.init returned to model.apply."
                    )
                stored[key] = self.variable(variable.collection, variable.name, None)
            return {key: variable.value for key, variable in stored.items()} | earlier.used

        recording = self.is_mutable_collection(RECORDS)
        y, new, record = self.call(x, labels, train, recording, read, how, rows_per_sample, samples)
        used = {}
        for key, value in new.items():
            collection = self.kept[key].collection
            if collection == "backward_memory" and not self.is_mutable_collection(collection):
                used[key] = value  # its value is the old one: only the next use in this call of the model wants it
                continue
            if not self.is_mutable_collection(collection):
                raise ValueError(
                    f"{type(self).__name__} {'/'.join(self.path)!r}: training updates {collection!r}, which is not "
                    "mutable. Pass mutable=dpa_jax.MUTABLE to model.apply."
                )
            stored[key].value = value
        if record is not None and recording:
            self.put_variable(RECORDS, "record", earlier.replace(records=(*earlier.records, record), used=used))
        return y

    @nn.nowrap
    def prepared(
        self, x: Any, pool: str | None, rows_per_sample: int
    ) -> tuple[jax.Array, functools.partial[jax.Array]]:
        """The checked input of a call, and its pool: the attribute's or the call's, ``"auto"`` where neither says."""
        owner, attribute = type(self).__name__, getattr(self, "pool", None)
        x = check_input(owner, x)
        if pool is not None:
            check_choice(owner, "pool", pool, mem.POOLS)
        how = "auto" if attribute is None and pool is None else nn.merge_param("pool", attribute, pool)
        check_sizes(owner, {"rows_per_sample": rows_per_sample}, high=INT32)
        if x.shape[0] % rows_per_sample:
            raise ValueError(f"{owner}: {rows_per_sample} rows per sample do not divide the input's {x.shape[0]}")
        return x, functools.partial(mem.pool, how=how, rows_per_sample=rows_per_sample)

    @nn.nowrap
    def call(
        self,
        x: jax.Array,
        labels: Any,
        train: bool,
        recording: bool,
        read: Callable[[], State],
        pool: functools.partial[jax.Array],
        rows: int,
        chosen: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array], Record | None]:
        """`plain`, or `observe` with everything checked, whoever keeps the state; the first arguments are `__call__`'s.

        ``recording`` says whether somebody wants the record, ``read()`` gives the state, ``x`` and ``pool`` are of
        `prepared`. Returns the output, {key: new array} of the state that has changed, and the record, None of a plain
        call.
        """
        asked = train and not self.class_wise  # what needs no labels need not wait for `supervise`
        labels, train = supervised(labels, train)
        train = train or asked
        if (labels is None and self.class_wise) or not (train or recording):
            return self.plain(x), {}, None
        owner, state, samples = type(self).__name__, read(), x.shape[0] // rows
        if train and getattr(self, "axis_name", ()) is None:
            check_no_mapped_axis(owner)
        if labels is not None:
            labels = check_labels(owner, x, labels, rows)
            samples = labels.size
            if labels.ndim > 1:
                pool = functools.partial(pool, sample_axes=labels.ndim)
            elif hasattr(self, "pool") and pool.keywords["how"] == "auto" and x.ndim == 3 and rows == 1:
                warn_of_first_token(owner, x.shape[1])
        of_x: Pool = pool
        if chosen is not None and labels is not None:
            labels = labels.reshape(samples).at[chosen].get(mode="fill", fill_value=-1)
            samples, of_x = chosen.size, lambda array: pool(array).at[chosen].get(mode="fill", fill_value=0.0)
        state = {key: self._fitting(key, value, x.shape[-1]) for key, value in state.items()}

        def observe(x: jax.Array, labels: Any, state: State) -> Observed:
            return self.observe(x, None if labels is None else labels.reshape(samples), state, train, of_x)

        specs = functools.partial(_specs, x, state, rows, samples)
        y, new, seen = on_auto_axes(observe, x, labels, state, specs=specs)
        settings = self.clone(parent=None, name=None)
        return y, new if train else {}, Record(settings, seen, labels, jnp.zeros((), jnp.float32))

    @nn.nowrap
    def _fitting(self, key: str, value: Any, channels: int) -> jax.Array:
        """A variable's value in its dtype; ValueError unless it has its shape and is of its kind, float or integer."""
        owner, variable = type(self).__name__, self.kept[key]
        shape = variable.shape(getattr(self, "num_classes", 0), channels)
        if jnp.shape(value) != shape:
            raise ValueError(
                f"{owner}: an input of {channels} channels needs a memory of shape {shape}; "
                f"the one given has {jnp.shape(value)} ({key})"
            )
        found, wanted = jnp.result_type(value), jnp.dtype(variable.dtype)
        if jnp.issubdtype(found, jnp.floating) != jnp.issubdtype(wanted, jnp.floating):
            raise ValueError(f"{owner}: the memory {key} must be {wanted}; the one given is {found}")
        return jnp.asarray(value, wanted)

    def _recorded(self) -> "_Recorded":
        """What earlier uses in this call of the model recorded; nothing of an earlier call."""
        model = weakref.ref(outermost_module())
        found = self.get_variable(RECORDS, "record") if self.has_variable(RECORDS, "record") else None
        return found if found is not None and found.call.model() is model() else _Recorded((), {}, _Call(model))


def _specs(x: jax.Array, state: State, rows_per_sample: int, samples: int, observed: Observed) -> Any:
    """How what `Mechanism.observe` returned is spread over Explicit axes: like ``x``, the state, and the samples."""
    _, new, seen = observed
    over = spec_of_samples(x, rows_per_sample)
    seen = jax.tree.map(lambda leaf: over if jnp.shape(leaf)[:1] == (samples,) else PartitionSpec(), seen)
    return spec(x), {key: spec(state[key]) for key in new}, seen


def check_no_mapped_axis(owner: str) -> None:
    """Raises ValueError inside of ``shard_map`` and ``pmap``, where a module sees the samples of one device."""
    if axes := jax.sharding.get_abstract_mesh().manual_axes:
        axis = next((repr(axis) for axis in axes if not str(axis).startswith("_")), "the axis_name of pmap")
        raise ValueError(
            f"{owner}: inside of shard_map or pmap each device would train a memory of its own samples. Set "
            f"axis_name={axis} for one memory of all, or axis_name=() if that is meant"
        )


@functools.cache
def warn_of_first_token(owner: str, tokens: int) -> None:
    """Warns, once, that the first of so many tokens is a sample's, unless the others may be those of a square image."""
    if tokens and math.isqrt(tokens - 1) ** 2 != tokens - 1:
        warnings.warn(
            f"{owner}: the first of {tokens} tokens is taken for the sample. If it is a class token, set pool='token'; "
            "if there is none, set pool='mean', or give labels [B, N], one for each token",
            stacklevel=2,
        )


def outermost_module() -> nn.Module:
    """The module whose ``apply`` is running. Flax makes it anew for each ``apply``, and keeps it nowhere public."""
    return next(module for module in linen_module._context.module_stack if module is not None)


def innermost_module() -> Any:
    """The module whose method is running; None outside of all."""
    return linen_module._context.module_stack[-1]


@dataclasses.dataclass(frozen=True)
class _Call:
    """Which ``apply`` records were made in. Equal to any other: it must not make JAX compile anew."""

    model: weakref.ref[nn.Module] = dataclasses.field(compare=False)


class _Recorded(struct.PyTreeNode):
    """The records of one module in one call of the model, one for each time that the module was called.

    ``used`` are the backward memories for its next use, by their keys.
    """

    records: tuple[Record, ...]
    used: dict[str, jax.Array]
    call: _Call = struct.field(pytree_node=False)
