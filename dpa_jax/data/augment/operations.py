"""The operations of RandAugment on one image, level for level what Pillow computes.

There are three kinds. Point operations map each level through a table, 256 entries a channel. Blends interpolate
between another image and this one, or extrapolate. Warps resample the image at other coordinates. `apply`, whose
operation is known at run time only, computes one of each kind and selects a result: under `vmap`, where all branches of
a conditional are computed, that costs a fraction of 15 branches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpa_jax.checks import check_choice
from dpa_jax.data.augment.resample import METHODS


def apply_op(
    name: str,
    image: jax.Array,
    argument: jax.Array | float | None = None,
    resample: str = "bilinear",
    fill: int | Sequence[int] = 128,
) -> jax.Array:
    """Applies one operation of RandAugment (Cubuk et al., 2020), as timm names it and Pillow computes it.

    The image is uint8 [H, W, C] with C 1 or 3. The name may have timm's ending "Increasing", which changes nothing.
    The argument is a scalar and may be traced. AutoContrast, Equalize, Invert: ignored. Posterize: bits to keep, 0
    gives black. Solarize: levels from this one on are inverted. SolarizeAdd: added to levels under 128. Color,
    Contrast, Brightness, Sharpness: the factor of the blend, 1 changes nothing. Rotate: degrees, anticlockwise.
    ShearX, ShearY: the shear. TranslateXRel, TranslateYRel: a fraction of the width or height. For the last five
    `resample` is "bilinear" or "bicubic", and `fill` the level, or the C levels, of pixels from outside the image.

    Raises:
      ValueError: an unknown name or `resample`, a missing argument, an image or a fill of another shape or dtype.
    """
    name = name.removesuffix("Increasing")
    check_choice("apply_op", "name", name, OPERATIONS)
    check_choice("apply_op", "resample", resample, METHODS)
    check_image(image, fill)
    if argument is None and name not in WITHOUT_ARGUMENT:
        raise ValueError(f"apply_op: {name} takes an argument")
    argument = jnp.asarray(0.0 if argument is None else argument, jnp.float32)
    levels = jnp.asarray(image, jnp.int32)
    if name in TABLES:
        levels = _look_up(TABLES[name](levels, argument), levels)
    elif name in BLENDS:
        levels = _blend(BLENDS[name](levels), levels, argument)
    else:
        matrix = WARPS[name](argument, *image.shape[:2])
        levels = _warp(levels, matrix, jnp.asarray(resample == "bicubic"), fill)
    return levels.astype(jnp.uint8)


def apply(
    op: jax.Array, image: jax.Array, arguments: jax.Array, cubic: jax.Array, fill: int | Sequence[int]
) -> jax.Array:
    """Applies operation `op`, int32 [] and known at run time only; `len(OPERATIONS)` is none of them.

    `arguments` are float32 [len(OPERATIONS)], one for each operation; `cubic`, bool [], is whether warps are.
    """
    levels = jnp.asarray(image, jnp.int32)
    argument = dict(zip(OPERATIONS, arguments, strict=True))
    first_blend, first_warp = len(TABLES), len(TABLES) + len(BLENDS)

    # Where the operation is of another kind these indices are out of range, and the result is not selected.
    tables = [function(levels, argument[name]) for name, function in TABLES.items()]
    looked_up = _look_up(jnp.stack(tables)[op], levels)

    grey, smooth = (function(levels) for function in BLENDS.values())
    blended = _blend(jnp.where(op == first_blend, grey, smooth), levels, arguments[op])

    matrices = [function(argument[name], *image.shape[:2]) for name, function in WARPS.items()]
    warped = _warp(levels, jnp.stack(matrices)[op - first_warp], cubic, fill)

    kind = (op >= first_blend).astype(jnp.int32) + (op >= first_warp) + (op >= len(OPERATIONS))
    results = (x.astype(jnp.int32) for x in (looked_up, blended, warped, levels))  # wider where JAX has 64 bits
    return jax.lax.select_n(kind, *results).astype(jnp.uint8)


def check_image(image: jax.Array, fill: int | Sequence[int] = 0) -> None:
    """Raises ValueError unless the image is uint8 [H, W, 1 or 3] and the fill one level, or one a channel."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != jnp.uint8:
        raise ValueError(f"the image must be uint8 [H, W, 1 or 3], not {image.dtype} {list(image.shape)}")
    if np.shape(fill) not in ((), image.shape[-1:]):
        raise ValueError(f"fill must be one level, or one for each of the {image.shape[-1]} channels, not {fill}")


