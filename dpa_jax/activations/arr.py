"""ARR: the Aggregated Response Regularisation (Qiu et al., ICLR 2024, "Dynamic Neural Response Tuning")."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from dpa_jax.activations import memory as mem
from dpa_jax.activations.mechanism import Mechanism, Observed, Pool, State, Variable
from dpa_jax.activations.penalties import Ratio, Record, Summary
from dpa_jax.activations.sharding import SAMPLES, WHOLE, by_shards
from dpa_jax.checks import INT32, check_range, check_sizes


class ARR(Mechanism):
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
        pool: how an input becomes one vector per sample, as `DPA` has it.
        axis_name: the mapped axis over which the batch is spread, as `DPA` has it.

    Raises:
        ValueError: for a setting outside of these, and for inputs or labels whose shape does not fit.
    """

    num_classes: int
    momentum: float = 0.1
    update_interval: int = 1
    pool: str | None = None
    axis_name: str | tuple | None = None

    kept: ClassVar = {
        "mean": Variable("response_memory", "mean"),
        "count": Variable("response_memory", "count", axes="K", dtype=jnp.int32),
    }
    coefficients: ClassVar = {"arr": 20.0}

    def check(self) -> None:
        """Raises ValueError for settings outside of their range."""
        check_range("ARR", "momentum", self.momentum, low=0, high=1)
        check_sizes("ARR", {"update_interval": self.update_interval}, high=INT32)

    def plain(self, x: jax.Array) -> jax.Array:
        """The identity."""
        return x

    def observe(self, x: jax.Array, labels: jax.Array, state: State, train: bool, pool: Pool) -> Observed:
        """As `Mechanism.observe`. Seen are the pooled responses [B, C], with gradient, and what makes their means.

        ``recalled`` [B, C] is each sample's row of the memory before this batch; ``counted`` [B] bool, the samples that
        the penalty is over; ``steps``, how each sample moves its class's row, or None where the memory is only read.
        """
        values, labels = mem.taking_part(pool(x), labels, self.num_classes)
        seen = {"values": values, "recalled": mem.recall(state["mean"], labels), "labels": labels}
        if not train:
            return x, {}, seen | {"counted": mem.recall(state["count"], labels) > 0, "steps": None}
        settings = self.momentum, self.update_interval, self.axis_name
        steps, weights, count = response_steps(labels, state["count"], *settings)
        mean = mem.update_memory(state["mean"], jax.lax.stop_gradient(values), weights)
        counted = mem.valid_labels(labels, self.num_classes)
        return x, {"mean": mean, "count": count}, seen | {"counted": counted, "steps": steps}

    @staticmethod
    def summarize(records: Sequence[Record]) -> Summary:
        """|response - mean|, averaged over the places of each width, then over the widths."""
        by_width: dict[int, Ratio] = defaultdict(Ratio.zero)
        for record in records:
            values = record.seen["values"]
            width = values.shape[-1]
            away = values - response_means(record)
            # The gradient of |.| at 0, which every first sample of a class hits, is 0 here: JAX's own abs has 1.
            distances = away * jax.lax.stop_gradient(jnp.sign(away))
            total = jnp.sum(jnp.where(record.seen["counted"][:, :, None], distances, 0.0))
            count = width * jnp.sum(record.seen["counted"], dtype=jnp.float32)
            by_width[width] += Ratio(total, count).share(record.settings.axis_name)
        ratios = [by_width[width] for width in sorted(by_width)]
        return Summary(terms={"arr": jax.tree.map(lambda *groups: jnp.stack(groups), *ratios)})


def response_steps(
    labels: jax.Array, count: jax.Array, momentum: float, update_interval: int, axis_name: str | tuple | None = None
) -> tuple[tuple[jax.Array, jax.Array], mem.UpdateWeights, jax.Array]:
    """What the labels of a batch do to a memory in which a class's every ``update_interval``-th sample enters.

    Sample i is its class's n_i-th, counted from 0 over the whole training. It enters where n_i is a multiple of the
    interval u; ceil(n / u) of the first n samples did, so all the weights follow from counts and ranks.

    ``count`` [K] int32 are the samples of each class before this batch. Returns each sample's step in batch order,
    ``row <- keep * row + gain * value``: ``keep`` and ``gain``, [B] float32, of which the gain is 1 for a class's very
    first sample and 0 for one that is passed over; the weights of the batch as a whole; the new count.
    """
    num_classes = count.shape[0]

    def entered(samples):
        return -(-samples // update_interval)

    def steps_of(axis_name: str | tuple | None, labels: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
        valid = mem.valid_labels(labels, num_classes)
        labels = jnp.where(valid, labels, num_classes)
        ranks, in_batch = mem.class_ranks(labels, num_classes, axis_name)
        new_count = count + in_batch[:num_classes]
        number = mem.recall(count, labels) + ranks
        enters = valid & (number % update_interval == 0)
        decay = 1.0 - momentum
        first = number == 0
        gain = jnp.where(enters, jnp.where(first, 1.0, momentum), 0.0)
        keep = jnp.where(enters, jnp.where(first, 0.0, decay), 1.0)
        later = entered(mem.recall(new_count, labels)) - entered(number + 1)
        weights = gain * jnp.power(decay, later.astype(jnp.float32))
        # An unseen class's row is zero, so what is kept of it does not matter.
        kept = jnp.power(decay, (entered(new_count) - entered(count)).astype(jnp.float32))
        return keep, gain, kept, mem.weight_matrix(labels, weights, num_classes), new_count

    in_specs, out_specs = (SAMPLES, WHOLE), (SAMPLES, SAMPLES, WHOLE, SAMPLES, WHOLE)
    keep, gain, kept, add, new_count = by_shards(
        steps_of, labels, count, axis_name=axis_name, in_specs=in_specs, out_specs=out_specs
    )
    return (keep, gain), mem.UpdateWeights(kept, add, axis_name), new_count


def response_means(record: Record) -> jax.Array:
    """Each sample's row right after its own step, without gradient: [L, B, C] of a record of L places."""
    seen = record.seen
    if seen["steps"] is None:
        return seen["recalled"]
    keep, gain = seen["steps"]
    terms = gain[:, :, None] * jax.lax.stop_gradient(seen["values"])
    axis_name = record.settings.axis_name
    labels = jax.vmap(functools.partial(mem.gather_labels, axis_name=axis_name))(seen["labels"])
    return mem.prefix_rows(seen["recalled"], keep, terms, labels, axis_name)
