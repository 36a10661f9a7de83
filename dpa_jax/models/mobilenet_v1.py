"""MobileNet V1 (Howard et al., 2017), as timm has it."""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import activation as make_activation
from dpa_jax.checks import MAX_SIZE, check_range
from dpa_jax.models import convnet


def _conv(features: int, in_features: int, size: int, **options) -> nn.Conv:
    """A convolution that starts normal with variance 2 / (size^2 * features of a group), as timm's."""
    # Depthwise, a group has one input and one feature.
    init = nn.initializers.variance_scaling(2, "fan_in" if in_features == 1 else "fan_out", "normal")
    return nn.Conv(features, (size, size), kernel_init=init, **options)


class SeparableBlock(nn.Module):
    """A depthwise 3 x 3 and a pointwise convolution: [B, H, W, D] -> [B, H/s, W/s, features]."""

    features: int
    stride: int
    unit: convnet.ConvUnit

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms feature maps."""
        width = x.shape[-1]
        x = self.unit(self, x, labels, train, width, 3, self.stride, groups=width, suffix="_depthwise")
        return self.unit(self, x, labels, train, self.features, 1, suffix="_pointwise")


class MobileNetV1(convnet.ConvNet):
    """A 3 x 3 stem and stages of depthwise separable convolutions, without shortcuts.

    The stem keeps the resolution for small images, else it has stride 2; every stage but the first halves it.

    Attributes (besides those of `ConvNet`; the last block has two activations):
        native: ReLU6 as in timm's weights; the paper has ReLU, ``dpa_jax.activation("relu")``.
        width: of all layers, in units of the published ones; channels are rounded to multiples of 8.
        stage_sizes: blocks in each of the five stages.
    """

    native: Callable[..., nn.Module] = make_activation("relu6")
    width: float = 1.0
    stage_sizes: Sequence[int] = (1, 2, 2, 6, 2)

    def __post_init__(self):
        convnet.check_numbers(
            "MobileNetV1", "stage_sizes", self.stage_sizes, "numbers of blocks", (5, 5), convnet.MAX_BLOCKS
        )
        check_range("MobileNetV1", "width", self.width, 0.01, MAX_SIZE / 1024)
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """Both activations of the last block."""
        return (f"stage4_block{self.stage_sizes[-1] - 1}/*",)

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C]; ``train`` updates batch statistics and memories."""
        x, placement = self.checked_batch(images, train), self.placement
        unit = convnet.ConvUnit(placement, _conv, self.dtype)
        stem = convnet.round_channels(32, self.width)
        x = unit(self, x, labels, train, stem, 3, 1 if self.small_images else 2)
        for stage, blocks in enumerate(self.stage_sizes):
            features = convnet.round_channels(64 << stage, self.width)
            for i in range(blocks):
                stride, name = 2 if stage and not i else 1, f"stage{stage}_block{i}"
                x = SeparableBlock(features, stride, unit, name=name)(x, labels, train)
            x = self.end_stage(x, labels, train, stage)
        placement.check("MobileNetV1")
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        init = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")  # +-1/sqrt(K)
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(x)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """The names in timm."""
        names = convnet.unit_names("{}", "conv_stem", "bn1", "bn1.act")
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                here, there = f"stage{stage}_block{i}.{{}}", f"blocks.{stage}.{i}"
                for kind, conv, norm in (("depthwise", "conv_dw", "bn1"), ("pointwise", "conv_pw", "bn2")):
                    parts = f"{there}.{conv}", f"{there}.{norm}", f"{there}.{norm}.act"
                    names |= convnet.unit_names(f"{here}_{kind}", *parts)
        return names | {"head": "classifier"}
