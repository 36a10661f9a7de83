"""The CIFAR archives: finding, downloading, extracting and reading them, none of it on trust.

Every file is compared with its published MD5 sum, extraction admits plain files only, and the pickles inside
are read by an unpickler that knows numpy arrays and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from absl import logging

from dpa_jax.data.sources import tfds as prepared
from dpa_jax.data.splits import AnySplit, Split


@dataclasses.dataclass(frozen=True)
class Archive:
    """One published archive and what is in it.

    Attributes:
      name: the data set's name, also TFDS' name for it.
      url: where the archive is published; its last part is the archive's file name.
      md5: the archive's MD5 sum, hexadecimal.
      folder: the folder that the archive unpacks to.
      train: `{member: MD5 sum}` of the training files, in order.
      test: the same of the test files.
      meta: the same of the file with the class names.
      labels: the pickles' key of the labels.
      class_names: the meta file's key of the class names.
    """

    name: str
    url: str
    md5: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: Mapping[str, str]
    labels: bytes
    class_names: bytes

    @property
    def filename(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def members(self) -> dict[str, str]:
        """`{member: MD5 sum}` of every file that is read."""
        return {**self.train, **self.test, **self.meta}


# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the sums are those its page
# publishes for the archives, and the well-known ones of the files inside.
CIFAR10 = Archive(
    name="cifar10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    labels=b"labels",
    class_names=b"label_names",
)
CIFAR100 = Archive(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    labels=b"fine_labels",
    class_names=b"fine_label_names",
)


def load(archive: Archive, directory: str, download: bool) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    """Reads a CIFAR set from where it lies, extracting or downloading it first where that is needed.

    Args:
      archive: which set.
      directory: the archive file itself, or a folder: with the archive, with the extracted folder, with
        either one level further down, the extracted folder itself, or one that holds TFDS' `NAME/VERSION/`
        prepared as array_record. Empty: `./data`, `~/data` and `~/tensorflow_datasets` are looked in.
      download: fetch the archive into the directory (`./data` for an empty one) when it is nowhere.

    Returns:
      The training and the test split, images uint8 [N, 32, 32, 3], and the class names.

    Raises:
      FileNotFoundError: nothing found; says where it looked and how to get the data.
      ValueError: a file is not the published one, or the archive has members it should not have.
      pickle.UnpicklingError: a file wants more than numpy arrays.
      OSError: the download failed.
    """
    places = [directory] if directory else ["data", "~/data", "~/tensorflow_datasets"]
    roots = [pathlib.Path(place).expanduser() for place in places]
    if folder := _find_folder(archive, roots):
        return _read_folder(archive, folder)
    if packed := _find_file(archive, roots):
        return _read_folder(archive, extract(archive, packed))
    if folder := prepared.find(archive.name, roots):
        return prepared.read(folder)
    if download:
        return _read_folder(archive, extract(archive, fetch(archive, roots[0])))
    looked_in = "\n".join(f"  {root.absolute()}" for root in roots)
    raise FileNotFoundError(
        f"{archive.name} was not found. Looked for {archive.filename}, the folder {archive.folder} with "
        f"{', '.join(archive.members)}, and a TFDS folder {archive.name}/VERSION prepared as array_record, "
        f"in\n{looked_in}\nTo download it ({archive.url}) into a folder DIR and go on:\n"
        f"  python train.py --config configs/{archive.name}_vit.py --config.data.download=True "
        "--config.data.dir=DIR\nor put the archive into DIR yourself and pass --config.data.dir=DIR."
    )


def fetch(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
    """Downloads an archive into a folder; it gets its name there only once it is whole and its sum is right.

    Raises:
      OSError: the address cannot be read.
      ValueError: what came is not the published archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goal = folder / archive.filename
    logging.info("Downloading %s to %s", archive.url, goal)
    # Not by tempfile, whose files only their owner can read.
    part = folder / f".{archive.filename}.{uuid.uuid4().hex}"
    try:
        with urllib.request.urlopen(archive.url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        _check_sum(part, archive.md5, f"what came from {archive.url}", "try again later")
        os.replace(part, goal)
    except OSError as error:
        raise OSError(
            f"could not download {archive.url} to {goal}: {error}. Fetch it by other means, put it into "
            f"{folder.absolute()} and pass --config.data.dir={folder.absolute()}."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return goal


def extract(archive: Archive, packed: pathlib.Path) -> pathlib.Path:
    """Extracts an archive beside itself; the folder gets its name only once it is whole.

    Raises:
      ValueError: the archive is not the published one, or has a member that is neither a plain file nor a
        folder inside `archive.folder`.
      FileExistsError: an incomplete folder of that name stands there already.
    """
    _check_sum(packed, archive.md5, str(packed), "delete it and download it again")
    goal = packed.parent / archive.folder
    if goal.exists():
        raise FileExistsError(f"{goal} lacks {_first_missing(archive, goal)}; delete that folder and start again")

    def admit(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        parts = pathlib.PurePosixPath(member.name).parts
        if not (member.isreg() or member.isdir()) or parts[:1] != (archive.folder,) or ".." in parts:
            raise ValueError(
                f"{packed} has the member {member.name!r}, which is not a plain file inside {archive.folder}"
            )
        return tarfile.data_filter(member, path)

    with tempfile.TemporaryDirectory(dir=packed.parent, prefix=f".{archive.folder}.") as partial:
        with tarfile.open(packed) as tar:
            tar.extractall(partial, filter=admit)
        try:
            os.rename(pathlib.Path(partial) / archive.folder, goal)
        except OSError:
            if _first_missing(archive, goal):  # else another process was faster, which is as good
                raise
    return goal


def read_pickle(path: pathlib.Path, md5: str) -> dict[bytes, Any]:
    """Reads one of CIFAR's pickles.

    Raises:
      ValueError: the file is not the published one.
      pickle.UnpicklingError: it asks for anything but numpy arrays.
    """
    _check_sum(path, md5, str(path), "delete its folder and extract or download it again")
    with path.open("rb") as file:
        return _Unpickler(file, encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    """Builds numpy arrays out of bytes, lists and dicts; refuses every other global."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _admitted = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # the name as of NumPy 1
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which no CIFAR file needs: it was not loaded"
            ) from None


def _read_folder(archive: Archive, folder: pathlib.Path) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    def split(members: Mapping[str, str]) -> Split:
        parts = [read_pickle(folder / member, md5) for member, md5 in members.items()]
        labels = np.concatenate([np.asarray(part[archive.labels], np.int32) for part in parts])
        images = np.empty((sum(len(part[b"data"]) for part in parts), 32, 32, 3), np.uint8)
        start = 0
        for part in parts:
            rows = part.pop(b"data")  # [n, 3072], channels first
            images[start : start + len(rows)] = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            start += len(rows)
        return Split(images, labels)

    ((meta, md5),) = archive.meta.items()
    names = read_pickle(folder / meta, md5)[archive.class_names]
    return split(archive.train), split(archive.test), tuple(name.decode() for name in names)


def _find_folder(archive: Archive, roots: Iterable[pathlib.Path]) -> pathlib.Path | None:
    for root in roots:
        for folder in (root, *_nearby(root, archive.folder)):
            if not _first_missing(archive, folder):
                return folder
    return None


def _find_file(archive: Archive, roots: Iterable[pathlib.Path]) -> pathlib.Path | None:
    for root in roots:
        for file in (root, *_nearby(root, archive.filename)):
            if file.is_file():
                return file
    return None


def _nearby(root: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    yield root / name
    yield from sorted(root.glob(f"*/{name}"))


def _first_missing(archive: Archive, folder: pathlib.Path) -> str | None:
    return next((member for member in archive.members if not (folder / member).is_file()), None)


def _check_sum(path: pathlib.Path, expected: str, what: str, remedy: str) -> None:
    found = _md5(path.open("rb"))
    if found != expected:
        raise ValueError(f"{what} has the MD5 sum {found}, not the published {expected}: {remedy}")


def _md5(file: IO[bytes]) -> str:
    with file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()  # type: ignore
