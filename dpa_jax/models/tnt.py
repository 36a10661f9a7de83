"""TNT, Transformer in Transformer (Han et al., 2021), in its first published form."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dpa_jax.activations.sharding import on_auto_axes, spec
from dpa_jax.checks import check_sizes
from dpa_jax.models import layers
from dpa_jax.models.transformer import Block, Isotropic, block_names, check_ratio, check_width

_ATTENTION = {"products": ("qk", "v"), "bias": False}


class TNTBlock(nn.Module):
    """A block on the pixels of each patch, whose output is added to the patches, and a block on these.

    Attributes:
        inner: factory of the `Block` on pixels.
        outer: factory of the `Block` on the class token and the patches.
        epsilon: of the norm in between.
        dtype: compute dtype.
    """

    inner: Callable[..., nn.Module]
    outer: Callable[..., nn.Module]
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: tuple[jax.Array, jax.Array], drop_rate: jax.Array | None, labels: jax.Array | None, train: bool
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """Pixels [B N, n, c] and tokens [B, 1 + N, D] -> the same, as `repeat` wants it."""
        pixels, tokens = x
        _, length, features = tokens.shape
        pixels, _ = self.inner(name="inner")(pixels, drop_rate, labels, train)
        y = flat(layers.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(pixels), length - 1)
        y = layers.Dense(features, dtype=self.dtype, name="projection")(y)
        tokens = jnp.concatenate([tokens[:, :1], tokens[:, 1:] + y], axis=1)
        tokens, _ = self.outer(name="outer")(tokens, drop_rate, labels, train)
        return (pixels, tokens), None


def flat(pixels: jax.Array, rows: int) -> jax.Array:
    """Pixels [B N, n, c] of N rows a sample, one after the other: [B, N, n c]."""
    y = pixels.reshape(pixels.shape[0], pixels.shape[1] * pixels.shape[2])  # on Explicit axes, one axis at a time
    return y.reshape(y.shape[0] // rows, rows, y.shape[1])


class TNT(Isotropic):
    """Every patch is a token, and an image of its own whose pixels are tokens of an inner transformer.

    The pixels are those of a strided 7 x 7 convolution of the image. Mechanisms in the inner MLPs pool by the mean over
    all pixels of a sample, those in the outer ones, and ``arr`` behind these, by the class token. In the inner blocks
    stochastic depth drops single patches' rows. The variables of all blocks are stacked under ``blocks``.

    Attributes (besides those of `Isotropic`, which are the outer blocks'; ``mlp_ratio`` is that of both):
        first_stride: of the convolution; divides ``patch_size``: a patch has ``(patch_size / first_stride)^2`` pixels.
        inner_dim: width of a pixel; ``inner_heads`` divides it.
        inner_heads: attention heads of the inner blocks.
    """

    embed_dim: int = 384
    num_heads: int = 6
    first_stride: int = 1
    inner_dim: int = 24
    inner_heads: int = 4

    epsilon: ClassVar[float] = 1e-5

    def __post_init__(self):
        check_sizes("TNT", {"first_stride": self.first_stride, "patch_size": self.patch_size})
        if self.patch_size % self.first_stride:
            raise ValueError(f"TNT: first_stride {self.first_stride} does not divide patch_size {self.patch_size}")
        check_width("TNT", {"inner_dim": self.inner_dim}, {"inner_heads": self.inner_heads})
        check_ratio("TNT", "mlp_ratio", self.mlp_ratio, self.inner_dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout and stochastic depth are on (they need a ``dropout`` key) and memories updated.
        """
        pixels = self._pixels(self.checked(images))
        rows = (self.image_size // self.patch_size) ** 2
        y = flat(pixels, rows)
        norm = functools.partial(layers.LayerNorm, epsilon=self.epsilon, dtype=self.dtype)
        y = layers.Dense(self.embed_dim, dtype=self.dtype, name="projection")(norm(name="pixel_norm")(y))
        y = norm(name="patch_norm")(y)
        tokens = self.positioned(jnp.concatenate([self.token(y, "class_token"), y], axis=1), train)

        placement = self.placement
        common = self.mlp_ratio, placement
        inner = self.block(self.inner_dim, self.inner_heads, *common, "mean", _ATTENTION)
        inner |= {"arr": None, "rows_per_sample": rows}
        outer = self.block(self.embed_dim, self.num_heads, *common, "token", _ATTENTION)
        parts = functools.partial(Block, **inner), functools.partial(Block, **outer)
        blocks = self.repeated(TNTBlock, self.depth)(*parts, self.epsilon, self.dtype, name="blocks")
        (_, tokens), _ = blocks((pixels, tokens), self.drop_rates(self.depth), labels, train)
        placement.check("TNT")
        return self.logits(tokens)

    def _pixels(self, images: jax.Array) -> jax.Array:
        """The pixels of all patches, row by row, with learned positions: [B, H, W, C] -> [B N, n, c]."""
        patches, side = self.image_size // self.patch_size, self.patch_size // self.first_stride  # along an edge
        options = {"strides": self.first_stride, "padding": 3, "dtype": self.dtype, "name": "pixel_embed"}
        y = layers.uniform_conv(self.inner_dim, self.in_channels, 7, **options)(images)

        def cut(y: jax.Array) -> jax.Array:
            y = y.reshape(len(y), patches, side, patches, side, self.inner_dim).swapaxes(2, 3)
            return y.reshape(len(y) * patches**2, side**2, self.inner_dim)

        y = on_auto_axes(cut, y, specs=lambda _: PartitionSpec(*spec(y)[:1]))
        # The axes are PyTorch's.
        positions = self.param("pixel_position", layers.normal_init, (1, self.inner_dim, side, side), jnp.float32)
        return y + positions.reshape(1, self.inner_dim, side**2).swapaxes(1, 2).astype(self.dtype)

    torch_names: ClassVar[Mapping[str, str]] = {
        "class_token": "cls_token",
        "position_embedding": "patch_pos",
        "pixel_position": "pixel_pos",
        "pixel_embed": "pixel_embed.proj",
        "pixel_norm": "norm1_proj",
        "projection": "proj",
        "patch_norm": "norm2_proj",
        "blocks.norm": "blocks.*.norm1_proj",
        "blocks.projection": "blocks.*.proj",
        **block_names("blocks.inner", "blocks.*", ("norm_in", "norm_mlp_in"), "attn_in", "mlp_in"),
        **block_names("blocks.outer", "blocks.*", ("norm_out", "norm_mlp"), "attn_out", "mlp"),
    }
