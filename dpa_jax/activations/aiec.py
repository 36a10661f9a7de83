"""AIEC: Activation with Intrinsic-Extrinsic Consensus (Qiu et al., ICML 2026)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dpa_jax.activations import memory as mem
from dpa_jax.activations.mechanism import Mechanism, Observed, Pool, State, Variable
from dpa_jax.activations.penalties import Ratio, Record, Summary
from dpa_jax.checks import INT32, check_range, check_sizes


class AIEC(Mechanism):
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
        pool: how an output becomes one vector per sample, as `DPA` has it.
        axis_name: the mapped axis over which the batch is spread, as `DPA` has it.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    tau: float = 0.0
    update_interval: int = 5
    pool: str | None = None
    axis_name: str | tuple | None = None

    kept: ClassVar = {
        "decision_weights": Variable("params", "decision_weights", start=nn.initializers.xavier_uniform()),
        "active": Variable("activity_counters", "active", dtype=jnp.int32, resets=True),
        "inhibited": Variable("activity_counters", "inhibited", dtype=jnp.int32, resets=True),
        "total": Variable("activity_counters", "total", "K", jnp.int32, nn.initializers.ones, resets=True),
        "step": Variable("activity_counters", "step", "", jnp.int32),
    }
    coefficients: ClassVar = {"aux": 1.0, "gate": 200.0}

    def check(self) -> None:
        """Raises ValueError for settings outside of their range."""
        check_range("AIEC", "tau", self.tau, low=0)
        check_sizes("AIEC", {"update_interval": self.update_interval}, high=INT32)

    def plain(self, x: jax.Array) -> jax.Array:
        """The threshold: 0 where ``x <= tau``, ``x`` elsewhere, and the gradient likewise."""
        return jnp.where(x <= self.tau, jnp.zeros((), x.dtype), x)

    def observe(self, x: jax.Array, labels: jax.Array, state: State, train: bool, pool: Pool) -> Observed:
        """As `Mechanism.observe`. Seen are pooled outputs [B, C] and the layer's own decision [B, K], with gradient.

        ``irrelevant`` [B, C] bool are the channels that both views find irrelevant to a sample's class; False without.
        """
        y, weights = self.plain(x), state["decision_weights"]
        values, labels = mem.taking_part(pool(y), labels, self.num_classes)
        logits = jnp.matmul(values, weights.T, precision=jax.lax.Precision.HIGHEST)
        counters = {name: state[name] for name in ("active", "inhibited", "total")}
        step = state["step"]
        if train:
            step = (step + 1) % self.update_interval
            counted = count_activity(values, logits, labels, self.axis_name)
            counters = {name: old + jnp.where(step == 0, counted[name], 0) for name, old in counters.items()}
        # The sign of (active - inhibited) / total, of which the total is positive.
        irrelevant = (counters["active"] <= counters["inhibited"]) & (weights <= 0)
        # By sample and not by class: small on each of many devices, and in the loop of a model over its blocks.
        irrelevant = mem.recall(irrelevant, labels)
        seen = {"values": values, "logits": logits, "irrelevant": irrelevant, "labels": labels}
        return y, {**counters, "step": step}, seen

    @staticmethod
    def summarize(records: Sequence[Record]) -> Summary:
        """The decisions' cross-entropy over layers and samples; the mean of a^2 over all masked entries."""
        aux = gate = masked = Ratio.zero()
        for record in records:
            axis_name, values, logits = record.settings.axis_name, record.seen["values"], record.seen["logits"]
            labelled = mem.valid_labels(record.seen["labels"], logits.shape[-1])
            labels = jnp.where(labelled, record.seen["labels"], 0)
            entropies = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            samples = jnp.sum(labelled, dtype=jnp.float32)
            aux += Ratio(jnp.sum(jnp.where(labelled, entropies, 0.0)), samples).share(axis_name)
            mask = record.seen["irrelevant"]
            count = jnp.sum(mask, dtype=jnp.float32)
            total = jnp.sum(jnp.where(mask, jnp.square(values), 0.0))
            gate += Ratio(total, count).share(axis_name)
            masked += Ratio(count, samples * values.shape[-1]).share(axis_name)
        return Summary(terms={"aux": aux, "gate": gate}, figures={"masked_fraction": masked})


def count_activity(
    values: jax.Array, logits: jax.Array, labels: jax.Array, axis_name: str | tuple | None
) -> dict[str, Any]:
    """Over the samples that the layer itself classifies correctly, how often each channel was on and off.

    Counts are int32: ``active`` and ``inhibited`` [K, C], ``total`` [K]. Invalid labels count nowhere.
    """
    correct = jnp.argmax(logits, axis=-1) == labels
    classes = jnp.arange(logits.shape[-1])
    members = (labels[:, None] == classes[None, :]) & correct[:, None]
    # Zeros and ones are exact in every precision of the product, and so are their sums up to 2^24.
    active = jnp.matmul(members.T.astype(jnp.float32), (values > 0).astype(jnp.float32)).astype(jnp.int32)
    active, total = mem.sum_devices((active, jnp.sum(members, axis=0, dtype=jnp.int32)), axis_name)
    return {"active": active, "inhibited": total[:, None] - active, "total": total}
