"""BERT (Devlin et al., 2019) for the classification of texts, with the sizes' names of Hugging Face."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.activations import activation as make_activation
from dpa_jax.checks import as_array, check_range, check_rate, check_sizes
from dpa_jax.models import layers
from dpa_jax.models.transformer import Attention, check_width

SIZES = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
SIZES += ["max_position_embeddings", "type_vocab_size", "layer_norm_eps"]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Layer(nn.Module):
    """Post-norm transformer layer: ``x = norm(x + attention(x))``, then ``x = norm(x + mlp(x))``.

    Attributes:
        attention: factory of an `Attention`.
        norm: factory of a norm over the features.
        hidden_dim: width of the MLP's hidden layer.
        activation: the model's activations; the one here is between the MLP's dense layers.
        arr: factory of an `ARR`, or None.
        dropout: rate after the MLP.
        dtype: compute dtype.
    """

    attention: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    hidden_dim: int
    activation: layers.Placement
    arr: Callable[..., nn.Module] | None
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, own: None, labels: jax.Array | None, train: bool, mask: jax.Array
    ) -> tuple[jax.Array, None]:
        """[B, L, D] -> [B, L, D], as `repeat` wants it; of the tokens those in the mask, bool [B, L], are looked at."""
        x = self.norm(name="attention_norm")(x + self.attention(name="attention")(x, train, mask))
        y = layers.Dense(self.hidden_dim, dtype=self.dtype, name="intermediate")(x)
        y = self.activation(self, y, labels, train, pool="token")
        y = layers.Dense(x.shape[-1], dtype=self.dtype, name="output")(y)
        x = self.norm(name="norm")(x + layers.Dropout(self.dropout)(y, deterministic=not train))
        if self.arr:
            x = self.arr(name="arr")(x, labels, train, pool="token")
        return x, None


class Bert(layers.Model):
    """BERT with a pooler and a linear head on the first token, [CLS].

    Called with ``{"input_ids", "attention_mask", "token_type_ids"}``, integers [B, L] each: the tokens, 1 for a token
    that is looked at and 0 for padding, and 0 or 1 for the part of the text. L is at most ``max_position_embeddings``.
    A token's number must be below ``vocab_size``; one that is not makes NaN of its sample.

    Mechanisms stand between the two dense layers of every layer's MLP. They and ``arr``, after every layer, pool by
    [CLS]. The variables of all layers are stacked under ``layers``, with a leading axis of their number. The default
    sizes are those of the smallest model of Turc et al. (2019), BERT-Tiny.

    Attributes (besides those of `Model`; sizes and rates are named as in Hugging Face's ``config.json``):
        vocab_size: tokens that there are.
        hidden_size: width D of the residual stream; ``num_attention_heads`` divides it.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads.
        intermediate_size: width of the MLPs.
        max_position_embeddings: tokens of the longest text.
        type_vocab_size: parts that a text may have.
        hidden_dropout_prob: dropout rate after embeddings, attention and MLP, and before the head; in [0, 1).
        attention_probs_dropout_prob: that of the attention's shares.
        layer_norm_eps: epsilon of all norms.
        sequence_length: L of `example_inputs`, padding included.
        scan: whether the layers are compiled as a loop (`dpa_jax.models.layers.repeat`).
        remat: whether what is in a layer is computed again for its gradient instead of kept.

    Raises:
        ValueError: for sizes that are too small or do not divide, other rates, and inputs of another kind.
    """

    native: Callable[..., nn.Module] = make_activation("gelu")
    vocab_size: int = 30522
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 512
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    sequence_length: int = 128
    scan: bool | None = None
    remat: bool = False

    def __post_init__(self):
        sizes = ("num_hidden_layers", "intermediate_size", "max_position_embeddings", "type_vocab_size")
        check_sizes("Bert", {name: getattr(self, name) for name in (*sizes, "sequence_length")})
        check_sizes("Bert", {"vocab_size": self.vocab_size}, high=2**24)
        heads = {"num_attention_heads": self.num_attention_heads}
        check_width("Bert", {"hidden_size": self.hidden_size}, heads)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            check_rate("Bert", name, getattr(self, name))
        check_range("Bert", "layer_norm_eps", self.layer_norm_eps, 0.0)
        self._check_length("sequence_length", self.sequence_length)
        super().__post_init__()

    def _check_length(self, what: str, length: int) -> None:
        if length > self.max_position_embeddings:
            raise ValueError(
                f"Bert: {what} {length} is more than max_position_embeddings {self.max_position_embeddings}"
            )

    @property
    def example_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one text, with a batch axis of 1: int32 [1, L] by name."""
        return {name: jax.ShapeDtypeStruct((1, self.sequence_length), jnp.int32) for name in INPUTS}

    @nn.compact
    def __call__(
        self, inputs: Mapping[str, jax.Array], labels: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Logits [B, K] float32 of tokens [B, L].

        In training, dropout is on (it needs a ``dropout`` key) and memories updated.
        """
        tokens, mask, types = self._checked(inputs)
        x = self._embed("word", self.vocab_size)(tokens) + self._embed("token_type", self.type_vocab_size)(types)
        x += self._embed("position", self.max_position_embeddings)(jnp.arange(tokens.shape[1]))[None]
        norm = functools.partial(layers.LayerNorm, epsilon=self.layer_norm_eps, dtype=self.dtype)
        x = self._drop(norm(name="norm")(x), train)

        placement, rate = self.placement, self.hidden_dropout_prob
        attention = functools.partial(
            Attention,
            self.num_attention_heads,
            rate,
            self.dtype,
            products=("q", "k", "v"),
            shares_dropout=self.attention_probs_dropout_prob,
        )
        arr = functools.partial(ARR, self.num_classes) if self.arr else None
        layer = layers.repeat(Layer, self.num_hidden_layers, self.scan, self.remat, shared=3)
        layer = layer(attention, norm, self.intermediate_size, placement, arr, rate, self.dtype, name="layers")
        x, _ = layer(x, None, labels, train, mask > 0)
        placement.check("Bert")

        x = jnp.tanh(layers.Dense(self.hidden_size, dtype=self.dtype, name="pooler")(x[:, 0]))
        return layers.Dense(self.num_classes, name="classifier")(self._drop(x, train).astype(jnp.float32))

    def _embed(self, name: str, number: int) -> layers.Embed:
        return layers.Embed(
            number, self.hidden_size, dtype=self.dtype, embedding_init=layers.normal_init, name=f"{name}_embeddings"
        )

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return layers.Dropout(self.hidden_dropout_prob)(x, deterministic=not train)

    def _checked(self, inputs: Any) -> list[jax.Array]:
        """The three arrays; ValueError unless they are integers of one shape [B, L], L not too long."""
        if not isinstance(inputs, Mapping) or set(inputs) != set(INPUTS):
            found = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
            raise ValueError(f"Bert: the inputs must be a mapping with {', '.join(INPUTS)}; got {found}")
        arrays = [as_array("Bert", name, inputs[name]) for name in INPUTS]
        for name, array in zip(INPUTS, arrays, strict=True):
            integers = jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool
            if array.ndim != 2 or array.shape != arrays[0].shape or not integers:
                raise ValueError(
                    f"Bert: {name} must be integers [B, L], all three of one shape; got {array.dtype} {array.shape}"
                )
        self._check_length("the length of input_ids", arrays[0].shape[1])
        return arrays

    hugging_face: ClassVar[Mapping[str, Any]] = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        **dict.fromkeys(SIZES),
    }
    torch_names: ClassVar[Mapping[str, str]] = {
        **{f"{name}_embeddings": f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")},
        "norm": "bert.embeddings.LayerNorm",
        "layers": "bert.encoder.layer.*",
        "layers.attention": "bert.encoder.layer.*.attention.self",
        "layers.attention.q": "bert.encoder.layer.*.attention.self.query",
        "layers.attention.k": "bert.encoder.layer.*.attention.self.key",
        "layers.attention.v": "bert.encoder.layer.*.attention.self.value",
        "layers.attention.projection": "bert.encoder.layer.*.attention.output.dense",
        "layers.attention_norm": "bert.encoder.layer.*.attention.output.LayerNorm",
        "layers.intermediate": "bert.encoder.layer.*.intermediate.dense",
        "layers.activation": "bert.encoder.layer.*.intermediate.activation",
        "layers.output": "bert.encoder.layer.*.output.dense",
        "layers.norm": "bert.encoder.layer.*.output.LayerNorm",
        "pooler": "bert.pooler.dense",
    }
    # Files of the pretraining have its heads, those of a bare model no prefix, old ones other names in the norms.
    torch_aliases: ClassVar[Mapping[str, str | None]] = {
        r"^cls\.|(^|\.)position_ids$": None,
        r"^(?=(embeddings|encoder|pooler)\.)": "bert.",
        r"LayerNorm\.gamma$": "LayerNorm.weight",
        r"LayerNorm\.beta$": "LayerNorm.bias",
    }
