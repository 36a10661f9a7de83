"""Graphs in NumPy's archives: DGraph as it is published, and one's own."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.graphs import graph
from dpa_jax.data.sources import reading
from dpa_jax.data.sources.graph_source import GraphSource

_DGRAPH = "dgraphfin.npz"
_SPLITS = ("train", "valid", "eval")


def open_dgraph(data: ConfigDict) -> GraphSource:
    """DGraph-Fin (Huang et al., 2022): 3.7 million users of a lender, of whom 1.2 million are normal or frauds.

    The file `dgraphfin.npz` is in `data.dir`, or is it. Features are standardised; edges count in both directions, and
    those from a node to itself in the mean of its neighbours.

    Raises:
      FileNotFoundError: the file is missing; it takes a registration to get it.
      ValueError: the file is damaged.
    """
    place = reading.folder_path(data.dir or "data")
    path = place if place.is_file() else place / _DGRAPH
    if not path.is_file():
        raise FileNotFoundError(
            f"dgraph was not found. Looked for {path}. Register at https://dgraph.xinye.com to get {_DGRAPH}, and pass "
            "--config.data.dir=FOLDER"
        )
    arrays = _read(path, ("x", "y", "edge_index", "train_mask", "valid_mask", "test_mask"))
    features = np.asarray(arrays["x"], np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{path}: x must be [N, C]; got {list(features.shape)}")
    spread = features.std(axis=0, ddof=1)
    features = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    labels = np.asarray(arrays["y"])
    labels = np.where(labels > 1, -1, labels)  # 2 and 3 are users who never borrowed
    splits = {split: arrays[f"{name}_mask"] for split, name in zip(_SPLITS, ("train", "valid", "test"), strict=True)}
    made = graph(features.astype(np.float32), arrays["edge_index"], keep_loops=True)
    return GraphSource("dgraph", made, labels, splits, ("normal", "fraud"))


def open_npz(data: ConfigDict) -> GraphSource:
    """One's own graph, `npz:PATH`: a file of `np.savez` with these arrays.

    `features` [N, C], `edges` int [E, 2], `labels` int [N] (-1: none), `train`, `eval` and, where there is one, `valid`
    (positions of nodes, or bool [N]); `weights` [E] of the edges and `class_names` [K], texts, may be missing.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it lacks an array, or one does not fit the others.
    """
    path = reading.folder_path(data.name.partition(":")[2])
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which --config.data.name={data.name} names")
    arrays = _read(path, ("features", "edges", "labels", "train", "eval"), ("valid", "weights", "class_names"))
    try:
        made = graph(arrays["features"], arrays["edges"], arrays.get("weights"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    labels = np.asarray(arrays["labels"])
    counted = max(int(labels.max(initial=0)) + 1, 2) if labels.dtype.kind in "iu" else 2
    names = tuple(map(str, arrays.get("class_names", [f"class {i}" for i in range(counted)])))
    return GraphSource(data.name, made, labels, {s: arrays[s] for s in _SPLITS if s in arrays}, names)


def _read(path: pathlib.Path, wanted: tuple[str, ...], others: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arrays of an archive by these names; no pickle in it is read."""
    try:
        with reading.open_plain(path) as file, np.load(file, allow_pickle=False) as archive:
            if missing := [name for name in wanted if name not in archive]:
                raise ValueError(f"it has no array {missing[0]!r}; it needs {', '.join(wanted)}")
            return {name: archive[name] for name in (*wanted, *others) if name in archive}
    except (ValueError, EOFError, zipfile.BadZipFile, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {reading.one_line(error)}") from error
