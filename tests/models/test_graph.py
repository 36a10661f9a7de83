"""GCN, GraphSAGE and TextGCN against PyTorch's recordings, and the sums over neighbours against matrices."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import dpa_jax
from dpa_jax import models
from dpa_jax.config import default_config
from dpa_jax.data.batch import Batch
from dpa_jax.models import graph as graphs
from dpa_jax.training.optimizer import make_optimizer
from dpa_jax.training.state import create_state
from dpa_jax.training.step import make_train_step

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "graph"


@functools.cache
def recording(name):
    """Its configuration and its arrays; the small integers that indices are stored in are widened."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file}
    config = json.loads(str(arrays.pop("config")))
    widened = {key: a.astype(np.int64) if a.dtype in (np.int8, np.int16) else a for key, a in arrays.items()}
    return config, widened


def under(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


@functools.cache
def cora():
    """The graph, and the labels with -1 outside of the training nodes."""
    _, arrays = recording("gcn_cora")
    place = arrays["feature_row"], arrays["feature_col"]
    features = scipy.sparse.csr_matrix((arrays["feature_value"], place), (len(arrays["labels"]), 1433))
    labels = np.full(len(arrays["labels"]), -1, np.int32)
    labels[arrays["train"]] = arrays["labels"][arrays["train"]]
    return dpa_jax.data.graph(features, arrays["edges"]), labels


def dgraph():
    _, arrays = recording("dgraph_mini")
    labels = np.full(400, -1, np.int32)
    train = arrays["raw/train_mask"]
    labels[train] = arrays["raw/y"][train]
    return dpa_jax.data.graph(arrays["standardised"], arrays["raw/edge_index"], keep_loops=True), labels


def text():
    from dpa_jax.data.text_graph import text_graph

    config, arrays = recording("textgcn_R8")
    documents = bytes(arrays["documents"].astype(np.uint8)).decode().strip("\n").split("\n")
    graph, words = text_graph(documents, config["train"])
    labels = np.full(graph.num_nodes, -1, np.int32)
    labels[: config["train"]] = arrays["document_labels"][: config["train"]]
    labels[arrays["validation"]] = -1
    return graph, labels, words


def train(model, graph, labels, params, rate, decay, decayed, coefficient):
    """Ten steps from recorded parameters: the metrics of each, the memories after each, and the last state."""
    config = default_config()
    config.clip_norm = 0.0
    config.optimizer.update(name="adam", learning_rate=rate, weight_decay=decay, decayed=decayed)
    optimizer = make_optimizer(config, lambda step: rate)
    state = create_state(model, optimizer, (), seed=0)
    wanted = jax.tree.map(jnp.shape, state.params)
    assert wanted == jax.tree.map(jnp.shape, params), wanted
    state = state.replace(params=params, opt_state=optimizer.init(params))
    step = jax.jit(make_train_step(model, optimizer, lambda _, batch: batch.inputs, {"channel": coefficient}))
    batch = Batch(jax.tree.map(jnp.asarray, graph), jnp.asarray(labels), labels, labels)
    seen = []
    for _ in range(10):
        state, metrics = step(state, batch)
        memories = {name: tree["mean"] for name, tree in _memories(state.variables).items()}
        seen.append(jax.device_get({**metrics, **memories}))
    return seen, state


def _memories(variables):
    return {name: variables[name]["activation"] for name in ("forward_memory", "backward_memory") if name in variables}


def check_steps(seen, state, model, graph, arrays, relative=2e-6):
    """Losses, masks, memories, final parameters and logits as recorded."""
    for step, metrics in enumerate(seen):
        for here, there in (("cross_entropy", "loss_ce"), ("channel", "loss_channel")):
            if there in arrays:
                np.testing.assert_allclose(metrics[f"loss_{here}"], arrays[there][step], rtol=relative, atol=1e-8)
        for memory in ("forward_memory", "backward_memory"):
            if memory in arrays and arrays[memory].ndim == 3:
                np.testing.assert_allclose(metrics[memory], arrays[memory][step], atol=7e-6)
    logits = model.apply(state.variables, graph)[: len(arrays["logits_final"])]
    scale = np.abs(arrays["logits_final"]).max()
    np.testing.assert_allclose(logits, arrays["logits_final"], atol=1e-5 * scale)
    for name, array in under(arrays, "final/").items():
        off = np.abs(state.params[name] - array) / np.abs(array).max()
        # A gradient near 0 is a whole step of Adam, whatever rounding makes of its sign.
        assert np.mean(off > 1e-5) < 1e-3 and off.max() < 1e-4, (name, off.max())


@pytest.mark.parametrize(("name", "file"), [("gcn", "gcn_cora"), ("graphsage", "sage_cora")])
def test_cora_equals_its_recording(name, file):
    graph, labels = cora()
    config, arrays = recording(file)
    model = models.create(name, 7, hidden=16, dropout=0.0, in_features=1433)
    params = under(arrays, "init/")
    np.testing.assert_allclose(model.apply({"params": params}, graph), arrays["logits0"], atol=1e-6)

    def loss(params):
        logits = model.apply({"params": params}, graph, train=True)
        part = labels >= 0
        entropies = -jnp.take_along_axis(jax.nn.log_softmax(logits[part]), labels[part][:, None], axis=1)
        decayed = [params[name] for name in params if name in ("W0", "W_self0", "W_neigh0")]
        return jnp.mean(entropies) + config["l2"] * 0.5 * sum(jnp.sum(w**2) for w in decayed)

    for key, gradient in jax.jit(jax.grad(loss))(params).items():
        wanted = arrays[f"grad0/{key}"]
        np.testing.assert_allclose(gradient, wanted, atol=2e-6 * np.abs(wanted).max())
    seen, state = train(model, graph, labels, params, 0.01, config["l2"], "W*0", 0.0)
    check_steps(seen, state, model, graph, arrays)


@pytest.mark.parametrize("variant", ["", "_u2", "_union"])
def test_dpa_on_cora_equals_its_recording(variant):
    graph, labels = cora()
    config, arrays = recording(f"dpa_gcn_cora{variant}")
    dpa = dpa_jax.activation(
        "dpa", num_classes=7, update_interval=config["update_interval"], criterion=config["criterion"]
    )
    model = models.create("gcn", 7, activation=dpa, hidden=16, dropout=0.0, in_features=1433, labelled_nodes=140)
    params = under(recording("gcn_cora")[1], "init/")
    seen, state = train(model, graph, labels, params, 0.01, 5e-4, "W0", config["coefficient"])
    check_steps(seen, state, model, graph, arrays)
    masked = [round(float(metrics["masked_fraction"]) * 140 * 16) for metrics in seen]
    assert masked == arrays["masked"].tolist()


@pytest.mark.parametrize("mechanism", ["relu", "dpa"])
@pytest.mark.parametrize("name", ["gcn", "graphsage"])
def test_dgraphs_recipe_equals_its_recording(name, mechanism):
    graph, labels = dgraph()
    config, arrays = recording("dgraph_mini")
    arrays = under(arrays, f"{name.removeprefix('graph')}/")
    options = {"num_classes": 2, "update_interval": 2} if mechanism == "dpa" else {}
    bias = {"use_bias": True} if name == "gcn" else {}
    sizes = {"hidden": 24, "dropout": 0.0, "in_features": 17}
    model = models.create(name, 2, activation=dpa_jax.activation(mechanism, **options), **sizes, **bias)
    params = under(arrays, "init/")
    variables = model.init(jax.random.key(0), graph) | {"params": params}
    np.testing.assert_allclose(model.apply(variables, graph), arrays["logits0"], atol=1e-6)
    seen, state = train(model, graph, labels, params, config["lr"], config["weight_decay"], "*", 1.0)
    wanted = under(arrays, f"{mechanism}/")
    np.testing.assert_allclose([m["loss_cross_entropy"] for m in seen], wanted["losses"][:, 1], rtol=2e-6)
    if mechanism == "dpa":
        np.testing.assert_allclose([m["loss_channel"] for m in seen], wanted["losses"][:, 2], rtol=4e-6, atol=1e-8)
        np.testing.assert_allclose(seen[-1]["forward_memory"], wanted["forward_memory"], atol=7e-6)
        np.testing.assert_allclose(seen[-1]["backward_memory"], wanted["backward_memory"], atol=7e-6)
    check_steps(seen, state, model, graph, wanted)


@pytest.mark.parametrize("mechanism", ["relu", "dpa"])
def test_textgcn_equals_its_recording(mechanism):
    graph, labels, _ = text()
    config, arrays = recording("textgcn_R8")
    options = {"num_classes": 8, "update_interval": 2} if mechanism == "dpa" else {}
    model = models.create(
        "textgcn", 8, activation=dpa_jax.activation(mechanism, **options), hidden=8, dropout=0.0, num_nodes=1416
    )
    seen, state = train(model, graph, labels, under(arrays, "init/"), config["lr"], 0.0, "*", 1.0)
    wanted = under(arrays, "dpa/") if mechanism == "dpa" else {k: v for k, v in arrays.items() if "/" not in k}
    for step, metrics in enumerate(seen):
        np.testing.assert_allclose(metrics["loss_cross_entropy"], wanted["loss_ce"][step], rtol=2e-6)
    documents = np.r_[:140, 1416 - 60 : 1416]
    logits = model.apply(state.variables, graph)[documents]
    np.testing.assert_allclose(logits, wanted["logits_final"], atol=1e-5 * np.abs(wanted["logits_final"]).max())
    if mechanism == "dpa":
        masked = [round(float(m["masked_fraction"]) * (labels >= 0).sum() * 8) for m in seen]
        assert masked == wanted["masked"].tolist()


def test_the_text_graph_equals_its_recording():
    graph, _, words = text()
    _, arrays = recording("textgcn_R8")
    first, last = 140, 140 + len(words)
    of_words = (graph.receivers >= first) & (graph.receivers < graph.senders) & (graph.senders < last)
    pairs = np.stack([graph.receivers[of_words], graph.senders[of_words]], axis=1) - 140
    np.testing.assert_array_equal(pairs, np.stack([arrays["pair_first"], arrays["pair_second"]], axis=1))
    np.testing.assert_allclose(graph.weights[of_words], arrays["pmi"], rtol=1e-6)
    scale = 1 / np.sqrt(graph.degree.astype(np.float64) + 1)
    sums = np.bincount(graph.receivers, scale[graph.receivers] * scale[graph.senders] * graph.weights, len(scale))
    np.testing.assert_allclose(sums + scale**2, arrays["row_sum_of_normalised"], rtol=1e-6)
    np.testing.assert_allclose(scale**2, arrays["normalised_diagonal"], rtol=1e-6)


# ---------------- Sums over neighbours ----------------


@pytest.fixture
def small(monkeypatch):
    """A weighted graph of 30 nodes with a loop, its matrix, and features; blocks are small, so that there are many."""
    monkeypatch.setitem(graphs._BLOCK, "cpu", 16)
    random = np.random.default_rng(0)
    matrix = np.triu((random.random((30, 30)) < 0.2) * random.random((30, 30)), 1)
    matrix[:, 7] = matrix[7] = 0  # a node without neighbours
    low, high = matrix.nonzero()
    edges = np.append(np.stack([low, high], axis=1), [[3, 3]], axis=0)
    weights = np.append(matrix[low, high], 2.0)
    graph = dpa_jax.data.graph(np.ones((30, 2)), edges, weights, keep_loops=True)
    return graph, matrix + matrix.T, random.normal(size=(30, 5)).astype(np.float32)


def test_sums_over_neighbours_are_products_with_matrices(small):
    graph, matrix, x = small
    np.testing.assert_allclose(graphs.neighbour_sum(graph, x), matrix @ x, atol=1e-5)
    with_loops = matrix + np.diag(graph.loops)
    mean = with_loops / np.where(with_loops.sum(1) > 0, with_loops.sum(1), 1)[:, None]
    np.testing.assert_allclose(graphs.neighbour_mean(graph, x), mean @ x, atol=1e-5)
    assert not np.any(graphs.neighbour_mean(graph, x)[7])
    scale = (matrix.sum(1) + 1) ** -0.5
    normalised = scale[:, None] * (matrix + np.eye(30)) * scale
    for aggregate, dense in (
        (graphs.normalised_sum, normalised),
        (graphs.neighbour_mean, mean),
        (graphs.neighbour_sum, matrix),
    ):
        gradient = jax.jit(jax.grad(lambda x, aggregate=aggregate: jnp.sum(aggregate(graph, x) ** 2)))(x)
        np.testing.assert_allclose(gradient, 2 * dense.T @ (dense @ x), atol=1e-4)
    half = graphs.normalised_sum(graph, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_several_features_and_several_graphs_under_vmap(small):
    graph, matrix, x = small
    several = np.stack([x, 2 * x, -x])
    wanted = np.stack([matrix @ each for each in several])
    np.testing.assert_allclose(jax.vmap(lambda x: graphs.neighbour_sum(graph, x))(several), wanted, atol=1e-5)
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), graph)
    np.testing.assert_allclose(jax.vmap(graphs.neighbour_sum)(copies, several), wanted, atol=1e-5)


