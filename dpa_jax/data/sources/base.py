"""What every data source has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dpa_jax.data.batch import ArraySpec, Spec
from dpa_jax.data.splits import ArraySplit, Split


class Source:
    """A data set that is described at once and loaded when it is asked for.

    Args:
      spec: what is known of it without loading anything.
      read: () -> the training and the evaluation split.
      class_counts: () -> int [num_classes], how many training examples each class has; may read the labels.
    """

    def __init__(
        self, spec: Spec, read: Callable[[], tuple[Any, ...]], class_counts: Callable[[], np.ndarray | list[int]]
    ):
        self.spec, self._read, self.class_counts = spec, read, class_counts
        self._splits: tuple[Any, ...] | None = None

    def load(self) -> tuple[Any, ...]:
        """The splits, of `SPLITS` those that there are: `ArraySplit`s, read once, or of encoded images `EncodedSplit`s.

        Raises:
          FileNotFoundError: the data is not there; the message says how to get it.
          ValueError: the data is not as the spec says: its size, a shape, a dtype, or a label out of range.
        """
        if self._splits is None:
            train, test = self._read()
            _check(self.spec, "train", train, self.spec.train_examples)
            _check(self.spec, "test", test, self.spec.test_examples)
            self._splits = train, test
        return self._splits


def _check(spec: Spec, split_name: str, split: Split, examples: int) -> None:
    if len(split) != examples:
        raise ValueError(f"{spec.name}: split {split_name!r} has {len(split)} examples, not {examples}")
    bad = np.flatnonzero((split.labels < 0) | (split.labels >= spec.num_classes))
    if bad.size:
        raise ValueError(
            f"{spec.name}: label {split.labels[bad[0]]} at position {bad[0]} of split {split_name!r} "
            f"is outside 0 .. {spec.num_classes - 1}, there are {spec.num_classes} classes"
        )
    if isinstance(split, ArraySplit):
        import jax

        found = jax.tree.map(lambda leaf: ArraySpec(leaf.shape[1:], leaf.dtype), split.inputs)
        if found != spec.inputs:
            raise ValueError(f"{spec.name}: examples of split {split_name!r} are {found}, not {spec.inputs}")
