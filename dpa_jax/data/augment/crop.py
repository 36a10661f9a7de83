"""Cuts and flips: which part of an image a model gets to see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dpa_jax.data.augment.resample import random_kernel, resample, resized_crop

BOX_DRAWS = 22


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


def box_from_draws(draws: Any, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Any:
    """The box of a random resized crop: up to ten tries, then the largest central box within the ratios.

    Args:
      draws: float32 [22], uniform in [0, 1); a NumPy or a JAX array.
      height: of the image, in pixels.
      width: likewise.
      scale: least and greatest area, as a fraction of the image's.
      ratio: least and greatest width divided by height; drawn uniformly in its logarithm.

    Returns:
      int32 [4], top, left, height, width, an array of the kind that `draws` is.
    """
    xp = draws.__array_namespace__()
    fits, box_height, box_width = first_fit(draws[:20], height, width, height * width, scale, ratio)
    box_height = xp.where(fits, box_height, min(height, round(width / ratio[0])))
    box_width = xp.where(fits, box_width, min(width, round(height * ratio[1])))
    room = xp.stack([height - box_height, width - box_width])
    anywhere = xp.floor(draws[20:] * (room + 1).astype(xp.float32)).astype(xp.int32)
    corner = xp.where(fits, anywhere, room // 2)
    return xp.concat([corner, xp.stack([box_height, box_width])]).astype(xp.int32)


def first_fit(
    draws: Any, max_height: int, max_width: int, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Any, Any, Any]:
    """The first of ten random boxes that is no larger than it may be.

    Args:
      draws: float32 [20], uniform in [0, 1); a NumPy or a JAX array.
      max_height: in pixels.
      max_width: likewise.
      area: of the image, in pixels.
      scale: least and greatest area, as a fraction of the image's.
      ratio: least and greatest width divided by height; drawn uniformly in its logarithm.

    Returns:
      Whether there is one, its height and its width.
    """
    xp = draws.__array_namespace__()
    areas = area * (scale[0] + (scale[1] - scale[0]) * draws[:10])
    aspects = ratio[0] * (ratio[1] / ratio[0]) ** draws[10:]
    widths = xp.round(xp.sqrt(areas * aspects)).astype(xp.int32)
    heights = xp.round(xp.sqrt(areas / aspects)).astype(xp.int32)
    fits = (widths > 0) & (widths <= max_width) & (heights > 0) & (heights <= max_height)
    first = xp.argmax(fits)
    return fits[first], heights[first], widths[first]
