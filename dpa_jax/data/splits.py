"""The training or the evaluation split of a data set: examples with their labels."""

from __future__ import annotations

import abc
from typing import Any, Self

import numpy as np


class Split(abc.ABC):
    """Examples with their labels, int32 [N]; ValueError where these have another shape or dtype."""

    def __init__(self, labels: np.ndarray):
        if labels.ndim != 1 or labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [N], not {labels.dtype} {list(labels.shape)}")
        self.labels = labels

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.labels)

    @abc.abstractmethod
    def take(self, index: np.ndarray) -> Split:
        """The examples at these positions, int [n], alone."""


class ArraySplit(Split):
    """Examples in memory: a pytree of NumPy arrays [N, ...]; ValueError where one has not N rows."""

    def __init__(self, inputs: Any, labels: np.ndarray):
        import jax  # not above: worker processes import this module and should not import JAX

        super().__init__(labels)
        self.inputs = inputs
        for leaf in jax.tree.leaves(inputs):
            if len(leaf) != len(labels):
                raise ValueError(f"there are {len(labels)} labels for an array of {len(leaf)} examples")

    def take(self, index: np.ndarray) -> Self:
        """The examples at these positions, int [n], alone."""
        import jax

        return type(self)(jax.tree.map(lambda leaf: leaf[index], self.inputs), self.labels[index])
