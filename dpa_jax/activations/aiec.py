"""AIEC: Activation with Intrinsic-Extrinsic Consensus (Qiu et al., ICML 2026)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from dpa_jax.activations import memory as mem
from dpa_jax.activations.checks import (
    check_choice,
    check_labels,
    check_memory,
    check_range,
    stored_variable,
)
from dpa_jax.activations.penalties import RECORDS, Ratio, Summary, stack_alike
from dpa_jax.activations.supervision import supervised


@struct.dataclass
class AIECRecord:
    """What one AIEC saw in one call. Leading axes, as ``nn.scan`` adds them, are layers.

    Attributes:
        values: [B, C] float32, pooled activations, with gradient.
        logits: [B, K] float32, the layer's own decision, with gradient.
        irrelevant: [K, C] bool, the channels that both views find irrelevant to a class.
        labels: [B] int32.
    """

    values: jax.Array
    logits: jax.Array
    irrelevant: jax.Array
    labels: jax.Array

    @staticmethod
    def summarize(records: list[AIECRecord]) -> Summary:
        """The decisions' cross-entropy over layers and samples; the mean of a^2 over all masked entries."""
        aux = gate = masked = Ratio.zero()
        for group in stack_alike(records):
            labelled = mem.valid_labels(group.labels, group.logits.shape[-1])
            labels = jnp.where(labelled, group.labels, 0)
            entropies = optax.softmax_cross_entropy_with_integer_labels(group.logits, labels)
            samples = jnp.sum(labelled, dtype=jnp.float32)
            aux += Ratio(jnp.sum(jnp.where(labelled, entropies, 0.0)), samples)
            mask = consensus_mask(group)
            count = jnp.sum(mask, dtype=jnp.float32)
            gate += Ratio(jnp.sum(jnp.where(mask, jnp.square(group.values), 0.0)), count)
            masked += Ratio(count, samples * group.values.shape[-1])
        return Summary(terms={"aux": aux, "gate": gate}, masked=masked)


def consensus_mask(record: AIECRecord) -> jax.Array:
    """The channels irrelevant to each sample's class, [L, B, C] bool of a record of L layers; False if unlabelled."""
    return jax.vmap(mem.recall)(record.irrelevant, record.labels)


def count_activity(values: jax.Array, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over the samples that the layer itself classifies correctly, how often each channel was on and off.

    Args:
        values: [B, C], pooled activations, at least 0.
        logits: [B, K].
        labels: [B] integers; invalid ones are never classified correctly.

    Returns:
        Active and inhibited, [K, C] int32, and total, [K] int32.
    """
    correct = jnp.argmax(logits, axis=-1) == labels
    classes = jnp.arange(logits.shape[-1])
    members = (labels[:, None] == classes[None, :]) & correct[:, None]
    # Zeros and ones are exact in every precision of the product, and so are their sums up to 2^24.
    active = jnp.matmul(members.T.astype(jnp.float32), (values > 0).astype(jnp.float32)).astype(jnp.int32)
    total = jnp.sum(members, axis=0, dtype=jnp.int32)
    return active, total[:, None] - active, total


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

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    tau: float = 0.0
    update_interval: int = 5
    pool: str = "token"

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
        y = jnp.where(x <= self.tau, jnp.zeros((), x.dtype), x)
        shape = (self.num_classes, x.shape[-1])
        if self.is_initializing():
            mem.pool(y, self.pool)  # a wrong shape shows here, not in the first training step
            self._decision_weights(shape)
            for name in ("active", "inhibited"):
                self.variable("activity_counters", name, jnp.zeros, shape, jnp.int32)
            self.variable("activity_counters", "total", jnp.ones, shape[:1], jnp.int32)
            self.variable("activity_counters", "step", jnp.zeros, (), jnp.int32)
            return y
        labels, train = supervised(labels, train)
        if labels is None or not (train or self.is_mutable_collection(RECORDS)):
            return y

        labels = jnp.asarray(labels)
        check_labels("AIEC", x, labels)
        names = ("active", "inhibited", "total", "step")
        active, inhibited, total, step = (stored_variable(self, "activity_counters", name) for name in names)
        check_memory("AIEC", active.value, *shape)

        values = mem.pool(y, self.pool)
        weights = self._decision_weights(shape)
        logits = jnp.matmul(values, weights.T, precision=jax.lax.Precision.HIGHEST)
        if train:
            step.value = (step.value + 1) % self.update_interval
            update = step.value == 0
            counters = (active, inhibited, total)
            for counter, counted in zip(counters, count_activity(values, logits, labels), strict=True):
                counter.value += jnp.where(update, counted, 0)
        # The sign of (active - inhibited) / total, of which the total is positive.
        irrelevant = (active.value <= inhibited.value) & (weights <= 0)
        self.sow(RECORDS, "aiec", AIECRecord(values, logits, irrelevant, labels))
        return y

    def _decision_weights(self, shape: tuple[int, int]) -> jax.Array:
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
