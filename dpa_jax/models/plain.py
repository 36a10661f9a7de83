"""What AlexNet and VGG are: stages of convolutions with max pools between them, and two hidden dense layers."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.checks import check_rate, check_sizes
from dpa_jax.models.convnet import ConvNet, ConvUnit, adaptive_average_pool, unit_names
from dpa_jax.models.layers import Dropout


class Convolution(NamedTuple):
    """One convolution of a plan."""

    features: int
    size: int
    stride: int
    padding: int  # of every side


class Plan(NamedTuple):
    """The layers of a `PlainConvNet`."""

    stages: tuple[tuple[Convolution, ...], ...]
    pool: int  # window of the max pool after each stage, in pixels; its stride is 2
    grid: int  # side of the maps that the dense layers see
    conv: Callable[..., nn.Conv]  # as `layers.uniform_conv`
    dense: Callable[..., nn.Dense]  # as `layers.uniform_dense`
    norm: bool  # whether a BatchNorm follows each convolution
    dropout_first: bool  # whether dropout precedes the hidden layers, or follows their activations


class PlainConvNet(ConvNet):
    """A convolutional network without shortcuts, as its `plan` says.

    Weight layers are numbered from 1, first the convolutions ``conv1`` ..., then the two hidden dense layers, ``fc6``
    and ``fc7`` in AlexNet; ``activation1`` follows the first. ``arr`` follows every stage, before its pool.

    Attributes (besides those of `ConvNet`):
        hidden: width of the two hidden dense layers.
        dropout: rate at the hidden dense layers, in [0, 1).

    Raises:
        ValueError: for sizes that are too small, images too small for the pools, and other rates.
    """

    hidden: int = 4096
    dropout: float = 0.5

    @property
    def plan(self) -> Plan:
        """The layers."""
        raise NotImplementedError

    def __post_init__(self):
        owner = type(self).__name__
        check_sizes(owner, {"hidden": self.hidden, "image_size": self.image_size})
        check_rate(owner, "dropout", self.dropout)
        super().__post_init__()
        plan = self.plan
        if last_side(plan, self.image_size) < 1:
            least = next(size for size in itertools.count(1) if last_side(plan, size) >= 1)
            raise ValueError(f"{owner}: image_size must be at least {least} in this form; got {self.image_size}")

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Logits [B, K] float32 of images [B, H, W, C].

        In training, dropout is on (it needs a ``dropout`` key), memories and batch statistics are updated.
        """
        x, plan, placement = self.checked_batch(images, train), self.plan, self.placement
        unit = ConvUnit(placement, plan.conv, self.dtype, plan.norm, use_bias=True)
        numbers = itertools.count(1)
        for stage, convolutions in enumerate(plan.stages):
            for features, size, stride, padding in convolutions:
                suffix = str(next(numbers))
                x = unit(self, x, labels, train, features, size, stride, padding=padding, suffix=suffix)
            x = self.end_stage(x, labels, train, stage)
            x = nn.max_pool(x, (plan.pool, plan.pool), (2, 2))
        x = adaptive_average_pool(x, plan.grid)
        x = x.reshape(len(x), -1)
        for _ in range(2):
            dropout = functools.partial(Dropout(self.dropout), deterministic=not train)
            number = next(numbers)
            x = dropout(x) if plan.dropout_first else x
            x = plan.dense(self.hidden, x.shape[-1], dtype=self.dtype, name=f"fc{number}")(x)
            x = placement(self, x, labels, train, pool="none", name=f"activation{number}")
            x = x if plan.dropout_first else dropout(x)
        placement.check(type(self).__name__)
        return plan.dense(self.num_classes, self.hidden, name="head")(x.astype(jnp.float32))

    @property
    def torch_names(self) -> Mapping[str, str]:
        """The names in torchvision: the positions in its two sequences, where pools and dropouts have one too."""
        names: dict[str, str] = {}
        plan, position, numbers = self.plan, 0, itertools.count(1)
        for convolutions in plan.stages:
            for _ in convolutions:
                kinds = ["conv", "norm", "activation"] if plan.norm else ["conv", "activation"]
                there = {kind: f"features.{position + i}" for i, kind in enumerate(kinds)}
                names |= unit_names(f"{{}}{next(numbers)}", **there)
                position += len(kinds)
            position += 1  # the pool
        for position in (1, 4) if plan.dropout_first else (0, 3):
            number = next(numbers)
            names |= {f"fc{number}": f"classifier.{position}", f"activation{number}": f"classifier.{position + 1}"}
        return names | {"head": "classifier.6"}

    @property
    def torch_flattened(self) -> Mapping[str, tuple[int, int, int]]:
        """{dense layer: (C, H, W)}: PyTorch flattens the maps in this order, here it is (H, W, C)."""
        plan = self.plan
        return {f"fc{sum(map(len, plan.stages)) + 1}": (plan.stages[-1][-1].features, plan.grid, plan.grid)}


def last_side(plan: Plan, side: int) -> int:
    """Height and width of the last maps before the average pool, for images of ``side`` pixels; none below 1."""
    for convolutions in plan.stages:
        for convolution in convolutions:
            side = (side + 2 * convolution.padding - convolution.size) // convolution.stride + 1
        side = (side - plan.pool) // 2 + 1
    return side
