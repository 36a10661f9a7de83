"""Batches of examples that are in memory: any pytree of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.base import BaseFeed, fits, put
from dpa_jax.data.sources import Source
from dpa_jax.data.splits import ArraySplit


class MemoryFeed(BaseFeed):
    """Batches of examples that are in memory.

    They wait where `config.data.resident` says: "device" (put there once, whole on every device; a batch is a gather),
    "host" (a batch is sent at every step), or "auto": "device" where they take at most a quarter of a device's memory,
    or 2 GiB of the host's on CPU. `decode` makes arrays of a split that has others.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        batch_size: int,
        config: ConfigDict,
        split: str,
        inputs: Any = None,
        decode: Callable[[Any], ArraySplit] = lambda split: split,
    ):
        super().__init__(source, mesh, batch_size, config, split, inputs)
        self.resident = config.data.resident
        if self.resident == "auto":
            leaves = jax.tree.leaves(self.inputs)
            size = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in leaves)
            self.resident = "device" if fits(self.num_examples * size, mesh) else "host"
        self._decode = decode
        # Once for all feeds that `reordered` makes of this one.
        self._stored = functools.cache(self._store)
        self._gather = jax.jit(_gather, out_shardings=self._sharded)

    def _store(self) -> tuple[ArraySplit, Any]:
        """The split and, where it is resident on the devices, its inputs there."""
        split = self._decode(self._open())
        if self.resident == "host":
            return split, None
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return split, jax.tree.map(lambda leaf: put(leaf.shape, everywhere, lambda at: leaf[at]), split.inputs)

    def load(self) -> ArraySplit:
        """Reads the examples, puts them on the devices where they wait there, and returns them; again: only that."""
        return self._stored()[0]

    @property
    def waiting(self) -> Any:
        """The inputs of all examples, where they wait on the devices."""
        return self._stored()[1]

    def order(self, step: int, count: int, length: int) -> Batch:
        """The batches of ``count`` 0-based steps from one on, without their inputs: arrays [length, B], padded with 0.

        `take` makes the whole batch of a row.
        """
        numbers = np.zeros((3, length, self.batch_size), np.int32)
        for row in range(count):
            index, epoch = self.sampler.indices(step + row)
            numbers[:, row] = self.split.labels[index], index, epoch
        sharding = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        labels, indices, epochs = (put(array.shape, sharding, lambda at, a=array: a[at]) for array in numbers)
        return Batch(None, labels, indices, epochs)

    def take(self, waiting: Any, order: Batch, row: jax.typing.ArrayLike) -> Batch:
        """The batch in a row of an `order`, within a compiled program."""
        labels, index, epoch = (array[row] for array in order[1:])
        inputs = jax.lax.with_sharding_constraint(_gather(waiting, index), self._sharded)
        return Batch(inputs, labels, index, epoch)

    def train(self, step: int) -> Batch:
        """The batch of a 0-based training step."""
        index, epoch = self.sampler.indices(step)
        return self._batch(self.split.labels[index], index, epoch)

    def evaluation(self) -> Iterator[Batch]:
        """The whole split once, in order; the last batch is padded with example 0 and the label -1."""
        split = self.split
        for start in range(0, len(split), self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            inside = index < len(split)
            index = np.where(inside, index, 0)
            labels = np.where(inside, split.labels[index], -1)
            yield self._batch(labels, index, np.zeros_like(index))

    def _batch(self, labels: np.ndarray, index: np.ndarray, epoch: np.ndarray) -> Batch:
        def rows(array: np.ndarray) -> jax.Array:
            return put(array.shape, self._sharded, lambda at: array[at])

        def sent(leaf: np.ndarray) -> jax.Array:
            return put((len(index), *leaf.shape[1:]), self._sharded, lambda at: leaf[index[at[0]]])

        split, on_devices = self._stored()
        index_on_devices = rows(index)
        inputs = jax.tree.map(sent, split.inputs) if on_devices is None else self._gather(on_devices, index_on_devices)
        return Batch(inputs=inputs, labels=rows(labels), index=index_on_devices, epoch=rows(epoch))


def _gather(arrays: Any, index: jax.Array) -> Any:
    return jax.tree.map(
        lambda array: array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False), arrays
    )
