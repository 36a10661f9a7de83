"""ShuffleNet V2 (Ma et al., 2018), as torchvision has it."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import MAX_SIZE
from dpa_jax.models import convnet, layers


class ShuffleUnit(nn.Module):
    """Two branches side by side, their channels shuffled: [B, H, W, D] -> [B, H/s, W/s, features].

    At stride 1 one half of the channels stays as it is; at stride 2 both branches see all of them.
    """

    features: int
    stride: int
    unit: convnet.ConvUnit

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms feature maps."""
        unit, half = self.unit, self.features // 2
        if self.stride == 1:
            left, right = jnp.split(x, 2, axis=-1)
        else:
            width, right = x.shape[-1], x
            left = unit(
                self, x, labels, train, width, 3, self.stride, groups=width, active=False, suffix="_left_depthwise"
            )
            left = unit(self, left, labels, train, half, 1, suffix="_left_pointwise")
        right = unit(self, right, labels, train, half, 1, suffix="1")
        right = unit(self, right, labels, train, half, 3, self.stride, groups=half, active=False, suffix="_depthwise")
        right = unit(self, right, labels, train, half, 1, suffix="2")
        # Channel 2i comes from the left, 2i + 1 from the right.
        return jnp.stack([left, right], axis=-1).reshape(*right.shape[:-1], self.features)


class ShuffleNetV2(convnet.ConvNet):
    """A 3 x 3 stem, three stages of shuffle units, a pointwise convolution and a linear head; by default x1.0.

    The first unit of a stage halves the resolution. The stem keeps it for small images; else it has stride 2 and a max
    pool behind it.

    Attributes (besides those of `ConvNet`; the last block is the last unit and what follows it):
        stage_sizes: units in each of the three stages.
        channels: of the stem, of the three stages (even numbers) and of the last convolution.
    """

    stage_sizes: Sequence[int] = (4, 8, 4)
    channels: Sequence[int] = (24, 116, 232, 464, 1024)

    def __post_init__(self):
        convnet.check_numbers(
            "ShuffleNetV2", "stage_sizes", self.stage_sizes, "numbers of units", (3, 3), convnet.MAX_BLOCKS
        )
        convnet.check_numbers("ShuffleNetV2", "channels", self.channels, "widths", (5, 5), MAX_SIZE)
        odd = [width for width in self.channels[1:4] if width % 2]
        if odd:
            raise ValueError(f"ShuffleNetV2: channels of the stages must be even, for two branches; got {odd[0]}")
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """The activations of the last unit, and the one behind it."""
        return f"stage2_block{self.stage_sizes[-1] - 1}/*", "activation_last"

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C]; ``train`` updates batch statistics and memories."""
        x, placement = self.checked_batch(images, train), self.placement
        unit = convnet.ConvUnit(placement, layers.uniform_conv, self.dtype)
        stem, *widths, last = self.channels
        x = unit(self, x, labels, train, stem, 3, 1 if self.small_images else 2)
        x = x if self.small_images else convnet.max_pool(x)
        for stage, (width, units) in enumerate(zip(widths, self.stage_sizes, strict=True)):
            for i in range(units):
                x = ShuffleUnit(width, 1 if i else 2, unit, name=f"stage{stage}_block{i}")(x, labels, train)
            x = self.end_stage(x, labels, train, stage)
        x = unit(self, x, labels, train, last, 1, suffix="_last")
        placement.check("ShuffleNetV2")
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return layers.uniform_dense(self.num_classes, last, name="head")(x)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """The names in torchvision: positions in the branches, and stages counted from 2."""
        names = _names("{}", "conv1") | _names("{}_last", "conv5") | {"head": "fc"}
        for stage, units in enumerate(self.stage_sizes):
            for i in range(units):
                here, there = f"stage{stage}_block{i}.{{}}", f"stage{stage + 2}.{i}"
                names |= _names(f"{here}_left_depthwise", f"{there}.branch1", active=False)
                names |= _names(f"{here}_left_pointwise", f"{there}.branch1", 2)
                names |= _names(f"{here}1", f"{there}.branch2")
                names |= _names(f"{here}_depthwise", f"{there}.branch2", 3, active=False)
                names |= _names(f"{here}2", f"{there}.branch2", 5)
        return names


def _names(here: str, there: str, position: int = 0, active: bool = True) -> dict[str, str]:
    """The unit whose parts follow each other from a position of a sequence on."""
    parts = (f"{there}.{position + k}" for k in range(3 if active else 2))
    return convnet.unit_names(here, *parts)
