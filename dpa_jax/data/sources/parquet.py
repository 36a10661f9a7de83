"""Folders of parquet files, as Hugging Face's `datasets` stores sets of images."""

from __future__ import annotations

import functools
import io
import json
import pathlib
from typing import BinaryIO, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import EncodedSplit, image_spec
from dpa_jax.data.sources import cache
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
        self._images = pyarrow.ipc.open_file(pyarrow.memory_map(copy)).read_all()["bytes"]

    def __reduce__(self) -> tuple[type, tuple]:
        # A worker process maps the copy itself.
        return type(self), (self.labels, self._first, self._copy)

    def where(self, i: int) -> str:
        """The first of the parquet files and the row of image i, counted over all of them."""
        return f"row {i} of {self._first} and the files after it"

    def open(self, i: int) -> BinaryIO:
        """The encoded image i."""
        return io.BytesIO(self._images[i].as_py() or b"")


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
    root = pathlib.Path(data.dir or "data").expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"parquet: there is no folder {root}. Pass --config.data.dir=DIR; wanted is {LAYOUT}.")
    train, test = _find(root, "train"), _find(root, "test", "validation")
    if train[1:4] != test[1:4]:
        raise ValueError(f"the splits in {root} have other columns or classes: {train[1:4]} and {test[1:4]}")
    spec = image_spec(data.name, (None, None, 3), train.class_names, len(train.labels), len(test.labels), encoded=True)
    return Source(
        spec,
        lambda: (train.read(), test.read()),
        lambda: np.bincount(train.labels[train.labels >= 0], minlength=len(train.class_names)),
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
    """
    import pyarrow.parquet

    about = (pyarrow.parquet.read_schema(paths[0]).metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(about).get("info", {}).get("features", {})
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    names = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    if len(images) != 1:
        raise ValueError(
            f"{paths[0]} must describe one column of type Image and one of type ClassLabel, as datasets' to_parquet "
            f"does; it describes {features}"
        )
    if not names:
        return None
    label = max(names, key=lambda name: len(names[name]))
    column = pyarrow.parquet.read_table(paths, columns=[label])[label]
    labels = column.fill_null(-1).to_numpy().astype(np.int32)
    return None if (labels == -1).all() else _Files(paths, images[0], label, tuple(names[label]), labels)


def _copy_bytes(paths: list[str], image: str, goal: pathlib.Path) -> None:
    """Writes the encoded images of all files to one Arrow file, a little at a time."""
    import pyarrow.parquet

    schema = pyarrow.schema([("bytes", pyarrow.binary())])
    with pyarrow.OSFile(str(goal), "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        for path in paths:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=[image]):
                column = batch.column(0).field("bytes").cast(pyarrow.binary())
                writer.write_batch(pyarrow.record_batch([column], schema))
