"""MobileNet V2 (Sandler et al., 2018), as torchvision has it."""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import activation as make_activation
from dpa_jax.checks import MAX_SIZE, check_range, check_rate, check_sizes
from dpa_jax.models import convnet, layers


class InvertedResidual(nn.Module):
    """A pointwise convolution that widens, a depthwise one, and a linear one: [B, H, W, D] -> [B, H/s, W/s, features].

    The input is added where stride and widths let it: at stride 1 and for as many features.
    """

    features: int
    stride: int
    expansion: int
    unit: convnet.ConvUnit

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms feature maps."""
        unit, width, y = self.unit, x.shape[-1] * self.expansion, x
        if self.expansion > 1:
            y = unit(self, y, labels, train, width, 1, suffix="_expand")
        y = unit(self, y, labels, train, width, 3, self.stride, groups=width, suffix="_depthwise")
        y = unit(self, y, labels, train, self.features, 1, active=False, suffix="_project")
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(convnet.ConvNet):
    """A 3 x 3 stem, stages of inverted residuals, a pointwise convolution and a linear head.

    For small images the stem and the second stage keep the resolution; else the stem has stride 2.

    Attributes (besides those of `ConvNet`; the last block is the last inverted residual and what follows it):
        native: ReLU6.
        width: of all layers, in units of the published ones; channels are rounded to multiples of 8.
        stages: for each stage its expansion t, channels c, blocks n, and stride s of the first, as in the paper.
        last_channels: channels of the last pointwise convolution, whatever ``width`` is.
        dropout: rate before the head, in [0, 1).
    """

    native: Callable[..., nn.Module] = make_activation("relu6")
    width: float = 1.0
    stages: Sequence[Sequence[int]] = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    last_channels: int = 1280
    dropout: float = 0.2

    def __post_init__(self):
        convnet.check_list("MobileNetV2", "stages", self.stages, "stages", (1, 20))
        for i, stage in enumerate(self.stages):
            convnet.check_numbers("MobileNetV2", f"stages[{i}]", stage, "numbers t, c, n, s", (4, 4), MAX_SIZE >> 4)
            check_sizes("MobileNetV2", {f"stages[{i}][2]": stage[2]}, high=convnet.MAX_BLOCKS)
        check_range("MobileNetV2", "width", self.width, 0.01, 16)
        check_sizes("MobileNetV2", {"last_channels": self.last_channels})
        check_rate("MobileNetV2", "dropout", self.dropout)
        super().__post_init__()

    @property
    def last_places(self) -> tuple[str, ...]:
        """The activations of the last block, and the one behind it."""
        return f"stage{len(self.stages) - 1}_block{self.stages[-1][2] - 1}/*", "activation_last"

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout is on (it needs a ``dropout`` key), memories and batch statistics are updated.
        """
        x, placement = self.checked_batch(images, train), self.placement
        unit = convnet.ConvUnit(placement, convnet.fan_out_conv, self.dtype)
        stem = convnet.round_channels(32, self.width)
        x = unit(self, x, labels, train, stem, 3, 1 if self.small_images else 2)
        for stage, (expansion, channels, blocks, stride) in enumerate(self.stages):
            features = convnet.round_channels(channels, self.width)
            for i in range(blocks):
                first = 1 if i or (self.small_images and stage == 1) else stride
                block = InvertedResidual(features, first, expansion, unit, name=f"stage{stage}_block{i}")
                x = block(x, labels, train)
            x = self.end_stage(x, labels, train, stage)
        x = unit(self, x, labels, train, self.last_channels, 1, suffix="_last")
        placement.check("MobileNetV2")
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        x = layers.Dropout(self.dropout)(x, deterministic=not train)
        return convnet.normal_dense(self.num_classes, self.last_channels, name="head")(x)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """The names in torchvision: blocks counted through all stages, the stem being 0."""
        names, position = _names("{}", "features.0"), 1
        for stage, (expansion, _, blocks, _) in enumerate(self.stages):
            for i in range(blocks):
                here, there = f"stage{stage}_block{i}.{{}}", f"features.{position}.conv"
                kinds = ["expand"] * (expansion > 1) + ["depthwise"]
                for k, kind in enumerate(kinds):
                    names |= _names(f"{here}_{kind}", f"{there}.{k}")
                project = f"{there}.{len(kinds)}", f"{there}.{len(kinds) + 1}"
                names |= convnet.unit_names(f"{here}_project", *project)
                position += 1
        return names | _names("{}_last", f"features.{position}") | {"head": "classifier.1"}


def _names(here: str, there: str) -> dict[str, str]:
    return convnet.unit_names(here, f"{there}.0", f"{there}.1", f"{there}.2")
