"""What happens to images on their way into a model: on the device, inside jit, under vmap.

Every random operation is a pure function of a typed key and one uint8 image [H, W, C]. A train transform is a
list of `(key, image) -> image` functions followed by a normalisation; an operation is added by putting it
into the list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections

from dpa_jax.data.pipeline import Batch

Operation = Callable[[jax.Array, jax.Array], jax.Array]
Kernel = Callable[[jax.Array], jax.Array]


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
    box = _random_box(box_key, image.shape[:2], scale, ratio)
    if interpolation == "random":
        cubic = jax.random.bernoulli(kernel_key)
        return _resample(image, box, size, lambda x: jnp.where(cubic, _bicubic(x), _bilinear(x)))
    return resized_crop(image, box, size, interpolation)


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
    return _resample(image, box, size, _KERNELS[method])


def resize(image: jax.Array, size: int, method: str = "bilinear") -> jax.Array:
    """Resizes a whole image uint8 [H, W, C] to [size, size, C]; see `resized_crop`."""
    height, width, _ = image.shape
    if height == width == size:
        return image
    return resized_crop(image, jnp.array([0, 0, height, width]), size, method)


def center_crop(image: jax.Array, size: int) -> jax.Array:
    """Cuts [size, size, C] out of the middle of an image [H, W, C]; ValueError where the image is smaller."""
    height, width, _ = image.shape
    if size > min(height, width):
        raise ValueError(f"cannot cut {size} x {size} out of an image of {height} x {width}")
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Turns a uint8 image [H, W, C] into float32, scaled to [0, 1] and then standardised by channel."""
    mean_1x1xC, std_1x1xC = (jnp.array(values, jnp.float32)[None, None] for values in (mean, std))
    return (image.astype(jnp.float32) / 255 - mean_1x1xC) / std_1x1xC


def train_transform(
    config: ml_collections.ConfigDict, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array, Batch], jax.Array]:
    """The augmentation of training images.

    Args:
      config: the configuration's `augment` part. `image_size`: side length of the result, 0 for the stored
        one. `crop`: "none", "pad" (`random_crop` by `padding`) or "resized" (`random_resized_crop` with
        `scale`, `ratio` and `interpolation`). `flip`: probability of a horizontal flip.
      mean: per channel, in units of [0, 1].
      std: likewise.

    Returns:
      f(key, batch) -> float32 [B, S, S, C]. The draws depend on the key, the image's index and its epoch, and
      on nothing else: not on the batch size, the device count or the place in the batch.

    Raises:
      ValueError: `crop` is something else.
    """
    operations: list[Operation] = []
    if config.crop == "pad":
        operations.append(lambda key, image: random_crop(key, image, config.padding))
    elif config.crop == "resized":
        operations.append(
            lambda key, image: random_resized_crop(
                key,
                image,
                config.image_size or image.shape[0],
                tuple(config.scale),
                tuple(config.ratio),
                config.interpolation,
            )
        )
    elif config.crop != "none":
        raise ValueError(f"augment.crop must be none, pad or resized, not {config.crop!r}")
    if config.flip:
        operations.append(lambda key, image: random_flip(key, image, config.flip))

    def one(key: jax.Array, image: jax.Array, index: jax.Array, epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(key, epoch), index)
        for place, operation in enumerate(operations):
            image = operation(jax.random.fold_in(key, place), image)
        return normalize(resize(image, config.image_size or image.shape[0]), mean, std)

    def transform(key: jax.Array, batch: Batch) -> jax.Array:
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(key, batch.images, batch.index, batch.epoch)

    return transform


def eval_transform(
    config: ml_collections.ConfigDict, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array], jax.Array]:
    """The treatment of test images.

    Args:
      config: the configuration's `augment` part. `eval_resize`: resize to this side length (bilinear) and cut
        `image_size` out of the middle; 0: resize to `image_size`, or, where that is 0, leave the images as
        they are.
      mean: per channel, in units of [0, 1].
      std: likewise.

    Returns:
      f(images uint8 [B, H, W, C]) -> float32 [B, S, S, C].
    """

    def one(image: jax.Array) -> jax.Array:
        size = config.image_size or image.shape[0]
        if config.eval_resize:
            image = resize(image, config.eval_resize)
            return normalize(center_crop(image, size), mean, std)
        return normalize(resize(image, size), mean, std)

    return jax.vmap(one)


def _random_box(
    key: jax.Array, shape: tuple[int, ...], scale: tuple[float, float], ratio: tuple[float, float]
) -> jax.Array:
    """Draws top, left, height, width: int32 [4]."""
    height, width = shape
    tries = 10
    # One draw for everything: random bits are most of what this costs to compile and to run.
    draws = jax.random.uniform(key, (2 * tries + 2,))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:tries])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[tries : 2 * tries]
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    box_height = jnp.where(fits[first], heights[first], min(height, round(width / ratio[0])))
    box_width = jnp.where(fits[first], widths[first], min(width, round(height * ratio[1])))
    room = jnp.stack([height - box_height, width - box_width])
    anywhere = jnp.floor(draws[-2:] * (room + 1).astype(jnp.float32)).astype(jnp.int32)
    corner = jnp.where(fits[first], anywhere, room // 2)
    return jnp.concatenate([corner, jnp.stack([box_height, box_width])])


def _bilinear(x: jax.Array) -> jax.Array:
    return jnp.maximum(1 - jnp.abs(x), 0)


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys' cubic convolution with a = -1/2, which Pillow uses."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


_KERNELS: dict[str, Kernel] = {"bilinear": _bilinear, "bicubic": _bicubic}


def _resample(image: jax.Array, box: jax.Array, size: int, kernel: Kernel) -> jax.Array:
    """Pillow's two passes, columns first, each rounded to uint8."""
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
