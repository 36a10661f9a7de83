"""Cora, CiteSeer and PubMed as Planetoid has them (Yang et al., 2016): citations between papers, words as features.

The files are pickles of Python 2. They are read by an unpickler that admits six names and calls nothing else.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.graphs import graph, rows_that_sum_to_one
from dpa_jax.data.sources import reading
from dpa_jax.data.sources.graph_source import GraphSource

_VALIDATION = 500  # nodes after those to train on
_CLASSES = {"cora": 7, "citeseer": 6, "pubmed": 3}
_MEMBERS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")


def open_planetoid(name: str, data: ConfigDict) -> GraphSource:
    """A graph of `data.dir`, where the files `ind.NAME.x` and so on are; empty: `data` and `~/data` are tried.

    Raises:
      FileNotFoundError: a file is missing; the message says where they come from.
      ValueError: a file is damaged, or asks for more than arrays.
    """
    places = [data.dir] if data.dir else ["data", "~/data"]
    roots = [reading.folder_path(place) for place in places]
    folders = [folder for root in roots for folder in (root, root / "planetoid", root / name)]
    folder = next((found for found in folders if all(_path(found, name, m).is_file() for m in _MEMBERS)), None)
    if folder is None:
        raise FileNotFoundError(
            f"{name} was not found. Looked for {', '.join(f'ind.{name}.{member}' for member in _MEMBERS)} in "
            f"{', '.join(map(str, folders))}. To get them:\n  git clone https://github.com/kimiyoung/planetoid\n"
            "and pass --config.data.dir=planetoid/data"
        )
    return _read(name, folder)


def _path(folder: pathlib.Path, name: str, member: str) -> pathlib.Path:
    return folder / f"ind.{name}.{member}"


def _read(name: str, folder: pathlib.Path) -> GraphSource:
    import scipy.sparse

    paths = {member: _path(folder, name, member) for member in _MEMBERS}
    loaded = {member: unpickle(path) for member, path in paths.items() if member != "test.index"}
    kinds = {"x": _Csr, "tx": _Csr, "allx": _Csr, "y": np.ndarray, "ty": np.ndarray, "ally": np.ndarray, "graph": dict}
    for member, kind in kinds.items():
        if not isinstance(loaded[member], kind):
            raise ValueError(f"{paths[member]} is damaged: it holds a {type(loaded[member]).__name__}")
    x, tx, allx = (_matrix(paths[member], loaded[member]) for member in ("x", "tx", "allx"))
    y, ty, ally = (_one_hot(paths[member], loaded[member], _CLASSES[name]) for member in ("y", "ty", "ally"))
    try:
        test = np.array(reading.read_text(paths["test.index"]).split(), np.int64)
        neighbours = {int(node): [int(other) for other in others] for node, others in loaded["graph"].items()}
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{folder}: the files of {name} are damaged: {reading.one_line(error)}") from error
    nodes, known = len(neighbours), allx.shape[0]
    lengths = (len(y), len(ty), len(ally)) == (x.shape[0], tx.shape[0], known)
    if not lengths or len(test) != len(ty) or len(np.unique(test)) != len(test):
        raise ValueError(f"{folder}: the files of {name} do not fit each other: they have other numbers of rows")
    if len(y) + _VALIDATION > known or test.min() < known or test.max() >= nodes or allx.shape[1] != tx.shape[1]:
        raise ValueError(f"{folder}: the files of {name} do not fit each other: nodes to test on overlap with others")

    # Row i of tx is node test[i]; nodes that no file names (CiteSeer has 15) have neither features nor a label.
    labels = np.full(nodes, -1, np.int32)
    labels[:known], labels[test] = ally, ty
    rows = tx.tocoo()
    features = scipy.sparse.vstack(
        [allx, scipy.sparse.csr_matrix((rows.data, (test[rows.row] - known, rows.col)), (nodes - known, tx.shape[1]))]
    )
    edges = np.array([(node, other) for node, others in neighbours.items() for other in others], np.int64)
    valid = np.arange(len(y), len(y) + _VALIDATION)
    splits = {"train": np.arange(len(y)), "valid": valid, "eval": test}
    classes = tuple(f"class {i}" for i in range(_CLASSES[name]))
    made = graph(rows_that_sum_to_one(features), edges.reshape(-1, 2))
    return GraphSource(name, made, labels, splits, classes)


class _Csr:
    """Stands in for SciPy's csr_matrix, whose attributes a pickle sets."""

    _shape: Any = None
    data: Any = None
    indices: Any = None
    indptr: Any = None


def _matrix(path: pathlib.Path, found: _Csr) -> Any:
    import scipy.sparse

    try:
        parts = (np.asarray(part) for part in (found.data, found.indices, found.indptr))
        matrix = scipy.sparse.csr_matrix(tuple(parts), shape=found._shape)
        matrix.check_format(full_check=True)
    except (ValueError, TypeError, IndexError, MemoryError) as error:
        raise ValueError(f"{path} is damaged: {reading.one_line(error)}") from error
    if matrix.data.dtype.kind not in "biuf":
        raise ValueError(f"{path} is damaged: its numbers are {matrix.data.dtype}")
    return matrix.astype(np.float64)


def _one_hot(path: pathlib.Path, found: np.ndarray, classes: int) -> np.ndarray:
    """Labels int32 [n] of rows [n, classes] with at most a single one; -1 for rows of zeros."""
    if found.ndim != 2 or found.shape[1] != classes or not np.isin(found, (0, 1)).all() or found.sum(1).max() > 1:
        raise ValueError(f"{path} is damaged: it holds no labels of {classes} classes")
    return np.where(found.any(axis=1), found.argmax(axis=1), -1).astype(np.int32)


class _Unpickler(pickle.Unpickler):
    """Builds arrays, matrices, lists and dicts; refuses every other name."""

    _reconstruct = np.empty(0).__reduce__()[0]
    _admitted = {  # noqa: RUF012
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("scipy.sparse.csr", "csr_matrix"): _Csr,
        ("__builtin__", "list"): list,
        ("collections", "defaultdict"): collections.defaultdict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of Planetoid needs")
        return self._admitted[module, name]


def unpickle(path: pathlib.Path) -> Any:
    """What one of the pickles holds; ValueError where it is damaged or asks for more than arrays."""
    with reading.open_plain(path) as file:
        try:
            # Names stay as Python 2 wrote them, for they are what is admitted.
            return _Unpickler(file, fix_imports=False, encoding="latin1").load()
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged pickle makes Python raise
            raise ValueError(f"{path} is damaged, or none of Planetoid's: {reading.one_line(error)}") from error
