"""ARR: the Aggregated Response Regularisation (Qiu et al., ICLR 2024, "Dynamic Neural Response Tuning")."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
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
class Steps:
    """Each sample's step of its class's row, in batch order: ``row <- keep_i * row + gain_i * value_i``.

    Attributes:
        keep: [B] float32.
        gain: [B] float32; 1 for a class's very first sample, 0 for one that is passed over.
    """

    keep: jax.Array
    gain: jax.Array


@struct.dataclass
class ARRRecord:
    """What one ARR saw in one call. Leading axes, as ``nn.scan`` adds them, are places.

    Attributes:
        values: [B, C] float32, pooled responses, with gradient.
        recalled: [B, C] float32, each sample's row of the memory before this batch.
        labels: [B] int32.
        counted: [B] bool, the samples that the penalty is over.
        steps: how each sample moves its class's row; None where the memory was only read.
        axis_name: of the module.
    """

    values: jax.Array
    recalled: jax.Array
    labels: jax.Array
    counted: jax.Array
    steps: Steps | None
    axis_name: str | None = struct.field(pytree_node=False)

    @staticmethod
    def summarize(records: list[ARRRecord]) -> Summary:
        """|response - mean|, averaged over the places of each width, then over the widths."""
        by_width: dict[int, Ratio] = defaultdict(Ratio.zero)
        for group in stack_alike(records):
            width = group.values.shape[-1]
            away = group.values - response_means(group)
            # The gradient of |.| at 0, which every first sample of a class hits, is 0 here: JAX's own abs has 1.
            distances = away * jax.lax.stop_gradient(jnp.sign(away))
            total = jnp.sum(jnp.where(group.counted[:, :, None], distances, 0.0))
            count = width * jnp.sum(group.counted, dtype=jnp.float32)
            by_width[width] += Ratio(total, count).share(group.axis_name)
        ratios = [by_width[width] for width in sorted(by_width)]
        return Summary(terms={"arr": jax.tree.map(lambda *groups: jnp.stack(groups), *ratios)})


def response_steps(
    labels: jax.Array, count: jax.Array, momentum: float, update_interval: int, axis_name: str | None = None
) -> tuple[Steps, mem.UpdateWeights, jax.Array]:
    """What the labels of a batch do to a memory in which a class's every ``update_interval``-th sample enters.

    Sample i is its class's n_i-th, counted from 0 over the whole training. It enters where n_i is a multiple of the
    interval u; ceil(n / u) of the first n samples did, so all the weights follow from counts and ranks.

    Args:
        labels: [B] integers; invalid ones take no part.
        count: [K] int32, the samples of each class before this batch.
        momentum: weight m of a new value; a class's first value has weight 1.
        update_interval: u.
        axis_name: the mapped axis over which the batch is spread, if any.

    Returns:
        Each sample's step, the weights of the batch as a whole, and the new count [K].
    """
    num_classes = count.shape[0]
    labels = mem.gather_labels(labels, axis_name)
    valid = mem.valid_labels(labels, num_classes)
    labels = jnp.where(valid, labels, num_classes)
    ranks, in_batch = mem.class_ranks(labels, num_classes)
    in_batch = in_batch[:num_classes]
    new_count = count + in_batch

    def entered(samples):
        return -(-samples // update_interval)

    before = mem.recall(count, labels)
    number = before + ranks
    enters = valid & (number % update_interval == 0)
    decay = 1.0 - momentum
    first = number == 0
    gain = jnp.where(enters, jnp.where(first, 1.0, momentum), 0.0)
    keep = jnp.where(enters, jnp.where(first, 0.0, decay), 1.0)
    later = entered(mem.recall(new_count, labels)) - entered(number + 1)
    weights = gain * jnp.power(decay, later.astype(jnp.float32))
    # An unseen class's row is zero, so what is kept of it does not matter.
    kept = jnp.power(decay, (entered(new_count) - entered(count)).astype(jnp.float32))
    add = mem.weight_matrix(labels, weights, num_classes, axis_name)
    steps = Steps(keep=mem.own_part(keep, axis_name), gain=mem.own_part(gain, axis_name))
    return steps, mem.UpdateWeights(kept, add, axis_name), new_count


def response_means(record: ARRRecord) -> jax.Array:
    """Each sample's row right after its own step, without gradient: [L, B, C] of a record of L places."""
    if record.steps is None:
        return record.recalled
    terms = record.steps.gain[:, :, None] * jax.lax.stop_gradient(record.values)
    prefix_rows = functools.partial(mem.prefix_rows, axis_name=record.axis_name)
    return jax.vmap(prefix_rows)(record.recalled, record.steps.keep, terms, record.labels)


