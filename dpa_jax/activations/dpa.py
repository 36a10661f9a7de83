"""DPA: the Dual-Perspective Activation (Qiu et al., NeurIPS 2024)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dpa_jax.activations import memory as mem
from dpa_jax.activations.penalties import RECORDS, Ratio, Summary, stack_alike
from dpa_jax.activations.supervision import supervised
from dpa_jax.activations.threshold import threshold
from dpa_jax.checks import (
    check_choice,
    check_labels,
    check_memory,
    check_range,
    stored_variable,
)

CRITERIA = {
    "intersection": lambda forward, backward: forward & backward,
    "union": lambda forward, backward: forward | backward,
    "forward": lambda forward, backward: forward,
    "backward": lambda forward, backward: backward,
    "all": lambda forward, backward: jnp.ones_like(forward),
}
"""How the two perspectives join (Table 3): whether the class is silent forward, unwanted backward, both, ..."""


class DPARecord(struct.PyTreeNode):
    """What one DPA saw in one call. Leading axes, as ``nn.scan`` adds them, are layers.

    Attributes:
        values: [B, C] float32, pooled pre-activations, with gradient.
        forward: [B, C] float32, each sample's row of the forward memory before this batch.
        backward: [B, C] float32, likewise of the backward memory.
        labels: [B] int32.
        update: bool scalar, whether this call updated the memories.
    """

    values: jax.Array
    forward: jax.Array
    backward: jax.Array
    labels: jax.Array
    update: jax.Array
    num_classes: int = struct.field(pytree_node=False)
    tau: float = struct.field(pytree_node=False)
    momentum: float = struct.field(pytree_node=False)
    criterion: str = struct.field(pytree_node=False)
    axis_name: str | None = struct.field(pytree_node=False)

    @staticmethod
    def summarize(records: list[DPARecord]) -> Summary:
        """The channel loss over all layers together: the mean of v^2 over all masked entries."""
        channel = masked = Ratio.zero()
        for group in stack_alike(records):
            mask = joint_mask(group)
            count = jnp.sum(mask, dtype=jnp.float32)
            labelled = jnp.sum(mem.valid_labels(group.labels, group.num_classes), dtype=jnp.float32)
            total = jnp.sum(jnp.where(mask, jnp.square(group.values), 0.0))
            channel += Ratio(total, count).share(group.axis_name)
            masked += Ratio(count, labelled * group.values.shape[-1]).share(group.axis_name)
        return Summary(terms={"channel": channel}, masked=masked)


def joint_mask(record: DPARecord) -> jax.Array:
    """The channels that have nothing to do with each sample's class (the joint criterion).

    Args:
        record: one with a leading axis of L layers on every leaf.

    Returns:
        [L, B, C] bool, False for samples without a label.
    """
    values = jax.lax.stop_gradient(record.values)

    def after_own_update():
        prefix_means = functools.partial(mem.prefix_means, momentum=record.momentum, axis_name=record.axis_name)
        rows = jax.vmap(prefix_means)(record.forward, values, record.labels)
        return jnp.where(record.update[:, None, None], rows, record.forward)

    # Most steps update nothing and skip the scan; a conditional for each layer would cost more than it saves.
    forward = jax.lax.cond(jnp.any(record.update), after_own_update, lambda: record.forward)
    joint = CRITERIA[record.criterion](forward < record.tau, record.backward < 0)
    labelled = mem.valid_labels(record.labels, record.num_classes)
    return joint & (values > record.tau) & labelled[:, :, None]


class Memories(NamedTuple):
    """A DPA's state: the memories, [K, C] float32, and the training calls modulo the interval, int32."""

    forward: jax.Array
    backward: jax.Array
    step: jax.Array


def observe(
    act: DPA, x: jax.Array, labels: jax.Array, memories: Memories, train: bool
) -> tuple[jax.Array, Memories, DPARecord]:
    """DPA with labels, as a function of its state.

    Args:
        act: the settings.
        x: pre-activations, of the shape that the pool takes.
        labels: [B] integers.
        memories: before this batch.
        train: whether the memories are updated.

    Returns:
        The output, the memories after this batch (of which the backward one has yet to take its gradient)
        and the record.
    """
    y, labels = threshold(x, act.tau), jnp.asarray(labels)
    check_labels("DPA", x, labels)
    for memory in (memories.forward, memories.backward):
        check_memory("DPA", memory, act.num_classes, x.shape[-1])
    values = mem.pool(x, act.pool)
    record = DPARecord(
        values=values,
        forward=mem.recall(memories.forward, labels),
        backward=mem.recall(jax.lax.stop_gradient(memories.backward), labels),
        labels=labels,
        update=jnp.zeros((), bool),
        num_classes=act.num_classes,
        tau=act.tau,
        momentum=act.momentum,
        criterion=act.criterion,
        axis_name=act.axis_name,
    )
    if not train:
        return y, memories, record
    step = (memories.step + 1) % act.update_interval
    update = step == 0
    weights = mem.update_weights(labels, act.num_classes, act.momentum, act.axis_name)
    y = mem.remember_gradient_signs(act.pool, y, memories.backward, weights, update)
    forward = mem.update_memory(memories.forward, jax.lax.stop_gradient(values), weights)
    forward = jnp.where(update, forward, memories.forward)
    return y, Memories(forward, memories.backward, step), record.replace(update=update)


