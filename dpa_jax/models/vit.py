"""Vision Transformer (Dosovitskiy et al., 2021), as the papers train it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.activations import activation as make_activation

# The reference cuts its normal at +-2, a hundred standard deviations out.
_linear_init = nn.initializers.normal(0.02)
_Dense = functools.partial(nn.Dense, kernel_init=_linear_init)
# Two passes over the features: the fast variance, E[x^2] - E[x]^2, loses digits.
_LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def _uniform_bias(fan_in: int) -> Callable:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for convolutions."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]; one product makes queries, keys and values."""

    num_heads: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Mixes the tokens of each sample."""
        features = x.shape[-1]
        qkv = _Dense(3 * features, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.num_heads, features // self.num_heads)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        y = _Dense(features, dtype=self.dtype, name="projection")(y.reshape(x.shape))
        return nn.Dropout(self.dropout)(y, deterministic=not train)


class Mlp(nn.Module):
    """Dense, activation, Dense: [B, N, D] -> [B, N, D]."""

    hidden_dim: int
    activation: Callable[..., nn.Module]
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms each token."""
        y = _Dense(self.hidden_dim, dtype=self.dtype, name="expand")(x)
        y = self.activation(name="activation")(y, labels, train)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = _Dense(x.shape[-1], dtype=self.dtype, name="reduce")(y)
        return nn.Dropout(self.dropout)(y, deterministic=not train)


class Block(nn.Module):
    """Pre-norm transformer block; stochastic depth drops a branch for a whole sample."""

    num_heads: int
    hidden_dim: int
    activation: Callable[..., nn.Module]
    dropout: float
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """[B, N, D] -> [B, N, D]."""
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)
        y = _LayerNorm(dtype=self.dtype, name="norm1")(x)
        x = x + drop_path(Attention(self.num_heads, self.dropout, self.dtype, name="attention")(y, train))
        y = _LayerNorm(dtype=self.dtype, name="norm2")(x)
        mlp = Mlp(self.hidden_dim, self.activation, self.dropout, self.dtype, name="mlp")
        return x + drop_path(mlp(y, labels, train))


class ViT(nn.Module):
    """A Vision Transformer with a class token, learned positions and a linear head.

    Attributes:
        num_classes: K, the width of the logits.
        activation: factory of the activation in every MLP; called as ``module(x, labels, train)``.
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch; divides ``image_size``.
        in_channels: channels of the images.
        embed_dim: width D of the residual stream; ``num_heads`` divides it.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs in units of D.
        dropout: rate after embeddings, attention projections and MLP layers.
        stochastic_depth: drop rate of the last block's branches; linear from 0 at the first.
        arr: an `ARR` after every block, on the class token of the residual stream (DNRT).
        dtype: compute dtype; parameters and logits are float32.

    Raises:
        ValueError: for sizes that do not divide and for images of another shape.
    """

    num_classes: int
    activation: Callable[..., nn.Module] = make_activation("gelu")
    image_size: int = 32
    patch_size: int = 4
    in_channels: int = 3
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    arr: bool = False
    dtype: jnp.dtype = jnp.float32

    pool: ClassVar[str] = "token"

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"ViT: num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        super().__post_init__()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the model takes."""
        return (self.image_size, self.image_size, self.in_channels)

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
            images: [B, H, W, C], normalised.
            labels: [B] integers for stateful activations; -1 leaves a sample out. None is inference.
            train: dropout and stochastic depth on (they need a ``dropout`` key), memories updated.

        Returns:
            Logits [B, K] float32.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"ViT: images must be [B, {', '.join(map(str, self.image_shape))}]; got {images.shape}")
        patch = (self.patch_size, self.patch_size)
        x = nn.Conv(
            self.embed_dim,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=_uniform_bias(self.patch_size**2 * self.in_channels),
            dtype=self.dtype,
            name="patch_embed",
        )(images.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        class_token = self.param("class_token", nn.initializers.normal(1e-6), (1, 1, self.embed_dim))
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (x.shape[0], 1, self.embed_dim))
        x = jnp.concatenate([class_token, x], axis=1)
        x = x + self.param("position_embedding", _linear_init, (1, *x.shape[1:])).astype(self.dtype)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i in range(self.depth):
            x = Block(
                num_heads=self.num_heads,
                hidden_dim=int(self.embed_dim * self.mlp_ratio),
                activation=self.activation,
                dropout=self.dropout,
                drop_path=self.stochastic_depth * i / max(self.depth - 1, 1),
                dtype=self.dtype,
                name=f"block{i}",
            )(x, labels, train)
            if self.arr:
                x = ARR(self.num_classes, pool=self.pool, name=f"arr{i}")(x, labels, train)
        x = _LayerNorm(dtype=self.dtype, name="norm")(x[:, 0])
        return _Dense(self.num_classes, name="head")(x.astype(jnp.float32))

    # Names in PyTorch image models -> names here, for `params_from_torch`.
    torch_names: ClassVar = (
        (r"cls_token", "class_token"),
        (r"pos_embed", "position_embedding"),
        (r"patch_embed\.proj\.", "patch_embed."),
        (r"blocks\.(\d+)\.attn\.qkv\.", r"block\1.attention.qkv."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"block\1.attention.projection."),
        (r"blocks\.(\d+)\.mlp\.fc1\.", r"block\1.mlp.expand."),
        (r"blocks\.(\d+)\.mlp\.fc2\.", r"block\1.mlp.reduce."),
        (r"blocks\.(\d+)\.mlp\.act\.shift_proj_weight", r"block\1.mlp.activation.shift_kernel"),
        (r"blocks\.(\d+)\.mlp\.act\.shift_proj_bias", r"block\1.mlp.activation.shift_bias"),
        (r"blocks\.(\d+)\.mlp\.act\.", r"block\1.mlp.activation."),
        (r"blocks\.(\d+)\.", r"block\1."),
    )
