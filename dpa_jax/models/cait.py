"""CaiT (Touvron et al., 2021b, "Going deeper with image transformers")."""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import check_range, check_sizes
from dpa_jax.models.transformer import Block, Isotropic, block_names, patches


class CaiT(Isotropic):
    """Blocks on the patches with talking heads and layer scale, then blocks in which a class token looks at them.

    Mechanisms and ``arr`` pool the patches' blocks by the mean over the tokens, the class token's by that token. The
    variables of either are stacked, under ``blocks`` and ``class_blocks``.

    Attributes (besides those of `Isotropic`; ``depth`` is that of the patches' blocks):
        class_depth: number of blocks of the class token.
        layer_scale: what the factors of all branches start at.
        stochastic_depth: drop rate of the branches of every block on the patches, the same for all, in [0, 1); the
            class token's blocks drop nothing.
    """

    depth: int = 24
    num_heads: int = 4
    class_depth: int = 2
    layer_scale: float = 1e-5

    def __post_init__(self):
        check_sizes("CaiT", {"class_depth": self.class_depth})
        check_range("CaiT", "layer_scale", self.layer_scale)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout and stochastic depth are on (they need a ``dropout`` key) and memories updated.
        """
        x = patches(self.checked(images), self.embed_dim, self.patch_size, self.dtype, "patch_embed")
        x, placement = self.positioned(x, train), self.placement
        sizes = self.embed_dim, self.num_heads, self.mlp_ratio, placement
        settings = self.block(*sizes, "mean", {"talking_heads": True}, layer_scale=self.layer_scale)
        blocks = self.repeated(Block, self.depth)(**settings, name="blocks")
        rates = jnp.full(self.depth, self.stochastic_depth, jnp.float32) if self.stochastic_depth else None
        x, _ = blocks(x, rates, labels, train)

        attention = {"first_only": True, "products": ("q", "k", "v")}
        settings = self.block(*sizes, "token", attention, layer_scale=self.layer_scale)
        blocks = self.repeated(Block, self.class_depth, shared=3)(**settings, name="class_blocks")
        token, _ = blocks(self.token(x, "class_token"), None, labels, train, x)
        placement.check("CaiT")
        return self.logits(token)

    torch_names: ClassVar[Mapping[str, str]] = {
        "class_token": "cls_token",
        "position_embedding": "pos_embed",
        "patch_embed": "patch_embed.proj",
        **block_names("blocks", "blocks.*"),
        "blocks.attention.mix_scores": "blocks.*.attn.proj_l",
        "blocks.attention.mix_shares": "blocks.*.attn.proj_w",
        **block_names("class_blocks", "blocks_token_only.*"),
        **{
            f"{ours}.layer_scale{i}": f"{theirs}.*.gamma_{i}"
            for ours, theirs in (("blocks", "blocks"), ("class_blocks", "blocks_token_only"))
            for i in (1, 2)
        },
    }
