"""DPA, RAA, ARR and AIEC as Flax NNX modules: the same mathematics, the state in ``nnx.Variable``s.

Settings, defaults and errors are those of the linen modules of the same names. What differs is where things are:
the number of channels is given at construction, memories are attributes of the module, `value_and_grad` updates
the backward memories, and `recorded` hands out what the penalties are made of::

    import dpa_jax
    import dpa_jax.nnx
    from flax import nnx

    class Mlp(nnx.Module):
        def __init__(self, *, rngs):
            self.hidden = nnx.Linear(64, 128, rngs=rngs)
            self.act = dpa_jax.nnx.DPA(10, 128, pool="none")
            self.head = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x, labels=None, train=False):
            return self.head(self.act(self.hidden(x), labels, train))

    @nnx.jit
    def train_step(model, optimizer, x, labels):
        def loss_fn(model):
            logits, records = dpa_jax.nnx.recorded(model)(x, labels, train=True)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss + 5.0 * dpa_jax.penalties(records)["channel"]

        loss, gradients = dpa_jax.nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, gradients)
        return loss

`dpa_jax.supervise`, `dpa_jax.penalties` and `dpa_jax.summarize` serve linen and NNX alike.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dpa_jax.activations import aiec, arr, dpa, raa
from dpa_jax.activations import reset_counters as reset_linen_counters
from dpa_jax.activations.aiec import strict_threshold
from dpa_jax.activations.penalties import RECORDS
from dpa_jax.activations.supervision import supervised
from dpa_jax.activations.threshold import threshold
from dpa_jax.checks import check_range

__all__ = [
    "AIEC",
    "ARR",
    "DPA",
    "RAA",
    "ActivityCounter",
    "BackwardMemory",
    "ForwardMemory",
    "PenaltyRecords",
    "ResponseMemory",
    "recorded",
    "reset_counters",
    "value_and_grad",
]


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


class _Recorder(nnx.Module):
    """An activation that tells `recorded` what it saw, in an attribute that is there as long as it wants to know."""

    records: PenaltyRecords

    @property
    def _recording(self) -> bool:
        return hasattr(self, "records")

    def _record(self, record: Any) -> None:
        if self._recording:
            self.records.set_value((*self.records.get_value(), record))


class DPA(_Recorder):
    """Dual-Perspective Activation, `dpa_jax.DPA` as an NNX module.

    Attributes:
        settings: the linen module that holds the settings.
        forward_memory: ``ForwardMemory`` [K, C] float32.
        backward_memory: ``BackwardMemory`` [K, C] float32.
        step: ``ForwardMemory`` [] int32, the training calls modulo the interval.

    Args:
        num_classes: K.
        num_features: C.
        rngs: taken and not used, so that all activations are made alike.
        **options: the other attributes of `dpa_jax.DPA`.

    Raises:
        ValueError: for a setting out of its range, and for inputs or labels whose shape does not fit.
        TypeError: for an option that does not exist.
    """

    def __init__(self, num_classes: int, num_features: int, *, rngs: nnx.Rngs | None = None, **options: Any):
        del rngs
        self.settings = dpa.DPA(num_classes, parent=None, **options)
        check_range("DPA", "num_features", num_features, low=1)
        self.forward_memory = ForwardMemory(jnp.zeros((num_classes, num_features)))
        self.backward_memory = BackwardMemory(jnp.zeros((num_classes, num_features)))
        self.step = ForwardMemory(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As `dpa_jax.DPA`: the threshold of ``x``; ``labels`` [B] and ``train`` move the memories."""
        labels, train = supervised(labels, train)
        if labels is None or not (train or self._recording):
            return threshold(x, self.settings.tau)
        memories = dpa.Memories(self.forward_memory[...], self.backward_memory[...], self.step[...])
        y, memories, record = dpa.observe(self.settings, x, labels, memories, train)
        if train:
            self.forward_memory[...], self.step[...] = memories.forward, memories.step
        self._record(record)
        return y


class RAA(nnx.Module):
    """Response-Adaptive Activation, `dpa_jax.RAA` as an NNX module.

    Attributes:
        settings: the linen module that holds the settings.
        shift_kernel: ``nnx.Param`` [C], or [C, C] of kind ``"elementwise"``; absent of kind ``"scalar"``.
        shift_bias: ``nnx.Param`` [], or [C] of kind ``"elementwise"``.

    Args:
        num_features: C.
        rngs: taken and not used, so that all activations are made alike.
        **options: the attributes of `dpa_jax.RAA`.

    Raises:
        ValueError: for another kind or base, and for an input that is not floating.
        TypeError: for an option that does not exist.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs | None = None, **options: Any):
        del rngs
        self.settings = raa.RAA(parent=None, **options)
        check_range("RAA", "num_features", num_features, low=1)
        # All zeros, whatever the key.
        parameters = self.settings.init(jax.random.key(0), jnp.zeros((1, num_features)))["params"]
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As `dpa_jax.RAA`: the shifted GELU or ReLU of ``x`` [..., C]; ``labels`` and ``train`` change nothing."""
        parameters = {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}
        y: Any = self.settings.apply({"params": parameters}, x, labels, train)
        return y


