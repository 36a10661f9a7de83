"""From what the modules of a model recorded during one call to the penalties of its loss.

A module sows a *record* of what it saw. Records hold per-sample values of all layers, so that sums and counts
are taken once over the whole model: a mean over layers is exact, and a sharded batch costs few reductions.
A record class adds a mechanism: it has ``summarize(records) -> Summary``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

RECORDS = "penalty_records"
"""The collection that modules sow into. It lives for one call and is never carried to the next."""

MUTABLE = ("forward_memory", "response_memory", "activity_counters", RECORDS)
"""The collections to pass to ``apply`` as ``mutable=``."""

COLLECTIONS = (*MUTABLE, "backward_memory")
"""Every collection of the mechanisms, as ``nn.scan`` and ``nn.vmap`` want them in ``variable_axes``."""


@struct.dataclass
class Ratio:
    """A sum and what it is to be divided by, kept apart so that batches and devices can be added up.

    Attributes:
        total: float32 scalar, or [G] where the value is the mean of G groups' ratios.
        count: float32, of the same shape.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def zero(cls) -> Ratio:
        """Nothing over nothing."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.count + other.count)

    def share(self, axis_name: str | None) -> Ratio:
        """This device's share of the ratio over all devices: the mean of the shares is the whole, gradient included.

        A mean over devices is what loss and gradients get anyway. The gradient is the total's; counts have none.
        """
        if axis_name is None:
            return self
        count = jax.lax.psum(jax.lax.stop_gradient(self.count), axis_name)
        return Ratio(self.total * jax.lax.axis_size(axis_name), count)

    def value(self) -> jax.Array:
        """The mean of the groups' ratios; a group without members counts as 0."""
        return jnp.mean(self.total / jnp.maximum(self.count, 1.0))


@struct.dataclass
class Summary:
    """What the records of one call amount to.

    Attributes:
        terms: {penalty's name: Ratio}.
        masked: masked (sample, channel) entries and all of them; None where nothing masks.
    """

    terms: dict[str, Ratio]
    masked: Ratio | None = None

    def penalties(self) -> dict[str, jax.Array]:
        """{name: float32 scalar}."""
        return {name: ratio.value() for name, ratio in self.terms.items()}


def summarize(mutated: Mapping[str, Any]) -> Summary:
    """Sums and counts of every penalty, from the collections that ``model.apply(..., mutable=MUTABLE)`` returned.

    Args:
        mutated: the second result of ``apply``; a model without records gives an empty summary.
    """
    records = jax.tree.leaves(mutated.get(RECORDS, {}), is_leaf=lambda node: hasattr(node, "summarize"))
    summary = Summary(terms={})
    for kind in dict.fromkeys(type(record) for record in records):
        part = kind.summarize([record for record in records if type(record) is kind])
        masked = summary.masked
        if part.masked is not None:
            masked = part.masked if masked is None else masked + part.masked
        summary = Summary(terms={**summary.terms, **part.terms}, masked=masked)
    return summary


def stack_alike(records: list[Any]) -> list[Any]:
    """Records of equal shapes and settings along one leading axis, so that one look serves all layers.

    Args:
        records: of one class, with a field ``labels`` [B]; axes in front of it, on every leaf, are those that
            ``nn.scan`` or ``nn.vmap`` added.
    """
    groups = defaultdict(list)
    for record in records:
        lifted = record.labels.ndim - 1
        layers = jax.tree.map(lambda leaf, n=lifted: leaf.reshape(-1, *leaf.shape[n:]), record)
        leaves, structure = jax.tree.flatten(layers)
        groups[tuple(leaf.shape[1:] for leaf in leaves), structure].append(layers)
    return [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *group) for group in groups.values()]


def penalties(mutated: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The penalties to add to a loss, each times its coefficient.

    Args:
        mutated: the second result of ``model.apply(..., mutable=dpa_jax.MUTABLE)``.

    Returns:
        {name: float32 scalar}: ``"channel"`` where the model has `DPA`, ``"arr"`` where it has `ARR`, ``"aux"``
        and ``"gate"`` where it has `AIEC`. Empty if no module recorded anything: no labels were given, or
        the collections were not mutable. Of modules with an ``axis_name``, each device's share: the mean over
        the devices is the global batch's penalty.
    """
    return summarize(mutated).penalties()
