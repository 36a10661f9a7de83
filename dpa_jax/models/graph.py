"""Graphs, the sums over neighbours that graph networks are made of, and the base class of such models.

For any Flax module: `neighbour_sum`, `neighbour_mean` and `normalised_sum` take a `Graph` and features [N, C].
`dpa_jax.data.graph` makes a `Graph` of edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from dpa_jax.activations import ARR
from dpa_jax.activations.sharding import SAMPLES, WHOLE, batch_axes, by_shards
from dpa_jax.checks import INT32, check_range, check_sizes
from dpa_jax.models.layers import Dropout, Model

# Entries of a sparse matrix that are looked at together: on a CPU their rows stay in its cache, elsewhere many of them
# run side by side.
_BLOCK = {"cpu": 8192}
_LARGE_BLOCK = 2**20


class SparseMatrix(struct.PyTreeNode):
    """A matrix [N, C] of which Z entries are not 0.

    Attributes:
        rows: int32 [Z].
        columns: int32 [Z].
        values: float32 [Z].
        shape: (N, C).
    """

    rows: Any
    columns: Any
    values: Any
    shape: tuple[int, int] = struct.field(pytree_node=False)

    def __matmul__(self, x: jax.Array) -> jax.Array:
        """The product with ``x`` [C, D], added up in float32; only ``x`` gets a gradient: the matrix is data."""
        return _product(self.shape[0], x, self.rows, self.columns, self.values)


class Graph(struct.PyTreeNode):
    """An undirected graph of N nodes with weighted edges, each of which is here twice, once in either direction.

    Attributes:
        features: float32 [N, C], an array or a `SparseMatrix`; C is 0 where the nodes have none.
        receivers: int32 [E], ascending.
        senders: int32 [E].
        weights: float32 [E], equal in both directions.
        degree: float32 [N], the sum of the weights of a node's edges.
        loops: float32 [N], the weight of its edge to itself, which is not among the edges.
    """

    features: Any
    receivers: Any
    senders: Any
    weights: Any
    degree: Any
    loops: Any

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.degree.shape[0]


def neighbour_sum(graph: Graph, x: jax.Array) -> jax.Array:
    """The weighted sum of each node's neighbours, A x: [N, C] -> [N, C], added up in float32.

    No gradient reaches the weights: the edges are data.
    """
    return _product(graph.num_nodes, x, graph.receivers, graph.senders, graph.weights)


def neighbour_mean(graph: Graph, x: jax.Array) -> jax.Array:
    """The weighted mean of each node's neighbours, itself among them where it has a loop; 0 for a node without any."""
    weight = graph.degree + graph.loops
    total = neighbour_sum(graph, x) + _by_node(graph.loops, x) * x
    return total * _by_node(jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0), x)


def normalised_sum(graph: Graph, x: jax.Array) -> jax.Array:
    """P x with P = D^-1/2 (A + I) D^-1/2, D the row sums of A + I (Kipf and Welling, 2017, equation 2)."""
    scale = jax.lax.rsqrt(graph.degree + 1.0)
    scaled = _by_node(scale, x) * x
    return _by_node(scale, x) * (neighbour_sum(graph, scaled) + scaled)


def _by_node(values: jax.Array, x: jax.Array) -> jax.Array:
    """Numbers of nodes [N] as a column of ``x``'s dtype."""
    return values[:, None].astype(x.dtype)


# ---------------- Sparse products ----------------


