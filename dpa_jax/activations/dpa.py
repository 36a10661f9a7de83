"""DPA: the Dual-Perspective Activation (Qiu et al., NeurIPS 2024)."""

import functools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from dpa_jax.activations import memory as mem
from dpa_jax.activations.mechanism import Mechanism, Observed, Pool, State, Variable
from dpa_jax.activations.penalties import Ratio, Record, Summary
from dpa_jax.checks import INT32, check_choice, check_range, check_sizes

CRITERIA = {
    "intersection": lambda forward, backward: forward & backward,
    "union": lambda forward, backward: forward | backward,
    "forward": lambda forward, backward: forward,
    "backward": lambda forward, backward: backward,
    "all": lambda forward, backward: jnp.ones_like(forward),
}
"""How the two perspectives join (Table 3): whether the class is silent forward, unwanted backward, both, ..."""


def threshold(x: jax.Array, tau: float = 0.0) -> jax.Array:
    """Zero where ``x < tau``, ``x`` elsewhere; the gradient follows the same rule (DPA, section 3).

    Unlike ReLU it passes the gradient at ``x == tau``, the threshold in units of ``x``.
    """
    return jnp.where(x < tau, jnp.zeros((), x.dtype), x)


class DPA(Mechanism):
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

    Variables:
        ``forward_memory``: ``mean`` [K, C] float32 and ``step`` [] int32, the training calls modulo the interval.
        ``backward_memory``: ``mean`` [K, C] float32.

    Attributes:
        num_classes: K.
        tau: the threshold, at least 0.
        momentum: weight of a new value in a memory, in [0, 1].
        update_interval: the memories are updated in every ``update_interval``-th training call.
        pool: how an input becomes one vector per sample: ``"token"`` the first token of [B, N, C], ``"mean"``
            over the middle axes of [B, ..., C], ``"none"`` for [B, C], ``"auto"`` by the rank: none for [B, C], token
            for [B, N, C], mean for all others. None: what the call says, else ``"auto"``. With a label for each token,
            [B, N], it is about what is left of a sample: nothing of [B, N, C].
        criterion: which perspectives mask a channel: ``"intersection"`` (the method), ``"union"``, ``"forward"``,
            ``"backward"`` or ``"all"`` (DPA, Table 3).
        axis_name: inside of ``shard_map`` or ``pmap``, the mapped axis over which the batch is spread, as flax's
            ``BatchNorm`` has it: memories and penalties are those of the devices' batches one after the other, and
            the mean of the penalties over the devices is the whole batch's (``docs/drop_in.md``). ``()`` for a model of
            its own on each device.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    tau: float = 0.0
    momentum: float = 0.9
    update_interval: int = 5
    pool: str | None = None
    criterion: str = "intersection"
    axis_name: str | tuple | None = None

    kept: ClassVar = {
        "forward_memory": Variable("forward_memory", "mean"),
        "step": Variable("forward_memory", "step", axes="", dtype=jnp.int32),
        "backward_memory": Variable("backward_memory", "mean", bounds=(-1.0, 1.0)),
    }
    coefficients: ClassVar = {"channel": 5.0}

    def check(self) -> None:
        """Raises ValueError for settings outside of their range."""
        check_range("DPA", "tau", self.tau, low=0)
        check_range("DPA", "momentum", self.momentum, low=0, high=1)
        check_sizes("DPA", {"update_interval": self.update_interval}, high=INT32)
        check_choice("DPA", "criterion", self.criterion, CRITERIA)

    def plain(self, x: jax.Array) -> jax.Array:
        """The threshold alone."""
        return threshold(x, self.tau)

    def observe(self, x: jax.Array, labels: jax.Array, state: State, train: bool, pool: Pool) -> Observed:
        """As `Mechanism.observe`. Seen are the pooled inputs [B, C], with gradient, and what decides on the mask.

        ``forward`` and ``backward`` [B, C] are each sample's rows of the memories before this batch.
        """
        y = self.plain(x)
        values, labels = mem.taking_part(pool(x), labels, self.num_classes)
        seen = {
            "values": values,
            "forward": mem.recall(state["forward_memory"], labels),
            "backward": mem.recall(jax.lax.stop_gradient(state["backward_memory"]), labels),
            "labels": labels,
            "update": jnp.zeros((), bool),
        }
        if not train:
            return y, {}, seen
        step = (state["step"] + 1) % self.update_interval
        update = step == 0
        weights = mem.update_weights(labels, self.num_classes, self.momentum, self.axis_name)
        sign_update = functools.partial(mem.sign_update, pool)
        y, backward = mem.remember_gradient(sign_update, y, state["backward_memory"], weights, update)
        forward = mem.update_memory(state["forward_memory"], jax.lax.stop_gradient(values), weights)
        forward = jnp.where(update, forward, state["forward_memory"])
        return y, {"forward_memory": forward, "step": step, "backward_memory": backward}, seen | {"update": update}

    @staticmethod
    def summarize(records: Sequence[Record]) -> Summary:
        """The channel loss over all layers together: the mean of v^2 over all masked entries."""
        channel = masked = Ratio.zero()
        for record in records:
            act, values, mask = record.settings, record.seen["values"], joint_mask(record)
            count = jnp.sum(mask, dtype=jnp.float32)
            labelled = jnp.sum(mem.valid_labels(record.seen["labels"], act.num_classes), dtype=jnp.float32)
            total = jnp.sum(jnp.where(mask, jnp.square(values), 0.0))
            channel += Ratio(total, count).share(act.axis_name)
            masked += Ratio(count, labelled * values.shape[-1]).share(act.axis_name)
        return Summary(terms={"channel": channel}, figures={"masked_fraction": masked})


def joint_mask(record: Record) -> jax.Array:
    """The channels that have nothing to do with a sample's class, [L, B, C] bool of L layers; False if unlabelled."""
    act, seen = record.settings, record.seen
    values = jax.lax.stop_gradient(seen["values"])
    # Outside of the conditional, so that it may go with the exchanges of the layers' own updates.
    labels = jax.vmap(functools.partial(mem.gather_labels, axis_name=act.axis_name))(seen["labels"])

    def after_own_update():
        rows = mem.prefix_means(seen["forward"], values, labels, act.momentum, act.axis_name)
        return jnp.where(seen["update"][:, None, None], rows, seen["forward"])

    # Most steps update nothing and skip the scan; a conditional for each layer would cost more than it saves.
    forward = jax.lax.cond(jnp.any(seen["update"]), after_own_update, lambda: seen["forward"])
    joint = CRITERIA[act.criterion](forward < act.tau, seen["backward"] < 0)
    labelled = mem.valid_labels(seen["labels"], act.num_classes)
    return joint & (values > act.tau) & labelled[:, :, None]
