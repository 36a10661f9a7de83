"""Parts that the vision transformers share: patches, attention, MLP, block, and the base class of models."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.activations import activation as make_activation
from dpa_jax.activations.sharding import on_auto_axes, spec
from dpa_jax.checks import MAX_SIZE, check_range, check_rate, check_sizes
from dpa_jax.models import layers


class Attention(nn.Module):
    """Multi-head attention, [B, N, D] -> [B, N, D].

    Attributes:
        num_heads: heads h; D / h is the width of each.
        dropout: rate after the last product.
        dtype: compute dtype.
        products: which of queries, keys and values each product makes, as letters: ``("q", "kv")`` are two, the second
            of width 2 D. They are the products' names.
        bias: whether these products have a bias.
        first_only: whether only the first token asks, [B, N, D] -> [B, 1, D] (CaiT's class attention).
        talking_heads: whether the heads' scores are mixed before the softmax and after it (Shazeer et al., 2020).
        reduction: keys and values are of the tokens as a square map whose side a convolution divides by this (PVT).
        shares_dropout: rate after the softmax (BERT).
    """

    num_heads: int
    dropout: float
    dtype: Any
    products: tuple[str, ...] = ("qkv",)
    bias: bool = True
    first_only: bool = False
    talking_heads: bool = False
    reduction: int = 1
    shares_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Mixes the tokens of each sample; a mask, bool [B, N], says which of them are looked at (None: all)."""
        features = x.shape[-1]
        asking = x[:, :1] if self.first_only else x
        asked = self._reduced(x) if self.reduction > 1 else x
        made: dict[str, jax.Array] = {}
        for letters in self.products:
            source = asking if letters == "q" else asked
            y = layers.Dense(len(letters) * features, use_bias=self.bias, dtype=self.dtype, name=letters)(source)
            y = y.reshape(*y.shape[:2], len(letters), self.num_heads, features // self.num_heads)
            made |= {letter: y[:, :, i] for i, letter in enumerate(letters)}
        if self.talking_heads:
            y = self._talking(made["q"], made["k"], made["v"])
        elif self.shares_dropout and train:
            y = self._dropping(made["q"], made["k"], made["v"], mask)
        else:
            where = None if mask is None else _for_scores(mask)
            y = jax.nn.dot_product_attention(made["q"], made["k"], made["v"], mask=where)
        y = y.reshape(*y.shape[:2], features)
        y = layers.Dense(features, dtype=self.dtype, name="projection")(y)
        return layers.Dropout(self.dropout)(y, deterministic=not train)

    def _talking(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """Attention with mixed heads, of [B, N, h, D / h] each; scores and softmax are float32."""
        mix = functools.partial(
            nn.Einsum, (self.num_heads, self.num_heads), "bhqk,hg->bgqk", kernel_init=layers.normal_init
        )
        shares = jax.nn.softmax(mix(name="mix_scores")(_scores(queries, keys)))
        shares = mix(name="mix_shares")(shares).astype(values.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", shares, values)

    def _dropping(self, queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Attention with dropout of its shares, in training; of [B, N, h, D / h] each, softmax in float32."""
        scores = _scores(queries, keys)
        if mask is not None:  # as jax.nn.dot_product_attention has it: a sample of padding alone is no NaN
            scores = jnp.where(_for_scores(mask), scores, jnp.finfo(scores.dtype).min)
        shares = jax.nn.softmax(scores)
        shares = layers.Dropout(self.shares_dropout, deterministic=False)(shares).astype(values.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", shares, values)

    def _reduced(self, x: jax.Array) -> jax.Array:
        """The tokens of the smaller map, normalised."""
        batch, tokens, features = x.shape
        side = round(tokens**0.5)
        y = patches(x.reshape(batch, side, side, features), features, self.reduction, self.dtype, "reduction")
        return layers.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(y)


def _scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Of each query [B, N, h, D / h] and key [B, M, h, D / h], in each head: [B, h, N, M] float32."""
    return jnp.einsum("bqhd,bkhd->bhqk", queries * queries.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)


def _for_scores(mask: jax.Array) -> jax.Array:
    """A mask of tokens [B, M] as one of scores [B, 1, 1, M]."""
    return mask[:, None, None]


class Mlp(nn.Module):
    """Dense, activation, Dense: [B, N, D] -> [B, N, D]; how its activation pools is `layers.activate`'s to say."""

    hidden_dim: int
    activation: layers.Placement
    pool: str
    dropout: float
    dtype: Any
    rows_per_sample: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms each token."""
        y = layers.Dense(self.hidden_dim, dtype=self.dtype, name="expand")(x)
        y = self.activation(self, y, labels, train, pool=self.pool, rows_per_sample=self.rows_per_sample)
        y = layers.Dropout(self.dropout)(y, deterministic=not train)
        y = layers.Dense(x.shape[-1], dtype=self.dtype, name="reduce")(y)
        return layers.Dropout(self.dropout)(y, deterministic=not train)


class Block(nn.Module):
    """Pre-norm transformer block: ``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

    Stochastic depth drops a branch for a whole row of the batch.

    Attributes:
        attention: factory of an `Attention`.
        hidden_dim: width of the MLP's hidden layer.
        activation: the model's activations.
        pool: what a mechanism in the MLP and an ``arr`` behind the block pool by, ``"token"`` or ``"mean"``.
        arr: factory of an `ARR`, or None.
        dropout: rate in the MLP.
        dtype: compute dtype.
        epsilon: of both norms.
        layer_scale: what both branches are multiplied by at first, each channel with a factor of its own that is
            learned (Touvron et al., 2021); None: they are not.
        rows_per_sample: rows of the batch that are one sample.
    """

    attention: Callable[..., nn.Module]
    hidden_dim: int
    activation: layers.Placement
    pool: str
    arr: Callable[..., nn.Module] | None
    dropout: float
    dtype: Any
    epsilon: float
    layer_scale: float | None = None
    rows_per_sample: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        drop_rate: jax.Array | None,
        labels: jax.Array | None,
        train: bool,
        context: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """[B, N, D] -> [B, N, D], as `repeat` wants it; the attention also sees the context [B, M, D]."""
        norm = functools.partial(layers.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        mlp = Mlp(
            self.hidden_dim,
            self.activation,
            self.pool,
            self.dropout,
            self.dtype,
            rows_per_sample=self.rows_per_sample,
            name="mlp",
        )
        y = norm(name="norm1")(x if context is None else jnp.concatenate([x, context], axis=1))
        y = self._scaled("layer_scale1", self.attention(name="attention")(y, train))
        x = x + layers.drop_path(self, y, drop_rate, train)
        y = self._scaled("layer_scale2", mlp(norm(name="norm2")(x), labels, train))
        x = x + layers.drop_path(self, y, drop_rate, train)
        if self.arr:
            x = self.arr(name="arr")(x, labels, train, pool=self.pool)
        return x, None

    def _scaled(self, name: str, branch: jax.Array) -> jax.Array:
        """The branch [B, N, D] times a learned factor for each channel."""
        if self.layer_scale is None:
            return branch
        factors = self.param(name, nn.initializers.constant(self.layer_scale), branch.shape[-1:], jnp.float32)
        return branch * factors.astype(self.dtype)[None, None]


def patches(x: jax.Array, features: int, size: int, dtype: Any, name: str) -> jax.Array:
    """Non-overlapping patches of maps [B, H, W, C], each a token: [B, H W / size^2, features].

    A rest of the map that fills no patch is left out. ``name`` is the convolution's in the module that calls.
    """
    conv = layers.uniform_conv(features, x.shape[-1], size, strides=size, padding="VALID", dtype=dtype, name=name)
    y = conv(x)
    return y.reshape(y.shape[0], y.shape[1] * y.shape[2], features)


class Transformer(layers.ImageModel):
    """Base class of transformers on patches.

    Attributes (besides those of `ImageModel`; the activations are those of the MLPs, ``arr`` follows every block):
        patch_size: height and width of a patch; divides ``image_size``.
        dropout: rate after embeddings, attention projections and MLP layers, in [0, 1).
        stochastic_depth: drop rate of the last block's branches, in [0, 1); linear from 0 at the first.
        scan: whether equal blocks are compiled as a loop or one by one, with the same variables, random draws and
            results; None decides by the device (`dpa_jax.models.layers.repeat`).
        remat: whether what is in a block is computed again for its gradient instead of kept; the results are the same.

    Raises:
        ValueError: for sizes that are too small or do not divide, other rates, and images of another shape.
    """

    native: Callable[..., nn.Module] = make_activation("gelu")
    patch_size: int = 4
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool | None = None
    remat: bool = False

    epsilon: ClassVar[float] = 1e-6
    """Of the norms of blocks and of the last one."""

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"image_size": self.image_size, "patch_size": self.patch_size})
        if self.image_size % self.patch_size:
            raise ValueError(f"{owner}: patch_size {self.patch_size} does not divide image_size {self.image_size}")
        check_rate(owner, "dropout", self.dropout)
        check_rate(owner, "stochastic_depth", self.stochastic_depth)
        super().__post_init__()

    def drop_rates(self, depth: int) -> jax.Array | None:
        """Of ``depth`` blocks, one after the other; None for no stochastic depth."""
        return jnp.linspace(0.0, self.stochastic_depth, depth) if self.stochastic_depth else None

    def block(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        activation: layers.Placement,
        pool: str,
        attention: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The settings of a `Block` of this model: ``attention`` are its `Attention`'s, ``options`` its own."""
        return {
            "attention": functools.partial(Attention, num_heads, self.dropout, self.dtype, **(attention or {})),
            "hidden_dim": int(embed_dim * mlp_ratio),
            "activation": activation,
            "pool": pool,
            "arr": functools.partial(ARR, self.num_classes) if self.arr else None,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "epsilon": self.epsilon,
            **options,
        }

    def repeated(self, block: type[nn.Module], length: int, shared: int = 2) -> Callable[..., Any]:
        """A class of equal blocks, as `dpa_jax.models.layers.repeat` has it."""
        return layers.repeat(block, length, self.scan, self.remat, shared)

    def token(self, x: jax.Array, name: str, std: float = 0.02) -> jax.Array:
        """A learned token, the same for every sample of ``x`` [B, N, D]: [B, 1, D]."""
        token = self.param(name, nn.initializers.normal(std), (1, 1, x.shape[-1]), jnp.float32)
        return on_auto_axes(_for_each, x, token.astype(self.dtype), specs=lambda _: spec(x))

    def positioned(self, x: jax.Array, train: bool, name: str = "position_embedding") -> jax.Array:
        """The tokens [B, N, D] with learned positions, and dropout."""
        x = x + self.param(name, layers.normal_init, (1, *x.shape[1:]), jnp.float32).astype(self.dtype)
        return layers.Dropout(self.dropout)(x, deterministic=not train)

    def logits(self, x: jax.Array) -> jax.Array:
        """Those of the first token of [B, N, D], normalised."""
        x = layers.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(x[:, 0])
        return layers.Dense(self.num_classes, name="head")(x.astype(jnp.float32))


def _for_each(x: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.broadcast_to(token, (x.shape[0], 1, x.shape[-1]))


class Isotropic(Transformer):
    """Base class of transformers with one width, in blocks that are all equal.

    Attributes (besides those of `Transformer`):
        embed_dim: width D of the residual stream; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
    """

    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"depth": self.depth})
        check_width(owner, {"embed_dim": self.embed_dim}, {"num_heads": self.num_heads})
        check_ratio(owner, "mlp_ratio", self.mlp_ratio, self.embed_dim)
        super().__post_init__()


def check_width(owner: str, width: Mapping[str, int], heads: Mapping[str, int]) -> None:
    """Raises ValueError unless the number of heads, by its name, divides the width, by its name."""
    check_sizes(owner, {**width, **heads})
    ((dim, features),), ((name, number),) = width.items(), heads.items()
    if features % number:
        raise ValueError(f"{owner}: {name} {number} does not divide {dim} {features}")


def check_ratio(owner: str, name: str, ratio: float, features: int) -> None:
    """Raises ValueError unless an MLP's hidden layer, ``ratio`` times this wide, has a unit and is not too large."""
    check_range(owner, name, ratio, 1 / features, 16 * MAX_SIZE / features)


def block_names(
    ours: str, torch: str, norms: Sequence[str] = ("norm1", "norm2"), attention: str = "attn", mlp: str = "mlp"
) -> dict[str, str]:
    """A model's ``torch_names`` of a `Block`: its own name here, and the names in PyTorch of it and its parts."""
    return {
        ours: torch,
        **{f"{ours}.norm{i}": f"{torch}.{norm}" for i, norm in enumerate(norms, 1)},
        f"{ours}.attention": f"{torch}.{attention}",
        f"{ours}.attention.projection": f"{torch}.{attention}.proj",
        f"{ours}.mlp": f"{torch}.{mlp}",
        f"{ours}.mlp.expand": f"{torch}.{mlp}.fc1",
        f"{ours}.mlp.reduce": f"{torch}.{mlp}.fc2",
        f"{ours}.mlp.activation": f"{torch}.{mlp}.act",
        f"{ours}.mlp.activation.shift_kernel": f"{torch}.{mlp}.act.shift_proj_weight",
        f"{ours}.mlp.activation.shift_bias": f"{torch}.{mlp}.act.shift_proj_bias",
    }