def _auto_contrast(levels: jax.Array, _: jax.Array) -> jax.Array:
    """Stretches each channel from its least and greatest level to 0 and 255."""
    low, high = _extremes(_histogram(levels))
    i = jnp.arange(256)[:, None]
    span = jnp.maximum(high - low, 1)
    table, remainder = jnp.divmod((i - low) * 255, span)
    # Pillow takes int(i * scale - low * scale) in float64. Where the true value is whole, that is one less if
    # the errors of the two products outweigh the rounding of their difference.
    error_256xC = jnp.asarray(_product_errors())[span[0]].T
    error = error_256xC - jnp.take_along_axis(error_256xC, low, axis=0)
    rounding = jnp.exp2(jnp.floor(jnp.log2(jnp.maximum(table, 1).astype(jnp.float32) + 0.5)))
    table -= (remainder == 0) & (error < -1.001 * rounding)
    return jnp.where(high > low, jnp.clip(table, 0, 255), i)


@functools.cache
def _product_errors() -> np.ndarray:
    """By how much float64's i * (255 / n) is more than 255 i / n: float32 [n, i], in units of 2^-53."""
    n, i = np.maximum(np.arange(256), 1)[:, None], np.arange(256)[None, :]
    mantissa, exponent = np.frexp(i * (255.0 / n))
    excess = (mantissa * 2.0**53).astype(np.int64) * n - np.left_shift(255 * i, 53 - exponent)
    return np.where(i > 0, np.ldexp(excess / n, exponent), 0).astype(np.float32)


