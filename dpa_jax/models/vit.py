"""Vision Transformer (Dosovitskiy et al., 2021), as the papers train it."""

import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.activations import activation as make_activation
from dpa_jax.activations.sharding import on_auto_axes, spec
from dpa_jax.checks import MAX_SIZE, check_range, check_rate, check_sizes
from dpa_jax.models import layers


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops a branch for a whole sample."""

    num_heads: int
    hidden_dim: int
    activation: Callable[..., nn.Module]
    arr: Callable[..., nn.Module] | None
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, drop_rate: jax.Array | None, labels: jax.Array | None, train: bool
    ) -> tuple[jax.Array, None]:
        """[B, N, D] -> [B, N, D], as `repeat` wants it."""
        attention = layers.Attention(self.num_heads, self.dropout, self.dtype, name="attention")
        mlp = layers.Mlp(self.hidden_dim, self.activation, "token", self.dropout, self.dtype, name="mlp")
        y = layers.LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + layers.drop_path(self, attention(y, train), drop_rate, train)
        y = layers.LayerNorm(dtype=self.dtype, name="norm2")(x)
        x = x + layers.drop_path(self, mlp(y, labels, train), drop_rate, train)
        if self.arr:
            x = self.arr(name="arr")(x, labels, train, pool="token")
        return x, None


def with_first_token(x: jax.Array, token: jax.Array) -> jax.Array:
    """The tokens [B, N, D] of each sample behind one that all have, [1, 1, D]: [B, N + 1, D]."""
    return jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2])), x], axis=1)


class ViT(layers.ImageModel):
    """A Vision Transformer with a class token, learned positions and a linear head.

    The variables of all blocks are stacked under ``blocks``, with a leading axis of length ``depth``.

    Attributes (besides those of `ImageModel`; ``activation`` is that of every MLP, ``arr`` after every block on the
    class token):
        patch_size: height and width of a patch; divides ``image_size``.
        embed_dim: width D of the residual stream; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        dropout: rate after embeddings, attention projections and MLP layers, in [0, 1).
        stochastic_depth: drop rate of the last block's branches, in [0, 1); linear from 0 at the first.
        scan: whether the blocks are compiled as a loop or one by one, with the same variables, random draws and
            results; None decides by the device (`dpa_jax.models.layers.repeat`).

    Raises:
        ValueError: for sizes that are too small or do not divide, other rates, and images of another shape.
    """

    activation: Callable[..., nn.Module] = make_activation("gelu")
    patch_size: int = 4
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    scan: bool | None = None

    def __post_init__(self):
        names = ("image_size", "patch_size", "embed_dim", "depth", "num_heads")
        check_sizes("ViT", {name: getattr(self, name) for name in names})
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"ViT: num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        # The MLPs' hidden layer has at least one unit.
        check_range("ViT", "mlp_ratio", self.mlp_ratio, 1 / self.embed_dim, 16 * MAX_SIZE / self.embed_dim)
        check_rate("ViT", "dropout", self.dropout)
        check_rate("ViT", "stochastic_depth", self.stochastic_depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout and stochastic depth are on (they need a ``dropout`` key) and memories updated.
        """
        images = self.checked(images)
        embed = functools.partial(layers.uniform_conv, padding="VALID", dtype=self.dtype, name="patch_embed")
        x = embed(self.embed_dim, self.in_channels, self.patch_size, strides=self.patch_size)(images)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], self.embed_dim)
        class_token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, self.embed_dim), jnp.float32)
        x = on_auto_axes(with_first_token, x, class_token.astype(self.dtype), specs=lambda _: spec(x))
        x = x + self.param("position_embedding", layers.normal_init, (1, *x.shape[1:]), jnp.float32).astype(self.dtype)
        x = layers.Dropout(self.dropout)(x, deterministic=not train)
        arr = functools.partial(ARR, self.num_classes) if self.arr else None
        settings = self.num_heads, int(self.embed_dim * self.mlp_ratio), self.activation, arr, self.dropout, self.dtype
        blocks = layers.repeat(Block, self.depth, self.scan)(*settings, name="blocks")
        drop_rates = jnp.linspace(0.0, self.stochastic_depth, self.depth) if self.stochastic_depth else None
        x, _ = blocks(x, drop_rates, labels, train)
        x = layers.LayerNorm(dtype=self.dtype, name="norm")(x[:, 0])
        return layers.Dense(self.num_classes, name="head")(x.astype(jnp.float32))

    torch_names: ClassVar[Mapping[str, str]] = {
        "class_token": "cls_token",
        "position_embedding": "pos_embed",
        "patch_embed": "patch_embed.proj",
        "blocks": "blocks.*",
        "blocks.attention.qkv": "blocks.*.attn.qkv",
        "blocks.attention.projection": "blocks.*.attn.proj",
        "blocks.mlp.expand": "blocks.*.mlp.fc1",
        "blocks.mlp.reduce": "blocks.*.mlp.fc2",
        "blocks.mlp.activation": "blocks.*.mlp.act",
        "blocks.mlp.activation.shift_kernel": "blocks.*.mlp.act.shift_proj_weight",
        "blocks.mlp.activation.shift_bias": "blocks.*.mlp.act.shift_proj_bias",
    }
