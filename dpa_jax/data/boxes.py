"""Random boxes in an image, for crops and for erasing, of NumPy or of JAX arrays.

Nothing here imports JAX, so that the loader's worker processes need not.
"""

from __future__ import annotations

from typing import Any

BOX_DRAWS = 22


def box_from_draws(draws: Any, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Any:
    """The box of a random resized crop: up to ten tries, then the largest central box within the ratios.

    As torchvision and timm draw it. The draws are float32 [22], uniform in [0, 1), NumPy's or JAX's, as the result is:
    int32 [4], top, left, height and width in pixels. `scale` is the least and greatest area, as a fraction of the
    image's, and `ratio` the least and greatest width divided by height, drawn uniformly in its logarithm.
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
    """The first of ten random boxes that is no larger than it may be: whether there is one, its height and its width.

    As `box_from_draws`, but of its first 20 draws; `area` is the image's.
    """
    xp = draws.__array_namespace__()
    areas = area * (scale[0] + (scale[1] - scale[0]) * draws[:10])
    aspects = ratio[0] * (ratio[1] / ratio[0]) ** draws[10:]
    widths = xp.round(xp.sqrt(areas * aspects)).astype(xp.int32)
    heights = xp.round(xp.sqrt(areas / aspects)).astype(xp.int32)
    fits = (widths > 0) & (widths <= max_width) & (heights > 0) & (heights <= max_height)
    first = xp.argmax(fits)
    return fits[first], heights[first], widths[first]
