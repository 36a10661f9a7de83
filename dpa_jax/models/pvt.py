"""PVT, the Pyramid Vision Transformer (Wang et al., 2021), in its first version."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import check_sizes
from dpa_jax.models import layers
from dpa_jax.models.transformer import Block, Transformer, block_names, check_ratio, check_width, patches

_MAX_STAGES = 10


class PVT(Transformer):
    """Stages of blocks on ever smaller maps, in which keys and values are of a map that is smaller still.

    A stage starts with the patches of the map before, normalised, and positions; the last stage also has a class token,
    by which mechanisms and ``arr`` pool there. In the other stages they pool by the mean over the tokens. The variables
    of a stage's blocks are stacked, under ``blocks1``, ``blocks2``, ...

    Attributes (besides those of `Transformer`; ``patch_size`` is that of the first stage's patches, those of the others
    are 2 x 2; ``stochastic_depth`` rises over the blocks of all stages):
        embed_dims: width of each stage; its number of heads divides it.
        num_heads: attention heads in each stage.
        mlp_ratios: width of the MLPs in units of the stage's width.
        depths: number of blocks in each stage.
        reductions: what the side of each stage's map is divided by for keys and values; 1 in the last stage.
    """

    patch_size: int = 2
    embed_dims: Sequence[int] = (64, 128, 320, 512)
    num_heads: Sequence[int] = (1, 2, 5, 8)
    mlp_ratios: Sequence[float] = (8, 8, 4, 4)
    depths: Sequence[int] = (2, 2, 2, 2)
    reductions: Sequence[int] = (8, 4, 2, 1)

    def __post_init__(self):
        names = ("embed_dims", "num_heads", "mlp_ratios", "depths", "reductions")
        lists = {name: getattr(self, name) for name in names}
        for name, values in lists.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not 1 <= len(values) <= _MAX_STAGES:
                raise ValueError(f"PVT: {name} must be 1 to {_MAX_STAGES} numbers, one a stage; got {values!r}")
            if len(values) != len(self.embed_dims):
                raise ValueError(
                    f"PVT: {name} must have a number for each of the {len(self.embed_dims)} embed_dims; got {values!r}"
                )
        for i, dim in enumerate(self.embed_dims):
            check_width("PVT", {f"embed_dims[{i}]": dim}, {f"num_heads[{i}]": self.num_heads[i]})
            check_ratio("PVT", f"mlp_ratios[{i}]", self.mlp_ratios[i], dim)
            check_sizes("PVT", {f"{name}[{i}]": lists[name][i] for name in ("depths", "reductions")})
        if self.reductions[-1] != 1:
            raise ValueError(f"PVT: the last of reductions must be 1, with the class token; got {self.reductions!r}")
        super().__post_init__()
        multiple = self.patch_size << (len(self.embed_dims) - 1)
        if self.image_size % multiple:
            raise ValueError(
                f"PVT: image_size must be a multiple of {multiple}, patch_size {self.patch_size} doubled for every "
                f"further stage; got {self.image_size}"
            )
        for i, (reduction, side) in enumerate(zip(self.reductions, self.sides, strict=True)):
            if reduction > side:
                raise ValueError(f"PVT: reductions[{i}] is {reduction}; the stage's map has a side of {side} only")

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of each stage's map."""
        return tuple(self.image_size // (self.patch_size << i) for i in range(len(self.embed_dims)))

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout and stochastic depth are on (they need a ``dropout`` key) and memories updated.
        """
        x, placement, rates = self.checked(images), self.placement, self.drop_rates(sum(self.depths))
        for i, (dim, depth, side) in enumerate(zip(self.embed_dims, self.depths, self.sides, strict=True)):
            stage, last = i + 1, i + 1 == len(self.embed_dims)
            x = patches(x, dim, 2 if i else self.patch_size, self.dtype, f"patch_embed{stage}")
            x = layers.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"patch_norm{stage}")(x)
            if last:
                x = jnp.concatenate([self.token(x, "class_token"), x], axis=1)
            x = self.positioned(x, train, f"position_embedding{stage}")
            pool = "token" if last else "mean"
            attention = {"products": ("q", "kv"), "reduction": self.reductions[i]}
            settings = self.block(dim, self.num_heads[i], self.mlp_ratios[i], placement, pool, attention)
            blocks = self.repeated(Block, depth)(**settings, name=f"blocks{stage}")
            first = sum(self.depths[:i])
            x, _ = blocks(x, None if rates is None else rates[first : first + depth], labels, train)
            if not last:
                x = x.reshape(len(x), side, side, dim)
        placement.check("PVT")
        return self.logits(x)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """See `dpa_jax.models.torch`."""
        names = {"class_token": "cls_token"}
        for stage in range(1, len(self.embed_dims) + 1):
            names |= {
                f"patch_embed{stage}": f"patch_embed{stage}.proj",
                f"patch_norm{stage}": f"patch_embed{stage}.norm",
                f"position_embedding{stage}": f"pos_embed{stage}",
                **block_names(f"blocks{stage}", f"block{stage}.*"),
                f"blocks{stage}.attention.reduction": f"block{stage}.*.attn.sr",
            }
        return names
