"""Sets that TFDS prepared as array_record, its one format that is read at random and without TensorFlow."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import math
import pathlib
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import STATISTICS, EncodedSplit, decode, image_spec
from dpa_jax.data.sources import cache
from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import ArraySplit

_FORMAT = "array_record"
_IN_MEMORY = 2 * 2**30  # bytes of all images of a set that are decoded at the start


class PreparedSplit(EncodedSplit):
    """One split of a prepared set, which has this folder."""

    def __init__(self, folder: pathlib.Path, name: str):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        self._folder, self._place = folder, f"split {name!r} of {folder}"
        self._records = builder.as_data_source(split=name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in ("image", "label")})

    def __len__(self) -> int:
        """The number of images."""
        return len(self._records)

    @functools.cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Int32 [N]. They are stored beside the images: reading them takes minutes, and is done once for ever."""
        labels = cache.remembered(
            f"labels of {self._place}",
            lambda: [self.label(i) for i in range(len(self))],
            lambda _: [self._folder, self._folder / "dataset_info.json"],
        )
        return np.array(labels, np.int32)

    def label(self, i: int) -> int:
        """The label of image i; -1 in splits without labels."""
        return int(self._example(i)["label"])

    def where(self, i: int) -> str:
        """The number of image i in its split."""
        return f"record {i} in {self._place}"

    def open(self, i: int) -> BinaryIO:
        """The encoded image i."""
        return io.BytesIO(self._example(i)["image"])

    def decoded(self, shape: tuple[int, int, int]) -> ArraySplit:
        """All images, each of this shape, in memory."""
        images = np.empty((len(self), *shape), np.uint8)
        for i in range(len(self)):
            images[i] = decode(self.open(i), shape[-1], self.where(i))
        return ArraySplit(images, self.labels)

    def _example(self, i: int) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        return self._features.deserialize_example_np(self._records[i], decoders={"image": tfds.decode.SkipDecoding()})


def open_tfds(data: ConfigDict) -> Source:
    """The set that TFDS calls NAME, for `data.name` "tfds:NAME".

    It lies in `dir` as `find` takes it, `~/tensorflow_datasets` where that is empty. With `download` TFDS prepares it
    there where it is missing, which takes TensorFlow.
    """
    name = data.name.partition(":")[2]
    return open_prepared(data.name, name, _prepare(name, data.dir, data.download))


def open_prepared(name: str, statistics: str, folder: pathlib.Path) -> Source:
    """A prepared set of images with a class each; they wait in memory, decoded, where they take at most 2 GiB.

    The held-out split is `test`, or `validation` where that has no labels. Mean and standard deviation are those of
    `STATISTICS[statistics]`, or else ImageNet's.
    """
    import tensorflow_datasets as tfds

    folder = folder.absolute()
    info = tfds.builder_from_directory(folder).info
    features, kinds = dict(info.features.items()), tfds.features
    image, label = features.get("image"), features.get("label")
    if not (isinstance(image, kinds.Image) and isinstance(label, kinds.ClassLabel) and image.np_dtype == np.uint8):
        raise ValueError(f"{folder} has no uint8 images `image` with a class `label` each, but {info.features}")
    held_out = (PreparedSplit(folder, split) for split in ("test", "validation") if split in info.splits)
    test = next((split for split in held_out if split.label(0) >= 0), None)
    if "train" not in info.splits or test is None:
        raise ValueError(f"{folder} needs splits train, and test or validation, with labels; it has {[*info.splits]}")
    train = PreparedSplit(folder, "train")
    encoded = None in image.shape or (len(train) + len(test)) * math.prod(image.shape) > _IN_MEMORY
    shape = (*image.shape[:2], 1 if image.shape[2] == 1 and not encoded else 3)
    mean, std = STATISTICS.get(statistics, STATISTICS["imagenet"])
    if shape[2] == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    spec = image_spec(name, shape, tuple(label.names), len(train), len(test), mean=mean, std=std, encoded=encoded)
    return Source(
        spec,
        lambda: (train, test) if encoded else (train.decoded(shape), test.decoded(shape)),
        lambda: np.bincount(train.labels, minlength=spec.num_classes),
    )


def find(name: str, roots: Iterable[pathlib.Path]) -> pathlib.Path | None:
    """The folder of the newest version of a set that is prepared as array_record.

    The name is NAME or NAME/CONFIG as TFDS has it; ValueError where it is prepared in several configurations and none
    is named. The roots have `NAME/[CONFIG/]VERSION/` in them, or are a version's own folder.
    """
    readable = [(folder, facts) for folder, facts in _candidates(name, roots) if facts["fileFormat"] == _FORMAT]
    configs = sorted({facts.get("configName", "") for _, facts in readable})
    if len(configs) > 1:
        raise ValueError(f"{name} is prepared in several configurations: name one of {', '.join(configs)} after a /")
    return readable[0][0] if readable else None


def _prepare(name: str, directory: str, download: bool) -> pathlib.Path:
    """The folder of a prepared set, which is prepared first where that is asked for."""
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
    return folder


def _candidates(name: str, roots: Iterable[pathlib.Path]) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Every prepared version of a set, root by root, the newest first, and what TFDS wrote about it."""
    name, _, config = name.partition("/")
    found = []
    for root in roots:
        patterns = ("", f"{name}/*/", f"{name}/*/*/")
        folders = [file.parent for pattern in patterns for file in root.glob(f"{pattern}dataset_info.json")]
        folders.sort(key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)], reverse=True)
        for folder in folders:
            facts = {"fileFormat": "tfrecord", **json.loads((folder / "dataset_info.json").read_text())}
            if facts.get("name") == name and config in ("", facts.get("configName")):
                found.append((folder, facts))
    return found
