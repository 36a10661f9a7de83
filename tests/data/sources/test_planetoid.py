"""Planetoid's files: a set made here, as Python 2 wrote them, and files that are damaged or hostile."""

import collections
import os
import pickle

import numpy as np
import pytest
import scipy.sparse

from dpa_jax.config import default_config
from dpa_jax.data.sources import open_source

NODES, KNOWN, FEATURES, CLASSES = 620, 610, 12, 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven classes, 10 nodes to train on, 500 to validate, 8 to test on; nodes 612 and 615 are in no file."""
    folder = tmp_path_factory.mktemp("planetoid")
    random = np.random.default_rng(0)
    test = random.permutation([n for n in range(KNOWN, NODES) if n not in (612, 615)])
    labels = random.integers(0, CLASSES, NODES)
    features = scipy.sparse.random(NODES, FEATURES, 0.4, "csr", random_state=1, dtype=np.float32)
    features.data[:] = 1
    one_hot = np.eye(CLASSES, dtype=np.int32)[labels]
    neighbours = collections.defaultdict(list, {n: [int(random.integers(NODES)), n] for n in range(NODES)})
    parts = {
        "x": features[:10],
        "y": one_hot[:10],
        "tx": features[test],
        "ty": one_hot[test],
        "allx": features[:KNOWN],
        "ally": one_hot[:KNOWN],
        "graph": neighbours,
    }
    for member, value in parts.items():
        (folder / f"ind.cora.{member}").write_bytes(as_python_2(value))
    (folder / "ind.cora.test.index").write_text("".join(f"{node}\n" for node in test))
    return folder, test, labels, features.toarray()


def as_python_2(value):
    """A pickle as Python 2 wrote it, whose strings are bytes: of an array, a matrix, or lists by number."""
    return b"\x80\x02" + written(value) + b"."


def written(value):
    if isinstance(value, np.ndarray):
        data = value.tobytes()
        shape = b"(" + b"".join(b"I%d\n" % size for size in value.shape) + b"t"
        start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n" + shape
        dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb" % value.dtype.str[1:].encode()
        return start + dtype + b"I00\nT" + len(data).to_bytes(4, "little") + data + b"tb"
    if scipy.sparse.issparse(value):
        parts = {"data": value.data, "indices": value.indices, "indptr": value.indptr}
        items = b"".join(b"S'%s'\n" % name.encode() + written(part) for name, part in parts.items())
        shape = b"S'_shape'\n(I%d\nI%d\nt" % value.shape
        return b"cscipy.sparse.csr\ncsr_matrix\n)\x81}(" + items + shape + b"ub"
    lists = b"".join(b"I%d\n(" % n + b"".join(b"I%d\n" % o for o in others) + b"l" for n, others in value.items())
    return b"ccollections\ndefaultdict\n(c__builtin__\nlist\ntR(" + lists + b"u"


def opened(folder):
    data = default_config().data
    data.update(name="cora", dir=str(folder))
    return open_source(data)


def test_a_set_is_read_as_it_was_made(folder):
    """Rows of tx and ty go to the nodes that test.index says; nodes that no file names have neither word nor label."""
    folder, test, labels, features = folder
    source = opened(folder)
    train, evaluation, valid = source.load()
    assert source.spec.model_options() == {"in_features": FEATURES, "labelled_nodes": 500}
    assert np.flatnonzero(train.labels >= 0).tolist() == list(range(10))
    assert np.flatnonzero(valid.labels >= 0).tolist() == list(range(10, 510))
    assert np.flatnonzero(evaluation.labels >= 0).tolist() == sorted(test.tolist())
    np.testing.assert_array_equal(evaluation.labels[test], labels[test])
    found, graph = np.zeros((NODES, FEATURES)), train.inputs
    found[graph.features.rows, graph.features.columns] = graph.features.values
    wanted = features / np.maximum(features.sum(1, keepdims=True), 1)
    wanted[[612, 615]] = 0
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not np.any(graph.receivers == graph.senders) and not graph.loops.any()


def test_hostile_and_damaged_files_run_nothing(tmp_path):
    for member in ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index"):
        (tmp_path / f"ind.cora.{member}").write_bytes(b"")
    for content, message in (
        (b"", "damaged"),
        (b"cos\nsystem\n(S'touch hostile'\ntR.", "it asks for os.system"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "it asks for __builtin__.eval"),
        (pickle.dumps([1, 2]), "Ran out of input"),  # of the next file
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(K\x01tR.", "damaged"),
    ):
        (tmp_path / "ind.cora.x").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)
    assert not os.path.exists("hostile")
    with pytest.raises(FileNotFoundError, match=r"git clone https://github\.com/kimiyoung/planetoid"):
        opened(tmp_path / "nowhere")
