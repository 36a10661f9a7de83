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

from dpa_jax.data.batch import SPLITS, Batch
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.sources import Source

_CPU_BYTES = 2 * 2**30


class BaseFeed(abc.ABC):
    """Batches of one split on the devices of a mesh; nothing is read or put there before it is needed.

    Arguments are those of `make_feed`; `inputs` is a pytree of ArraySpec, one example as it is in a batch, where that
    is not as the source has it.

    Attributes:
        same_for_all: whether members of a run with other seeds see the same batches.
    """

    same_for_all = False

    def __init__(self, source: Source, mesh: Mesh, batch_size: int, config: ConfigDict, split: str, inputs: Any = None):
        if batch_size < 1 or batch_size % mesh.size:
            raise ValueError(f"batch_size must be a positive multiple of the {mesh.size} devices, not {batch_size}")
        self.spec, self.mesh, self.batch_size, self.seed = source.spec, mesh, batch_size, config.seed
        self.num_examples = self.spec.train_examples if split == "train" else self.spec.test_examples
        self.inputs = self.spec.inputs if inputs is None else inputs
        self._open = lambda: source.load()[SPLITS.index(split)]
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))

    @property
    def split(self) -> Any:
        """The examples, which are read now if they were not."""
        return self.load()

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The order of the training examples."""
        return Sampler(self.num_examples, self.batch_size, self.seed)

    @property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a batch."""
        abstract: Any = functools.partial(jax.ShapeDtypeStruct, sharding=self._sharded)
        inputs = jax.tree.map(lambda array: abstract((self.batch_size, *array.shape), array.dtype), self.inputs)
        numbers = abstract((self.batch_size,), np.int32)
        return Batch(inputs=inputs, labels=numbers, index=numbers, epoch=numbers)

    def reordered(self, seed: int) -> Self:
        """The same examples in the training order of another seed; they are read and put on the devices once."""
        feed = copy.copy(self)
        feed.seed = seed
        vars(feed).pop("sampler", None)
        return feed

    def left_to_do(self, augment: ConfigDict) -> ConfigDict:
        """The part of the configuration's `augment` that the feed leaves to the device: all of it here."""
        return augment

    def close(self) -> None:  # noqa: B027
        """Ends the threads or processes that read ahead for training, where there are any."""

    def load(self) -> Any:
        """Reads what is read once, puts on the devices what stays there, and returns the split; again: only that."""
        return self._open()

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
    """Whether so many bytes are at most a quarter of a device's memory (CPU: 2 GiB); False where that is unknown."""
    devices = mesh.local_devices
    if devices and devices[0].platform == "cpu":
        return size * len(devices) <= _CPU_BYTES
    # The whole memory and not what is free now, so that all processes decide alike.
    try:
        stats = devices[0].memory_stats() or {}
    except (IndexError, jax.errors.JaxRuntimeError):  # the mesh is a description, its devices are not here
        stats = {}
    return size <= stats.get("bytes_limit", 0) // 4
