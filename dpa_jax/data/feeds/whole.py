"""A graph, which is one example: every step sees it whole, and the devices share its nodes and edges."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpa_jax.data.batch import ArraySpec, Batch
from dpa_jax.data.feeds.base import BaseFeed, put
from dpa_jax.data.feeds.sampler import Sampler
from dpa_jax.data.sources.base import Source
from dpa_jax.models.graph import Graph, SparseMatrix


class WholeFeed(BaseFeed):
    """The one batch of a graph: it waits on the devices and is the same in every step, whatever the seed.

    Nodes and edges are padded to a multiple of the devices: nodes with label -1 and without edges, edges of weight 0.
    """

    same_for_all = True

    def __init__(self, source: Source, mesh: Mesh, batch_size: int, config: ConfigDict, split: str):
        if batch_size != 1:
            key = "batch_size" if split == "train" else "eval_batch_size"
            raise ValueError(f"config: {key} must be 1, for data {source.spec.name!r} is one graph; got {batch_size}")
        super().__init__(source, mesh, mesh.size, config, split)
        self.batch_size = 1
        # Once for the feeds of all splits.
        self._graph = source.__dict__.setdefault("placed", functools.cache(self._put_graph))
        self._batch = functools.cache(self._put)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """One step an epoch."""
        return Sampler(1, 1, self.seed)

    @property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of the batch."""
        abstract: Any = functools.partial(jax.ShapeDtypeStruct, sharding=self._sharded)
        inputs = jax.tree.map(lambda array: abstract(array.shape, array.dtype), padded(self.inputs, self.mesh.size))
        numbers = abstract(inputs.degree.shape, np.int32)
        return Batch(inputs=inputs, labels=numbers, index=numbers, epoch=numbers)

    def load(self) -> Any:
        """Puts the graph on the devices, and returns the split; again: only that."""
        self._batch()
        return self._open()

    def train(self, step: int) -> Batch:
        """The same batch at every step."""
        return self._batch()

    def evaluation(self) -> Iterator[Batch]:
        """The one batch."""
        yield self._batch()

    def _put_graph(self) -> Graph:
        return self._on_devices(padded(self._open().inputs, self.mesh.size))

    def _put(self) -> Batch:
        labels = _more_rows(self._open().labels, self.mesh.size, -1)
        index = np.arange(len(labels), dtype=np.int32)
        return Batch(self._graph(), *self._on_devices((labels, index, np.zeros_like(index))))

    def _on_devices(self, arrays: Any) -> Any:
        return jax.tree.map(lambda leaf: put(leaf.shape, self._sharded, lambda at: leaf[at]), arrays)


def padded(graph: Graph, devices: int) -> Graph:
    """The graph, of arrays or of their `ArraySpec`s, with as many nodes and edges for every device."""
    nodes = -(-graph.num_nodes // devices) * devices

    def more(leaf: Any) -> Any:
        return _more_rows(leaf, devices, 0)

    features = graph.features
    if isinstance(features, SparseMatrix):
        rows, columns, values = (more(leaf) for leaf in (features.rows, features.columns, features.values))
        features = SparseMatrix(rows, columns, values, shape=(nodes, features.shape[1]))
    else:
        features = more(features)
    # Padding is added to the last node, so that receivers stay ascending.
    receivers = _more_rows(graph.receivers, devices, graph.num_nodes - 1)
    others = (more(leaf) for leaf in (graph.senders, graph.weights, graph.degree, graph.loops))
    return Graph(features, receivers, *others)


def _more_rows(array: Any, devices: int, value: int) -> Any:
    missing = -array.shape[0] % devices
    if isinstance(array, ArraySpec):
        return ArraySpec((array.shape[0] + missing, *array.shape[1:]), array.dtype)
    return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)
