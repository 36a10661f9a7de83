"""Reading the images of batches: each is a function of the seed and its place in the stream of examples.

Worker processes run this. Nothing here imports JAX, so that they need not.
"""

from __future__ import annotations

import abc
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
    """Some rows of a batch.

    Attributes:
      image: uint8 [R, S, S, 3].
      label: int32 [R]; -1 is ignored.
      index: int32 [R], the images' positions in their split.
      epoch: int32 [R], the epoch each belongs to.
      corrupt: [R], why the image that should be there cannot be decoded; empty: it can.
    """

    image: np.ndarray
    label: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # the method of tuples gives way
    epoch: np.ndarray
    corrupt: np.ndarray


Row = tuple[np.ndarray, int, int, int, str]  # one of `Rows`


@dataclasses.dataclass(frozen=True)
class Examples(abc.ABC):
    """What is at each position of a stream of examples, batch after batch.

    Attributes:
      split: where they come from.
    """

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
    """Training: in the sampler's order, without end.

    Attributes:
      sampler: says which image is where.
      crop: cuts them.
    """

    sampler: Sampler
    crop: TrainCrop

    def at(self, position: int) -> Row:
        """The image of this place, or the next that can be decoded; CorruptImageError where none can."""
        index, epoch = self.sampler.at(position)
        image, index, corrupt = read_or_next(self.split, index)
        cut = self.crop(image, uniform(self.sampler.seed, epoch, index))
        return cut, int(self.split.labels[index]), index, epoch, corrupt


@dataclasses.dataclass(frozen=True)
class EvalExamples(Examples):
    """Evaluation: in order, every image once, then padding.

    Attributes:
      crop: cuts them.
    """

    crop: EvalCrop

    def at(self, position: int) -> Row:
        """The image of this place; black with the label -1 after the last, and where it cannot be decoded."""
        cut, label, corrupt = np.zeros((self.crop.size, self.crop.size, self.split.channels), np.uint8), -1, ""
        inside = position < len(self.split)
        if inside:
            image, corrupt = read_or_none(self.split, position)
            if image is not None:
                cut, label = self.crop(image), int(self.split.labels[position])
        return cut, label, position if inside else 0, 0, corrupt


def read_or_next(split: EncodedSplit, i: int) -> tuple[np.ndarray, int, str]:
    """Reads image i, or the next that can be decoded.

    Returns:
      uint8 [H, W, 3], the position that it was read from, and why image i cannot be decoded, empty where it can.

    Raises:
      CorruptImageError: none can.
    """
    image, corrupt = read_or_none(split, i)
    if image is not None:
        return image, i, ""
    for other in itertools.chain(range(i + 1, len(split)), range(i)):
        image, _ = read_or_none(split, other)
        if image is not None:
            return image, other, corrupt
    raise CorruptImageError(f"{corrupt}, nor can any other image of the split")


def read_or_none(split: EncodedSplit, i: int) -> tuple[np.ndarray | None, str]:
    """Reads image i: uint8 [H, W, 3] and an empty string, or None and why it cannot be decoded."""
    try:
        return split.read(i), ""
    except CorruptImageError as error:
        return None, str(error)


def decode_all(split: EncodedSplit, replace: bool, training: bool) -> ArraySplit:
    """All images of a split in memory.

    Args:
      split: images of one size.
      replace: do without corrupt images, as `TrainExamples` and `EvalExamples` do, and warn of them.
      training: whether it is the training split.

    Raises:
      ValueError: the images are of several sizes.
      CorruptImageError: one cannot be decoded, and is not to be replaced; or none can.
    """
    first, shape = next(shapes_of(split))
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
                do_without(reason, consequence, replace)
    return ArraySplit(images, labels)


def shapes_of(split: EncodedSplit) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Positions and shapes of the images whose headers can be read; CorruptImageError where there is none."""
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


def do_without(reason: str, consequence: str, replace: bool) -> None:
    """Warns of a corrupt image, or raises CorruptImageError where it must not be replaced."""
    if not replace:
        raise CorruptImageError(f"{reason}. Mend it, or do without it: --config.data.corrupt=replace")
    warnings.warn(f"{reason}; {consequence}", RuntimeWarning, stacklevel=3)


def uniform(seed: int, epoch: int, index: int) -> np.ndarray:
    """The draws of an image, float32 [DRAWS] in [0, 1): the same for ever and on every machine."""
    # Far along the stream of the epoch's permutation, which has the same key.
    counter = np.array([0, 0, 0, index + 1], np.uint64)
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter).random_raw(DRAWS)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
