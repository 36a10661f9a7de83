"""Resizing as Pillow does it: separable, antialiased, each of the two passes rounded to uint8."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Kernel = Callable[[jax.Array], jax.Array]


def resized_crop(image: jax.Array, box: jax.Array, size: int, method: str) -> jax.Array:
    """Cuts a box out and resizes it, with Pillow's antialiased resampling.

    Args:
      image: uint8 [H, W, C].
      box: integers [4], top, left, height, width; may be traced.
      size: side length of the result.
      method: "bilinear" or "bicubic".

    Returns:
      uint8 [size, size, C]; equal to Pillow's save for ties in its rounding, which make a level or two.

    Raises:
      ValueError: the method is something else.
    """
    if method not in _KERNELS:
        raise ValueError(f"the interpolation must be one of {', '.join(_KERNELS)}, not {method!r}")
    return resample(image, box, size, _KERNELS[method])


def resize(image: jax.Array, size: int, method: str = "bilinear") -> jax.Array:
    """Resizes a whole image uint8 [H, W, C] to [size, size, C]; see `resized_crop`."""
    height, width, _ = image.shape
    if height == width == size:
        return image
    return resized_crop(image, jnp.array([0, 0, height, width]), size, method)


def _bilinear(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - jnp.abs(x), 0)


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys' cubic convolution with a = -1/2, which Pillow uses."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


_KERNELS: dict[str, Kernel] = {"bilinear": _bilinear, "bicubic": _bicubic}


def random_kernel(key: jax.Array) -> Kernel:
    """Bilinear or bicubic, with equal chances."""
    cubic = jax.random.bernoulli(key)
    return lambda x: jnp.where(cubic, _bicubic(x), _bilinear(x))


def resample(image: jax.Array, box: jax.Array, size: int, kernel: Kernel) -> jax.Array:
    """`resized_crop` with a kernel of one's own: Pillow's two passes, columns first."""
    height, width, _ = image.shape
    top, left, box_height, box_width = box
    columns_SxW = _weights(left, box_width, width, size, kernel)
    rows_SxH = _weights(top, box_height, height, size, kernel)
    # The full precision of float32: accelerators would take bfloat16 or TF32 here, which is off by many
    # levels.
    einsum = functools.partial(jnp.einsum, precision="highest")
    narrow = _to_levels(einsum("sw,hwc->hsc", columns_SxW, image.astype(jnp.float32)))
    return _to_levels(einsum("sh,htc->stc", rows_SxH, narrow)).astype(jnp.uint8)


def _weights(start: jax.Array, extent: jax.Array, length: int, size: int, kernel: Kernel) -> jax.Array:
    """How much each of `length` pixels adds to each of the `size` pixels of the result: [size, length]."""
    step = extent.astype(jnp.float32) / size
    reduction = jnp.maximum(step, 1)  # antialiasing: the kernel grows with the reduction
    centers_Sx1 = (jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5) * step
    pixels_1xL = jnp.arange(length)[None, :] - start
    weights_SxL = kernel((pixels_1xL.astype(jnp.float32) + 0.5 - centers_Sx1) / reduction)
    weights_SxL = jnp.where((pixels_1xL >= 0) & (pixels_1xL < extent), weights_SxL, 0)
    return weights_SxL / jnp.sum(weights_SxL, axis=1, keepdims=True)


def _to_levels(values: jax.Array) -> jax.Array:
    # A little more than a half, so that ties go up whatever the order of summation was.
    return jnp.clip(jnp.floor(values + 0.5001), 0, 255)
