"""Crops and flips."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpa_jax.data.augment.resample import random_kernel, resample, resized_crop
from dpa_jax.data.boxes import BOX_DRAWS, box_from_draws


def random_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads with black on every side and cuts the image's own size out, anywhere.

    Args:
      key: a typed key.
      image: [H, W, C], any dtype.
      padding: pixels added on each side.

    Returns:
      [H, W, C] of the image's dtype.
    """
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

    As torchvision and timm draw it: up to ten tries, then the largest central box within the ratios.

    Args:
      key: a typed key.
      image: uint8 [H, W, C].
      size: side length of the result.
      scale: least and greatest area, as a fraction of the image's.
      ratio: least and greatest width divided by height; drawn uniformly in its logarithm.
      interpolation: "bilinear", "bicubic", or "random" for one of the two with equal chances.

    Returns:
      uint8 [size, size, C].
    """
    box_key, kernel_key = jax.random.split(key)
    height, width, _ = image.shape
    box = box_from_draws(jax.random.uniform(box_key, (BOX_DRAWS,)), height, width, scale, ratio)
    if interpolation == "random":
        return resample(image, box, size, random_kernel(kernel_key))
    return resized_crop(image, box, size, interpolation)


def center_crop(image: jax.Array, size: int) -> jax.Array:
    """Cuts [size, size, C] out of the middle of an image [H, W, C]; ValueError where the image is smaller."""
    height, width, _ = image.shape
    if size > min(height, width):
        raise ValueError(f"cannot cut {size} x {size} out of an image of {height} x {width}")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]
