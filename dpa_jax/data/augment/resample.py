"""Resizing as Pillow does it: separable, antialiased, each of the two passes rounded to uint8."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpa_jax.checks import check_choice

METHODS = ("bilinear", "bicubic")
_BITS = 22  # after the point in Pillow's weights


def resized_crop(image: jax.Array, box: jax.Array, size: int, method: str) -> jax.Array:
    """Cuts a box out of an image uint8 [H, W, C] and resizes it to uint8 [size, size, C].

    The box is top, left, height and width, integers [4] that may be traced; the method is "bilinear" or "bicubic", else
    ValueError is raised. Equal to Pillow save for ties in its rounding, which make a level or two.
    """
    check_choice("resize", "the interpolation", method, METHODS)
    return resample(image, box, size, method == "bicubic")


def resize(image: jax.Array, size: int | tuple[int, int], method: str = "bilinear") -> jax.Array:
    """Resizes a whole image uint8 [H, W, C] in Pillow's fixed point, so that every level is Pillow's.

    The size is height and width, or one number for both; the method is "bilinear" or "bicubic", else ValueError is
    raised.
    """
    check_choice("resize", "the interpolation", method, METHODS)
    height, width = (size, size) if isinstance(size, int) else size
    levels = jnp.asarray(image, jnp.int32)
    # Columns first, as the transposed image's rows.
    levels = _resize_rows(levels.transpose(1, 0, 2), width, method == "bicubic").transpose(1, 0, 2)
    return _resize_rows(levels, height, method == "bicubic").astype(jnp.uint8)


def _resize_rows(levels: jax.Array, size: int, cubic: bool) -> jax.Array:
    """Int32 [H, W, C] to [size, W, C]."""
    length = levels.shape[0]
    if length == size:
        return levels
    zero, whole = np.zeros((), np.int64), np.asarray(length)
    weights_SxH = _weights(zero, whole.astype(np.float64), length, size, cubic)
    weights_SxH = np.rint(weights_SxH * 2**_BITS).astype(np.int32)
    # Most are 0: only so many next to each other count.
    first_S = np.argmax(weights_SxH != 0, axis=1)
    taps = np.max(length - np.argmax(weights_SxH[:, ::-1] != 0, axis=1) - first_S)
    rows_SxT = np.minimum(first_S[:, None] + np.arange(taps), length - 1)
    weights_SxT = np.where(first_S[:, None] + np.arange(taps) < length, np.take_along_axis(weights_SxH, rows_SxT, 1), 0)
    total = jnp.sum(levels[rows_SxT] * weights_SxT[..., None, None], axis=1)
    return jnp.clip((total + 2 ** (_BITS - 1)) >> _BITS, 0, 255)


def _kernel(x: Any, cubic: bool | jax.Array) -> Any:
    """Pillow's kernels: Keys' cubic convolution with a = -1/2, or bilinear. Of NumPy's arrays as well as JAX's."""
    x = abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    bicubic = (x < 1) * near + ((x >= 1) & (x < 2)) * far
    return x.__array_namespace__().where(cubic, bicubic, (1 - x).clip(0))


def resample(image: jax.Array, box: jax.Array, size: int, cubic: bool | jax.Array) -> jax.Array:
    """`resized_crop`, bicubic or bilinear: Pillow's two passes, columns first."""
    height, width, _ = image.shape
    top, left, box_height, box_width = box
    columns_SxW = _weights(left, box_width.astype(jnp.float32), width, size, cubic)
    rows_SxH = _weights(top, box_height.astype(jnp.float32), height, size, cubic)
    # Accelerators would take bfloat16 or TF32 here, which is off by many levels.
    einsum = functools.partial(jnp.einsum, precision="highest")
    narrow = _to_levels(einsum("sw,hwc->hsc", columns_SxW, image.astype(jnp.float32)))
    return _to_levels(einsum("sh,htc->stc", rows_SxH, narrow)).astype(jnp.uint8)


def _weights(start: Any, extent: Any, length: int, size: int, cubic: bool | jax.Array) -> Any:
    """How much each of `length` pixels adds to each of the `size` pixels of the result: [size, length].

    The start is an integer and the extent a float, both NumPy's or both JAX's.
    """
    xp = extent.__array_namespace__()
    step = extent / size
    reduction = xp.maximum(step, xp.ones_like(step))  # antialiasing: the kernel grows with the reduction
    centers_Sx1 = (xp.arange(size, dtype=extent.dtype)[:, None] + 0.5) * step
    pixels_1xL = xp.arange(length)[None, :] - start
    weights_SxL = _kernel((pixels_1xL.astype(extent.dtype) + 0.5 - centers_Sx1) / reduction, cubic)
    weights_SxL = xp.where((pixels_1xL >= 0) & (pixels_1xL < extent), weights_SxL, 0)
    return weights_SxL / xp.sum(weights_SxL, axis=1, keepdims=True)


def _to_levels(values: jax.Array) -> jax.Array:
    # A little more than a half, so that ties go up whatever the order of summation was.
    return jnp.clip(jnp.floor(values + 0.5001), 0, 255)
