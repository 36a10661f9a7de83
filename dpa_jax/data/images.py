"""Image data sets: what is known of them before loading, and images that are stored encoded.

Nothing here imports JAX, so that the loader's worker processes need not.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from dpa_jax.data.batch import ArraySpec, Shape, Spec, Transforms
from dpa_jax.data.splits import Split

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from dpa_jax.data.feeds.base import BaseFeed

# Per channel, mean and standard deviation of images scaled to [0, 1]; ImageNet's where nothing else is known.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

_MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class ImageSpec(Spec):
    """What is known of a set of images before it is loaded; `inputs` is one ArraySpec, uint8 [H, W, C].

    Attributes:
      mean: per channel, of training images scaled to [0, 1].
      std: standard deviations, likewise.
      encoded: images are stored as JPEG or PNG files and decoded one by one; the splits are `EncodedSplit`s.

    Raises:
      ValueError: the inputs are not uint8 [H, W, C], or mean and std have not one value a channel.
    """

    mean: tuple[float, ...] = STATISTICS["imagenet"][0]
    std: tuple[float, ...] = STATISTICS["imagenet"][1]
    encoded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.inputs.shape) != 3 or self.inputs.dtype != np.uint8 or 0 in self.inputs.shape:
            raise ValueError(f"{self.name}: images must be uint8 [H, W, C] with no side 0, not {self.inputs}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"{self.name}: mean and std need one value for each of {self.channels} channels, "
                f"not {self.mean} and {self.std}"
            )

    @property
    def channels(self) -> int:
        """C."""
        return self.inputs.shape[-1]

    def configured(self, data: ConfigDict) -> ImageSpec:
        """With `data.mean` and `data.std` where these are given."""
        return dataclasses.replace(self, mean=tuple(data.mean) or self.mean, std=tuple(data.std) or self.std)

    def model_options(self) -> dict[str, Any]:
        """The number of channels, `in_channels`."""
        return {"in_channels": self.channels}

    def transforms(self, config: ConfigDict, train_feed: BaseFeed, eval_feed: BaseFeed) -> Transforms:
        """The augmentation of the configuration's `augment` part, as far as a feed leaves it to the device."""
        from dpa_jax.data import augment

        part = config.augment
        evaluate = augment.eval_transform(eval_feed.left_to_do(part), self.mean, self.std)
        mix = functools.partial(augment.mix, mixup=part.mixup, cutmix=part.cutmix)
        return Transforms(
            train=augment.train_transform(train_feed.left_to_do(part), self.mean, self.std),
            evaluate=lambda batch: evaluate(batch.inputs),
            mix=mix if part.mixup or part.cutmix else None,
        )


def image_spec(
    name: str, shape: Shape, class_names: tuple[str, ...], train_examples: int, test_examples: int, **others: Any
) -> ImageSpec:
    """An `ImageSpec` of uint8 images of this shape, [H, W, C]; `others` are further attributes of it."""
    inputs = ArraySpec(shape, np.dtype(np.uint8))
    return ImageSpec(name, inputs, len(class_names), class_names, train_examples, test_examples, **others)


class CorruptImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


class EncodedSplit(Split):
    """Images that are stored encoded, each of its own size, and decoded one by one.

    It is pickled and sent to worker processes, so it should hold little more than labels and names.
    """

    channels = 3

    @abc.abstractmethod
    def where(self, i: int) -> str:
        """Where image i is stored, for messages: a path, or a file and a row."""

    @abc.abstractmethod
    def open(self, i: int) -> BinaryIO:
        """Image i as it is stored, JPEG or PNG."""

    def read(self, i: int) -> np.ndarray:
        """Decodes image i to uint8 [H, W, 3]; CorruptImageError or, where it cannot be read at all, OSError."""
        with self.open(i) as file:
            # Read whole before it is decoded, so that a failing disk is not taken for a damaged image.
            encoded = io.BytesIO(file.read())
        return decode(encoded, self.channels, self.where(i))

    def shape(self, i: int) -> tuple[int, int, int]:
        """Height, width and channels of image i, from its header alone; raises as `read` does."""
        with self.open(i) as file, _opened(file, self.where(i)) as image:
            return image.height, image.width, self.channels

    def take(self, index: np.ndarray) -> EncodedSplit:
        """The images at these positions, int [n], alone."""
        return _Taken(self, index)


class _Taken(EncodedSplit):
    """Some of the images of another split."""

    def __init__(self, split: EncodedSplit, index: np.ndarray):
        super().__init__(split.labels[index])
        self._split, self._index = split, index

    def where(self, i: int) -> str:
        return self._split.where(int(self._index[i]))

    def open(self, i: int) -> BinaryIO:
        return self._split.open(int(self._index[i]))


def decode(file: BinaryIO, channels: int, where: str) -> np.ndarray:
    """Decodes a JPEG or a PNG of any colour mode to uint8 [H, W, channels], grey (1) or RGB (3), without transparency.

    Raises CorruptImageError, which says `where`: it is damaged, cut off, too large for Pillow, or of another format.
    """
    with _opened(file, where) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns of a palette with transparency otherwise
        return np.asarray(image.convert(_MODES[channels])).reshape(image.height, image.width, channels)


@contextlib.contextmanager
def _opened(file: BinaryIO, where: str) -> Iterator[Image.Image]:
    """The image in a file; whatever Pillow raises for damaged data becomes a CorruptImageError.

    So do images of more pixels than `Image.MAX_IMAGE_PIXELS`, of which Pillow only warns up to twice as many.
    """
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"its {image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
            yield image
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "is neither a JPEG nor a PNG"
        raise CorruptImageError(f"{where} cannot be decoded: {reason}") from error
