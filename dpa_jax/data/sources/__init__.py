"""Where images come from: every data set by its name."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import ml_collections
import numpy as np

from dpa_jax.checks import check_choice, check_range
from dpa_jax.data.sources import cifar as archives
from dpa_jax.data.sources import folder, parquet
from dpa_jax.data.sources import tfds as prepared
from dpa_jax.data.splits import Dataset, Split


def load(data: ml_collections.ConfigDict) -> Dataset:
    """Loads a data set; images that do not fit into memory stay where they are until they are wanted.

    Args:
      data: the configuration's `data` part: `name` (a key of `SOURCES`, or `tfds:NAME`), `dir` and `download` (see
        `archives.load`, `folder.load`, `parquet.load`, `prepared.load`), `imbalance` (see `long_tail`), `mean` and
        `std` (in place of the source's own), and `image_size`, `channels`, `num_classes`, `train_examples` and
        `test_examples` (synthetic).

    Raises:
      ValueError: the name is unknown, or the data is not what it should be.
      FileNotFoundError: the data is not there; the message says how to get it.
    """
    if data.name.startswith(_TFDS):
        dataset = _prepared(data)
    else:
        check_choice("config", "data.name", data.name, [*SOURCES, f"{_TFDS}NAME"])
        dataset = SOURCES[data.name](data)
    train = dataset.train
    if data.imbalance != 1:
        train = train.take(long_tail(train.labels, dataset.num_classes, data.imbalance))
    mean, std = tuple(data.mean) or dataset.mean, tuple(data.std) or dataset.std
    return dataclasses.replace(dataset, train=train, mean=mean, std=std)


def long_tail(labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
    """Which images stay where the classes get rarer exponentially, as in the long-tailed CIFAR sets.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019: of n images a class, class k of K
    keeps n * imbalance^(-k / (K - 1)), rounded down; here at least one.

    Args:
      labels: int32 [N].
      num_classes: K.
      imbalance: how many times more images the first class keeps than the last.

    Returns:
      Positions, int64 [n], rising; the same for ever, and a greater imbalance keeps some of what a smaller one does.

    Raises:
      ValueError: the imbalance is less than 1.
    """
    check_range("config", "data.imbalance", imbalance, low=1)
    profile = imbalance ** (-np.arange(num_classes) / max(num_classes - 1, 1))
    kept = np.maximum(len(labels) / num_classes * profile, 1).astype(np.int64)
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    return np.sort(np.concatenate([order[labels[order] == k][: kept[k]] for k in range(num_classes)]))


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


def _cifar(archive: archives.Archive, data: ml_collections.ConfigDict) -> Dataset:
    train, test, class_names = archives.load(archive, data.dir, data.download)
    return Dataset(archive.name, train, test, len(class_names), *_STATISTICS[archive.name], class_names)


def _folder(data: ml_collections.ConfigDict, get: str = "") -> Dataset:
    """A folder of images, ImageNet first of all; `get` says where its images are to be had."""
    root = pathlib.Path(data.dir or f"data/{data.name}").expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{data.name}: there is no folder {root.absolute()}. {get}Pass --config.data.dir=DIR; wanted is "
            f"{folder.LAYOUT}."
        )
    train, test, class_names = folder.load(root)
    return Dataset(data.name, train, test, len(class_names), *_STATISTICS["imagenet"], class_names)


def _parquet(data: ml_collections.ConfigDict) -> Dataset:
    """Any set of images with a class each that Hugging Face's `datasets` has written as parquet."""
    root = pathlib.Path(data.dir or "data").expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"parquet: there is no folder {root.absolute()}. Pass --config.data.dir=DIR; wanted is {parquet.LAYOUT}."
        )
    train, test, class_names = parquet.load(root)
    return Dataset(data.name, train, test, len(class_names), *_STATISTICS["imagenet"], class_names)


def _prepared(data: ml_collections.ConfigDict) -> Dataset:
    """Any set of images with a class each that TFDS has prepared."""
    name = data.name.removeprefix(_TFDS)
    train, test, class_names = prepared.load(name, data.dir, data.download)
    mean, std = _STATISTICS.get(name, _STATISTICS["imagenet"])
    if train.channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return Dataset(data.name, train, test, len(class_names), mean, std, class_names)


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


_TFDS = "tfds:"

# Per channel, mean and standard deviation of images scaled to [0, 1]; where nothing else is known, ImageNet's.
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

_IMAGENET = (
    "ImageNet's images (ILSVRC2012) are to be had at https://www.image-net.org/download.php once you have agreed to "
    "their terms. "
)
_IMAGENET100 = _IMAGENET + "ImageNet-100 is the folders of 100 of its classes. "

# A new source is one function here.
SOURCES: dict[str, Callable[[ml_collections.ConfigDict], Dataset]] = {
    "digits": _digits,
    "cifar10": functools.partial(_cifar, archives.CIFAR10),
    "cifar100": functools.partial(_cifar, archives.CIFAR100),
    "imagenet": functools.partial(_folder, get=_IMAGENET),
    "imagenet100": functools.partial(_folder, get=_IMAGENET100),
    "folder": _folder,
    "parquet": _parquet,
    "synthetic": _synthetic,
    "fake_data": _synthetic,
}