class Memory(NamedTuple):
    """An ARR's state: the mean response of each class [K, C] float32 and its samples so far [K] int32."""

    mean: jax.Array
    samples: jax.Array


def observe(place: ARR, x: jax.Array, labels: jax.Array, memory: Memory, train: bool) -> tuple[Memory, ARRRecord]:
    """ARR with labels, as a function of its state.

    Args:
        place: the settings.
        x: responses, of the shape that the pool takes.
        labels: [B] integers.
        memory: before this batch.
        train: whether the memory is updated.

    Returns:
        The memory after this batch and the record.
    """
    labels = jnp.asarray(labels)
    check_labels("ARR", x, labels)
    check_memory("ARR", memory.mean, place.num_classes, x.shape[-1])
    values = mem.pool(x, place.pool)
    recalled = mem.recall(memory.mean, labels)
    if not train:
        counted = mem.recall(memory.samples, labels) > 0
        return memory, ARRRecord(values, recalled, labels, counted, None, place.axis_name)
    steps, weights, count = response_steps(
        labels, memory.samples, place.momentum, place.update_interval, place.axis_name
    )
    counted = mem.valid_labels(labels, place.num_classes)
    mean = mem.update_memory(memory.mean, jax.lax.stop_gradient(values), weights)
    return Memory(mean, count), ARRRecord(values, recalled, labels, counted, steps, place.axis_name)


class ARR(nn.Module):
    """Aggregated Response Regularisation: draws a class's responses together, whatever layer it stands behind.

    The output is the input, always. In training, ``response_memory`` follows the mean pooled response of
    each class, and the *arr* penalty is the distance of each sample's response to the mean of its class, right
    after the sample itself went in (`dpa_jax.penalties`).

    Example::

        place = dpa_jax.ARR(num_classes=10)
        x, labels = jnp.ones((8, 17, 64)), jnp.zeros(8, int)
        variables = place.init(jax.random.key(0), x)
        x, mutated = place.apply(variables, x, labels, train=True, mutable=dpa_jax.MUTABLE)
        penalty = dpa_jax.penalties(mutated)["arr"]
        memory = mutated["response_memory"]  # for the next step

    Variables:
        ``response_memory``: ``mean`` [K, C] float32 and ``count`` [K] int32, the samples of each class so
        far. The row of a class without samples is zero and means nothing: its first sample replaces it,
        and evaluation leaves its samples out.

    Attributes:
        num_classes: K.
        momentum: weight of a new value in the mean, in [0, 1].
        update_interval: of a class's samples, the first and then every ``update_interval``-th enter the memory.
        pool: how an input becomes one vector per sample: ``"token"`` the first token of [B, N, C], ``"mean"``
            over the middle axes of [B, ..., C], ``"none"`` for [B, C].
        axis_name: inside of ``shard_map`` or ``pmap``, the mapped axis over which the batch is spread, as flax's
            ``BatchNorm`` has it: memories and penalties are those of the devices' batches one after the other.
            Penalties are such that their mean over the devices, and that of their gradients, is the whole batch's.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    momentum: float = 0.1
    update_interval: int = 1
    pool: str = "token"
    axis_name: str | None = None

    def __post_init__(self):
        check_range("ARR", "num_classes", self.num_classes, low=1)
        check_range("ARR", "momentum", self.momentum, low=0, high=1)
        check_range("ARR", "update_interval", self.update_interval, low=1)
        check_choice("ARR", "pool", self.pool, mem.POOLS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Returns ``x`` and, given labels, takes part in the penalty.

        Args:
            x: responses, of the shape that ``pool`` takes; any floating dtype.
            labels: [B] integers, -1 for samples to be left out. None: those of `dpa_jax.supervise`, and outside of
                it nothing happens.
            train: whether the memory is updated. Without, it is read for the penalty where the call's
                ``mutable`` asks for it.

        Returns:
            ``x``.
        """
        if self.is_initializing():
            mem.pool(x, self.pool)  # a wrong shape shows here, not in the first training step
            self.variable("response_memory", "mean", jnp.zeros, (self.num_classes, x.shape[-1]), jnp.float32)
            self.variable("response_memory", "count", jnp.zeros, (self.num_classes,), jnp.int32)
            return x
        labels, train = supervised(labels, train)
        if labels is None or not (train or self.is_mutable_collection(RECORDS)):
            return x

        mean = stored_variable(self, "response_memory", "mean")
        count = stored_variable(self, "response_memory", "count")
        memory, record = observe(self, x, labels, Memory(mean.value, count.value), train)
        if train:
            mean.value, count.value = memory
        self.sow(RECORDS, "arr", record)
        return x
