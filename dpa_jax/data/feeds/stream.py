"""Images that do not fit into memory: read, decoded and cut on the host while the devices are at work.

Which image is where in the stream, and how it is cut, follows from the seed and the step alone: not from the number of
threads, worker processes, devices or hosts, nor from where the run was started.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.base import BaseFeed, fits, put
from dpa_jax.data.feeds.examples import EvalExamples, Example, Examples, TrainExamples, read_or_next, read_or_none
from dpa_jax.data.feeds.host_crop import EvalCrop, TrainCrop
from dpa_jax.data.feeds.memory import Feed
from dpa_jax.data.splits import AnySplit, CorruptImageError, LazySplit, Split

_WAITING = 8  # images of each worker that wait, in shared memory, of which a container may have little


def make_feed(split: AnySplit, mesh: Mesh, batch_size: int, config: ConfigDict, training: bool) -> BaseFeed:
    """The feed for a split: from memory where it is there or fits, else one that reads at every step.

    Args:
      split: the images and labels.
      mesh: a mesh with the one axis `"data"`.
      batch_size: the global batch size.
      config: a run's configuration; `seed`, `augment` and of `data` `resident`, `corrupt` and `workers` count.
      training: whether the images are for training; what is done about corrupt ones depends on it.

    Raises:
      ValueError: the configuration does not suit the split.
      CorruptImageError: all images are decoded now, one cannot be, and `data.corrupt` is "refuse".
    """
    resident, replace = config.data.resident, config.data.corrupt == "replace"
    if isinstance(split, LazySplit):
        if resident == "host" or (resident == "auto" and not _fits_decoded(split, mesh)):
            return StreamFeed(split, mesh, batch_size, config, training)
        split = _decoded(split, replace, training)
    return Feed(split, mesh, batch_size, config.seed, resident)


class StreamFeed(BaseFeed):
    """Batches of images that are read at every step, a little ahead of it.

    Args:
      split: the images and labels.
      mesh: a mesh with the one axis `"data"`, which batches are sharded over; a process reads what its own devices get.
      batch_size: the global batch size, a multiple of the mesh's devices.
      config: a run's configuration. Images are cut to `augment.image_size` as `TrainCrop` and `EvalCrop` say, in
        `data.workers` processes, or in threads of this one; the devices do the rest of `augment`.
      training: whether the images are for training.

    Raises:
      ValueError: the batch size does not divide, or `augment` asks for what images of any size cannot have.
    """

    split: LazySplit

    def __init__(self, split: LazySplit, mesh: Mesh, batch_size: int, config: ConfigDict, training: bool):
        """See the class."""
        size = config.augment.image_size
        super().__init__(split, (size, size, split.channels), mesh, batch_size, config.seed)
        self._crop: Any = (TrainCrop if training else EvalCrop).from_config(config.augment)
        self._replace, self._workers = config.data.corrupt == "replace", config.data.workers
        own = self._sharded.addressable_devices_indices_map((batch_size,)).values()
        self._rows = np.sort(np.concatenate([np.arange(batch_size)[where] for where in own]))
        self._stream: grain.DatasetIterator | None = None
        self._next_step = 0

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
            self._stream = self._read(TrainExamples(**self._rows_from(step), sampler=self.sampler, crop=self._crop))
        self._next_step = step + 1
        batch, corrupt = next(self._stream)
        for reason, taken in corrupt:
            _do_without(reason, f"{self.split.where(taken)} takes its place", self._replace)
        return batch

    def evaluation(self) -> Iterator[Batch]:
        """The whole split once, in order; padding, and what cannot be decoded, is black and has the label -1."""
        batches = math.ceil(len(self.split) / self.batch_size)
        # Closed before its end: grain's workers leave shared memory behind where they come to one.
        with contextlib.closing(self._read(EvalExamples(**self._rows_from(0), crop=self._crop))) as stream:
            for batch, corrupt in itertools.islice(stream, batches):
                for reason, _ in corrupt:
                    _do_without(reason, "it counts nowhere", self._replace)
                yield batch

    def close(self) -> None:
        """Ends the threads or processes that read ahead for training."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _rows_from(self, first: int) -> dict[str, Any]:
        return {
            "split": self.split,
            "rows": self._rows,
            "batch_size": self.batch_size,
            "first": first,
        }

    def _read(self, examples: Examples) -> grain.DatasetIterator:
        """Yields batches, read by threads here or in worker processes and put on the devices by another thread.

        With each come its corrupt images, as (why they cannot be decoded, index in the batch). They are not raised
        where they are read, so that all ends in order.
        """
        threads = 2 if self._workers else os.cpu_count() or 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, len(self._rows)))
        images = grain.MapDataset.source(examples).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # in a program without flags; grain looks at its own, at their defaults
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=_WAITING)
            images = images.mp_prefetch(processes, worker_init_fn=_start_worker)
        batches = images.batch(len(self._rows), batch_fn=self._on_devices)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1))

    def _on_devices(self, examples: Sequence[Example]) -> tuple[Batch, list[tuple[str, int]]]:
        def on_devices(column: Sequence, dtype: type) -> jax.Array:
            own: np.ndarray = np.array(column, dtype)

            def rows(where: tuple[slice, ...]) -> np.ndarray:
                start, stop, _ = where[0].indices(self.batch_size)
                first = np.searchsorted(self._rows, start)
                return own[first : first + stop - start]

            return put((self.batch_size, *own.shape[1:]), self._sharded, rows)

        batch = Batch(
            inputs=on_devices([example["image"] for example in examples], np.uint8),
            labels=on_devices([example["label"] for example in examples], np.int32),
            index=on_devices([example["index"] for example in examples], np.int32),
            epoch=on_devices([example["epoch"] for example in examples], np.int32),
        )
        return batch, [(example["corrupt"], example["index"]) for example in examples if example["corrupt"]]