def _product(num_rows: int, x: jax.Array, rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """The product of a sparse matrix [num_rows, C] with ``x`` [C, D]; its gradient is that of the transposed matrix."""

    @jax.custom_vjp
    def product(x, *entries):
        return _shared_product(num_rows, x, *entries)

    def forward(x, *entries):
        return product(x, *entries), entries

    def backward(entries, gradient):
        rows, columns, values = entries
        sums = _shared_product(x.shape[0], gradient, columns, rows, values)
        return sums.astype(x.dtype), None, None, None

    product.defvjp(forward, backward)
    return product(x, rows, columns, values).astype(x.dtype)


def _shared_product(num_rows: int, x: jax.Array, *entries: jax.Array) -> jax.Array:
    """The product in float32; of a graph that devices share each adds up its own entries, and gets its own rows."""

    def own(axis_name: Any, x: jax.Array, *entries: jax.Array) -> jax.Array:
        zeros = jnp.zeros((num_rows, x.shape[1]), jnp.float32)
        if axis_name is None:
            return _add_up(zeros, x, *entries)
        sums = _add_up(jax.lax.pcast(zeros, axis_name, to="varying"), x, *entries)
        return jax.lax.psum_scatter(sums, axis_name, tiled=True) if scatters else jax.lax.psum(sums, axis_name)

    scatters = bool(batch_axes(num_rows))
    in_specs, out_specs = (WHOLE, SAMPLES, SAMPLES, SAMPLES), SAMPLES if scatters else WHOLE
    return by_shards(own, x, *entries, axis_name=None, in_specs=in_specs, out_specs=out_specs)


@jax.custom_batching.custom_vmap
def _add_up(total: jax.Array, x: jax.Array, rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """``total`` [N, D] plus the product of the entries with ``x`` [C, D], in blocks: no [Z, D] array is made."""
    block = min(_BLOCK.get(jax.default_backend(), _LARGE_BLOCK), max(len(values), 1))
    blocks = [jnp.pad(array, (0, -len(values) % block)).reshape(-1, block) for array in (rows, columns, values)]

    def add(total, entries):
        rows, columns, values = entries
        terms = x.at[columns].get(mode="promise_in_bounds").astype(jnp.float32) * values[:, None]
        return total.at[rows].add(terms, mode="promise_in_bounds"), None

    return jax.lax.scan(add, total, blocks)[0]


@_add_up.def_vmap
def _side_by_side(
    size: int, batched: list[bool], total: jax.Array, x: jax.Array, *entries: jax.Array
) -> tuple[jax.Array, bool]:
    """Several ``x`` for one matrix are more columns; several matrices are taken one after the other."""

    def whole(array: jax.Array, is_batched: bool) -> jax.Array:
        return array if is_batched else jnp.broadcast_to(array, (size, *array.shape))

    def side_by_side(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, 1).reshape(array.shape[1], -1)

    total, x = whole(total, batched[0]), whole(x, batched[1])
    if any(batched[2:]):
        every = [whole(array, is_batched) for array, is_batched in zip(entries, batched[2:], strict=True)]
        return jax.lax.map(lambda one: _add_up(*one), (total, x, *every)), True
    sums = _add_up(side_by_side(total), side_by_side(x), *entries)
    return jnp.moveaxis(sums.reshape(total.shape[1], size, -1), 1, 0), True


# ---------------- Models ----------------


class GraphModel(Model):
    """Base class of models that classify the nodes of a `Graph`, called with one, labels [N] and ``train``.

    A label of -1 is none: a node that is only evaluated, or never labelled.

    Attributes (besides those of `Model`):
        hidden: width of the hidden layer.
        dropout: the share of values that are dropped in training, of the features (where there are any) and of the
            hidden layer.
        in_features: C, the features of a node; 0: each node is a feature of its own, and what it is, is learned.
        num_nodes: N, where ``in_features`` is 0.
        labelled_nodes: at most so many nodes have a label: only those go into class memories, which costs less than
            looking at all; 0: all may have.

    Raises:
        ValueError: as `Model`, and for a graph that is not like these.
    """

    hidden: int = 16
    dropout: float = 0.5
    in_features: int = 0
    num_nodes: int = 0
    labelled_nodes: int = 0

    torch_names: ClassVar[Mapping[str, str]] = {}
    """Parameters have the names of the recordings, and matrices are [in, out] there too."""

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"hidden": self.hidden})
        check_range(owner, "dropout", self.dropout, 0.0, 1.0)
        for name in ("in_features", "num_nodes", "labelled_nodes"):
            check_sizes(owner, {name: getattr(self, name) + 1}, high=INT32)
        super().__post_init__()

    @property
    def example_inputs(self) -> Graph:
        """Shapes and dtypes of a graph of one node and one edge."""

        def one(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((1, *shape), dtype)

        edge = one(dtype=jnp.int32)
        return Graph(one(self.in_features), receivers=edge, senders=edge, weights=one(), degree=one(), loops=one())

    def checked(self, graph: Any) -> Graph:
        """The graph, its features in the compute dtype."""
        owner = type(self).__name__
        if not isinstance(graph, Graph):
            raise ValueError(f"{owner}: takes the graph that dpa_jax.data.graph makes; got a {type(graph).__name__}")
        if self.in_features not in (0, found := graph.features.shape[1]):
            raise ValueError(f"{owner}: in_features is {self.in_features}; the graph's nodes have {found} features")
        if not (found or self.is_initializing()) and self.num_nodes > graph.num_nodes:
            raise ValueError(f"{owner}: num_nodes is {self.num_nodes}; the graph has {graph.num_nodes}")
        return graph

    def inputs(self, graph: Graph, train: bool) -> Any:
        """The features after dropout, [N, C]; None where each node is a feature of its own."""
        features, dropout = graph.features, Dropout(self.dropout, name="input_dropout")
        if not features.shape[1]:
            return None
        if isinstance(features, SparseMatrix):  # what is 0 stays 0
            return features.replace(values=dropout(features.values, not train))
        return dropout(jnp.asarray(features, self.dtype), not train)

    def weight(self, name: str, x: Any, graph: Graph, features: int) -> jax.Array:
        """A matrix of parameters [C, features] for the product with ``x`` [N, C], Glorot's uniform at the start."""
        nodes = self.num_nodes or graph.num_nodes
        size = nodes if x is None else x.shape[1]
        weight = self.param(name, nn.initializers.glorot_uniform(), (size, features)).astype(self.dtype)
        if x is None:
            weight = weight[: graph.num_nodes]  # the graph of `example_inputs` has one
            # Nodes that were added so that all devices have equally many are no features.
            weight = jnp.pad(weight, ((0, graph.num_nodes - len(weight)), (0, 0)))
        return weight

    def bias(self, name: str, features: int) -> jax.Array:
        """Parameters [features], 0 at the start, as a row."""
        return self.param(name, nn.initializers.zeros, (features,)).astype(self.dtype)[None, :]

    def activate(self, x: jax.Array, labels: jax.Array | None, train: bool, placement: Any) -> jax.Array:
        """The hidden activation, an `ARR` behind it where the model has one, and dropout: [N, hidden]."""
        samples = None
        if labels is not None and 0 < self.labelled_nodes < x.shape[0]:
            (samples,) = jnp.nonzero(labels >= 0, size=self.labelled_nodes, fill_value=x.shape[0])
        x = placement(self, x, labels, train, pool="none", samples=samples)
        if self.arr:
            x = ARR(self.num_classes, name="arr")(x, labels, train, pool="none", samples=samples)
        return Dropout(self.dropout, name="hidden_dropout")(x, not train)


def aggregated_product(
    aggregate: Callable[[Graph, jax.Array], jax.Array], graph: Graph, x: Any, weight: jax.Array
) -> jax.Array:
    """``aggregate(graph, x) @ weight``, [N, D], in the order that costs less; ``x`` [N, C], None for the identity."""
    if x is None:
        return aggregate(graph, weight)
    if isinstance(x, SparseMatrix) or weight.shape[0] > weight.shape[1]:
        return aggregate(graph, x @ weight)
    return aggregate(graph, x) @ weight


def product(x: Any, weight: jax.Array) -> jax.Array:
    """``x @ weight``; ``x`` None is the identity."""
    return weight if x is None else x @ weight
