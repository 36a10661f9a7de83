"""Sets that TFDS prepared as array_record, its one format that is read at random and without TensorFlow.

TFDS itself takes no part in the reading: it would import whatever classes a set's metadata names.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dpa_jax.data.images import STATISTICS, EncodedSplit, decode, image_spec
from dpa_jax.data.sources import cache, reading, tf_example
from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import ArraySplit

_FORMAT = "array_record"
_IN_MEMORY = 2 * 2**30  # bytes of all images of a set that are decoded at the start
_MOST_CLASSES = 10**6  # more would be a mistake that takes all memory
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS' own for file names
_AGAIN = "Delete its folder and prepare the set again"

# The two features that are read, as the metadata has them; whatever other features there are is passed over.
_IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
_LABEL = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"


class _Shard(NamedTuple):
    """One file of a split; the names are those that array_record asks for."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Metadata(NamedTuple):
    """What the metadata of a prepared set says: the images' shape, a name a class, the files of each split."""

    shape: tuple[int | None, ...]
    class_names: tuple[str, ...]
    splits: dict[str, list[_Shard]]


class _Version(NamedTuple):
    """One prepared version of a set."""

    folder: pathlib.Path
    file_format: str
    config: str


class PreparedSplit(EncodedSplit):
    """One split of a prepared set, which has this folder."""

    def __init__(self, folder: pathlib.Path, name: str, shards: list[_Shard]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._folder, self._place, self._shards = folder, f"split {name!r} of {folder}", shards
        self._records = ArrayRecordDataSource(shards)

    def __len__(self) -> int:
        """The number of images."""
        return sum(shard.take for shard in self._shards)

    @functools.cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Int32 [N]. They are stored beside the images: reading them takes minutes, and is done once for ever."""
        labels = cache.remembered(
            f"labels of {self._place}",
            lambda: [self.label(i) for i in range(len(self))],
            lambda _: [self._folder / "dataset_info.json", *(pathlib.Path(shard.filename) for shard in self._shards)],
        )
        return np.array(labels, np.int32)

    def label(self, i: int) -> int:
        """The label of image i; -1 in splits without labels. OSError where it cannot be read."""
        return self._value(i, "label", int)

    def where(self, i: int) -> str:
        """The number of image i in its split."""
        return f"record {i} in {self._place}"

    def open(self, i: int) -> BinaryIO:
        """The encoded image i; OSError where it cannot be read."""
        return io.BytesIO(self._value(i, "image", bytes))

    def decoded(self, shape: tuple[int, int, int]) -> ArraySplit:
        """All images, each of this shape, in memory."""
        images = np.empty((len(self), *shape), np.uint8)
        for i in range(len(self)):
            image = decode(self.open(i), shape[-1], self.where(i))
            if image.shape != shape:
                raise ValueError(f"{self.where(i)} is an image {image.shape}; the set's metadata says {shape}")
            images[i] = image
        return ArraySplit(images, self.labels)

    def _value(self, i: int, feature: str, kind: type) -> Any:
        """The one value of a feature of example i."""
        try:
            values = tf_example.parse(self._records[i]).get(feature, [])
            if [type(value) for value in values] != [kind] or (kind is int and not -1 <= values[0] < 2**31):
                raise ValueError(f"its {feature} is {str(values)[:100]}, not one of type {kind.__name__}")
        # array_record has RuntimeErrors alone.
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{self.where(i)} is damaged: {reading.one_line(error)}. {_AGAIN}") from error
        return values[0]


def open_tfds(data: ConfigDict) -> Source:
    """The set that TFDS calls NAME, for `data.name` "tfds:NAME" or "tfds:NAME/CONFIG".

    It lies in `dir` as `find` takes it, `~/tensorflow_datasets` where that is empty. With `download` TFDS prepares it
    there where it is missing, which takes TensorFlow.
    """
    name = data.name.partition(":")[2]
    if not re.fullmatch(r"\w+(/[\w.+-]+)?", name) or ".." in name:
        raise ValueError(f"data.name must be tfds:NAME or tfds:NAME/CONFIG; got {data.name!r}")
    return open_prepared(data.name, name, _prepare(name, data.dir, data.download))


def open_prepared(name: str, statistics: str, folder: pathlib.Path) -> Source:
    """A prepared set of images with a class each; they wait in memory, decoded, where they take at most 2 GiB.

    The evaluation split is `test`, or `validation` where that has no labels. Mean and standard deviation are those of
    `STATISTICS[statistics]`, or else ImageNet's.

    Raises:
      ValueError: it is no such set, or its metadata is damaged.
      OSError: a file is missing or damaged.
    """
    folder = folder.absolute()
    about = _read_metadata(folder)
    train, *others = (
        PreparedSplit(folder, split, _checked(about.splits[split])) if about.splits.get(split) else None
        for split in ("train", "test", "validation")
    )
    test = next((split for split in others if split and split.label(0) >= 0), None)
    if not train or not test:
        found = [*about.splits]
        raise ValueError(f"{folder} needs splits train, and test or validation, with labels; it has {found}")
    encoded = None in about.shape or (len(train) + len(test)) * math.prod(about.shape) > _IN_MEMORY  # type: ignore
    shape: Any = (*about.shape[:2], 1 if about.shape[2] == 1 and not encoded else 3)
    mean, std = STATISTICS.get(statistics, STATISTICS["imagenet"])
    if shape[2] == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    spec = image_spec(name, shape, about.class_names, len(train), len(test), mean=mean, std=std, encoded=encoded)
    return Source(
        spec,
        lambda: (train, test) if encoded else (train.decoded(shape), test.decoded(shape)),
        lambda: np.bincount(train.labels, minlength=spec.num_classes),
    )


def find(name: str, roots: Iterable[pathlib.Path]) -> pathlib.Path | None:
    """The folder of the newest version of a set that is prepared as array_record.

    The name is NAME or NAME/CONFIG as TFDS has it; ValueError where it is prepared in several configurations and none
    is named. The roots have `NAME/[CONFIG/]VERSION/` in them, or are a version's own folder. A version whose
    `dataset_info.json` is damaged is passed over with a warning.
    """
    versions, damaged = _versions(name, roots)
    for line in damaged:
        logging.warning("%s", line)
    readable = [version for version in versions if version.file_format == _FORMAT]
    configs = sorted({version.config for version in readable})
    if len(configs) > 1:
        raise ValueError(f"{name} is prepared in several configurations: name one of {', '.join(configs)} after a /")
    return readable[0].folder if readable else None


def _prepare(name: str, directory: str, download: bool) -> pathlib.Path:
    """The folder of a prepared set, which is prepared first where that is asked for."""
    root = reading.folder_path(directory or "~/tensorflow_datasets")
    folder = find(name, [root])
    if folder is None and download and importlib.util.find_spec("tensorflow"):
        import tensorflow_datasets as tfds

        set_name, _, config = name.partition("/")
        # By its class: `tfds.builder` may take what lies in the folder for the set.
        try:
            builder = tfds.builder_cls(set_name)
        except tfds.core.DatasetNotFoundError as error:  # whose message lists all sets
            raise ValueError(f"data.name: TFDS has no set {set_name!r}") from error
        builder(config=config or None, data_dir=root, file_format=_FORMAT).download_and_prepare()
        folder = find(name, [root])
    if folder is None:
        versions, damaged = _versions(name, [root])
        others = [*damaged, *(f"{version.folder} has it as {version.file_format}" for version in versions)]
        raise FileNotFoundError(
            f"{name} was not found, prepared as {_FORMAT}, in {root}. {' '.join(f'{line}.' for line in others)}\n"
            "To prepare it in a folder DIR (for which alone TensorFlow is needed) and go on:\n  pip install '.[tfds]'\n"
            # Not `tfds build`, which wants Apache Beam as well.
            f"  python -c \"import tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir='DIR', "
            f"file_format='{_FORMAT}').download_and_prepare()\"\nand pass --config.data.dir=DIR."
        )
    return folder


def _versions(name: str, roots: Iterable[pathlib.Path]) -> tuple[list[_Version], list[str]]:
    """Every prepared version of a set, root by root, the newest first; and of those that are damaged a line each."""
    name, _, config = name.partition("/")
    found, damaged = [], []
    for root in roots:
        patterns = ("", f"{name}/*/", f"{name}/*/*/")
        files = [file for pattern in patterns for file in root.glob(f"{pattern}dataset_info.json")]
        files.sort(key=lambda file: [int(part) for part in re.findall(r"\d+", file.parent.name)], reverse=True)
        for file in files:
            try:
                info = reading.read_object(file)
                facts = {"name": "", "fileFormat": "tfrecord", "configName": ""}
                facts = {key: reading.member(info, key, str, file, default) for key, default in facts.items()}
            except (ValueError, OSError) as error:
                damaged.append(str(error))
                continue
            if facts["name"] == name and config in ("", facts["configName"]):
                found.append(_Version(file.parent, facts["fileFormat"], facts["configName"]))
    return found, damaged


# ---------------- The metadata ----------------


def _read_metadata(folder: pathlib.Path) -> _Metadata:
    """Reads the files that TFDS writes beside the records; ValueError or OSError where one is not as it should be."""
    file = folder / "features.json"
    features = reading.member(reading.read_object(file), "featuresDict", dict, file)
    features = reading.member(features, "features", dict, file)
    kinds = {name: feature.get("pythonClassName") for name, feature in features.items() if isinstance(feature, dict)}
    image, label = (
        reading.member(features[name], part, dict, file) if kinds.get(name) == wanted else {}
        for name, part, wanted in (("image", "image", _IMAGE), ("label", "classLabel", _LABEL))
    )
    if not (image and label and image.get("dtype", "uint8") == "uint8"):
        raise ValueError(f"{folder} has no uint8 images `image` with a class `label` each, but {str(kinds)[:500]}")
    sides = reading.member(reading.member(image, "shape", dict, file), "dimensions", list, file)
    shape = tuple(reading.integer(side, file, least=-1) for side in sides)
    if len(shape) != 3 or 0 in shape or shape[2] not in (1, 3, 4):
        raise ValueError(f"{file} has images of the shape {shape}, not [height, width, 1, 3 or 4]")
    return _Metadata(
        tuple(None if side == -1 else side for side in shape),
        _class_names(folder, reading.integer(label.get("numClasses"), file, least=1)),
        _splits(folder),
    )


def _class_names(folder: pathlib.Path, classes: int) -> tuple[str, ...]:
    """The names of so many classes; numbers where there is no file of them."""
    file = folder / "label.labels.txt"
    if classes > _MOST_CLASSES:
        raise ValueError(f"{folder}/features.json is damaged: there are {classes} classes, more than {_MOST_CLASSES}")
    if not file.exists():
        return tuple(map(str, range(classes)))
    names = [name.strip() for name in reading.read_text(file).split("\n")]
    names = [name for name in names if name]
    if len(names) != classes or len(set(names)) != classes:
        raise ValueError(
            f"{file} must have {classes} different names; it has {len(names)}, {len(set(names))} different"
        )
    return tuple(names)


def _splits(folder: pathlib.Path) -> dict[str, list[_Shard]]:
    """The files of each split; no name in the metadata leads out of the folder."""
    file = folder / "dataset_info.json"
    info = reading.read_object(file)
    dataset = reading.member(info, "name", str, file)
    found: dict[str, list[_Shard]] = {}
    for split in reading.member(info, "splits", list, file, []):
        if not isinstance(split, dict):
            raise ValueError(f"{file} is damaged: a split is {split!r}")
        name = reading.member(split, "name", str, file)
        if name in found:
            raise ValueError(f"{file} is damaged: it has two splits {name!r}")
        template = reading.member(split, "filepathTemplate", str, file, "") or _TEMPLATE
        lengths = reading.member(split, "shardLengths", list, file, [])
        found[name] = []
        for i, length in enumerate(lengths):
            number, of = f"{i:05}", f"{len(lengths):05}"
            shard = template.replace("{SHARD_X_OF_Y}", f"{number}-of-{of}").replace("{DATASET}", dataset)
            shard = shard.replace("{SHARD_INDEX}", number).replace("{NUM_SHARDS}", of)
            shard = shard.replace("{FILEFORMAT}", _FORMAT).replace("{SPLIT}", name)
            if pathlib.PurePath(shard).name != shard or shard == "..":
                raise ValueError(f"{file} is damaged: it names {shard!r}, which is no file of this folder")
            take = reading.integer(length, file, least=0)
            found[name].append(_Shard(str(folder / shard), 0, take, take))
    paths = [shard.filename for shards in found.values() for shard in shards]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{file} is damaged: it names a file twice among {str(paths)[:500]}")
    return found


def _checked(shards: list[_Shard]) -> list[_Shard]:
    """The same; OSError where a file is missing, damaged, or has another number of records than it should have."""
    from array_record.python.array_record_module import ArrayRecordReader

    for shard in shards:
        if not os.path.isfile(shard.filename):
            raise FileNotFoundError(f"{shard.filename} is missing, or no plain file. {_AGAIN}")
        try:
            reader = ArrayRecordReader(shard.filename)
            records = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise OSError(f"{shard.filename} is damaged: {reading.one_line(error)}. {_AGAIN}") from error
        if records != shard.take:
            raise OSError(
                f"{shard.filename} is damaged: it has {records} records that can be read, not {shard.take}. {_AGAIN}"
            )
    return shards
