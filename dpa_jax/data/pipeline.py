"""Which images at which step, and how they come to the devices.

The stream of training images is continuous over epochs: position p = step * B + i is image permutation_e[p
mod N] of epoch e = p div N. So every image comes exactly once an epoch, no batch is short, and the position
in the data follows from the step alone: a resumed run needs to remember nothing else.
"""

from __future__ import annotations

import abc
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.data.splits import AnySplit, Split

RESIDENCES = ("auto", "device", "host")
_CPU_BYTES = 2 * 2**30


@flax.struct.dataclass
class Batch:
    """One global batch; axis 0 of every leaf is sharded over the mesh axis `"data"`.

    Attributes:
      images: uint8 [B, H, W, C].
      labels: int32 [B]; -1 is padding, which counts nowhere.
      index: int32 [B], the images' positions in their split.
      epoch: int32 [B], the epoch each image belongs to.
    """

    images: jax.Array
    labels: jax.Array
    index: jax.Array
    epoch: jax.Array


class Sampler:
    """Says which image is at which place of the stream of training images.

    Args:
      num_examples: N, the size of the split.
      batch_size: B, the global batch size.
      seed: the permutations' seed; they are the same for ever and on every machine.

    Raises:
      ValueError: the batch size is not in 1 .. N, or the seed is negative.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        """See the class."""
        if not 1 <= batch_size <= num_examples:
            raise ValueError(
                f"batch_size must be between 1 and the {num_examples} images of the split, not {batch_size}"
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
        """The images of a step.

        Args:
          step: 0-based.

        Returns:
          index int32 [B] (positions in the split) and epoch int32 [B].
        """
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, self.num_examples)
        index = np.empty(self.batch_size, np.int32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index[here] = self._permutation(int(epoch))[places[here]]
        return index, epochs.astype(np.int32)

    def at(self, position: int) -> tuple[int, int]:
        """Which image, and of which epoch, is at a 0-based place of the stream; threads may ask at once."""
        epoch, place = divmod(position, self.num_examples)
        with self._drawing:
            return int(self._permutation(epoch)[place]), epoch

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        # By hand from raw bits, since NumPy promises a stable stream for those and not for
        # Generator.permutation.
        bits = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(self.num_examples)
        return np.argsort(bits, kind="stable")


class BaseFeed(abc.ABC):
    """Batches of a split on the devices of a mesh: what those in memory and those that are read have in common.

    Args:
      split: the images and labels.
      image_shape: height, width and channels of the images in a batch.
      mesh: a mesh with the one axis `"data"`, which batches are sharded over.
      batch_size: the global batch size, a multiple of the mesh's devices.
      seed: of the order of training images.

    Raises:
      ValueError: the batch size does not divide.
    """

    def __init__(self, split: AnySplit, image_shape: tuple[int, ...], mesh: Mesh, batch_size: int, seed: int):
        """See the class."""
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(f"batch_size must be a positive multiple of the {mesh.size} devices, not {batch_size}")
        self.split, self.image_shape, self.batch_size, self.seed = split, image_shape, batch_size, seed
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The order of the training images."""
        return Sampler(len(self.split), self.batch_size, self.seed)

    @property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a batch."""
        abstract: Any = functools.partial(jax.ShapeDtypeStruct, sharding=self._sharded)
        images = abstract((self.batch_size, *self.image_shape), np.uint8)
        numbers = abstract((self.batch_size,), np.int32)
        return Batch(images=images, labels=numbers, index=numbers, epoch=numbers)

    def reordered(self, seed: int) -> Self:
        """The same images, which are not put on the devices again, in the training order of another seed."""
        feed = copy.copy(self)
        feed.seed = seed
        vars(feed).pop("sampler", None)
        return feed

    def close(self) -> None:  # noqa: B027
        """Ends what reads ahead for training, where something does."""

    @abc.abstractmethod
    def left_to_do(self, augment: ConfigDict) -> ConfigDict:
        """What of the configuration's `augment` part has not happened to the images of a batch yet."""

    @abc.abstractmethod
    def train(self, step: int) -> Batch:
        """The batch of a 0-based training step."""

    @abc.abstractmethod
    def evaluation(self) -> Iterator[Batch]:
        """The whole split once, in order; the last batch is padded with the label -1."""


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
            images=images,
            labels=put(labels.shape, self._sharded, lambda where: labels[where]),
            index=index_on_devices,
            epoch=put(epoch.shape, self._sharded, lambda where: epoch[where]),
        )


def _gather(images: jax.Array, index: jax.Array) -> jax.Array:
    return images.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def put(shape: tuple[int, ...], sharding: NamedSharding, rows: Callable[..., np.ndarray]) -> jax.Array:
    """Makes a global array; each process computes and sends the rows that its own devices need."""
    with jax.transfer_guard_host_to_device("allow"):  # a transfer that is meant
        return jax.make_array_from_callback(shape, sharding, rows)


def fits(size: int, mesh: Mesh) -> bool:
    """Whether so many bytes are a small part of a device's memory."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return size * len(mesh.local_devices) <= _CPU_BYTES
    # The whole memory and not what is free now, so that all processes decide alike.
    stats = device.memory_stats() or {}
    return size <= stats.get("bytes_limit", 0) // 4