def _start_worker(_: int, __: int) -> None:
    """Lets a worker end when the process that it works for wants it to, or has ended itself, and only then."""
    # A signal to all of a run's processes is for the main one to act on, which may still need images then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _fits_decoded(split: LazySplit, mesh: Mesh) -> bool:
    """Whether the images are all of one size, and decoded a small part of a device's memory."""
    shapes = _shapes(split)
    _, first = next(shapes)
    return fits(len(split) * math.prod(first), mesh) and all(shape == first for _, shape in shapes)


def _decoded(split: LazySplit, replace: bool, training: bool) -> Split:
    """All images in memory; with those that cannot be decoded is done as `TrainExamples` and `EvalExamples` do."""
    first, shape = next(_shapes(split))
    images, labels = np.zeros((len(split), *shape), np.uint8), split.labels.copy()

    def fill(i: int) -> tuple[str, str]:
        image: np.ndarray | None
        if training:
            image, taken, reason = read_or_next(split, i)
            labels[i], consequence = split.labels[taken], f"{split.where(taken)} takes its place"
        else:
            image, reason = read_or_none(split, i)
            if image is None:
                labels[i] = -1
                return reason, "it counts nowhere"
            consequence = ""
        if image.shape != shape:
            raise ValueError(
                f"data.resident=device needs images of one size: {split.where(first)} is {shape}, "
                f"{split.where(i)} is {image.shape}. Pass --config.data.resident=host."
            )
        images[i] = image
        return reason, consequence

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for reason, consequence in pool.map(fill, range(len(split))):
            if reason:
                _do_without(reason, consequence, replace)
    return Split(images, labels)


def _shapes(split: LazySplit) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Positions and shapes of the images whose headers are whole; CorruptImageError where none is."""
    found = False
    for i in range(len(split)):
        try:
            shape = split.shape(i)
        except CorruptImageError:  # which is told of when it is decoded
            continue
        found = True
        yield i, shape
    if not found:
        raise CorruptImageError(f"no image of the split can be decoded, from {split.where(0)} on")


def _do_without(reason: str, consequence: str, replace: bool) -> None:
    """Warns of a corrupt image; raises CorruptImageError where it may not be replaced."""
    if not replace:
        raise CorruptImageError(f"{reason}. Mend it, or do without it: --config.data.corrupt=replace")
    warnings.warn(f"{reason}; {consequence}", RuntimeWarning, stacklevel=3)