def _equalize(levels: jax.Array, _: jax.Array) -> jax.Array:
    """Makes the levels of each channel as evenly frequent as a table can."""
    counts_256xC = _histogram(levels)
    total = levels.shape[0] * levels.shape[1]
    _, highest_1xC = _extremes(counts_256xC)
    step_1xC = (total - jnp.take_along_axis(counts_256xC, highest_1xC, axis=0)) // 255
    below_256xC = jnp.cumsum(counts_256xC, axis=0) - counts_256xC
    table = (below_256xC + step_1xC // 2) // jnp.maximum(step_1xC, 1)
    return jnp.where(step_1xC > 0, jnp.minimum(table, 255), jnp.arange(256)[:, None])


def _histogram(levels: jax.Array) -> jax.Array:
    """How often each level occurs in each channel: int32 [256, C]."""
    channels = levels.shape[-1]
    counts = jnp.zeros(256 * channels, jnp.int32).at[_flat(levels)].add(1, mode="promise_in_bounds")
    return counts.reshape(256, channels)


def _extremes(counts_256xC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest level in each channel: int32 [1, C]."""
    occurs = counts_256xC > 0
    return jnp.argmax(occurs, axis=0)[None], 255 - jnp.argmax(occurs[::-1], axis=0)[None]


def _posterize(levels: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps so many of the highest bits; none of them leaves black, as Pillow had it until it refused 0."""
    dropped = jnp.clip(8 - bits.astype(jnp.int32), 0, 8)
    return _point(levels, lambda i: i >> dropped << dropped)


def _solarize(levels: jax.Array, threshold: jax.Array) -> jax.Array:
    return _point(levels, lambda i: jnp.where(i < threshold.astype(jnp.int32), i, 255 - i))


def _solarize_add(levels: jax.Array, addition: jax.Array) -> jax.Array:
    return _point(levels, lambda i: jnp.where(i < 128, jnp.minimum(i + addition.astype(jnp.int32), 255), i))


def _contrast(levels: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean grey of the image."""
    grey = _grey(levels)[..., 0]
    mean = (2 * jnp.sum(grey) + grey.size) // (2 * grey.size)  # the nearest level, halves go up
    return _point(levels, lambda i: _blend(mean, i, factor))


def _point(levels: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return jnp.broadcast_to(function(jnp.arange(256))[:, None], (256, levels.shape[-1]))


def _look_up(table: jax.Array, levels: jax.Array) -> jax.Array:
    table = table.astype(jnp.int32)
    return jax.lax.platform_dependent(table, levels, tpu=_look_up_by_product, default=_look_up_by_index)


def _look_up_by_index(table: jax.Array, levels: jax.Array) -> jax.Array:
    # Written out before: XLA would work an entry out anew for every pixel that wants it.
    table = jnp.zeros_like(table).at[jnp.arange(256)].set(table, mode="promise_in_bounds", unique_indices=True)
    return table.reshape(-1).at[_flat(levels)].get(mode="promise_in_bounds")


def _look_up_by_product(table: jax.Array, levels: jax.Array) -> jax.Array:
    # TPUs gather single numbers slowly and multiply fast; bfloat16 holds every level.
    one_hot = jax.nn.one_hot(levels, 256, dtype=jnp.bfloat16)
    return jnp.einsum("hwcl,lc->hwc", one_hot, table.astype(jnp.bfloat16)).astype(jnp.int32)


def _flat(levels: jax.Array) -> jax.Array:
    """Where each value's entry is in a flat table: one number an index is what XLA is quick with."""
    channels = levels.shape[-1]
    return levels * channels + jnp.arange(channels)[None, None]


def _grey(levels: jax.Array) -> jax.Array:
    """ITU-R 601-2 luma in every channel, in Pillow's fixed point."""
    if levels.shape[-1] == 1:
        return levels
    luma = (levels @ jnp.array([19595, 38470, 7471]) + 0x8000) >> 16
    return jnp.broadcast_to(luma[..., None], levels.shape)


def _smooth(levels: jax.Array) -> jax.Array:
    """The mean of each pixel, which counts five times, and its eight neighbours; the rim stays as it is."""
    height, width, _ = levels.shape
    if min(height, width) < 3:
        return levels
    across = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    total = across[:-2] + across[1:-1] + across[2:] + 4 * levels[1:-1, 1:-1]
    return levels.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def _blend(other: jax.Array | int, levels: jax.Array, factor: jax.Array) -> jax.Array:
    """`other + factor * (levels - other)`, rounded down and clipped to 0 .. 255."""
    # Pillow rounds the product to float32 before the sum; a floor of it alone can't be fused into one step.
    along = jnp.floor(factor * (levels - other).astype(jnp.float32)).astype(jnp.int32)
    return jnp.clip(other + along, 0, 255)


def _rotate(degrees: jax.Array, height: int, width: int) -> jax.Array:
    cos, sin = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    x, y = width / 2, height / 2
    return jnp.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _warp(levels: jax.Array, matrix: jax.Array, cubic: jax.Array, fill: int | Sequence[int]) -> jax.Array:
    """Resamples the image at the coordinates that the matrix gives, rounded down; Pillow's cubic has a = -1 here."""
    height, width, channels = levels.shape
    x_W, y_H = (jnp.arange(n, dtype=jnp.float32) + 0.5 for n in (width, height))
    (xx, xy, x0), (yx, yy, y0) = matrix
    x_HxW = xx * x_W[None, :] + xy * y_H[:, None] + x0
    y_HxW = yx * x_W[None, :] + yy * y_H[:, None] + y0
    inside = (x_HxW >= 0) & (x_HxW < width) & (y_HxW >= 0) & (y_HxW < height)

    left, up = jnp.floor(x_HxW - 0.5), jnp.floor(y_HxW - 0.5)
    dx, dy = (x_HxW - 0.5 - left)[..., None], (y_HxW - 0.5 - up)[..., None]
    flat = levels.reshape(height * width, channels).astype(jnp.float32)

    def pixels(row: int, column: int) -> jax.Array:
        y = jnp.clip(up.astype(jnp.int32) + row, 0, height - 1)
        x = jnp.clip(left.astype(jnp.int32) + column, 0, width - 1)
        return flat.at[y * width + x].get(mode="promise_in_bounds")

    rows = [_interpolate([pixels(row, column) for column in (-1, 0, 1, 2)], dx, cubic) for row in (-1, 0, 1, 2)]
    values = jnp.clip(jnp.floor(_interpolate(rows, dy, cubic)), 0, 255).astype(jnp.int32)
    return jnp.where(inside[..., None], values, jnp.broadcast_to(jnp.array(fill, jnp.int32), levels.shape))


def _interpolate(values: Sequence[jax.Array], d: jax.Array, cubic: jax.Array) -> jax.Array:
    """Between the second and third of four values: a polynomial in d, exact where all are the same."""
    a, b, c, e = values
    return b + d * jnp.where(cubic, c - a + d * (2 * (a - b) + c - e + d * (b - a + e - c)), c - b)


# Tables int32 [256, C], of the image's levels and an argument.
TABLES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda levels, _: _point(levels, lambda i: 255 - i),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Contrast": _contrast,
    "Brightness": lambda levels, factor: _point(levels, lambda i: _blend(0, i, factor)),  # with black
}
# What the image is blended with.
BLENDS: dict[str, Callable[[jax.Array], jax.Array]] = {"Color": _grey, "Sharpness": _smooth}
# Where each pixel comes from, float32 [2, 3] on (x, y, 1), of an argument, the height and the width.
WARPS: dict[str, Callable[[jax.Array, int, int], jax.Array]] = {
    "Rotate": _rotate,
    "ShearX": lambda share, height, width: jnp.eye(2, 3).at[0, 1].set(share),
    "ShearY": lambda share, height, width: jnp.eye(2, 3).at[1, 0].set(share),
    "TranslateXRel": lambda share, height, width: jnp.eye(2, 3).at[0, 2].set(share * width),
    "TranslateYRel": lambda share, height, width: jnp.eye(2, 3).at[1, 2].set(share * height),
}
OPERATIONS = (*TABLES, *BLENDS, *WARPS)
WITHOUT_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
