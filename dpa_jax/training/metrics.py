"""Counts of an evaluation, added up on the devices, and the accuracies that are computed from them.

The counts are a pytree: they are added to inside jit, and stay exact over a batch that is sharded or padded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class Classification:
    """Counts for accuracy, recall, precision and F1.

    Attributes:
        correct1: int32, samples whose label has the largest logit.
        correct5: int32, samples whose label is among the min(5, K) largest.
        count: int32, labelled samples.
        true_positives: int32 [K], samples of class k taken for k.
        false_positives: int32 [K], samples of another class taken for k.
        false_negatives: int32 [K], samples of class k taken for another.
    """

    correct1: jax.Array
    correct5: jax.Array
    count: jax.Array
    true_positives: jax.Array
    false_positives: jax.Array
    false_negatives: jax.Array

    @classmethod
    def empty(cls, num_classes: int) -> Classification:
        """Nothing counted yet, for K classes."""
        # Arrays of their own: a donated state may not hold one buffer twice.
        scalars = [jnp.zeros((), jnp.int32) for _ in range(3)]
        vectors = [jnp.zeros(num_classes, jnp.int32) for _ in range(3)]
        return cls(*scalars, *vectors)

    def update(self, logits: jax.Array, labels: jax.Array) -> Classification:
        """With a batch counted.

        Args:
            logits: [B, K], any float type.
            labels: int [B] in 0..K-1; -1 is padding and counts nowhere.
        """
        num_classes = self.true_positives.shape[0]
        # The order among equal logits is top_k's for both: the first class wins.
        _, best = jax.lax.top_k(logits, min(5, num_classes))
        labelled = labels >= 0
        hits = best == labels[:, None]
        classes = jnp.arange(num_classes)[None, :]
        actual = labels[:, None] == classes
        taken = (best[:, :1] == classes) & labelled[:, None]
        return Classification(
            correct1=self.correct1 + _count(hits[:, 0]),
            correct5=self.correct5 + _count(hits),
            count=self.count + _count(labelled),
            true_positives=self.true_positives + _count(actual & taken, axis=0),
            false_positives=self.false_positives + _count(~actual & taken, axis=0),
            false_negatives=self.false_negatives + _count(actual & ~taken, axis=0),
        )

    def compute(self) -> dict[str, jax.Array]:
        """The figures, as fractions in 0..1, float32 scalars.

        Returns:
            ``top1``, ``top5``, and ``recall``, ``precision``, ``f1``: means over the classes that are some
            sample's label or prediction, a class without a defined value counting 0, as in scikit-learn's
            ``precision_recall_fscore_support(average="macro", zero_division=0)``.
        """
        actual = self.true_positives + self.false_negatives
        taken = self.true_positives + self.false_positives
        present = _count((actual + taken) > 0)

        def macro(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
            return _ratio(_ratio(numerator, denominator).sum(), present)

        return {
            "top1": _ratio(self.correct1, self.count),
            "top5": _ratio(self.correct5, self.count),
            "recall": macro(self.true_positives, actual),
            "precision": macro(self.true_positives, taken),
            "f1": macro(2 * self.true_positives, actual + taken),
        }


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The sum of the samples' cross-entropies, and how many samples it is of.

    Args:
        logits: [B, K], any float type; computed in float32.
        labels: int [B] in 0..K-1; -1 is padding and counts nowhere.
        label_smoothing: the share of each target that is spread evenly over all K classes.

    Returns:
        The sum and the count, float32 scalars.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    losses = optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)
    labelled = labels >= 0
    return jnp.where(labelled, losses, 0.0).sum(), labelled.sum(dtype=jnp.float32)


def _count(flags: jax.Array, axis: int | None = None) -> jax.Array:
    return flags.sum(axis=axis, dtype=jnp.int32)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Their quotient in float32, 0 where the denominator is 0."""
    quotient = numerator.astype(jnp.float32) / jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0.0, quotient)
