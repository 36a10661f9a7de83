"""Images with their labels: as arrays in memory, or encoded somewhere and decoded when they are wanted."""

from __future__ import annotations

import abc
import dataclasses
import io
import struct
from typing import BinaryIO

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG")
_MODES = {1: "L", 3: "RGB"}


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels, in memory.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where a shape or a dtype is another."""
        if self.images.ndim != 4 or self.images.dtype != np.uint8 or not self.images.size:
            raise ValueError(f"images must be uint8 [N, H, W, C] with none of them 0, not {_describe(self.images)}")
        _check_labels(self.labels, len(self.images))

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[-1]

    def take(self, index: np.ndarray) -> Split:
        """The images at these positions, int [n], alone."""
        return Split(self.images[index], self.labels[index])


class LazySplit(abc.ABC):
    """Images with their labels, each decoded when it is wanted and of a size of its own.

    It goes to worker processes: it can be pickled, and is as small as its labels and names let it be.

    Args:
      labels: int32 [N].

    Raises:
      ValueError: the labels are something else.
    """

    channels = 3

    def __init__(self, labels: np.ndarray):
        """See the class."""
        _check_labels(labels, len(labels))
        self.labels = labels

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @abc.abstractmethod
    def where(self, i: int) -> str:
        """What to call image i in a report: its path, or its place in a file of many."""

    @abc.abstractmethod
    def open(self, i: int) -> BinaryIO:
        """Image i as it is stored, JPEG or PNG."""

    def read(self, i: int) -> np.ndarray:
        """Decodes image i to uint8 [H, W, 3].

        Raises:
          CorruptImageError: it cannot be decoded.
          OSError: it cannot be read at all.
        """
        with self.open(i) as file:
            # Whole before it is decoded, so that a disk that fails is not taken for a damaged image.
            encoded = io.BytesIO(file.read())
        return decode(encoded, self.channels, self.where(i))

    def shape(self, i: int) -> tuple[int, int, int]:
        """Height, width and channels of image i, of which only the header is read; raises as `read` does."""
        with self.open(i) as file, _open(file, self.where(i)) as image:
            return image.height, image.width, self.channels

    def take(self, index: np.ndarray) -> LazySplit:
        """The images at these positions, int [n], alone."""
        return _Taken(self, index)


class _Taken(LazySplit):
    """Some of the images of another split."""

    def __init__(self, split: LazySplit, index: np.ndarray):
        super().__init__(split.labels[index])
        self._split, self._index = split, index

    def where(self, i: int) -> str:
        return self._split.where(int(self._index[i]))

    def open(self, i: int) -> BinaryIO:
        return self._split.open(int(self._index[i]))


AnySplit = Split | LazySplit


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split, and what a model needs to know of them.

    Attributes:
      name: the name it was loaded by.
      train: the training split.
      test: the held-out split.
      num_classes: how many classes there are; labels are 0 .. num_classes - 1.
      mean: per channel, of training images scaled to [0, 1].
      std: standard deviations, likewise.
      class_names: one a class, in the order of the labels.
    """

    name: str
    train: AnySplit
    test: AnySplit
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where a label is out of range, or the parts do not belong together."""
        for split_name, split in (("train", self.train), ("test", self.test)):
            bad = np.flatnonzero((split.labels < 0) | (split.labels >= self.num_classes))
            if bad.size:
                raise ValueError(
                    f"{self.name}: label {split.labels[bad[0]]} at position {bad[0]} of split {split_name!r} "
                    f"is outside 0 .. {self.num_classes - 1}, there are {self.num_classes} classes"
                )
        if isinstance(self.train, Split) and isinstance(self.test, Split):
            shape = self.train.images.shape[1:]
            if self.test.images.shape[1:] != shape:
                raise ValueError(f"{self.name}: test images are {self.test.images.shape[1:]}, training images {shape}")
        channels = self.train.channels
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(
                f"{self.name}: mean and std need one value for each of {channels} channels, "
                f"not {self.mean} and {self.std}"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.class_names)} class names for {self.num_classes} classes")


def decode(file: BinaryIO, channels: int, where: str) -> np.ndarray:
    """Decodes a JPEG or a PNG, whatever its colours are stored as.

    Args:
      file: the image.
      channels: of the result: 1 (grey) or 3 (RGB). Transparency is dropped.
      where: what an error calls the image.

    Returns:
      uint8 [H, W, channels].

    Raises:
      CorruptImageError: it is damaged, cut off, too large for Pillow, or neither JPEG nor PNG.
    """
    with _open(file, where) as image:
        try:
            if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
                levels = (np.asarray(image) >> 8).astype(np.uint8)
                return np.asarray(Image.fromarray(levels).convert(_MODES[channels])).reshape(*levels.shape, channels)
            if "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns of a palette with transparency otherwise
            return np.asarray(image.convert(_MODES[channels])).reshape(image.height, image.width, channels)
        except _DAMAGE as error:
            raise _corrupt(where, error) from error


# What Pillow raises for damaged data of these formats.
_DAMAGE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def _open(file: BinaryIO, where: str) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except _DAMAGE as error:
        raise _corrupt(where, error) from error


def _corrupt(where: str, error: Exception) -> CorruptImageError:
    reason = "is neither a JPEG nor a PNG" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return CorruptImageError(f"{where} cannot be decoded: {reason}")


def _check_labels(labels: np.ndarray, examples: int) -> None:
    if labels.shape != (examples,) or labels.dtype != np.int32:
        raise ValueError(f"labels must be int32 [{examples}], one an image, not {_describe(labels)}")


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
