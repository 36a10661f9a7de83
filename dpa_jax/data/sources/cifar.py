"""CIFAR-10 and CIFAR-100: finding, downloading, extracting and reading the published archives.

Nothing is trusted: every file is compared with its published MD5 sum, only plain files are extracted, and the pickles
inside are read by an unpickler that builds NumPy arrays and nothing else.
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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dpa_jax.data.images import STATISTICS, image_spec
from dpa_jax.data.sources import cache, reading
from dpa_jax.data.sources import tfds as prepared
from dpa_jax.data.sources.base import Source
from dpa_jax.data.splits import ArraySplit, Split


@dataclasses.dataclass(frozen=True)
class Archive:
    """One published archive and what is in it."""

    name: str  # the set's, also TFDS' for it
    url: str
    md5: str
    folder: str  # that it unpacks to
    train: Mapping[str, str]  # {member: MD5 sum}, in order
    test: Mapping[str, str]
    labels: bytes  # the pickles' key of the labels
    classes: str = ""

    @property
    def filename(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]


# Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; the sums of the archives are those its page
# publishes, the files' are well known.
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
    labels=b"labels",
    classes="airplane automobile bird cat deer dog frog horse ship truck",
)
CIFAR100 = Archive(
    name="cifar100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    labels=b"fine_labels",
    classes="""
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
""",
)


def open_cifar(archive: Archive, data: ConfigDict) -> Source:
    """CIFAR-10 or CIFAR-100; `dir` and `download` are those of `load`."""
    mean, std = STATISTICS[archive.name]
    class_names = tuple(archive.classes.split())
    spec = image_spec(archive.name, (32, 32, 3), class_names, 50_000, 10_000, mean=mean, std=std)
    counts = [50_000 // len(class_names)] * len(class_names)
    return Source(spec, lambda: load(archive, data.dir, data.download), lambda: counts)


def load(archive: Archive, directory: str, download: bool) -> tuple[Split, Split]:
    """Reads the training and the test split, extracting or downloading the set first where that is needed.

    The directory is the archive file or the extracted folder itself, a folder with one of these in it or one level
    further down, or one with TFDS' `NAME/VERSION/`; empty: `./data`, `~/data` and `~/tensorflow_datasets` are tried.
    With `download` the archive is fetched into it (`./data` for an empty one) when it is nowhere.

    Raises:
      FileNotFoundError: nothing found; says where it looked and how to get the data.
      ValueError: a file is not the published one, or the archive has members it should not have.
      pickle.UnpicklingError: a file wants more than numpy arrays.
      OSError: the download failed.
    """
    places = [directory] if directory else ["data", "~/data", "~/tensorflow_datasets"]
    roots = [reading.folder_path(place) for place in places]
    if folder := _find(roots, archive.folder, lambda path: not _first_missing(archive, path)):
        return _read_folder(archive, folder)
    if packed := _find(roots, archive.filename, pathlib.Path.is_file):
        return _read_folder(archive, extract(archive, packed))
    if folder := prepared.find(archive.name, roots):
        return prepared.open_prepared(archive.name, archive.name, folder).load()
    if download:
        return _read_folder(archive, extract(archive, fetch(archive, roots[0])))
    looked_in = "\n".join(f"  {root}" for root in roots)
    raise FileNotFoundError(
        f"{archive.name} was not found. Looked for {archive.filename}, the folder {archive.folder} with "
        f"{', '.join([*archive.train, *archive.test])}, and a TFDS folder {archive.name}/VERSION prepared as "
        f"array_record, in\n{looked_in}\nTo download it ({archive.url}) into a folder DIR and go on:\n"
        f"  python train.py --config configs/{archive.name}_vit.py --config.data.download=True "
        "--config.data.dir=DIR\nor put the archive into DIR yourself and pass --config.data.dir=DIR."
    )


def fetch(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
    """Downloads an archive into a folder; it gets its name there only once it is whole and its sum is right."""
    goal = folder / archive.filename
    logging.info("Downloading %s to %s", archive.url, goal)

    def download(part: pathlib.Path) -> None:
        with urllib.request.urlopen(archive.url, timeout=60) as response, part.open("wb") as file:
            shutil.copyfileobj(response, file)
        _check_sum(part, archive.md5, f"what came from {archive.url}", "try again later")

    try:
        cache.write_whole(goal, download)
    except OSError as error:
        raise OSError(
            f"could not download {archive.url} to {goal}: {error}. Fetch it by other means, put it into "
            f"{folder.absolute()} and pass --config.data.dir={folder.absolute()}."
        ) from error
    return goal


def extract(archive: Archive, packed: pathlib.Path) -> pathlib.Path:
    """Extracts an archive beside itself; the folder gets its name only once it is whole."""
    _check_sum(packed, archive.md5, str(packed), "delete it and download it again")
    goal = packed.parent / archive.folder
    if goal.exists():
        raise FileExistsError(f"{goal} lacks {_first_missing(archive, goal)}; delete that folder and start again")

    def admit(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        parts = pathlib.PurePosixPath(member.name).parts
        if not (member.isreg() or member.isdir()) or parts[:1] != (archive.folder,) or ".." in parts:
            raise ValueError(f"{packed}: its member {member.name!r} is not a plain file inside {archive.folder}")
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
    """Reads one of CIFAR's pickles, where its sum is right and it asks for nothing but numpy arrays."""
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
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no CIFAR file needs")
        return self._admitted[module, name]


def _read_folder(archive: Archive, folder: pathlib.Path) -> tuple[ArraySplit, ArraySplit]:
    def split(members: Mapping[str, str]) -> ArraySplit:
        parts = [read_pickle(folder / member, md5) for member, md5 in members.items()]
        labels = np.concatenate([np.asarray(part[archive.labels], np.int32) for part in parts])
        rows = np.concatenate([part[b"data"] for part in parts])  # [N, 3072], channels first
        return ArraySplit(np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels)

    return split(archive.train), split(archive.test)


def _find(roots: Iterable[pathlib.Path], name: str, is_it: Callable[[pathlib.Path], bool]) -> pathlib.Path | None:
    """The first of the roots themselves and of what has this name in them, or one level further down, that is it."""
    for root in roots:
        for path in (root, root / name, *sorted(root.glob(f"*/{name}"))):
            if is_it(path):
                return path
    return None


def _first_missing(archive: Archive, folder: pathlib.Path) -> str | None:
    return next((member for member in [*archive.train, *archive.test] if not (folder / member).is_file()), None)


def _check_sum(path: pathlib.Path, expected: str, what: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))  # type: ignore
    if digest.hexdigest() != expected:
        raise ValueError(f"{what} has the MD5 sum {digest.hexdigest()}, not the published {expected}: {remedy}")