def test_sparse_features_are_the_dense_ones(small):
    graph, _, _ = small
    features = np.where(np.random.default_rng(1).random((30, 12)) < 0.3, 1.5, 0).astype(np.float32)
    edges = np.stack([graph.receivers, graph.senders], axis=1)
    for name in ("gcn", "graphsage"):
        model, found = models.create(name, 3, hidden=4), []
        for given in (features, scipy.sparse.csr_matrix(features)):
            made = dpa_jax.data.graph(given, edges)
            variables = jax.jit(model.init)(jax.random.key(0), made)
            loss = jax.jit(jax.value_and_grad(lambda v, made, model=model: jnp.sum(model.apply(v, made) ** 2)))
            found.append(loss(variables, made))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *found)


def test_only_labelled_nodes_need_go_into_memories():
    graph, labels = cora()
    found = []
    for labelled in (0, 140):
        for mechanism in ({"activation": dpa_jax.activation("dpa", num_classes=7, update_interval=1)}, {"arr": True}):
            model = models.create("gcn", 7, dropout=0.0, in_features=1433, labelled_nodes=labelled, **mechanism)
            variables = model.init(jax.random.key(0), graph)
            params = variables.pop("params")

            def loss(params, variables=variables, model=model):
                logits, mutated = model.apply(
                    {"params": params, **variables}, graph, labels, train=True, mutable=dpa_jax.MUTABLE
                )
                return sum(dpa_jax.penalties(mutated).values()) + jnp.sum(logits), mutated

            (value, mutated), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
            kept = {name: mutated[name] for name in ("forward_memory", "response_memory") if name in mutated}
            found.append((value, kept, gradients))
    for all_nodes, only_labelled in zip(found[:2], found[2:], strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), all_nodes, only_labelled
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda g: np.ones((3, 2)), "takes the graph that dpa_jax.data.graph makes; got a ndarray"),
        (lambda g: g, "in_features is 5; the graph's nodes have 2 features"),
    ],
    ids=["an array", "other features"],
)
def test_another_input_is_refused(small, given, message):
    model = models.create("gcn", 3, in_features=5)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), given(small[0]))
