"""Batches of encoded images: decoded once where they fit into memory, else read, decoded and cropped at every step.

The order of the images and their crops follow from the seed and the step alone: not from the number of threads, worker
processes, devices or hosts, nor from the step that a run was resumed at.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Generator, Iterator
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpa_jax.data.batch import ArraySpec, Batch
from dpa_jax.data.feeds.base import BaseFeed, fits, put
from dpa_jax.data.feeds.examples import EvalExamples, Rows, TrainExamples, decode_all, do_without, shapes_of
from dpa_jax.data.feeds.host_crop import EvalCrop, TrainCrop
from dpa_jax.data.feeds.memory import MemoryFeed
from dpa_jax.data.feeds.read_ahead import read_ahead
from dpa_jax.data.sources import Source


def make_image_feed(source: Source, mesh: Mesh, batch_size: int, config: ConfigDict, split: str) -> BaseFeed:
    """The feed for images that are stored encoded; arguments and errors are those of `make_feed`."""
    spec, resident, training = source.spec, config.data.resident, split == "train"
    examples = spec.train_examples if training else spec.test_examples
    # An image has a pixel at least: what cannot fit is not even opened.
    if resident == "device" or (resident == "auto" and fits(examples * spec.inputs.shape[-1], mesh)):
        shapes = shapes_of(source.load()[0 if training else 1])
        _, shape = next(shapes)
        size = examples * math.prod(shape)
        if resident == "device" or (fits(size, mesh) and all(other == shape for _, other in shapes)):
            inputs = ArraySpec(shape, spec.inputs.dtype)
            decode = functools.partial(decode_all, training=training, replace=config.data.corrupt == "replace")
            return MemoryFeed(source, mesh, batch_size, config, split, inputs, decode)
    return StreamFeed(source, mesh, batch_size, config, split)


class StreamFeed(BaseFeed):
    """Batches of images that are read at every step, a little ahead of it.

    A process reads what its own devices get. Images are cut to `augment.image_size` as `TrainCrop` and `EvalCrop` say,
    in `data.workers` processes, or in threads of this one; the devices do the rest of `augment`.
    """

    def __init__(self, source: Source, mesh: Mesh, batch_size: int, config: ConfigDict, split: str):
        size, stored = config.augment.image_size, source.spec.inputs
        inputs = ArraySpec((size, size, stored.shape[-1]), stored.dtype)
        super().__init__(source, mesh, batch_size, config, split, inputs)
        self._crop: Any = (TrainCrop if split == "train" else EvalCrop).from_config(config.augment)
        self._replace, self._workers = config.data.corrupt == "replace", config.data.workers
        self._stream: Generator[Rows, None, None] | None = None
        self._next_step = 0

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        """The rows of a batch that this process's devices get, int [R], rising."""
        own = self._sharded.addressable_devices_indices_map((self.batch_size,)).values()
        return np.sort(np.concatenate([np.arange(self.batch_size)[where] for where in own]))

    def left_to_do(self, augment: ConfigDict) -> ConfigDict:
        """All but the cuts."""
        left = augment.copy_and_resolve_references()
        left.update(crop="none", eval_resize=0)
        return left

    def reordered(self, seed: int) -> Self:
        """The same images in the training order of another seed, with other cuts."""
        feed = super().reordered(seed)
        feed._stream = None
        return feed

    def train(self, step: int) -> Batch:
        """The batch of a 0-based training step; ready soon where the step before it was the last asked for."""
        if self._stream is None or step != self._next_step:
            self.close()
            examples = TrainExamples(self.split, self.sampler, self._crop)
            self._stream = read_ahead(examples, map(self._positions, itertools.count(step)), self._workers)
        self._next_step = step + 1
        return self._on_devices(next(self._stream))

    def evaluation(self) -> Iterator[Batch]:
        """The whole split once, in order; padding, and what cannot be decoded, is black and has the label -1."""
        batches = map(self._positions, range(math.ceil(self.num_examples / self.batch_size)))
        examples = EvalExamples(self.split, self._crop)
        with contextlib.closing(read_ahead(examples, batches, self._workers)) as stream:
            yield from map(self._on_devices, stream)

    def close(self) -> None:
        """Ends the threads or processes that read ahead for training."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _positions(self, step: int) -> np.ndarray:
        """Of the rows of this process, in the stream of examples."""
        return step * self.batch_size + self._rows

    def _on_devices(self, rows: Rows) -> Batch:
        for label, index, corrupt in zip(rows.label, rows.index, rows.corrupt, strict=True):
            do_without(self.split, label, index, corrupt, self._replace)

        def on_devices(own: np.ndarray) -> jax.Array:
            def part(where: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = where[0].indices(self.batch_size)
                first = np.searchsorted(self._rows, start)
                return own[first : first + stop - start]

            return put((self.batch_size, *own.shape[1:]), self._sharded, part)

        return Batch(*map(on_devices, (rows.image, rows.label, rows.index, rows.epoch)))
