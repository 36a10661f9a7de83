"""ResNet (He et al., 2016) for small images: a 3 x 3 stem and no pooling before the stages."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.checks import MAX_SIZE, check_sizes
from dpa_jax.models.layers import ImageModel, Placement

_MAX_STAGES, _MAX_BLOCKS = 10, 500  # each block is compiled


def _conv(features: int, size: int, stride: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """A convolution that keeps the size, or divides it by its stride, padded alike on all sides."""
    # He et al., 2015, for what comes out of a convolution; PyTorch's reference ResNets start so.
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(features, (size, size), stride, size // 2, use_bias=False, kernel_init=init, dtype=dtype, name=name)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added: [B, H, W, D] -> [B, H/s, W/s, features]."""

    features: int
    stride: int
    activation: Placement
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms feature maps."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        y = norm(name="norm1")(_conv(self.features, 3, self.stride, self.dtype, "conv1")(x))
        y = self.activation(self, y, labels, train, pool="mean", name="activation1")
        y = norm(name="norm2")(_conv(self.features, 3, 1, self.dtype, "conv2")(y))
        if x.shape != y.shape:
            x = norm(name="norm_shortcut")(_conv(self.features, 1, self.stride, self.dtype, "conv_shortcut")(x))
        return self.activation(self, x + y, labels, train, pool="mean", name="activation2")


class ResNet(ImageModel):
    """A ResNet of basic blocks for images of CIFAR's size.

    Blocks are not scanned: the first of a stage has another shape, and too few equal ones are left.

    Attributes (besides those of `ImageModel`; an activation follows every convolution, ``arr`` every stage, and both
    pool feature maps by their mean):
        stage_sizes: blocks in each stage; every stage but the first halves the resolution.
        width: channels of the first stage; every other doubles them.
    """

    activation_places: str = "last"
    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    width: int = 64

    @property
    def last_places(self) -> tuple[str, ...]:
        """Both activations of the last block."""
        return (f"stage{len(self.stage_sizes) - 1}_block{self.stage_sizes[-1] - 1}/*",)

    def __post_init__(self):
        sizes = self.stage_sizes
        if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not 1 <= len(sizes) <= _MAX_STAGES:
            raise ValueError(f"ResNet: stage_sizes must be 1 to {_MAX_STAGES} numbers of blocks; got {sizes!r}")
        check_sizes("ResNet", {f"stage_sizes[{i}]": blocks for i, blocks in enumerate(sizes)}, high=_MAX_BLOCKS)
        check_sizes("ResNet", {"width": self.width}, high=MAX_SIZE >> (len(sizes) - 1))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C]; ``train`` updates batch statistics and memories."""
        images, placement = self.checked(images), self.placement
        if train and len(images) == 0:
            raise ValueError("ResNet: an empty batch has no statistics to train with")
        x = _conv(self.width, 3, 1, self.dtype, "conv")(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")(x)
        x = placement(self, x, labels, train, pool="mean")
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                stride, name = 2 if stage and not i else 1, f"stage{stage}_block{i}"
                block = BasicBlock(self.width * 2**stage, stride, placement, self.dtype, name=name)
                x = block(x, labels, train)
            if self.arr:
                x = ARR(self.num_classes, name=f"arr{stage}")(x, labels, train, pool="mean")
        placement.check("ResNet")
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return nn.Dense(self.num_classes, name="head")(x)
