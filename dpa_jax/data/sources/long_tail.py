"""Long-tailed training splits, whose classes get exponentially rarer.

Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019: of n examples a class, class k of K
keeps n * imbalance^(-k / (K - 1)), rounded down; here at least one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import Split


def long_tailed(source: Source, imbalance: float) -> Source:
    """A source with a long tail of training examples; its evaluation split stays whole."""
    counts = _kept(np.asarray(source.class_counts()), imbalance)

    def read() -> tuple[Split, Split]:
        train, test = source.load()
        return train.take(long_tail(train.labels, source.spec.num_classes, imbalance)), test

    return Source(dataclasses.replace(source.spec, train_examples=int(counts.sum())), read, lambda: counts)


def long_tail(labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
    """The examples that a long tail keeps, whose first class has `imbalance` times as many as its last.

    Their positions, int64 [n], rise and never change; a greater imbalance keeps some of what a smaller one does.
    """
    kept = _kept(np.bincount(labels, minlength=num_classes), imbalance)
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    return np.sort(np.concatenate([order[labels[order] == k][: kept[k]] for k in range(num_classes)]))


def _kept(counts: np.ndarray, imbalance: float) -> np.ndarray:
    """How many examples of each class stay, int64 [K], of so many."""
    profile = imbalance ** (-np.arange(len(counts)) / max(len(counts) - 1, 1))
    return np.minimum(np.maximum(counts.sum() / len(counts) * profile, 1).astype(np.int64), counts)
