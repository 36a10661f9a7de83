"""A large batch as micro-batches, one after the other within a step: the memory of one, the result of all.

What the large batch would do and how it is had:

- *Ratios.* The loss is a sum of ratios, each over all samples of the batch. Cross-entropies are divided by the labelled
  samples, but what a penalty is divided by, such as the masked entries, is known only after a forward pass. Where there
  are penalties a first pass without gradient counts; then each micro-batch's loss is its totals over the counts of all.
  So its gradients, and their signs, are those of the large batch.
- *Forward memories* take in samples one after the other, so micro-batches in the order of the batch are the same.
- *Backward memories* are read as they were before the batch. What earlier micro-batches have changed comes in as the
  gradient of the memory that the model returns, where `remember_gradient` takes it up.
- *Counters of calls*, which decide when an update is due, show every micro-batch the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpa_jax.activations.penalties import Ratio
from dpa_jax.activations.registry import call_counters

Part = Any
"""A pytree: what a forward pass takes of a batch, [B, ...], or of its micro-batches, [N, B / N, ...]."""


class Seen(NamedTuple):
    """What a forward pass of a training step gives beside the gradient."""

    terms: dict[str, Ratio]  # of the loss
    figures: dict[str, Ratio]
    model_state: dict[str, Any]  # after it
    backward_memory: Any  # as the model returns it, for the next use


def gradients_of(
    forward: Callable[..., Seen],
    loss_of: Callable[[Mapping[str, Ratio]], jax.Array],
    params: Any,
    backward_memory: Any,
    model_state: dict[str, Any],
    parts: Part,
    number: int,
) -> tuple[Seen, Any, Any]:
    """What a batch's forward and backward passes give: `Seen`, the parameters' gradient and the backward memory's.

    Args:
        forward: (params, backward_memory, model_state, part) -> `Seen`, in training.
        loss_of: the loss of its terms; linear in their totals.
        params: the parameters.
        backward_memory: before the batch.
        model_state: before the batch.
        parts: the batch; its micro-batches where there are several.
        number: how many micro-batches there are.
    """

    def loss_fn(params, backward_memory, model_state, part, counts, changed):
        seen = forward(params, backward_memory, model_state, part)
        terms = {name: Ratio(term.total, counts.get(name, term.count)) for name, term in seen.terms.items()}
        loss = loss_of(terms)
        # Its gradient is `changed`.
        for memory, change in zip(jax.tree.leaves(seen.backward_memory), jax.tree.leaves(changed), strict=False):
            loss += jnp.vdot(change, memory)
        return loss, seen

    grad = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
    if number == 1:
        (gradients, change), seen = grad(params, backward_memory, model_state, parts, {}, None)
        return seen, gradients, change

    def count(earlier, part):
        seen = forward(params, backward_memory, _calls_as_in(model_state, earlier), part)
        return seen.model_state, {name: term.count for name, term in seen.terms.items()}

    def add(carry, part):
        earlier, gradients, changed = carry
        earlier = _calls_as_in(model_state, earlier)
        (more, changed), seen = grad(params, backward_memory, earlier, part, counts, changed)
        return (seen.model_state, jax.tree.map(jnp.add, gradients, more), changed), (seen.terms, seen.figures)

    _, counts = jax.lax.scan(count, model_state, parts)
    counts = _sums(counts)
    start = jax.tree.map(jnp.zeros_like, (params, backward_memory))
    (model_state, gradients, change), seen = jax.lax.scan(add, (model_state, *start), parts)
    terms, figures = _sums(seen)
    return Seen(terms, figures, model_state, backward_memory={}), gradients, change


def _sums(tree: Any) -> Any:
    """Over the micro-batches."""
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), tree)


def _calls_as_in(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The model's state ``after``, with the counters of calls of the one ``before``."""
    counters = call_counters()

    def choose(path: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        return old if (path[0].key, path[-1].key) in counters else new

    return jax.tree_util.tree_map_with_path(choose, before, after)
