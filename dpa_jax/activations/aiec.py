"""AIEC: Activation with Intrinsic-Extrinsic Consensus (Qiu et al., ICML 2026)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpa_jax.activations import memory as mem
from dpa_jax.activations.penalties import RECORDS, Ratio, Summary, stack_alike
from dpa_jax.activations.supervision import supervised
from dpa_jax.checks import (
    check_choice,
    check_labels,
    check_memory,
    check_range,
    stored_variable,
)


@struct.dataclass
class AIECRecord:
    """What one AIEC saw in one call. Leading axes, as ``nn.scan`` adds them, are layers.

    Attributes:
        values: [B, C] float32, pooled activations, with gradient.
        logits: [B, K] float32, the layer's own decision, with gradient.
        irrelevant: [K, C] bool, the channels that both views find irrelevant to a class.
        labels: [B] int32.
        axis_name: of the module.
    """

    values: jax.Array
    logits: jax.Array
    irrelevant: jax.Array
    labels: jax.Array
    axis_name: str | None = struct.field(pytree_node=False)

    @staticmethod
    def summarize(records: list[AIECRecord]) -> Summary:
        """The decisions' cross-entropy over layers and samples; the mean of a^2 over all masked entries."""
        aux = gate = masked = Ratio.zero()
        for group in stack_alike(records):
            labelled = mem.valid_labels(group.labels, group.logits.shape[-1])
            labels = jnp.where(labelled, group.labels, 0)
            entropies = optax.softmax_cross_entropy_with_integer_labels(group.logits, labels)
            samples = jnp.sum(labelled, dtype=jnp.float32)
            aux += Ratio(jnp.sum(jnp.where(labelled, entropies, 0.0)), samples).share(group.axis_name)
            mask = consensus_mask(group)
            count = jnp.sum(mask, dtype=jnp.float32)
            total = jnp.sum(jnp.where(mask, jnp.square(group.values), 0.0))
            gate += Ratio(total, count).share(group.axis_name)
            masked += Ratio(count, samples * group.values.shape[-1]).share(group.axis_name)
        return Summary(terms={"aux": aux, "gate": gate}, masked=masked)


def consensus_mask(record: AIECRecord) -> jax.Array:
    """The channels irrelevant to each sample's class, [L, B, C] bool of a record of L layers; False if unlabelled."""
    return jax.vmap(mem.recall)(record.irrelevant, record.labels)


