"""DeiT (Touvron et al., 2021a), the form with a distillation token."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from dpa_jax.models import layers
from dpa_jax.models.vit import ViT


class DeiT(ViT):
    """A `ViT` with a distillation token behind its class token, and a head for each of the two.

    Logits are the mean of both heads', in training too: there is no teacher.
    """

    def with_tokens(self, x: jax.Array) -> jax.Array:
        """The patches [B, N, D] behind the learned tokens."""
        return super().with_tokens(jnp.concatenate([self.token(x, "distillation_token"), x], axis=1))

    def logits(self, x: jax.Array) -> jax.Array:
        """The mean of both heads', of the first two tokens of [B, N, D]."""
        x = layers.LayerNorm(dtype=self.dtype, name="norm")(x[:, :2]).astype(jnp.float32)
        heads = layers.Dense(self.num_classes, name="head"), layers.Dense(self.num_classes, name="head_distillation")
        return (heads[0](x[:, 0]) + heads[1](x[:, 1])) / 2

    torch_names: ClassVar[Mapping[str, str]] = {
        **ViT.torch_names,
        "distillation_token": "dist_token",
        "head_distillation": "head_dist",
    }
