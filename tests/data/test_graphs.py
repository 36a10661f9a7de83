"""Graphs made of edges, their sources, and what is refused."""

import numpy as np
import pytest
import scipy.sparse

from dpa_jax.config import default_config
from dpa_jax.data import graph
from dpa_jax.data.graphs import rows_that_sum_to_one
from dpa_jax.data.sources import open_source
from dpa_jax.data.sources.graph_source import GraphSource
from dpa_jax.data.text_graph import text_graph


def edges_of(made):
    return {
        (a, b): w
        for a, b, w in zip(*(getattr(made, n).tolist() for n in ("receivers", "senders", "weights")), strict=True)
    }


def test_an_edge_counts_in_both_directions_and_once():
    made = graph(np.eye(4), [[0, 1], [1, 0], [2, 1], [2, 1], [3, 3]])
    assert edges_of(made) == {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1}
    np.testing.assert_array_equal(made.degree, [1, 2, 1, 0])
    assert not made.loops.any() and np.all(np.diff(made.receivers) >= 0)
    made = graph(np.eye(4), [[0, 1], [1, 0], [3, 3]], weights=[1.0, 3.0, 2.0], keep_loops=True)
    assert edges_of(made) == {(0, 1): 3, (1, 0): 3} and made.loops.tolist() == [0, 0, 0, 2]
    assert graph(np.eye(2), np.zeros((0, 2), int)).degree.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("features", "edges", "weights", "message"),
    [
        (np.eye(3), [[0, 3]], None, "an edge names node 3; there are 3, from 0 to 2"),
        (np.eye(3), [[-1, 0]], None, "an edge names node -1"),
        (np.eye(3), [[0.0, 1.0]], None, "edges must be integers"),
        (np.eye(3), [0, 1], None, r"edges must be integers \[E, 2\]"),
        (np.eye(3), [[0, 1]], [0.0], "weights must be 1 numbers more than 0"),
        (np.eye(3), [[0, 1]], [1.0, 2.0], "weights must be 1 numbers"),
        (np.array([[np.nan], [1.0]]), [[0, 1]], None, "a feature is no finite number"),
        (scipy.sparse.csr_matrix([[np.inf], [1.0]]), [[0, 1]], None, "a feature is no finite number"),
        (np.ones(3), [[0, 1]], None, r"features must be numbers \[N, C\]"),
        (np.array([["a"]]), [[0, 0]], None, "features must be numbers"),
    ],
    ids=["node", "negative", "float", "shape", "weight", "weights", "nan", "sparse", "vector", "text"],
)
def test_what_is_no_graph_is_refused(features, edges, weights, message):
    with pytest.raises(ValueError, match=message):
        graph(features, edges, weights)


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        ([0, 1, 2, 0], {"train": [0], "eval": [1]}, "a label 2; they must be -1, or 0 to 1"),
        ([0, 1, -1, 0], {"train": [0, 2], "eval": [1]}, "node 2 is in train and has no label"),
        ([0, 1, 0, 0], {"train": [0, 1], "eval": [1]}, "node 1 is in eval and in another split"),
        ([0, 1, 0, 0], {"train": [0], "eval": []}, "eval must be positions|no nodes in eval"),
        ([0, 1, 0, 0], {"train": [0], "eval": np.zeros(4, bool)}, "there are no nodes in eval"),
        ([0, 1, 0, 0], {"train": [0], "eval": [4]}, "eval has node 4; there are 4"),
        ([0, 1, 0], {"train": [0], "eval": [1]}, r"labels must be integers \[4\]"),
        ([0.0, 1, 0, 0], {"train": [0], "eval": [1]}, "labels must be integers"),
    ],
    ids=["class", "unlabelled", "twice", "empty", "mask", "outside", "number", "float"],
)
def test_labels_and_splits_that_do_not_fit_are_refused(labels, splits, message):
    made = graph(np.eye(4), [[0, 1]])
    with pytest.raises(ValueError, match=message):
        GraphSource("mine", made, np.asarray(labels), splits, ("a", "b"))


