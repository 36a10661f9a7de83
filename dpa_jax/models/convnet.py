"""Parts that several convolutional networks share: the base class, and convolution, BatchNorm, activation as one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dpa_jax.activations import ARR
from dpa_jax.checks import check_sizes
from dpa_jax.models import layers

MAX_BLOCKS = 500  # of a stage; each is compiled


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` whose running variance follows PyTorch's.

    Both normalise a batch by its biased variance, the mean of the squared deviations of its n values a channel
    (n = B * H * W). Flax also averages that one over the steps, PyTorch the unbiased estimate, n / (n - 1) times it.
    Evaluation uses the average: with 12 images and maps of 2 x 2 the two differ by 2%. Here it is PyTorch's, so that a
    model evaluates alike in both, wherever it was trained.

    One value a channel has no unbiased variance: the average stays as it was. PyTorch refuses to train with it.
    """

    momentum: float = 0.9  # PyTorch's 0.1

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        """Normalises x [..., C] over all axes but the channels'."""
        before: jax.Array = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average)
        if self.is_initializing() or nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        ):
            return y
        n = jax.lax.psum(x.size // before.size, self.axis_name) if self.axis_name else x.size // before.size
        after: jax.Array = self.get_variable("batch_stats", "var")
        added = after - self.momentum * before  # of the biased variance
        self.put_variable("batch_stats", "var", after + added / (n - 1) if n > 1 else before)
        return y


class ConvNet(layers.ImageModel):
    """Base class of convolutional networks that classify images.

    Attributes (besides those of `ImageModel`; ``activation`` is put into the last block by default, as DPA's authors
    have it; mechanisms pool feature maps by their mean over H and W; ``arr`` follows every stage):
        small_images: the form for images of about 32 pixels, whose first layers keep the resolution; False: the
            published one, for about 224.
    """

    activation_places: str = "last"
    small_images: bool = True

    def checked_batch(self, images: Any, train: bool) -> jax.Array:
        """As `checked`; ValueError also for a batch to train with that is empty."""
        images = self.checked(images)
        if train and len(images) == 0:
            raise ValueError(f"{type(self).__name__}: an empty batch has no statistics to train with")
        return images

    def end_stage(self, x: jax.Array, labels: jax.Array | None, train: bool, stage: int) -> jax.Array:
        """The maps [B, H, W, C] that end a stage, through its `ARR` if there is one."""
        return ARR(self.num_classes, name=f"arr{stage}")(x, labels, train, pool="mean") if self.arr else x


@dataclasses.dataclass(frozen=True)
class ConvUnit:
    """How a model makes a convolution, its BatchNorm and its activation.

    A module calls it in a compact method; its parts are the module's: ``conv1``, ``norm1``, ``activation1`` with the
    suffix "1".

    Attributes:
        activation: which activation is where.
        conv: makes the convolution of (features, inputs of a group, size), as `layers.uniform_conv`.
        dtype: compute dtype.
        norm: whether a BatchNorm follows the convolution.
        use_bias: whether the convolution has a bias.
    """

    activation: layers.Placement
    conv: Callable[..., nn.Conv]
    dtype: Any
    norm: bool = True
    use_bias: bool = False

    def __call__(
        self,
        module: nn.Module,
        x: jax.Array,
        labels: jax.Array | None,
        train: bool,
        features: int,
        size: int,
        stride: int = 1,
        *,
        padding: int | None = None,
        groups: int = 1,
        active: bool = True,
        suffix: str = "",
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H/stride, W/stride, features].

        ``padding`` is that of every side, by default half of the kernel's size; without ``active`` there is no
        activation.
        """
        conv = self.conv(
            features,
            x.shape[-1] // groups,
            size,
            strides=stride,
            padding=size // 2 if padding is None else padding,
            feature_group_count=groups,
            use_bias=self.use_bias,
            dtype=self.dtype,
            name=f"conv{suffix}",
        )
        x = conv(x)
        if self.norm:
            x = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"norm{suffix}")(x)
        if active:
            x = self.activation(module, x, labels, train, pool="mean", name=f"activation{suffix}")
        return x


def unit_names(here: str, conv: str, norm: str = "", activation: str = "") -> dict[str, str]:
    """PyTorch's names of a `ConvUnit`'s parts, as ``torch_names`` has them; ``here`` has {} for the part's kind."""
    names = {"conv": conv, "norm": norm, "activation": activation}
    return {here.format(kind): name for kind, name in names.items() if name}


def fan_out_conv(features: int, in_features: int, size: int, **options: Any) -> nn.Conv:
    """A convolution that starts normal with variance 2 / (features * size^2) (He et al., 2015), its bias at 0.

    The inputs of a group do not count, those of a depthwise convolution neither: torchvision has it so.
    """
    return nn.Conv(
        features, (size, size), kernel_init=nn.initializers.variance_scaling(2, "fan_out", "normal"), **options
    )


def normal_dense(features: int, in_features: int, **options: Any) -> nn.Dense:
    """A dense layer that starts normal with a deviation of 0.01, its bias at 0, as torchvision's VGG."""
    return nn.Dense(features, kernel_init=nn.initializers.normal(0.01), **options)


def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of 3 x 3 at stride 2, [B, H, W, C] -> [B, H/2, W/2, C]: the end of stems for large images."""
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def adaptive_average_pool(x: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] -> [B, side, side, C], also where ``side`` is the larger or does not divide.

    Row i is the mean of the rows from floor(i H / side) to below ceil((i + 1) H / side), columns alike, as PyTorch's.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        if n == side:
            continue
        spans = [(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
        mean = functools.partial(jnp.mean, axis=axis, keepdims=True)
        x = jnp.concatenate([mean(jax.lax.slice_in_dim(x, *span, axis=axis)) for span in spans], axis)
    return x


def round_channels(channels: int, width: float) -> int:
    """A width of MobileNets: ``channels * width`` rounded to a multiple of 8, at least 8, by at most 10% down."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def check_list(owner: str, name: str, values: Any, what: str, counts: tuple[int, int]) -> None:
    """Raises ValueError unless these are ``counts[0]`` to ``counts[1]`` of something, in a tuple or a list."""
    low, high = counts
    if isinstance(values, str) or not isinstance(values, Sequence) or not low <= len(values) <= high:
        raise ValueError(f"{owner}: {name} must be {low if low == high else f'{low} to {high}'} {what}; got {values!r}")


def check_numbers(owner: str, name: str, values: Any, what: str, counts: tuple[int, int], high: int) -> None:
    """As `check_list`, and each of them a whole number in [1, high]."""
    check_list(owner, name, values, what, counts)
    check_sizes(owner, {f"{name}[{i}]": value for i, value in enumerate(values)}, high=high)
