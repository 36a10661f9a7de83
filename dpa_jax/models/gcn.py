"""The graph convolutional network of two layers (Kipf and Welling, 2017), and TextGCN (Yao et al., 2019)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.models.graph import Graph, GraphModel, aggregated_product, normalised_sum


class GCN(GraphModel):
    """Two graph convolutions: logits = P drop(act(P drop(X) W0)) W1, with P of `normalised_sum`.

    On the graph of a set of documents and their words, which have no features, it is TextGCN: X is the identity.

    Attributes (besides those of `GraphModel`):
        use_bias: whether biases ``b0`` and ``b1`` are added behind P.
    """

    use_bias: bool = False

    @nn.compact
    def __call__(self, graph: Graph, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [N, K] float32 of the graph's nodes; ``train`` updates memories."""
        graph, placement = self.checked(graph), self.placement
        x = self.inputs(graph, train)
        for layer, width in enumerate((self.hidden, self.num_classes)):
            x = aggregated_product(normalised_sum, graph, x, self.weight(f"W{layer}", x, graph, width))
            if self.use_bias:
                x += self.bias(f"b{layer}", width)
            if not layer:
                x = self.activate(x, labels, train, placement)
        placement.check("GCN")
        return x.astype(jnp.float32)
