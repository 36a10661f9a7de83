"""Folders of parquet files, as Hugging Face's `datasets` stores sets of images."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import CorruptImageError, EncodedSplit, image_spec
from dpa_jax.data.sources import cache, reading
from dpa_jax.data.sources.base import Source

LAYOUT = "DIR/train-*.parquet and DIR/test-*.parquet (or validation-*), or the same in DIR/data"


class ParquetSplit(EncodedSplit):
    """The images of some parquet files, from a copy of their bytes that can be read at random.

    The copy is an uncompressed Arrow file with the one column `bytes`. It is mapped into memory, so that all processes
    share its pages. `first` is the first parquet file, for messages.
    """

    def __init__(self, labels: np.ndarray, first: str, copy: str):
        import pyarrow

        super().__init__(labels)
        self._first, self._copy = first, copy
        with _told(copy, "Delete it, it is made again"):
            images = pyarrow.ipc.open_file(pyarrow.memory_map(copy)).read_all()
            images.validate(full=True)  # an offset beyond its end would end the process
            if images.column_names != ["bytes"] or len(images) != len(labels):
                raise ValueError(f"it has columns {images.column_names} of {len(images)} rows, not {len(labels)}")
        self._images = images["bytes"]

    def __reduce__(self) -> tuple[type, tuple]:
        # A worker process maps the copy itself.
        return type(self), (self.labels, self._first, self._copy)

    def where(self, i: int) -> str:
        """The first of the parquet files and the row of image i, counted over all of them."""
        return f"row {i} of {self._first} and the files after it"

    def open(self, i: int) -> BinaryIO:
        """The encoded image i."""
        encoded = self._images[i].as_py()
        if encoded is None:
            raise CorruptImageError(f"{self.where(i)} cannot be decoded: the file has its path alone, not its bytes")
        return io.BytesIO(encoded)


class _Files(NamedTuple):
    """The parquet files of one split: their paths in order, the two columns, the classes and int32 [N] labels."""

    paths: list[str]
    image: str
    label: str
    class_names: tuple[str, ...]
    labels: np.ndarray

    def read(self) -> ParquetSplit:
        copy = cache.converted(self.paths, functools.partial(_copy_bytes, self.paths, self.image), ".arrow")
        return ParquetSplit(self.labels, self.paths[0], str(copy))


def open_parquet(data: ConfigDict) -> Source:
    """The folder `dir`, `data` where it is empty, as `LAYOUT` says; a `test` split without labels is passed over."""
    root = reading.folder_path(data.dir or "data")
    if not root.is_dir():
        raise FileNotFoundError(f"parquet: there is no folder {root}. Pass --config.data.dir=DIR; wanted is {LAYOUT}.")
    train, test = _find(root, "train"), _find(root, "test", "validation")
    if train[1:4] != test[1:4]:
        raise ValueError(f"the splits in {root} have other columns or classes: {train[1:4]} and {test[1:4]}")
    spec = image_spec(data.name, (None, None, 3), train.class_names, len(train.labels), len(test.labels), encoded=True)
    return Source(
        spec,
        lambda: (train.read(), test.read()),
        lambda: np.bincount(train.labels, minlength=len(train.class_names)),
    )


def _find(root: pathlib.Path, *names: str) -> _Files:
    """The files of the first of these splits that has any, with labels."""
    unlabelled = ""
    for name in names:
        for folder in (root, root / "data"):
            if paths := sorted(str(path) for path in folder.glob(f"{name}-*.parquet")):
                if files := _describe(paths):
                    return files
                unlabelled = f" ({paths[0]} has no labels)"
    wanted = " or ".join(names)
    raise FileNotFoundError(f"there is no {wanted}-*.parquet with labels in {root}{unlabelled}; wanted is {LAYOUT}")


def _describe(paths: list[str]) -> _Files | None:
    """What the files hold; None where the labels are missing, or -1 as `datasets` writes what has none.

    Of several columns of labels the one with most classes is taken.

    Raises:
      ValueError: a file is damaged or missing, describes other columns or classes than the first, has no class names,
        or has a label that is none of its classes; the message names it.
    """
    _check_numbers(paths)
    files = [_Description.read(path) for path in paths]
    for path, other in zip(paths, files, strict=True):
        if other != files[0]:
            raise ValueError(f"{path} has other columns or classes than {paths[0]}: {other} and {files[0]}")
    image, classes = files[0]
    if not classes:
        return None
    label = max(classes, key=lambda name: len(classes[name]))
    columns = [_read_labels(path, label) for path in paths]
    if all((column == -1).all() for column in columns):
        return None
    for path, column in zip(paths, columns, strict=True):
        bad = np.flatnonzero((column < 0) | (column >= len(classes[label])))
        if bad.size:
            raise ValueError(
                f"{path}: the label in row {bad[0]} of the column {label!r} is {column[bad[0]]}, not one of its "
                f"{len(classes[label])} classes, 0 to {len(classes[label]) - 1}"
            )
    return _Files(paths, image, label, tuple(classes[label]), np.concatenate(columns).astype(np.int32))


class _Description(NamedTuple):
    """What Hugging Face's metadata says of a file: the column of images, and {column: classes} of the labels."""

    image: str
    classes: dict[str, list[str]]

    @classmethod
    def read(cls, path: str) -> _Description:
        """That of a file; ValueError where it has no one column of images, or names of classes that are none."""
        with _opened(path) as file:
            schema = file.schema_arrow
        about = (schema.metadata or {}).get(b"huggingface", b"{}")
        where = f"the Hugging Face metadata of {path}"
        info = reading.member(reading.parse_object(about, where), "info", dict, where, {})
        features = reading.member(info, "features", dict, where, {})
        kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        if len(images) != 1:
            raise ValueError(
                f"{path} must describe one column of type Image and one of type ClassLabel, as datasets' to_parquet "
                f"does; it describes {str(features)[:500]}"
            )
        columns = [str(field.type) for field in schema if field.name == images[0]]
        if len(columns) != 1 or not re.search(r"^struct<(.*, )?bytes: (large_)?binary", columns[0]):
            raise ValueError(f"{path}: the column {images[0]!r} must be one struct with binary bytes, not {columns}")
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        classes = {name: reading.member(features[name], "names", list, where) for name in labels}
        for name, names in classes.items():
            if not names or not all(isinstance(one, str) for one in names):
                raise ValueError(f"{where} is damaged: the classes of {name!r} are {str(names)[:100]}")
        return cls(images[0], classes)