class ARR(_Recorder):
    """Aggregated Response Regularisation, `dpa_jax.ARR` as an NNX module.

    Attributes:
        settings: the linen module that holds the settings.
        mean: ``ResponseMemory`` [K, C] float32.
        count: ``ResponseMemory`` [K] int32, the samples of each class so far.

    Args:
        num_classes: K.
        num_features: C.
        rngs: taken and not used, so that all activations are made alike.
        **options: the other attributes of `dpa_jax.ARR`.

    Raises:
        ValueError: for a setting out of its range, and for inputs or labels whose shape does not fit.
        TypeError: for an option that does not exist.
    """

    def __init__(self, num_classes: int, num_features: int, *, rngs: nnx.Rngs | None = None, **options: Any):
        del rngs
        self.settings = arr.ARR(num_classes, parent=None, **options)
        check_range("ARR", "num_features", num_features, low=1)
        self.mean = ResponseMemory(jnp.zeros((num_classes, num_features)))
        self.count = ResponseMemory(jnp.zeros((num_classes,), jnp.int32))

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As `dpa_jax.ARR`: ``x``; ``labels`` [B] and ``train`` move the memory."""
        labels, train = supervised(labels, train)
        if labels is None or not (train or self._recording):
            return x
        memory = arr.Memory(self.mean[...], self.count[...])
        memory, record = arr.observe(self.settings, x, labels, memory, train)
        if train:
            self.mean[...], self.count[...] = memory
        self._record(record)
        return x


class AIEC(_Recorder):
    """Activation with Intrinsic-Extrinsic Consensus, `dpa_jax.AIEC` as an NNX module.

    Attributes:
        settings: the linen module that holds the settings.
        decision_weights: ``nnx.Param`` [K, C] float32.
        active: ``ActivityCounter`` [K, C] int32, as are ``inhibited`` [K, C], ``total`` [K] and ``step`` [].

    Args:
        num_classes: K.
        num_features: C.
        rngs: its ``params`` stream draws the decision weights.
        **options: the other attributes of `dpa_jax.AIEC`.

    Raises:
        ValueError: for a setting out of its range, and for inputs or labels whose shape does not fit.
        TypeError: for an option that does not exist.
    """

    def __init__(self, num_classes: int, num_features: int, *, rngs: nnx.Rngs, **options: Any):
        self.settings = aiec.AIEC(num_classes, parent=None, **options)
        check_range("AIEC", "num_features", num_features, low=1)
        shape = (num_classes, num_features)
        self.decision_weights = nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), shape))
        self.active = ActivityCounter(jnp.zeros(shape, jnp.int32))
        self.inhibited = ActivityCounter(jnp.zeros(shape, jnp.int32))
        self.total = ActivityCounter(jnp.ones((num_classes,), jnp.int32))
        self.step = ActivityCounter(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """As `dpa_jax.AIEC`: the threshold of ``x``; ``labels`` [B] and ``train`` move the counters."""
        labels, train = supervised(labels, train)
        if labels is None or not (train or self._recording):
            return strict_threshold(x, self.settings.tau)
        stored = [getattr(self, name) for name in aiec.Counters._fields]
        counters = aiec.Counters(*[variable[...] for variable in stored])
        weights = self.decision_weights[...]
        y, counters, record = aiec.observe(self.settings, x, labels, weights, counters, train)
        if train:
            for variable, value in zip(stored, counters, strict=True):
                variable[...] = value
        self._record(record)
        return y


def recorded(call: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A model's call that also returns what `dpa_jax.penalties` and `dpa_jax.summarize` take.

    Example::

        logits, records = dpa_jax.nnx.recorded(model)(images, labels, train=True)
        loss += 5.0 * dpa_jax.penalties(records)["channel"]

    Args:
        call: an NNX module, or a method of one such as ``model.encode``.

    Returns:
        A function of the same arguments. Without labels the records are empty.

    Raises:
        TypeError: if ``call`` is neither.
    """
    model = call.__self__ if inspect.ismethod(call) else call
    if not isinstance(model, nnx.Module):
        raise TypeError(f"recorded: takes an nnx.Module or a method of one; got {call!r}")

    def recorded_call(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, _Recorder):
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

    Args:
        loss_fn: a function of the model, first, and of what else it takes; returns the loss.
        has_aux: whether it returns (loss, anything else) instead.
        wrt: what to differentiate with respect to, as ``nnx.Optimizer`` takes it.

    Returns:
        A function of the same arguments; its result is that of ``loss_fn`` and the gradients of ``wrt``, for
        ``optimizer.update(model, gradients)``.
    """
    state = nnx.DiffState(0, nnx.Any(wrt, BackwardMemory))
    differentiated = nnx.value_and_grad(loss_fn, argnums=state, has_aux=has_aux)

    @functools.wraps(loss_fn)
    def value_and_gradients(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, gradients = differentiated(model, *args, **kwargs)
        # The gradient with respect to a backward memory is its update.
        update, gradients = nnx.split_state(gradients, BackwardMemory, ...)
        memory = nnx.state(model, BackwardMemory)
        nnx.update(model, jax.tree.map(jnp.add, memory, update))
        return value, gradients

    return value_and_gradients


def reset_counters(model: nnx.Module) -> None:
    """`dpa_jax.reset_counters` of every `AIEC` in the model, in place: whenever it enters evaluation."""
    counters = nnx.state(model, ActivityCounter)
    nnx.replace_by_pure_dict(counters, reset_linen_counters(nnx.to_pure_dict(counters)))
    nnx.update(model, counters)
