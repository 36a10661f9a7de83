"""Folders of images: ImageNet, and any other that has a folder a class."""

from __future__ import annotations

import os
import pathlib
import re
from typing import BinaryIO

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.images import EncodedSplit, image_spec
from dpa_jax.data.sources import cache, reading
from dpa_jax.data.sources.base import Source

LAYOUT = "DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE (or test for val), the images JPEG or PNG"
_IMAGE = re.compile(r"[^.].*\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)
_IMAGENET = (
    "ImageNet's images (ILSVRC2012) are to be had at https://www.image-net.org/download.php once you have agreed to "
    "their terms. "
)
_GET = {"imagenet": _IMAGENET, "imagenet100": _IMAGENET + "ImageNet-100 is the folders of 100 of its classes. "}


class FolderSplit(EncodedSplit):
    """The images of `{class: its files' names}` in a folder with one folder a class; labels are in this order."""

    def __init__(self, folder: pathlib.Path, files: dict[str, list[str]]):
        super().__init__(np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files.values()]))
        self._folders = [str(folder / name) for name in files]
        # One string and where its parts end: a million small strings would cost every worker 100 MB.
        names = [os.fsencode(name) for names in files.values() for name in names]
        self._names, self._ends = b"".join(names), np.cumsum([0, *map(len, names)])

    def where(self, i: int) -> str:
        """The path of image i."""
        name = self._names[self._ends[i] : self._ends[i + 1]]
        return os.path.join(self._folders[self.labels[i]], os.fsdecode(name))

    def open(self, i: int) -> BinaryIO:
        """The file of image i."""
        return reading.open_plain(self.where(i))


def open_folder(data: ConfigDict) -> Source:
    """A folder with `train/CLASS/IMAGE` and `val/CLASS/IMAGE`, or `test` where there is no `val`.

    Images are JPEG or PNG by their names' endings; names that begin with a dot are left out, and so are folders, pipes,
    sockets and devices. The classes have the labels 0, 1, ... in the order of their names. The list of files is
    remembered until a folder changes. `dir` is the folder, `data/NAME` where it is empty.
    """
    root = reading.folder_path(data.dir or f"data/{data.name}")
    if not root.is_dir():
        get = _GET.get(data.name, "")
        raise FileNotFoundError(
            f"{data.name}: there is no folder {root}. {get}Pass --config.data.dir=DIR; wanted is {LAYOUT}."
        )
    train, test = (_find(root, *names) for names in (("train",), ("val", "test")))
    train_files, test_files = _files(train), _files(test)
    for folder, missing in ((test, train_files.keys() - test_files), (train, test_files.keys() - train_files)):
        if missing:
            raise ValueError(
                f"{folder} has no folder {min(missing)!r}, a class that the other split has ({len(missing)} such "
                f"classes); wanted is {LAYOUT}"
            )
    splits = FolderSplit(train, train_files), FolderSplit(test, test_files)
    spec = image_spec(data.name, (None, None, 3), tuple(train_files), *map(len, splits), encoded=True)
    return Source(spec, lambda: splits, lambda: [len(names) for names in train_files.values()])


def _find(root: pathlib.Path, *names: str) -> pathlib.Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"there is no folder {' or '.join(str(root / name) for name in names)}; wanted is {LAYOUT}")


def _files(folder: pathlib.Path) -> dict[str, list[str]]:
    """`{class: its files' names}`, both sorted."""

    def look() -> dict[str, list[str]]:
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        return {name: _images(folder / name) for name in classes}

    files = cache.remembered(f"folder {folder}", look, lambda files: [folder, *(folder / name for name in files)])
    empty = [name for name, images in files.items() if not images]
    if empty or not files:
        raise ValueError(f"there are no images in {folder / empty[0] if empty else folder}; wanted is {LAYOUT}")
    return files


def _images(folder: pathlib.Path) -> list[str]:
    """The names of the images in a class's folder, sorted; what is no plain file, nor a link to one, is no image."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if _IMAGE.fullmatch(entry.name)]
    for entry in found:
        if entry.is_symlink() and not os.path.exists(entry):
            raise FileNotFoundError(f"{entry.path} is a link to nothing: mend or remove it")
    return sorted(entry.name for entry in found if entry.is_file())