def test_rows_that_sum_to_one():
    dense = np.array([[1.0, 3.0], [0.0, 0.0]])
    for given in (dense, scipy.sparse.csr_matrix(dense)):
        found = rows_that_sum_to_one(given)
        np.testing.assert_array_equal(scipy.sparse.coo_matrix(found).toarray(), [[0.25, 0.75], [0, 0]])


def data(**changes):
    config = default_config().data
    config.update(**changes)
    return config


def write_npz(folder, **changes):
    arrays = {
        "features": np.eye(6, 3),
        "edges": np.array([[0, 1], [1, 2], [3, 4], [4, 5]]),
        "labels": np.array([0, 1, 0, 1, -1, 1]),
        "train": np.array([0, 1]),
        "valid": np.array([2]),
        "eval": np.array([False, False, False, True, False, True]),
    }
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(folder / "mine.npz", **arrays)
    return data(name=f"npz:{folder / 'mine.npz'}")


def test_ones_own_graph(tmp_path):
    source = open_source(write_npz(tmp_path, class_names=np.array(["no", "yes"])))
    train, evaluation, valid = source.load()
    assert source.spec.class_names == ("no", "yes") and source.spec.splits == ("valid", "eval")
    assert train.labels.tolist() == [0, 1, -1, -1, -1, -1]
    assert evaluation.labels.tolist() == [-1, -1, -1, 1, -1, 1] and valid.labels.tolist() == [-1, -1, 0, -1, -1, -1]
    assert source.spec.model_options() == {"in_features": 3, "labelled_nodes": 2}
    assert open_source(write_npz(tmp_path, valid=None)).spec.splits == ("eval",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "it has no array 'labels'; it needs features, edges, labels, train, eval"),
        ({"edges": np.array([[0, 6]])}, "an edge names node 6"),
        ({"labels": np.array([0, 1, 0, 1, -5, 1])}, "a label -5"),
        ({"features": np.array([{}] * 6)}, "cannot be read"),  # a pickle
    ],
    ids=["missing", "edge", "label", "pickle"],
)
def test_a_damaged_archive_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_source(write_npz(tmp_path, **changes))


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(data(name=f"npz:{tmp_path / 'mine.npz'}"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_source(data(name="npz:nowhere.npz"))
    with pytest.raises(FileNotFoundError, match=r"dgraphfin\.npz"):
        open_source(data(name="dgraph", dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.imbalance takes examples away"):
        open_source(data(name="digits_graph", imbalance=2.0))


def test_windows_are_counted_without_looking_at_them():
    """The same words as by sliding a window of 20 over each document, pair by pair, as the authors do."""
    random = np.random.default_rng(0)
    documents = [" ".join(random.choice(list("abcdefgh"), size)) for size in (1, 5, 20, 21, 33, 60)]
    windows = []
    for words in map(str.split, documents):
        windows += [words[i : i + 20] for i in range(max(len(words) - 19, 1))]
    with_word = {word: sum(word in window for window in windows) for word in "abcdefgh"}
    pairs = {}
    for window in windows:
        for i, first in enumerate(window):
            for second in window[:i]:
                if first != second:
                    key = tuple(sorted((first, second)))
                    pairs[key] = pairs.get(key, 0) + 1
    wanted = {key: np.log(n * len(windows) / (with_word[key[0]] * with_word[key[1]])) for key, n in pairs.items()}
    made, words = text_graph(documents, 4)
    found = {(words[a - 4], words[b - 4]): w for (a, b), w in edges_of(made).items() if 4 <= a < b < 4 + len(words)}
    assert found == pytest.approx({key: value for key, value in wanted.items() if value > 0}, rel=1e-6)
    with pytest.raises(ValueError, match="document 2 of 2 has no words"):
        text_graph(["a b", " "], 1)
