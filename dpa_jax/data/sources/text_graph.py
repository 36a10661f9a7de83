"""Documents and their words as one graph: R8, MR, 20News and one's own."""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dpa_jax.data.sources import cache
from dpa_jax.data.sources.documents import open_documents
from dpa_jax.data.sources.graph_source import GraphSource
from dpa_jax.data.text_graph import text_graph
from dpa_jax.models.graph import Graph

_VALIDATION = 10  # every so manyth training document, by chance
_EDGES = ("receivers", "senders", "weights", "degree", "loops")


def open_text_graph(data: ConfigDict) -> GraphSource:
    """``NAME_graph`` or ``text_graph:PATH``: the documents of `open_documents`, as `text_graph` makes a graph of them.

    A tenth of the training documents, always the same, validates. The graph is kept in the user's cache folder.
    """
    name, colon, path = data.name.partition(":")
    documents = open_documents(f"text:{path}" if colon else name.removesuffix("_graph"), data.dir)
    order = np.argsort(~documents.train, kind="stable")
    num_train = int(documents.train.sum())
    graph = _cached([documents.texts[i] for i in order], num_train)
    words = graph.num_nodes - len(order)

    node = np.arange(len(order)) + np.where(np.arange(len(order)) < num_train, 0, words)
    labels = np.full(graph.num_nodes, -1, np.int32)
    labels[node] = documents.labels[order]
    drawn = np.argsort(np.random.Philox(key=0).random_raw(num_train), kind="stable")
    valid, train = np.split(drawn, [max(num_train // _VALIDATION, 1)])
    splits = {"train": np.sort(train), "valid": np.sort(valid), "eval": node[num_train:]}
    return GraphSource(data.name, graph, labels, splits, documents.class_names)


def _cached(documents: list[str], num_train: int) -> Graph:
    """The graph, made once: that of 20News takes half a minute."""

    def compute(part: pathlib.Path) -> None:
        graph, _ = text_graph(documents, num_train)
        with part.open("wb") as file:
            np.savez(file, **{name: getattr(graph, name) for name in _EDGES})

    path = cache.computed(json.dumps(["text graph 1", num_train, documents]), compute, ".npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            edges: dict[str, Any] = {name: arrays[name] for name in _EDGES}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged: it costs time and nothing else
        path.unlink()
        return _cached(documents, num_train)
    return Graph(features=np.zeros((len(edges["degree"]), 0), np.float32), **edges)
