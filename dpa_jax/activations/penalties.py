"""From what the modules of a model saw during one call to the penalties of its loss.

A mechanism records what it saw. Records hold values of all samples, so that sums and counts are taken once over the
whole model: a mean over layers is exact, and a sharded batch costs few reductions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from dpa_jax.activations.sharding import on_auto_axes

RECORDS = "penalty_records"
"""The collection of records. Those of an earlier call are dropped where they come in with a model's variables."""


@struct.dataclass
class Ratio:
    """A sum and what it is to be divided by, kept apart so that batches and devices can be added up.

    Both are float32 scalars, or [G] where the value is the mean of G groups' ratios.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def zero(cls) -> Ratio:
        """Nothing over nothing."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    def share(self, axis_name: str | tuple | None) -> Ratio:
        """This device's share of the ratio over all devices: the mean of the shares is the whole, gradient included.

        A mean over devices is what loss and gradients get anyway. The gradient is the total's; counts have none.
        """
        if axis_name in (None, ()):
            return self
        count = jax.lax.psum(jax.lax.stop_gradient(self.count), axis_name)
        return Ratio(self.total * jax.lax.axis_size(axis_name), count)

    def value(self) -> jax.Array:
        """The mean of the groups' ratios; a group without members counts as 0."""
        return jnp.mean(self.total / jnp.maximum(self.count, 1.0))


class Record(struct.PyTreeNode):
    """What one mechanism saw in one call: the mechanism, unbound, and the arrays that its ``observe`` returned.

    ``labels`` are those of the call, [B] or None, before samples that take no part were sorted out.
    ``mark`` is a float32 zero. The axes that ``nn.scan`` or ``nn.vmap`` put in front of every array show there.
    """

    settings: Any = struct.field(pytree_node=False)
    seen: Any
    labels: Any
    mark: jax.Array


@struct.dataclass
class Summary:
    """What the records of one call amount to: ``terms`` may be added to a loss, ``figures`` are reported only."""

    terms: dict[str, Ratio] = struct.field(default_factory=dict)
    figures: dict[str, Ratio] = struct.field(default_factory=dict)

    def penalties(self) -> dict[str, jax.Array]:
        """{penalty: float32 scalar}."""
        return {name: ratio.value() for name, ratio in self.terms.items()}


def summarize(mutated: Mapping[str, Any]) -> Summary:
    """Sums and counts of every penalty and figure: of ``mutated`` as `penalties` takes it; empty without records.

    Raises TypeError if ``mutated`` is no mapping of collections.
    """
    if not isinstance(mutated, Mapping):
        raise TypeError(
            "summarize: takes the collections that model.apply(..., mutable=dpa_jax.MUTABLE) returned second; "
            f"got a {type(mutated).__name__}"
        )
    leaves = jax.tree.leaves(mutated.get(RECORDS, {}), is_leaf=lambda node: isinstance(node, Record))
    records = [leaf for leaf in leaves if isinstance(leaf, Record)]
    summary = Summary()
    for mechanism in dict.fromkeys(type(record.settings) for record in records):
        own = [record for record in records if type(record.settings) is mechanism]
        part = on_auto_axes(
            lambda own, mechanism=mechanism: mechanism.summarize(stack_alike(own)),
            own,
            specs=lambda part: jax.tree.map(lambda _: PartitionSpec(), part),
        )
        for ours, its in ((summary.terms, part.terms), (summary.figures, part.figures)):
            for name, ratio in its.items():
                ours[name] = ours[name] + ratio if name in ours else ratio
    return summary


def stack_alike(records: Sequence[Record]) -> list[Record]:
    """Records of equal shapes and settings along one leading axis, so that one look serves all layers."""
    groups = defaultdict(list)
    for record in records:
        axes = record.mark.ndim
        count = math.prod(record.mark.shape)
        layers = jax.tree.map(lambda leaf, n=axes, count=count: leaf.reshape(count, *leaf.shape[n:]), record)
        leaves, structure = jax.tree.flatten(layers)
        groups[tuple(leaf.shape[1:] for leaf in leaves), structure].append(layers)
    return [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *group) for group in groups.values()]


def penalties(mutated: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{name: float32 scalar}, the penalties to add to a loss, each times its coefficient.

    ``mutated`` is the second result of ``model.apply(..., mutable=dpa_jax.MUTABLE)``. There are ``"channel"`` where the
    model has `DPA`, ``"arr"`` where it has `ARR`, ``"aux"`` and ``"gate"`` where it has `AIEC`, and those of your own
    mechanisms; none if no module recorded anything: no labels were given, or the collections were not mutable. Of
    modules with an ``axis_name``, each device's share: the mean over the devices is the global batch's penalty.
    """
    return summarize(mutated).penalties()
