"""Crops, flips and random erasing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpa_jax.data.augment.resample import resample, resized_crop
from dpa_jax.data.boxes import BOX_DRAWS, box_from_draws, first_fit


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads an image [H, W, C] with `padding` black pixels on every side and cuts its own size out, anywhere."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array, p: float = 0.5) -> jax.Array:
    """Mirrors an image [H, W, C] left to right with probability p."""
    return jnp.where(jax.random.bernoulli(key, p), image[:, ::-1], image)


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "random",
) -> jax.Array:
    """Cuts out a box of random area and aspect ratio and resizes it (Szegedy et al., 2015, section 6).

    `box_from_draws` says how it is drawn. `interpolation` is "bilinear", "bicubic", or "random" for one of the two with
    equal chances. uint8 [H, W, C] becomes uint8 [size, size, C].
    """
    box_key, kernel_key = jax.random.split(key)
    height, width, _ = image.shape
    box = box_from_draws(jax.random.uniform(box_key, (BOX_DRAWS,)), height, width, scale, ratio)
    if interpolation == "random":
        return resample(image, box, size, jax.random.bernoulli(kernel_key))
    return resized_crop(image, box, size, interpolation)


def center_crop(image: jax.Array, size: int) -> jax.Array:
    """Cuts [size, size, C] out of the middle of an image [H, W, C]; ValueError where the image is smaller."""
    height, width, _ = image.shape
    if size > min(height, width):
        raise ValueError(f"cannot cut {size} x {size} out of an image of {height} x {width}")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> jax.Array:
    """Fills a random rectangle with noise (Zhong et al., 2020), a standard normal draw for every value.

    As timm's mode `pixel` with count 1. The image [H, W, C] is float and normalised already. `p` is the probability
    that anything is erased; nothing is, too, where none of ten rectangles fits. `scale` and `ratio` are as in
    `box_from_draws`.
    """
    height, width, _ = image.shape
    whether_key, box_key, noise_key = jax.random.split(key, 3)
    draws = jax.random.uniform(box_key, (BOX_DRAWS,))
    fits, box_height, box_width = first_fit(draws[:20], height - 1, width - 1, height * width, scale, ratio)
    room = jnp.stack([height - box_height, width - box_width]) + 1
    top, left = jnp.floor(draws[20:] * room.astype(jnp.float32)).astype(jnp.int32)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)
    erased = inside & fits & jax.random.bernoulli(whether_key, p)
    return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape, image.dtype), image)