class DPA(nn.Module):
    """Dual-Perspective Activation: a threshold with two class-wise memories of its channels.

    The output is `threshold` of the input, always. In training, two memories follow what each class does
    to each channel: ``forward_memory`` the pooled inputs, ``backward_memory`` the signs of the pooled gradients of
    the loss. Where both say that a channel has nothing to do with a sample's class and it is active
    all the same, the *channel* penalty pushes it down (`dpa_jax.penalties`).

    Example::

        act = dpa_jax.DPA(num_classes=10)
        x, labels = jnp.ones((8, 17, 64)), jnp.zeros(8, int)
        variables = act.init(jax.random.key(0), x)

        def loss_fn(backward_memory):
            y, mutated = act.apply(
                {**variables, "backward_memory": backward_memory}, x, labels, train=True, mutable=dpa_jax.MUTABLE
            )
            return jnp.sum(y) + 5.0 * dpa_jax.penalties(mutated)["channel"], mutated

        # The gradient with respect to the backward memory is its update.
        update, mutated = jax.grad(loss_fn, has_aux=True)(variables["backward_memory"])
        backward_memory = optax.apply_updates(variables["backward_memory"], update)

    On a batch sharded under ``jit`` this is all. ``shard_map`` and ``pmap`` show a module its device's samples only;
    ``axis_name`` gives it the others. ``shard_map`` sums gradients of replicated inputs itself: average the loss::

        act = dpa_jax.DPA(num_classes=10, axis_name="data")

        def loss_fn(params, backward_memory):  # with images and labels of one device
            ...
            loss = cross_entropy + 5.0 * dpa_jax.penalties(mutated)["channel"]
            return jax.lax.pmean(loss, "data"), mutated

        gradients, update = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(params, backward_memory)

    ``pmap`` does not: there return the device's own loss and ``pmean`` the gradients.

    Variables:
        ``forward_memory``: ``mean`` [K, C] float32 and ``step`` [] int32, the training calls modulo the interval.
        ``backward_memory``: ``mean`` [K, C] float32.

    Attributes:
        num_classes: K.
        tau: the threshold, at least 0.
        momentum: weight of a new value in a memory, in [0, 1].
        update_interval: the memories are updated in every ``update_interval``-th training call.
        pool: how an input becomes one vector per sample: ``"token"`` the first token of [B, N, C], ``"mean"``
            over the middle axes of [B, ..., C], ``"none"`` for [B, C].
        criterion: which perspectives mask a channel: ``"intersection"`` (the method), ``"union"``, ``"forward"``,
            ``"backward"`` or ``"all"`` (DPA, Table 3).
        axis_name: inside of ``shard_map`` or ``pmap``, the mapped axis over which the batch is spread, as flax's
            ``BatchNorm`` has it: memories and penalties are those of the devices' batches one after the other.
            Penalties are such that their mean over the devices, and that of their gradients, is the whole batch's;
            the backward memory's update is the same on all devices, and its mean changes nothing.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    tau: float = 0.0
    momentum: float = 0.9
    update_interval: int = 5
    pool: str = "token"
    criterion: str = "intersection"
    axis_name: str | None = None

    def __post_init__(self):
        check_range("DPA", "num_classes", self.num_classes, low=1)
        check_range("DPA", "tau", self.tau, low=0)
        check_range("DPA", "momentum", self.momentum, low=0, high=1)
        check_range("DPA", "update_interval", self.update_interval, low=1)
        check_choice("DPA", "pool", self.pool, mem.POOLS)
        check_choice("DPA", "criterion", self.criterion, CRITERIA)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Applies the threshold and, given labels, takes part in the penalty.

        Args:
            x: pre-activations, of the shape that ``pool`` takes; any floating dtype.
            labels: [B] integers, -1 for samples to be left out. None: those of `dpa_jax.supervise`, and outside of
                it the plain threshold and nothing else.
            train: whether the memories are updated. Without, they are read for the penalty where
                the call's ``mutable`` asks for it.

        Returns:
            Array of the shape and dtype of ``x``.
        """
        if self.is_initializing():
            mem.pool(x, self.pool)  # a wrong shape shows here, not in the first training step
            shape = (self.num_classes, x.shape[-1])
            self.variable("forward_memory", "mean", jnp.zeros, shape, jnp.float32)
            self.variable("forward_memory", "step", jnp.zeros, (), jnp.int32)
            self.variable("backward_memory", "mean", jnp.zeros, shape, jnp.float32)
            return threshold(x, self.tau)
        labels, train = supervised(labels, train)
        if labels is None or not (train or self.is_mutable_collection(RECORDS)):
            return threshold(x, self.tau)

        forward = stored_variable(self, "forward_memory", "mean")
        backward = stored_variable(self, "backward_memory", "mean")
        step = stored_variable(self, "forward_memory", "step")
        memories = Memories(forward.value, backward.value, step.value)
        y, memories, record = observe(self, x, labels, memories, train)
        if train:
            forward.value, step.value = memories.forward, memories.step
        self.sow(RECORDS, "dpa", record)
        return y
