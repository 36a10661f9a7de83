"""ResNet (He et al., 2016) of basic blocks, with a stem for small images or the published one."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import MAX_SIZE, check_sizes
from dpa_jax.models import convnet, layers

_MAX_STAGES = 10


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around which the input is added: [B, H, W, D] -> [B, H/s, W/s, features]."""

    features: int
    stride: int
    unit: convnet.ConvUnit

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None, train: bool) -> jax.Array:
        """Transforms feature maps."""
        unit = self.unit
        y = unit(self, x, labels, train, self.features, 3, self.stride, suffix="1")
        y = unit(self, y, labels, train, self.features, 3, active=False, suffix="2")
        if x.shape != y.shape:
            x = unit(self, x, labels, train, self.features, 1, self.stride, active=False, suffix="_shortcut")
        return unit.activation(self, x + y, labels, train, pool="mean", name="activation2")


class ResNet(convnet.ConvNet):
    """A ResNet of basic blocks.

    The stem for small images is a 3 x 3 convolution; the other is 7 x 7 at stride 2, with a max pool behind it.
    Blocks are not scanned: the first of a stage has another shape, and too few equal ones are left.

    Attributes (besides those of `ConvNet`; an activation follows every convolution):
        stage_sizes: blocks in each stage; every stage but the first halves the resolution.
        width: channels of the first stage; every other doubles them.
    """

    stage_sizes: Sequence[int] = (2, 2, 2, 2)
    width: int = 64

    @property
    def last_places(self) -> tuple[str, ...]:
        """Both activations of the last block."""
        return (f"stage{len(self.stage_sizes) - 1}_block{self.stage_sizes[-1] - 1}/*",)

    def __post_init__(self):
        sizes, stages = self.stage_sizes, (1, _MAX_STAGES)
        convnet.check_numbers("ResNet", "stage_sizes", sizes, "numbers of blocks", stages, convnet.MAX_BLOCKS)
        check_sizes("ResNet", {"width": self.width}, high=MAX_SIZE >> (len(sizes) - 1))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C]; ``train`` updates batch statistics and memories."""
        x, placement = self.checked_batch(images, train), self.placement
        unit = convnet.ConvUnit(placement, convnet.fan_out_conv, self.dtype)
        x = unit(self, x, labels, train, self.width, *((3, 1) if self.small_images else (7, 2)))
        x = x if self.small_images else convnet.max_pool(x)
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                stride, name = 2 if stage and not i else 1, f"stage{stage}_block{i}"
                x = BasicBlock(self.width * 2**stage, stride, unit, name=name)(x, labels, train)
            x = self.end_stage(x, labels, train, stage)
        placement.check("ResNet")
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        return layers.uniform_dense(self.num_classes, x.shape[-1], name="head")(x)

    @property
    def torch_names(self) -> Mapping[str, str]:
        """The names in torchvision, which counts stages from 1."""
        names = convnet.unit_names("{}", "conv1", "bn1", "relu")
        for stage, blocks in enumerate(self.stage_sizes):
            for i in range(blocks):
                here, there = f"stage{stage}_block{i}.{{}}", f"layer{stage + 1}.{i}"
                for n in (1, 2):
                    names |= convnet.unit_names(f"{here}{n}", f"{there}.conv{n}", f"{there}.bn{n}", f"{there}.act{n}")
                names |= convnet.unit_names(f"{here}_shortcut", f"{there}.downsample.0", f"{there}.downsample.1")
        return names | {"head": "fc"}
