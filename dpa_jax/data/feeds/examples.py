"""Reading the images of batches: each is a function of the seed and its place in the stream of examples.

Worker processes run this. Nothing here imports JAX, so that they need not.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dpa_jax.data.feeds.host_crop import DRAWS, EvalCrop, TrainCrop
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.images import CorruptImageError, EncodedSplit
from dpa_jax.data.splits import ArraySplit


class Rows(NamedTuple):
    """R rows of a batch; `corrupt` says of each why the image that should be there cannot be decoded, "" if it can."""

    image: np.ndarray  # uint8 [R, S, S, 3]
    label: np.ndarray  # int32 [R]; -1 is ignored
    index: np.ndarray  # type: ignore[assignment]  # int32 [R], in the split; the method of tuples gives way
    epoch: np.ndarray  # int32 [R]
    corrupt: np.ndarray


Row = tuple[np.ndarray, int, int, int, str]  # one of `Rows`


@dataclasses.dataclass(frozen=True)
class Examples(abc.ABC):
    """What is at each position of a stream of examples, batch after batch."""

    split: EncodedSplit

    def read(self, positions: np.ndarray, each: Callable[..., Iterable[Row]] = map) -> Rows:
        """The rows at these positions, int [R]; `each` is `map`, or that of a pool of threads."""
        images, *numbers, corrupt = zip(*each(self.at, positions.tolist()), strict=True)
        label, index, epoch = (np.array(column, np.int32) for column in numbers)
        return Rows(np.stack(images), label, index, epoch, np.array(corrupt))

    @abc.abstractmethod
    def at(self, position: int) -> Row:
        """The row at a position."""


@dataclasses.dataclass(frozen=True)
class TrainExamples(Examples):
    """Training: in the sampler's order, without end; the next image takes the place of a corrupt one."""

    sampler: Sampler
    crop: TrainCrop

    def at(self, position: int) -> Row:
        """The row at a position; CorruptImageError where no image can be decoded."""
        index, epoch = self.sampler.at(position)
        image, label, index, corrupt = read_or_next(self.split, index)
        return self.crop(image, uniform(self.sampler.seed, epoch, index)), label, index, epoch, corrupt


@dataclasses.dataclass(frozen=True)
class EvalExamples(Examples):
    """Evaluation: in order, every image once; corrupt ones, and the padding after the last, are black with label -1."""

    crop: EvalCrop

    def at(self, position: int) -> Row:
        """The row at a position."""
        image, label, index, corrupt = None, -1, 0, ""
        if position < len(self.split):
            image, label, index, corrupt = read_or_none(self.split, position)
        black = np.zeros((self.crop.size, self.crop.size, self.split.channels), np.uint8)
        return black if image is None else self.crop(image), label, index, 0, corrupt


def read_or_next(split: EncodedSplit, i: int) -> tuple[np.ndarray, int, int, str]:
    """Reads image i, or the next that can be decoded; CorruptImageError where none can.

    Returns its pixels uint8 [H, W, 3], its label, its position, and why image i cannot be decoded, "" if it can.
    """
    image, label, taken, corrupt = read_or_none(split, i)
    others = itertools.chain(range(i + 1, len(split)), range(i))
    while image is None:
        if (other := next(others, None)) is None:
            raise CorruptImageError(f"{corrupt}, nor can any other image of the split")
        image, label, taken, _ = read_or_none(split, other)
    return image, label, taken, corrupt


def read_or_none(split: EncodedSplit, i: int) -> tuple[np.ndarray | None, int, int, str]:
    """As `read_or_next`, but None with the label -1 where image i cannot be decoded."""
    try:
        return split.read(i), int(split.labels[i]), i, ""
    except CorruptImageError as error:
        return None, -1, i, str(error)


def decode_all(split: EncodedSplit, training: bool, replace: bool) -> ArraySplit:
    """All images of a split in memory, the corrupt ones replaced as `TrainExamples` and `EvalExamples` do.

    Raises:
      ValueError: the images are of several sizes.
      CorruptImageError: one cannot be decoded, and `replace` is not set; or none can.
    """
    first, shape = next(shapes_of(split))
    images, labels = np.zeros((len(split), *shape), np.uint8), np.empty(len(split), np.int32)
    read: Callable[..., tuple[np.ndarray | None, int, int, str]] = read_or_next if training else read_or_none

    def fill(i: int) -> tuple[int, str]:
        image, labels[i], taken, corrupt = read(split, i)
        if image is None:
            return taken, corrupt
        if image.shape != shape:
            raise ValueError(
                f"data.resident=device needs images of one size: {split.where(first)} is {shape}, "
                f"{split.where(i)} is {image.shape}. Pass --config.data.resident=host."
            )
        images[i] = image
        return taken, corrupt

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, (taken, corrupt) in enumerate(pool.map(fill, range(len(split)))):
            do_without(split, labels[i], taken, corrupt, replace)
    return ArraySplit(images, labels)


def shapes_of(split: EncodedSplit) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Positions and shapes of the images whose headers can be read; CorruptImageError where there is none."""
    found = False
    for i in range(len(split)):
        with contextlib.suppress(CorruptImageError):  # which is told of when it is decoded
            yield i, split.shape(i)
            found = True
    if not found:
        raise CorruptImageError(f"no image of the split can be decoded, from {split.where(0)} on")


def do_without(split: EncodedSplit, label: int, taken: int, corrupt: str, replace: bool) -> None:
    """Warns where an image is corrupt, or raises CorruptImageError where it must not be replaced."""
    if corrupt and not replace:
        raise CorruptImageError(f"{corrupt}. Mend it, or do without it: --config.data.corrupt=replace")
    if corrupt:
        consequence = "it counts nowhere" if label == -1 else f"{split.where(taken)} takes its place"
        warnings.warn(f"{corrupt}; {consequence}", RuntimeWarning, stacklevel=4)


def uniform(seed: int, epoch: int, index: int) -> np.ndarray:
    """The draws of an image, float32 [DRAWS] in [0, 1): the same for ever and on every machine."""
    # Far along the stream of the epoch's permutation, which has the same key.
    counter = np.array([0, 0, 0, index + 1], np.uint64)
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter).random_raw(DRAWS)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
