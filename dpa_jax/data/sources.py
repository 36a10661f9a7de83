"""Where images come from: every data set by its name, as uint8 arrays in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import ml_collections
import numpy as np

from dpa_jax.activations.checks import check_choice
from dpa_jax.data import archives


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with their labels.

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
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int32:
            raise ValueError(f"labels must be int32 [{len(self)}], one an image, not {_describe(self.labels)}")

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)


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
    train: Split
    test: Split
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
        shape = self.train.images.shape[1:]
        if self.test.images.shape[1:] != shape:
            raise ValueError(f"{self.name}: test images are {self.test.images.shape[1:]}, training images {shape}")
        if not len(self.mean) == len(self.std) == shape[-1]:
            raise ValueError(
                f"{self.name}: mean and std need one value for each of {shape[-1]} channels, "
                f"not {self.mean} and {self.std}"
            )
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.name}: {len(self.class_names)} class names for {self.num_classes} classes")


def load(data: ml_collections.ConfigDict) -> Dataset:
    """Loads a data set into memory.

    Args:
      data: the configuration's `data` part: `name` (a key of `SOURCES`), `dir` and `download` (CIFAR; see
        `archives.load`), and `image_size, channels, num_classes, train_examples, test_examples` (synthetic).

    Raises:
      ValueError: the name is unknown, or the data is not what it should be.
      FileNotFoundError: the data is not there; the message says how to get it.
    """
    check_choice("config", "data.name", data.name, SOURCES)
    return SOURCES[data.name](data)


def _digits(data: ml_collections.ConfigDict) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey: 1,437 to train on, 360 held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # Every fifth of the images in order of class: stratified, and the same everywhere and for ever.
    held_out = np.zeros(len(labels), bool)
    held_out[np.argsort(labels, kind="stable")[::5]] = True
    return Dataset(
        name="digits",
        train=Split(images[~held_out], labels[~held_out]),
        test=Split(images[held_out], labels[held_out]),
        num_classes=10,
        mean=(0.3053,),
        std=(0.3759,),
        class_names=tuple(str(digit) for digit in range(10)),
    )


def _cifar(
    archive: archives.Archive, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[ml_collections.ConfigDict], Dataset]:
    def source(data: ml_collections.ConfigDict) -> Dataset:
        train, test, class_names = archives.load(archive, data.dir, data.download)
        return Dataset(archive.name, Split(*train), Split(*test), len(class_names), mean, std, class_names)

    return source


def _synthetic(data: ml_collections.ConfigDict) -> Dataset:
    """Noise over a coarse pattern of the class: any shape and class count, learnable, always the same."""
    for key in ("image_size", "channels", "num_classes", "train_examples", "test_examples"):
        if data[key] < 1:
            raise ValueError(f"data.{key} must be at least 1, not {data[key]}")
    random = np.random.Generator(np.random.Philox(0))
    coarse = random.integers(0, 128, (data.num_classes, 4, 4, data.channels), np.uint8)
    cell = np.arange(data.image_size) * 4 // data.image_size
    patterns = coarse[:, cell[:, None], cell]

    def split(examples: int) -> Split:
        labels = random.permutation(np.arange(examples, dtype=np.int32) % data.num_classes)
        images = patterns[labels]
        images += random.integers(0, 128, images.shape, np.uint8)
        return Split(images, labels)

    return Dataset(
        name=data.name,
        train=split(data.train_examples),
        test=split(data.test_examples),
        num_classes=data.num_classes,
        mean=(0.498,) * data.channels,  # of the sum of two uniform values in 0 .. 127
        std=(0.205,) * data.channels,
        class_names=tuple(f"class {i}" for i in range(data.num_classes)),
    )


def _describe(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


_cifar10 = _cifar(archives.CIFAR10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
_cifar100 = _cifar(archives.CIFAR100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))

# A new source is one function here.
SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "synthetic": _synthetic,
    "fake_data": _synthetic,
}
