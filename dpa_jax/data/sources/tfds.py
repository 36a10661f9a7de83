"""Sets that TFDS prepared as array_record, its one format that is read at random and without TensorFlow."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np

from dpa_jax.data.sources import cache
from dpa_jax.data.splits import AnySplit, LazySplit, Split, decode

_FORMAT = "array_record"
_IN_MEMORY = 2 * 2**30  # bytes of all images of a set that are decoded at the start


class PreparedSplit(LazySplit):
    """One split of a prepared set.

    Args:
      folder: of the set's version.
      name: the split's.
    """

    def __init__(self, folder: pathlib.Path, name: str):
        """See the class."""
        import tensorflow_datasets as tfds

        folder = folder.absolute()
        builder = tfds.builder_from_directory(folder)
        self._place = f"split {name!r} of {folder}"
        self._records = builder.as_data_source(split=name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in ("image", "label")})
        # They are read from beside the images, which takes minutes where those are many.
        labels = cache.remembered(
            f"labels of {self._place}",
            lambda: [int(self._example(i)["label"]) for i in range(len(self._records))],
            lambda _: [folder, folder / "dataset_info.json"],
        )
        super().__init__(np.array(labels, np.int32))

    def where(self, i: int) -> str:
        """The number of image i in its split."""
        return f"record {i} in {self._place}"

    def open(self, i: int) -> BinaryIO:
        """The encoded image i."""
        return io.BytesIO(self._example(i)["image"])

    def decode(self, height: int, width: int, channels: int) -> Split:
        """All images, which are all of this shape, in memory; of more than one channel they become RGB."""
        channels = 1 if channels == 1 else 3
        images = np.empty((len(self), height, width, channels), np.uint8)
        for i in range(len(self)):
            images[i] = decode(self.open(i), channels, self.where(i))
        return Split(images, self.labels)

    def _example(self, i: int) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        return self._features.deserialize_example_np(self._records[i], decoders={"image": tfds.decode.SkipDecoding()})


def find(name: str, roots: Iterable[pathlib.Path]) -> pathlib.Path | None:
    """The folder of the newest version of a set that is prepared as array_record.

    Args:
      name: the set's, as TFDS has it; `NAME/CONFIG` for one of several configurations.
      roots: folders with `NAME/[CONFIG/]VERSION/`, or a version's own folder.

    Raises:
      ValueError: it is prepared in several configurations, and none is named.
    """
    readable = [(folder, facts) for folder, facts in _candidates(name, roots) if facts["fileFormat"] == _FORMAT]
    configs = sorted({facts.get("configName", "") for _, facts in readable})
    if len(configs) > 1:
        raise ValueError(f"{name} is prepared in several configurations: name one of {', '.join(configs)} after a /")
    return readable[0][0] if readable else None


def read(folder: pathlib.Path) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    """Opens a prepared set: in memory where its images are of one known shape and take at most 2 GiB.

    Args:
      folder: of its version, as `find` gives it.

    Returns:
      The training split; the held-out one, `test`, or `validation` where that has no labels; the classes' names.

    Raises:
      ValueError: it is no set of images with a class each, or lacks one of the two splits.
      CorruptImageError: an image that is decoded at once cannot be.
    """
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(folder).info
    features = dict(info.features.items())
    image, label = features.get("image"), features.get("label")
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype != np.uint8
    ):
        raise ValueError(f"{folder} has no uint8 images `image` with a class `label` each, but {info.features}")
    held_out = (PreparedSplit(folder, name) for name in ("test", "validation") if name in info.splits)
    test = next((split for split in held_out if split.labels.min() >= 0), None)
    if "train" not in info.splits or test is None:
        raise ValueError(
            f"{folder} needs splits train, and test or validation, with labels; it has {list(info.splits)}"
        )
    train, names = PreparedSplit(folder, "train"), tuple(label.names)
    if None not in image.shape and (len(train) + len(test)) * math.prod(image.shape) <= _IN_MEMORY:
        return train.decode(*image.shape), test.decode(*image.shape), names
    return train, test, names


def load(name: str, directory: str, download: bool) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    """Finds a prepared set and opens it with `read`.

    Args:
      name: as `find` takes it.
      directory: where it is, as `find` takes it; empty: `~/tensorflow_datasets`.
      download: have TFDS prepare it there where it is missing, which takes TensorFlow.

    Raises:
      FileNotFoundError: it is not there; the message says how to prepare it.
      ValueError: as `find` and `read` do.
    """
    root = pathlib.Path(directory or "~/tensorflow_datasets").expanduser()
    folder = find(name, [root])
    if folder is None and download and importlib.util.find_spec("tensorflow"):
        import tensorflow_datasets as tfds

        tfds.builder(name, data_dir=root, file_format=_FORMAT).download_and_prepare()
        folder = find(name, [root])
    if folder is None:
        others = [f"{folder} has it as {facts['fileFormat']}." for folder, facts in _candidates(name, [root])]
        raise FileNotFoundError(
            f"{name} was not found, prepared as {_FORMAT}, in {root.absolute()}. {' '.join(others)}\nTo prepare it in "
            "a folder DIR (for which alone TensorFlow is needed) and go on:\n  pip install '.[tfds]'\n"
            # Not `tfds build`, which wants Apache Beam as well.
            f"  python -c \"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir='DIR', "
            f"file_format='{_FORMAT}').download_and_prepare()\"\nand pass --config.data.dir=DIR."
        )
    return read(folder)


def _candidates(name: str, roots: Iterable[pathlib.Path]) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Every prepared version of a set, root by root, the newest first, and what TFDS wrote about it."""
    name, _, config = name.partition("/")
    found = []
    for root in roots:
        files = [
            path for depth in ("", f"{name}/*/", f"{name}/*/*/") for path in root.glob(f"{depth}dataset_info.json")
        ]
        versions = [(file.parent, {"fileFormat": "tfrecord", **json.loads(file.read_text())}) for file in files]
        versions.sort(key=lambda version: [int(part) for part in re.findall(r"\d+", version[0].name)], reverse=True)
        found += versions
    return [
        (folder, facts)
        for folder, facts in found
        if facts.get("name") == name and config in ("", facts.get("configName"))
    ]