def count_activity(
    values: jax.Array, logits: jax.Array, labels: jax.Array, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over the samples that the layer itself classifies correctly, how often each channel was on and off.

    Args:
        values: [B, C], pooled activations, at least 0.
        logits: [B, K].
        labels: [B] integers; invalid ones are never classified correctly.
        axis_name: the mapped axis over which the batch is spread, if any.

    Returns:
        Active and inhibited, [K, C] int32, and total, [K] int32.
    """
    correct = jnp.argmax(logits, axis=-1) == labels
    classes = jnp.arange(logits.shape[-1])
    members = (labels[:, None] == classes[None, :]) & correct[:, None]
    # Zeros and ones are exact in every precision of the product, and so are their sums up to 2^24.
    active = jnp.matmul(members.T.astype(jnp.float32), (values > 0).astype(jnp.float32)).astype(jnp.int32)
    active, total = mem.sum_devices((active, jnp.sum(members, axis=0, dtype=jnp.int32)), axis_name)
    return active, total[:, None] - active, total


class Counters(NamedTuple):
    """An AIEC's counters, int32: [K, C], [K, C], [K] and []."""

    active: jax.Array
    inhibited: jax.Array
    total: jax.Array
    step: jax.Array


def strict_threshold(x: jax.Array, tau: float) -> jax.Array:
    """The threshold of AIEC: 0 where ``x <= tau``, ``x`` elsewhere, and the gradient likewise."""
    return jnp.where(x <= tau, jnp.zeros((), x.dtype), x)


def observe(
    act: AIEC, x: jax.Array, labels: jax.Array, weights: jax.Array, counters: Counters, train: bool
) -> tuple[jax.Array, Counters, AIECRecord]:
    """AIEC with labels, as a function of its state.

    Args:
        act: the settings.
        x: pre-activations, of the shape that the pool takes.
        labels: [B] integers.
        weights: [K, C] float32, the decision weights.
        counters: before this batch.
        train: whether the counters are updated.

    Returns:
        The output, the counters after this batch and the record.
    """
    y, labels = strict_threshold(x, act.tau), jnp.asarray(labels)
    check_labels("AIEC", x, labels)
    check_memory("AIEC", counters.active, act.num_classes, x.shape[-1])
    values = mem.pool(y, act.pool)
    logits = jnp.matmul(values, weights.T, precision=jax.lax.Precision.HIGHEST)
    if train:
        step = (counters.step + 1) % act.update_interval
        counted = count_activity(values, logits, labels, act.axis_name)
        active, inhibited, total = (
            old + jnp.where(step == 0, new, 0) for old, new in zip(counters[:3], counted, strict=True)
        )
        counters = Counters(active, inhibited, total, step)
    # The sign of (active - inhibited) / total, of which the total is positive.
    irrelevant = (counters.active <= counters.inhibited) & (weights <= 0)
    return y, counters, AIECRecord(values, logits, irrelevant, labels, act.axis_name)


class AIEC(nn.Module):
    """Activation with Intrinsic-Extrinsic Consensus: a threshold whose channels are counted and judged.

    The output is ``x`` where ``x > tau`` and 0 elsewhere, always. In training, two views judge each channel for
    each class: *intrinsic* counters of how often it is on or off for the class's samples, and *extrinsic* weights
    of a linear decision that the layer learns from its own activations (the *aux* penalty). Where neither
    finds it relevant to a sample's class, the *gate* penalty pushes its activation down (`dpa_jax.penalties`).

    Example::

        act = dpa_jax.AIEC(num_classes=10)
        x, labels = jnp.ones((8, 17, 64)), jnp.zeros(8, int)
        variables = act.init(jax.random.key(0), x)
        y, mutated = act.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        terms = dpa_jax.penalties(mutated)
        penalty = terms["aux"] + 200.0 * terms["gate"]
        counters = mutated["activity_counters"]  # for the next step
        variables = dpa_jax.reset_counters(variables)  # whenever the model enters evaluation: once an epoch

    Variables:
        ``params``: ``decision_weights`` [K, C] float32.
        ``activity_counters``, int32: ``active`` and ``inhibited`` [K, C], ``total`` [K], from 1, and ``step`` [],
        the training calls modulo the interval.

    Attributes:
        num_classes: K.
        tau: the threshold, at least 0.
        update_interval: samples are counted in every ``update_interval``-th training call.
        pool: how an output becomes one vector per sample: ``"token"`` the first token of [B, N, C], ``"mean"``
            over the middle axes of [B, ..., C], ``"none"`` for [B, C].
        axis_name: inside of ``shard_map`` or ``pmap``, the mapped axis over which the batch is spread, as flax's
            ``BatchNorm`` has it: memories and penalties are those of the devices' batches one after the other.
            Penalties are such that their mean over the devices, and that of their gradients, is the whole batch's.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    tau: float = 0.0
    update_interval: int = 5
    pool: str = "token"
    axis_name: str | None = None

    def __post_init__(self):
        check_range("AIEC", "num_classes", self.num_classes, low=1)
        check_range("AIEC", "tau", self.tau, low=0)
        check_range("AIEC", "update_interval", self.update_interval, low=1)
        check_choice("AIEC", "pool", self.pool, mem.POOLS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Applies the threshold and, given labels, takes part in the penalties.

        Args:
            x: pre-activations, of the shape that ``pool`` takes; any floating dtype.
            labels: [B] integers, -1 for samples to be left out. None: those of `dpa_jax.supervise`, and outside of
                it the plain threshold and nothing else.
            train: whether the counters are updated. Without, they are read for the penalties where
                the call's ``mutable`` asks for it.

        Returns:
            Array of the shape and dtype of ``x``.
        """
        if self.is_initializing():
            mem.pool(x, self.pool)  # a wrong shape shows here, not in the first training step
            shape = (self.num_classes, x.shape[-1])
            self._decision_weights(shape)
            for name in ("active", "inhibited"):
                self.variable("activity_counters", name, jnp.zeros, shape, jnp.int32)
            self.variable("activity_counters", "total", jnp.ones, shape[:1], jnp.int32)
            self.variable("activity_counters", "step", jnp.zeros, (), jnp.int32)
            return strict_threshold(x, self.tau)
        labels, train = supervised(labels, train)
        if labels is None or not (train or self.is_mutable_collection(RECORDS)):
            return strict_threshold(x, self.tau)

        stored = [stored_variable(self, "activity_counters", name) for name in Counters._fields]
        counters = Counters(*[variable.value for variable in stored])
        weights = self._decision_weights(counters.active.shape)  # observe says what does not fit the input
        y, counters, record = observe(self, x, labels, weights, counters, train)
        if train:
            for variable, value in zip(stored, counters, strict=True):
                variable.value = value
        self.sow(RECORDS, "aiec", record)
        return y

    def _decision_weights(self, shape: tuple[int, ...]) -> jax.Array:
        return self.param("decision_weights", nn.initializers.xavier_uniform(), shape)


COUNTERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "active": jnp.zeros_like,
    "inhibited": jnp.zeros_like,
    "total": jnp.ones_like,
    "step": jnp.asarray,
}
"""AIEC's counters and what each becomes at a reset."""


def reset_counters(variables: Mapping[str, Any]) -> Any:
    """AIEC's return to the start on entering evaluation: nothing active, nothing inhibited, totals of 1.

    Args:
        variables: what ``model.init`` returned or any part of it, such as the collection ``activity_counters``
            alone; other variables, the steps and the decision weights among them, stay as they are.

    Returns:
        The same structure.
    """
    if variables.keys() == COUNTERS.keys():
        reset = {name: COUNTERS[name](leaf) for name, leaf in variables.items()}
    else:
        reset = {k: reset_counters(node) if isinstance(node, Mapping) else node for k, node in variables.items()}
    same_mapping: Any = type(variables)  # a dict, or flax's FrozenDict
    return same_mapping(reset)
