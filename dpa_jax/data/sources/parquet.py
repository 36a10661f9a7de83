"""Folders of parquet files, as Hugging Face's `datasets` stores sets of images."""

from __future__ import annotations

import io
import json
import pathlib
from typing import BinaryIO

import numpy as np

from dpa_jax.data.splits import LazySplit

LAYOUT = "DIR/train-*.parquet and DIR/test-*.parquet (or validation-*), or the same in DIR/data"


class ParquetSplit(LazySplit):
    """The images of some parquet files. They wait in memory, encoded: parquet is not made for reading at random.

    Args:
      files: paths, in order.
      image: the column of the images.
      label: the column of the labels.
    """

    def __init__(self, files: list[str], image: str, label: str):
        """See the class."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(files, columns=[image, label])
        super().__init__(table[label].to_numpy().astype(np.int32))
        self._files, self._columns, self._images = files, (image, label), table[image]

    def __reduce__(self) -> tuple[type, tuple]:
        # A worker process gets the names and reads the files itself.
        return type(self), (self._files, *self._columns)

    def where(self, i: int) -> str:
        """The number of image i in its files."""
        return f"row {i} of {self._files[0]}" + (f" and the {len(self._files) - 1} after it" * (len(self._files) > 1))

    def open(self, i: int) -> BinaryIO:
        """The encoded image i."""
        return io.BytesIO(self._images[i].as_py()["bytes"] or b"")


def load(root: pathlib.Path) -> tuple[ParquetSplit, ParquetSplit, tuple[str, ...]]:
    """Opens a folder of parquet files.

    Args:
      root: the folder, laid out as `LAYOUT` says.

    Returns:
      The training and the held-out split, and the classes' names.

    Raises:
      FileNotFoundError: there are no such files.
      ValueError: they have not one column of images, or none of class labels, or these are not in both splits.
    """
    train, test = (_find(root, *names) for names in (("train",), ("test", "validation")))
    columns = [_columns(files[0]) for files in (train, test)]
    if columns[0] != columns[1]:
        raise ValueError(f"the splits in {root} have other columns or classes: {columns[0]} and {columns[1]}")
    image, label, names = columns[0]
    return ParquetSplit(train, image, label), ParquetSplit(test, image, label), names


def _find(root: pathlib.Path, *names: str) -> list[str]:
    for name in names:
        for folder in (root, root / "data"):
            if files := sorted(str(file) for file in folder.glob(f"{name}-*.parquet")):
                return files
    raise FileNotFoundError(f"there is no {' or '.join(names)}-*.parquet in {root.absolute()}; wanted is {LAYOUT}")


def _columns(file: str) -> tuple[str, str, tuple[str, ...]]:
    """The column of the images, that of the labels (of several the one with most classes), and the classes' names."""
    import pyarrow.parquet

    about = (pyarrow.parquet.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(about).get("info", {}).get("features", {})
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    labels = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    if len(images) != 1 or not labels:
        raise ValueError(
            f"{file} must describe one column of type Image and one of type ClassLabel, as datasets' to_parquet "
            f"does; it describes {features}"
        )
    label = max(labels, key=lambda name: len(labels[name]))
    return images[0], label, tuple(labels[label])
