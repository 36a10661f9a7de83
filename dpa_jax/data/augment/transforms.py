"""The operations in the order that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dpa_jax.data.augment.color import color_jitter
from dpa_jax.data.augment.crop import center_crop, random_crop, random_flip, random_resized_crop
from dpa_jax.data.augment.erasing import random_erasing
from dpa_jax.data.augment.policy import parse_policy, rand_augment
from dpa_jax.data.augment.resample import resize
from dpa_jax.data.batch import Batch

if TYPE_CHECKING:
    from ml_collections import ConfigDict

Operation = Callable[[jax.Array, jax.Array], jax.Array]


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Turns a uint8 image [H, W, C] into float32, scaled to [0, 1] and then standardised by channel."""
    mean_1x1xC, std_1x1xC = (jnp.array(values, jnp.float32)[None, None] for values in (mean, std))
    return (image.astype(jnp.float32) / 255 - mean_1x1xC) / std_1x1xC


def train_transform(
    config: ConfigDict, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array, Batch], jax.Array]:
    """The augmentation of training images.

    In timm's order: crop, flip, RandAugment, colour jitter, normalisation, erasing. Mixing is for `mix`.

    Args:
      config: the configuration's `augment` part. `image_size`: side length of the result, 0 for the stored
        one. `crop`: "none", "pad" (`random_crop` by `padding`) or "resized" (`random_resized_crop` with
        `scale`, `ratio` and `interpolation`). `flip`: probability of a horizontal flip. `rand_augment`: a
        policy for `rand_augment`, whose fill is the mean; empty for none. `color_jitter`: the four amounts
        for `color_jitter`. `erase`: probability of `random_erasing`.
      mean: per channel, in units of [0, 1].
      std: likewise.

    Returns:
      f(key, batch) -> float32 [B, S, S, C]. The draws depend on the key, the image's index and its epoch, and
      on nothing else: not on the batch size, the device count or the place in the batch.

    Raises:
      ValueError: `crop` is something else, or an operation refuses its part of the configuration.
    """
    operations = [_crop(config)]
    if config.image_size:
        operations.append(lambda _, image: resize(image, config.image_size))
    if config.flip:
        operations.append(lambda key, image: random_flip(key, image, config.flip))
    if config.rand_augment:
        policy = parse_policy(config.rand_augment)
        fill = [min(255, round(255 * value)) for value in mean]
        operations.append(lambda key, image: rand_augment(key, image, policy, fill, config.interpolation))
    if any(config.color_jitter):
        operations.append(lambda key, image: color_jitter(key, image, *config.color_jitter))
    operations.append(lambda _, image: normalize(image, mean, std))
    if config.erase:
        operations.append(lambda key, image: random_erasing(key, image, config.erase))

    def one(key: jax.Array, image: jax.Array, index: jax.Array, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, epoch), index)
        for place, operation in enumerate(operations):
            image = operation(jax.random.fold_in(key, place), image)
        return image

    def transform(key: jax.Array, batch: Batch) -> jax.Array:
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(key, batch.inputs, batch.index, batch.epoch)

    return transform


def _crop(config: ConfigDict) -> Operation:
    if config.crop == "none":
        return lambda _, image: image
    if config.crop == "pad":
        return lambda key, image: random_crop(key, image, config.padding)
    if config.crop == "resized":
        return lambda key, image: random_resized_crop(
            key,
            image,
            config.image_size or image.shape[0],
            tuple(config.scale),
            tuple(config.ratio),
            config.interpolation,
        )
    raise ValueError(f"augment.crop must be none, pad or resized, not {config.crop!r}")


def eval_transform(config: ConfigDict, mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """The preprocessing of test images.

    Args:
      config: the configuration's `augment` part. The shorter side is resized to `eval_resize` (bilinear), or,
        where that is 0, to `image_size`, which is then cut out of the middle. With both 0 the images stay as
        they are.
      mean: per channel, in units of [0, 1].
      std: likewise.

    Returns:
      f(images uint8 [B, H, W, C]) -> float32 [B, S, S, C].
    """

    def one(image: jax.Array) -> jax.Array:
        if shorter := config.eval_resize or config.image_size:
            height, width = (shorter * side // min(image.shape[:2]) for side in image.shape[:2])
            image = center_crop(resize(image, (height, width)), config.image_size or image.shape[0])
        return normalize(image, mean, std)

    return jax.vmap(one)
