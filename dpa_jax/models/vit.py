"""Vision Transformer (Dosovitskiy et al., 2021), as the papers train it."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.models.transformer import Block, Isotropic, block_names, patches


class ViT(Isotropic):
    """A Vision Transformer with a class token, learned positions and a linear head.

    Its attributes and errors are those of `Isotropic`. The variables of all blocks are stacked under ``blocks``, with a
    leading axis of length ``depth``. Mechanisms and ``arr`` pool by the class token.
    """

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout and stochastic depth are on (they need a ``dropout`` key) and memories updated.
        """
        x = patches(self.checked(images), self.embed_dim, self.patch_size, self.dtype, "patch_embed")
        x = self.positioned(self.with_tokens(x), train)
        placement = self.placement
        settings = self.block(self.embed_dim, self.num_heads, self.mlp_ratio, placement, "token")
        blocks = self.repeated(Block, self.depth)(**settings, name="blocks")
        x, _ = blocks(x, self.drop_rates(self.depth), labels, train)
        placement.check(type(self).__name__)
        return self.logits(x)

    def with_tokens(self, x: jax.Array) -> jax.Array:
        """The patches [B, N, D] behind the learned tokens."""
        return jnp.concatenate([self.token(x, "class_token", std=1e-6), x], axis=1)

    torch_names: ClassVar[Mapping[str, str]] = {
        "class_token": "cls_token",
        "position_embedding": "pos_embed",
        "patch_embed": "patch_embed.proj",
        **block_names("blocks", "blocks.*"),
    }
