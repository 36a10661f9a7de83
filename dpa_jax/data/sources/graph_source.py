"""What every source of a graph has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpa_jax.data.batch import SPLITS, ArraySpec
from dpa_jax.data.graphs import GraphSpec, NodeSplit
from dpa_jax.data.sources.base import Source
from dpa_jax.models.graph import Graph


class GraphSource(Source):
    """A graph with its labels and splits, which is read when it is opened.

    Args:
      name: as `config.data.name` has it.
      graph: the graph.
      labels: int [N], -1 for nodes of no class.
      splits: {"train", "valid" (may be missing), "eval": positions of nodes, int [n], or bool [N]}.
      class_names: one a class.

    Raises:
      ValueError: for labels that are not of the classes, and splits that are empty, overlap, or have unlabelled nodes.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        labels: np.ndarray,
        splits: Mapping[str, Any],
        class_names: tuple[str, ...],
    ):
        nodes, classes = graph.num_nodes, len(class_names)
        labels = np.asarray(labels)
        if labels.shape != (nodes,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name}: labels must be integers [{nodes}]; got {labels.dtype} {list(labels.shape)}")
        if outside := labels[(labels < -1) | (labels >= classes)].tolist():
            raise ValueError(f"{name}: there is a label {outside[0]}; they must be -1, or 0 to {classes - 1}")
        taken = np.zeros(nodes, bool)
        self._labels: dict[str, np.ndarray] = {}
        for split, chosen in splits.items():
            inside = _mask(f"{name}: {split}", chosen, nodes)
            if not inside.any():
                raise ValueError(f"{name}: there are no nodes in {split}")
            if np.any(taken & inside):
                raise ValueError(f"{name}: node {np.flatnonzero(taken & inside)[0]} is in {split} and in another split")
            if np.any(labels[inside] < 0):
                node = np.flatnonzero(inside & (labels < 0))[0]
                raise ValueError(f"{name}: node {node} is in {split} and has no label")
            taken |= inside
            self._labels[split] = np.where(inside, labels, -1).astype(np.int32)
        sizes = {split: int(np.sum(found >= 0)) for split, found in self._labels.items()}
        counts = np.bincount(self._labels["train"][self._labels["train"] >= 0], minlength=classes)
        spec = GraphSpec(
            name=name,
            inputs=jax.tree.map(lambda leaf: ArraySpec(leaf.shape, leaf.dtype), graph),
            num_classes=classes,
            class_names=class_names,
            train_examples=1,
            test_examples=1,
            splits=tuple(split for split in ("valid", "eval") if split in sizes),
            labelled_nodes=max(sizes.values()),
            about=f"{nodes:,} nodes, {len(graph.weights) // 2:,} edges, "
            + ", ".join(f"{size:,} nodes {_FOR[split]}" for split, size in sizes.items()),
            auc=True,
        )
        super().__init__(spec, self.load, lambda: counts)
        self._graph = graph

    def load(self) -> tuple[Any, ...]:
        """The graph with the labels of each split: training, evaluation and, where there is one, validation."""
        return tuple(NodeSplit(self._graph, self._labels[split]) for split in SPLITS if split in self._labels)


_FOR = {"train": "to train on", "valid": "to validate", "eval": "to evaluate"}


def _mask(what: str, chosen: Any, nodes: int) -> np.ndarray:
    chosen = np.asarray(chosen)
    if chosen.dtype == bool and chosen.shape == (nodes,):
        return chosen
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"{what} must be positions of nodes, or bool [{nodes}]; got {chosen.dtype} {chosen.shape}")
    if outside := chosen[(chosen < 0) | (chosen >= nodes)].tolist():
        raise ValueError(f"{what} has node {outside[0]}; there are {nodes}, from 0 to {nodes - 1}")
    mask = np.zeros(nodes, bool)
    mask[chosen] = True
    return mask
