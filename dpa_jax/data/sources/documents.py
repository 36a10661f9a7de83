"""Documents with a label each, from two text files or from a folder a class: what the sources of text share."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import numpy as np

from dpa_jax.data.sources import reading

LAYOUT = (
    "PATH.split.txt (a line a document: NAME, train or test, LABEL, tabs between) and PATH.clean.txt (a line a "
    "document, in the same order), or PATH/train/CLASS/DOCUMENT and PATH/test/CLASS/DOCUMENT"
)
_FILES = {"r8": "R8", "mr": "mr", "20news": "20ng"}  # as TextGCN's authors name them
# The documents of a split file, and how these authors' repository has both.
_PAIRS = {"{}.split.txt": "{}.clean.txt", "{}.txt": "corpus/{}.clean.txt"}


class Documents(NamedTuple):
    """Labelled documents in the order of their files; training and test documents may be mixed."""

    texts: list[str]  # none is empty
    labels: np.ndarray  # int32 [N], in 0 .. K - 1
    class_names: tuple[str, ...]  # K, sorted
    train: np.ndarray  # bool [N]: whether it is a training document; there are both


def open_documents(name: str, directory: str = "") -> Documents:
    """Reads the documents of a data set.

    Args:
      name: ``r8``, ``mr`` or ``20news``, or ``PREFIX:PATH`` for a set of one's own, laid out as `LAYOUT` says.
      directory: for the three, the folder with their files, ``data/text`` where it is empty; TextGCN's ``data`` is one.

    Text is UTF-8, or Latin-1 where it is not. The classes are the training documents' labels.

    Raises:
      FileNotFoundError: a file or folder is not there; the message says what is wanted.
      ValueError: another number of documents than of lines in the split file, a damaged line, an empty document, a
        test document's label that no training document has, or no document of a split; the message says where.
    """
    _, own, path = name.partition(":")
    if not own:
        return _read_published(name, reading.folder_path(directory or "data/text"))
    root = reading.folder_path(path)
    if (root / "train").is_dir():
        return _read_folder(name, root)
    split, texts = (root.with_name(root.name + ending) for ending in (".split.txt", ".clean.txt"))
    for file in (split, texts):
        if not path or not file.is_file():
            raise FileNotFoundError(
                f"{name}: there is no folder {root / 'train'} and no file {file}; wanted is {LAYOUT}"
            )
    return _read_files(name, split, texts)


def _read_published(name: str, folder: pathlib.Path) -> Documents:
    pairs = [(folder / a.format(_FILES[name]), folder / b.format(_FILES[name])) for a, b in _PAIRS.items()]
    for split, texts in pairs:
        if split.is_file() and texts.is_file():
            return _read_files(name, split, texts)
    wanted = " or ".join(f"{split} and {texts}" for split, texts in pairs)
    raise FileNotFoundError(
        f"{name}: there are no files {wanted}. They are in the folder data of "
        "https://github.com/yao8839836/text_gcn; pass --config.data.dir=DIR."
    )


def _read_files(name: str, split: pathlib.Path, texts: pathlib.Path) -> Documents:
    listed, documents = _lines(split), _lines(texts)
    if len(listed) != len(documents):
        raise ValueError(f"{name}: {split} has {len(listed)} lines, but {texts} has {len(documents)} documents")
    parts, labels = [], []
    for i, line in enumerate(listed, 1):
        columns = line.split("\t")
        if len(columns) != 3 or columns[1] not in ("train", "test") or not columns[2].strip():
            raise ValueError(
                f"{name}: line {i} of {split} must be NAME, train or test, and LABEL with tabs between; "
                f"it is {line[:80]!r}"
            )
        parts.append(columns[1] == "train")
        labels.append(columns[2].strip())
    places = [f"line {i} of {texts}" for i in range(1, len(documents) + 1)]
    return _checked(name, documents, labels, parts, places)


def _read_folder(name: str, root: pathlib.Path) -> Documents:
    documents, labels, parts, places = [], list[str](), list[bool](), list[str]()
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {root / part}; wanted is {LAYOUT}")
        for class_name in _visible(root / part, folders=True):
            for file in _visible(root / part / class_name, folders=False):
                path = root / part / class_name / file
                documents.append(_text(path))
                labels.append(class_name)
                parts.append(part == "train")
                places.append(str(path))
    return _checked(name, documents, labels, parts, places)


def _visible(folder: pathlib.Path, folders: bool) -> list[str]:
    """The names in a folder that begin with no dot, sorted: of folders, or of files."""
    with os.scandir(folder) as entries:
        kind = os.DirEntry.is_dir if folders else os.DirEntry.is_file
        return sorted(entry.name for entry in entries if kind(entry) and not entry.name.startswith("."))


def _checked(name: str, texts: list[str], labels: list[str], parts: list[bool], places: list[str]) -> Documents:
    """The documents with numbers for their labels; ``places`` say where each is stored."""
    train = np.array(parts, bool)
    for part, count in (("train", np.sum(train)), ("test", np.sum(~train))):
        if not count:
            raise ValueError(f"{name}: there is no {part} document; wanted is {LAYOUT}")
    if empty := [place for text, place in zip(texts, places, strict=True) if not text.strip()]:
        raise ValueError(f"{name}: the document in {empty[0]} is empty ({len(empty)} such documents); leave it out")
    class_names = tuple(sorted({label for label, part in zip(labels, parts, strict=True) if part}))
    numbers = {label: number for number, label in enumerate(class_names)}
    if outside := [i for i, label in enumerate(labels) if label not in numbers]:
        raise ValueError(
            f"{name}: the label {labels[outside[0]]!r} of the test document in {places[outside[0]]} is that of no "
            f"training document ({len(outside)} such documents)"
        )
    return Documents(texts, np.array([numbers[label] for label in labels], np.int32), class_names, train)


def _lines(path: pathlib.Path) -> list[str]:
    """The lines of a file; only a line feed ends one, and the last may lack it."""
    return [line.rstrip("\r") for line in _text(path).removesuffix("\n").split("\n")]


def _text(path: pathlib.Path) -> str:
    with reading.open_plain(path) as file:
        content = file.read()
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")
