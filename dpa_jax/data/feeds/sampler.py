"""The order of the training examples.

The stream is continuous over epochs: position p = step * B + i is example permutation_e[p mod N] of epoch e = p div N.
So every example comes exactly once an epoch, no batch is short, and the position in the data follows from the step
alone: a resumed run needs to remember nothing else.
"""

from __future__ import annotations

import functools
import threading

import numpy as np


class Sampler:
    """Which of N examples is at each position of the stream; for a seed it is the same for ever, on every machine."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"batch_size must be between 1 and the {num_examples} examples of the split, not {batch_size}"
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative, it is {seed}")
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        # A batch sees at most two epochs.
        self._permutation = functools.lru_cache(maxsize=2)(self._draw_permutation)
        self._drawing = threading.Lock()

    def __reduce__(self) -> tuple:
        """Goes to other processes without its permutations."""
        return Sampler, (self.num_examples, self.batch_size, self.seed)

    def steps(self, epochs: float) -> int:
        """The number of steps that so many epochs take: epochs * N / B, rounded."""
        return round(epochs * self.num_examples / self.batch_size)

    def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of a 0-based step: int32 [B] positions in the split, and int32 [B] epochs."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_examples)
        index = np.empty(self.batch_size, np.int32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._permutation(int(epoch))[places[here]]
        return index, epochs.astype(np.int32)

    def at(self, position: int) -> tuple[int, int]:
        """The example at a 0-based position of the stream, and its epoch; safe to call from several threads."""
        epoch, place = divmod(position, self.num_examples)
        with self._drawing:
            return int(self._permutation(epoch)[place]), epoch

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        # By hand from raw bits, since NumPy promises a stable stream for those and not for Generator.permutation.
        bits = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.num_examples)
        return np.argsort(bits, kind="stable")
