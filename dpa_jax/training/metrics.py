"""Counts of an evaluation, added up on the devices, and the accuracies that are computed from them.

The counts are a pytree of integers: those of batches are added leaf by leaf, and exact also where these are sharded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct


@struct.dataclass
class Classification:
    """Counts for accuracy, recall, precision and F1.

    Attributes:
        top1: int32, samples whose label has the largest logit.
        top5: int32, samples whose label is among the min(5, K) largest.
        count: int32, labelled samples.
        actual: int32 [K], samples of class k.
        taken: int32 [K], samples taken for k.
        correct: int32 [K], samples of class k taken for k.
    """

    top1: jax.Array
    top5: jax.Array
    count: jax.Array
    actual: jax.Array
    taken: jax.Array
    correct: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, labels: jax.Array) -> Classification:
        """Of one batch: logits [B, K] of any float type, int labels [B] in 0..K-1; -1 is padding and counts nowhere."""
        num_classes = logits.shape[-1]
        # The order among equal logits is top_k's for both: the first class wins.
        _, best = jax.lax.top_k(logits, min(5, num_classes))
        # What is no number is taken for no class; top_k would take it for the first.
        best = jnp.where(jnp.any(jnp.isnan(logits), axis=-1, keepdims=True), num_classes, best)
        hits, labelled = best == labels[:, None], labels >= 0
        classes = jnp.arange(num_classes)[None, :]
        actual = labels[:, None] == classes
        taken = (best[:, :1] == classes) & labelled[:, None]
        per_class = [_count(flags, axis=0) for flags in (actual, taken, actual & taken)]
        return cls(_count(hits[:, 0]), _count(hits), _count(labelled), *per_class)

    def compute(self) -> dict[str, jax.Array]:
        """The figures, as fractions in 0..1, float32 scalars.

        Returns:
            ``top1``, ``top5``, and ``recall``, ``precision``, ``f1``: means over the classes that are some
            sample's label or prediction, a class without a defined value counting 0, as in scikit-learn's
            ``precision_recall_fscore_support(average="macro", zero_division=0)``.
        """
        present = _count((self.actual + self.taken) > 0)

        def macro(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
            return _ratio(_ratio(numerator, denominator).sum(), present)

        return {
            "top1": _ratio(self.top1, self.count),
            "top5": _ratio(self.top5, self.count),
            "recall": macro(self.correct, self.actual),
            "precision": macro(self.correct, self.taken),
            "f1": macro(2 * self.correct, self.actual + self.taken),
        }


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve, in float64: how often a sample of a class scores higher in it than another sample.

    With two classes that of class 1, else the mean over classes, each against the rest. Equal scores count half. NaN
    where no class has samples both of it and of others; such classes are left out of the mean.

    Args:
        scores: [B, K], any float type, such as probabilities.
        labels: int [B] in 0..K-1; -1 counts nowhere.
    """
    scores, labels = np.asarray(scores, np.float64)[(kept := np.asarray(labels) >= 0)], np.asarray(labels)[kept]
    areas = []
    for k in [1] if scores.shape[1] == 2 else range(scores.shape[1]):
        positive = labels == k
        count, others = int(positive.sum()), int((~positive).sum())
        if count and others:
            # The mean rank of equal scores is halfway between the first and the last of them.
            _, inverse, times = np.unique(scores[:, k], return_inverse=True, return_counts=True)
            ranks = (np.cumsum(times) - (times - 1) / 2)[inverse]
            areas.append((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))
    return float(np.mean(areas)) if areas else math.nan


def auc_of_logits(batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """`auc` of the softmax of logits: [B, K] and labels [B] of each batch."""
    logits, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(logits)
    return auc(exponentials / exponentials.sum(axis=1, keepdims=True), labels)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """The sum of the samples' cross-entropies, and how many samples it is of: float32 scalars.

    Args:
        logits: [B, K], any float type; computed in float32.
        labels: int [B] in 0..K-1; -1 is padding and counts nowhere, whatever its logits are.
        label_smoothing: the share of each target that is spread evenly over all K classes.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), label_smoothing)
    labelled = labels >= 0
    # A gradient of 0 times NaN would be NaN.
    logits = jnp.where(labelled[:, None], logits.astype(jnp.float32), 0.0)
    losses = optax.softmax_cross_entropy(logits, targets)
    return jnp.where(labelled, losses, 0.0).sum(), labelled.sum(dtype=jnp.float32)


def _count(flags: jax.Array, axis: int | None = None) -> jax.Array:
    return flags.sum(axis=axis, dtype=jnp.int32)


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Their quotient in float32, 0 where the denominator is 0."""
    quotient = numerator.astype(jnp.float32) / jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0.0, quotient)
