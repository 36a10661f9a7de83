"""GraphSAGE with the mean of the neighbours, two layers over the whole graph (Hamilton et al., 2017)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.models.graph import Graph, GraphModel, aggregated_product, neighbour_mean, product


class GraphSAGE(GraphModel):
    """A node and the mean of its neighbours, each with weights of its own: x W_self + M x W_neigh + b, twice.

    M is `neighbour_mean`. All neighbours count, none are sampled, and rows are not normalised.
    """

    @nn.compact
    def __call__(self, graph: Graph, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [N, K] float32 of the graph's nodes; ``train`` updates memories."""
        graph, placement = self.checked(graph), self.placement
        x = self.inputs(graph, train)
        for layer, width in enumerate((self.hidden, self.num_classes)):
            own, neighbours = (self.weight(f"W_{of}{layer}", x, graph, width) for of in ("self", "neigh"))
            x = product(x, own) + aggregated_product(neighbour_mean, graph, x, neighbours)
            x += self.bias(f"b{layer}", width)
            if not layer:
                x = self.activate(x, labels, train, placement)
        placement.check("GraphSAGE")
        return x.astype(jnp.float32)