def _check_numbers(paths: list[str]) -> None:
    """Of files that are numbered `-00000-of-00003` all must be there, and of one set; else ValueError."""
    found = [re.search(r"-(\d+)-of-(\d+)", os.path.basename(path), re.ASCII) for path in paths]
    numbers = [(int(match[1]), int(match[2])) for match in found if match]
    if numbers != [(i, len(numbers)) for i in range(len(numbers))]:
        names = [os.path.basename(path) for path in paths]
        raise ValueError(f"{os.path.dirname(paths[0])}: one file is missing, or one too many, of {', '.join(names)}")


def _read_labels(path: str, label: str) -> np.ndarray:
    """The labels of one file, int64 or uint64 [N]; ValueError where they are no integers, or one is missing."""
    import pyarrow

    with _opened(path) as file:
        table = file.read(columns=[label])
        if table.column_names != [label] or not pyarrow.types.is_integer(table.schema.types[0]):
            raise ValueError(f"its column {label!r} must be one of integers, not {table.schema.types}")
        column = table[label]
        if column.null_count == len(column):
            return np.full(len(column), -1)
        if column.null_count:
            raise ValueError(f"the label in row {column.is_null().index(True).as_py()} of {label!r} is missing")
        return column.to_numpy()


def _copy_bytes(paths: list[str], image: str, goal: pathlib.Path) -> None:
    """Writes the encoded images of all files to one Arrow file, a little at a time."""
    import pyarrow

    schema = pyarrow.schema([("bytes", pyarrow.binary())])
    with pyarrow.OSFile(str(goal), "wb") as target, pyarrow.ipc.new_file(target, schema) as writer:
        for path in paths:
            for images in _read_images(path, image):
                writer.write_batch(pyarrow.record_batch([images], schema))


def _read_images(path: str, image: str) -> Iterator[Any]:
    """The encoded images of one file as Arrow arrays, a little at a time."""
    import pyarrow

    with _opened(path) as file:
        for batch in file.iter_batches(256, columns=[image]):
            yield batch.column(0).field("bytes").cast(pyarrow.binary())


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A parquet file; ValueError, which names it, where it is damaged or something in the block is wrong with it."""
    import pyarrow.parquet

    reading.open_plain(path).close()
    with _told(path, "Get it anew"), pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield file


@contextlib.contextmanager
def _told(path: str, remedy: str) -> Iterator[None]:
    """Errors about a file become ValueErrors of one line that names it; pyarrow has many kinds."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {reading.one_line(error)}. {remedy}") from error
