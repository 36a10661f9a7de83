"""Graphs whose nodes are classified: making one of edges, what is known of a set, and its splits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dpa_jax.data.batch import Spec
from dpa_jax.data.splits import Split
from dpa_jax.models.graph import Graph, SparseMatrix


def graph(features: Any, edges: Any, weights: Any = None, keep_loops: bool = False) -> Graph:
    """The graph that `gcn` and `graphsage` take, of NumPy arrays.

    An edge counts in both directions, and once: where a pair of nodes comes several times, in either direction, with
    its greatest weight.

    Args:
        features: [N, C] numbers, an array or one of SciPy's sparse matrices.
        edges: int [E, 2], pairs of nodes 0 .. N - 1.
        weights: [E], more than 0; None: all are 1.
        keep_loops: whether edges from a node to itself count in `neighbour_mean`; they are dropped otherwise.

    Raises:
        ValueError: for other shapes, a node that is not there, and numbers that are not finite.
    """
    features = _features(features)
    nodes = features.shape[0]
    edges = np.asarray(edges)
    if edges.ndim != 2 or edges.shape[1] != 2 or (edges.size and not np.issubdtype(edges.dtype, np.integer)):
        raise ValueError(f"graph: edges must be integers [E, 2]; got {edges.dtype} {list(edges.shape)}")
    if outside := edges[(edges < 0) | (edges >= nodes)].tolist():
        raise ValueError(f"graph: an edge names node {outside[0]}; there are {nodes}, from 0 to {nodes - 1}")
    weights = np.ones(len(edges), np.float64) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != edges.shape[:1] or not np.all((weights > 0) & np.isfinite(weights)):
        raise ValueError(f"graph: weights must be {len(edges)} numbers more than 0, one an edge; got {weights.shape}")
    low, high = np.sort(edges.astype(np.int64), axis=1).T
    loops = np.zeros(nodes, np.float32)
    itself = low == high
    if keep_loops:
        np.maximum.at(loops, low[itself], weights[itself].astype(np.float32))
    low, high, weights = low[~itself], high[~itself], weights[~itself]
    order = np.lexsort((weights, low * nodes + high))
    pairs = (low * nodes + high)[order]
    last = np.append(pairs[1:] != pairs[:-1], True)[: len(pairs)]
    kept = order[last]
    return symmetric_graph(features, low[kept], high[kept], weights[kept], loops)


def symmetric_graph(
    features: Any, low: np.ndarray, high: np.ndarray, weights: np.ndarray, loops: np.ndarray | None = None
) -> Graph:
    """As `graph`, of edges that are here once and are no loops: int [E], int [E] and float [E]."""
    nodes = features.shape[0]
    receivers, senders, both = np.append(low, high), np.append(high, low), np.append(weights, weights)
    order = np.argsort(receivers.astype(np.int64) * nodes + senders)
    degree = np.bincount(receivers, both, minlength=nodes).astype(np.float32)
    return Graph(
        features=features,
        receivers=receivers[order].astype(np.int32),
        senders=senders[order].astype(np.int32),
        weights=both[order].astype(np.float32),
        degree=degree,
        loops=np.zeros(nodes, np.float32) if loops is None else loops,
    )


def _features(features: Any) -> Any:
    if hasattr(features, "tocoo"):  # one of SciPy's
        sparse = features.tocsr().tocoo()
        values = sparse.data.astype(np.float32)
        result: Any = SparseMatrix(sparse.row.astype(np.int32), sparse.col.astype(np.int32), values, sparse.shape)
    else:
        result = values = np.asarray(features)
        if result.ndim != 2 or not (np.issubdtype(result.dtype, np.number) or result.dtype == bool):
            raise ValueError(f"graph: features must be numbers [N, C]; got {result.dtype} {list(result.shape)}")
        if np.iscomplexobj(result):
            raise ValueError(f"graph: features must be real; got {result.dtype}")
        result = values = result.astype(np.float32)
    if not np.all(np.isfinite(values)):
        raise ValueError("graph: a feature is no finite number")
    return result


def rows_that_sum_to_one(features: Any) -> Any:
    """Features [N, C], an array or one of SciPy's sparse matrices, each row divided by its sum; rows of 0 stay."""
    if hasattr(features, "tocoo"):
        import scipy.sparse

        return (scipy.sparse.diags(_inverse(np.asarray(features.sum(axis=1)).ravel())) @ features).tocsr()
    return features * _inverse(features.sum(axis=1))[:, None]


def _inverse(sums: np.ndarray) -> np.ndarray:
    return np.divide(1.0, sums, out=np.zeros(len(sums), np.float64), where=sums != 0)


# ---------------- As a task ----------------


@dataclasses.dataclass(frozen=True)
class GraphSpec(Spec):
    """What is known of a graph whose nodes are classified. It is one example, which every step sees whole.

    Attributes:
      labelled_nodes: the greatest number of labelled nodes in a split.
      about: a text on its size, for the header of a run.
    """

    labelled_nodes: int = 0
    about: str = ""
    whole: bool = True
    unit: str = "graphs"

    def model_options(self) -> dict[str, Any]:
        """The number of features or, where there are none, of nodes, and how many can be labelled."""
        nodes, features = self.inputs.features.shape
        size = {"in_features": features} if features else {"num_nodes": nodes}
        return size | {"labelled_nodes": self.labelled_nodes}

    def example(self, inputs: Graph) -> Graph:
        """As a graph model's `example_inputs`: what counts is how many features a node has."""
        return Graph((inputs.features.shape[1],), *[()] * 5)

    def describe(self) -> str:
        """The set in a line."""
        return f"{self.name}, {self.about}, {self.num_classes:,} classes"


class NodeSplit(Split):
    """A graph and the labels of its nodes, int32 [N], -1 for those outside of the split."""

    def __init__(self, graph: Graph, labels: np.ndarray):
        super().__init__(labels)
        self.inputs = graph

    def take(self, index: np.ndarray) -> NodeSplit:
        """Not the nodes at these positions alone: the same graph, in which only they are labelled."""
        labels = np.full_like(self.labels, -1)
        labels[index] = self.labels[index]
        return NodeSplit(self.inputs, labels)
