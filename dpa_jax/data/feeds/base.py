"""What every feed has."""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.splits import AnySplit

_CPU_BYTES = 2 * 2**30


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
        return Batch(inputs=images, labels=numbers, index=numbers, epoch=numbers)

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
