"""scikit-learn's handwritten digits as a graph: each of the 1,797 is joined to the 8 that look most like it."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.graphs import graph
from dpa_jax.data.sources.graph_source import GraphSource

_NEIGHBOURS, _PER_CLASS, _VALIDATION = 8, 10, 300


def open_digits_graph(data: ConfigDict) -> GraphSource:
    """The graph: 10 digits of each class to train on, 300 to validate, all others to evaluate."""
    del data
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    bunch = load_digits()
    features, labels = bunch.data / 16, bunch.target.astype(np.int32)
    edges = np.stack(kneighbors_graph(features, _NEIGHBOURS).nonzero(), axis=1)
    # By chance, but always the same: the data set is in the order of its writers.
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    train = np.concatenate([order[labels[order] == k][:_PER_CLASS] for k in range(10)])
    rest = order[~np.isin(order, train)]
    splits = {"train": np.sort(train), "valid": rest[:_VALIDATION], "eval": rest[_VALIDATION:]}
    return GraphSource("digits_graph", graph(features, edges), labels, splits, tuple(map(str, range(10))))
