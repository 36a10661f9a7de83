"""The operations in the order that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dpa_jax.checks import check_memory
from dpa_jax.data.augment.color import color_jitter
from dpa_jax.data.augment.crop import center_crop, random_crop, random_erasing, random_flip, random_resized_crop
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


def _check_sizes(config: ConfigDict, shape: tuple[int, ...]) -> None:
    """Raises ValueError where the part `augment` of a configuration does not suit images of this shape, [H, W, C]."""
    shorter = min(shape[:2])
    if config.crop == "pad" and config.padding >= shorter:
        raise ValueError(
            f"config: augment.padding must be less than the images' shorter side, {shorter}; got {config.padding}"
        )
    if config.eval_resize and not config.image_size and config.eval_resize < shape[0]:
        raise ValueError(
            f"config: augment.eval_resize must be 0 or at least the {shape[0]} pixels that are cut out of it, where "
            f"augment.image_size is 0; got {config.eval_resize}"
        )
    if shape[2] not in (1, 3) and (config.rand_augment or any(config.color_jitter)):
        name = "rand_augment" if config.rand_augment else "color_jitter"
        raise ValueError(f"config: augment.{name} needs images of 1 or 3 channels; these have {shape[2]}")
    if shape[2] != 3 and any(config.color_jitter[3:]):
        raise ValueError("config: augment.color_jitter changes the hue of colour images only, of 3 channels")


def train_transform(
    config: ConfigDict, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array, Batch], jax.Array]:
    """The augmentation of training images.

    In timm's order: crop, flip, RandAugment filled with the mean, colour jitter, normalisation, erasing; `mix` comes
    after. `config` is a configuration's `augment` part, whose keys `dpa_jax.config` describes; mean and std are per
    channel, in units of [0, 1]. ValueError where `crop` is unknown, or an operation refuses its part.

    Returns:
      f(key, batch) -> float32 [B, S, S, C]. The draws depend on the key, the image's index and its epoch, and
      on nothing else: not on the batch size, the device count or the place in the batch.
    """
    size = config.image_size
    crops: dict[str, Operation] = {
        "none": lambda _, image: image,
        "pad": lambda key, image: random_crop(key, image, config.padding),
        "resized": lambda key, image: random_resized_crop(
            key, image, size or image.shape[0], config.scale, config.ratio, config.interpolation
        ),
    }
    if config.crop not in crops:
        raise ValueError(f"augment.crop must be none, pad or resized, not {config.crop!r}")
    operations = [crops[config.crop]]
    if size:
        operations.append(lambda _, image: resize(image, size))
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

    def transform(key: jax.Array, example: Batch) -> jax.Array:
        _check_sizes(config, example.inputs.shape)
        key = jax.random.fold_in(jax.random.fold_in(key, example.epoch), example.index)
        image = example.inputs
        for place, operation in enumerate(operations):
            image = operation(jax.random.fold_in(key, place), image)
        return image

    return jax.vmap(transform, in_axes=(None, 0))


def eval_transform(config: ConfigDict, mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """The preprocessing of test images: uint8 [B, H, W, C] becomes float32 [B, S, S, C].

    The shorter side is resized (bilinear) to `eval_resize`, or, where that is 0, to `image_size`, which is then cut out
    of the middle. With both 0 the images stay as they are. The arguments are those of `train_transform`.
    """

    def one(image: jax.Array) -> jax.Array:
        if shorter := config.eval_resize or config.image_size:
            height, width = (shorter * side // min(image.shape[:2]) for side in image.shape[:2])
            image = center_crop(resize(image, (height, width)), config.image_size or image.shape[0])
        return normalize(image, mean, std)

    def transform(images: jax.Array) -> jax.Array:
        _check_sizes(config, images.shape[1:])
        size = images.size // min(images.shape[1:3]) ** 2 * config.eval_resize**2 * 4  # int32 while it is resized
        check_memory("config", f"a batch of {len(images)} images by augment.eval_resize {config.eval_resize}", size)
        return jax.vmap(one)(images)

    return transform
