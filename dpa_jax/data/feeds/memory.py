"""Batches of images that are in memory."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.base import BaseFeed, fits, put
from dpa_jax.data.splits import Split

RESIDENCES = ("auto", "device", "host")


class Feed(BaseFeed):
    """Batches of images that are in memory.

    Args:
      split: the images and labels.
      mesh: a mesh with the one axis `"data"`, which batches are sharded over.
      batch_size: the global batch size, a multiple of the mesh's devices.
      seed: of the order of training images.
      resident: where the images wait: "device" (put there once, whole on every device, then a batch is a
        gather), "host" (a batch's images are sent at every step), or "auto": "device" where they take at most
        a quarter of a device's memory, or 2 GiB of the host's on CPU.

    Raises:
      ValueError: the batch size does not divide, or `resident` is something else.
    """

    split: Split

    def __init__(self, split: Split, mesh: Mesh, batch_size: int, seed: int, resident: str = "auto"):
        """See the class."""
        super().__init__(split, split.images.shape[1:], mesh, batch_size, seed)
        if resident not in RESIDENCES:
            raise ValueError(f"resident must be one of {', '.join(RESIDENCES)}, not {resident!r}")
        if resident == "auto":
            resident = "device" if fits(split.images.nbytes, mesh) else "host"
        self.resident = resident
        if resident == "device":
            everywhere = NamedSharding(mesh, PartitionSpec())
            self._images = put(split.images.shape, everywhere, lambda where: split.images[where])
            self._gather = jax.jit(_gather, out_shardings=self._sharded)

    def left_to_do(self, augment: ConfigDict) -> ConfigDict:
        """All of it."""
        return augment

    def train(self, step: int) -> Batch:
        """The batch of a 0-based training step."""
        index, epoch = self.sampler.indices(step)
        return self._batch(self.split.labels[index], index, epoch)

    def evaluation(self) -> Iterator[Batch]:
        """The whole split once, in order; the last batch is padded with image 0 and the label -1."""
        for start in range(0, len(self.split), self.batch_size):
            index = np.arange(start, start + self.batch_size, dtype=np.int32)
            inside = index < len(self.split)
            index = np.where(inside, index, 0)
            labels = np.where(inside, self.split.labels[index], -1)
            yield self._batch(labels, index, np.zeros_like(index))

    def _batch(self, labels: np.ndarray, index: np.ndarray, epoch: np.ndarray) -> Batch:
        index_on_devices = put(index.shape, self._sharded, lambda where: index[where])
        if self.resident == "device":
            images = self._gather(self._images, index_on_devices)
        else:
            shape = (self.batch_size, *self.split.images.shape[1:])
            images = put(shape, self._sharded, lambda where: self.split.images[index[where[0]]])
        return Batch(
            inputs=images,
            labels=put(labels.shape, self._sharded, lambda where: labels[where]),
            index=index_on_devices,
            epoch=put(epoch.shape, self._sharded, lambda where: epoch[where]),
        )


def _gather(images: jax.Array, index: jax.Array) -> jax.Array:
    return images.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
