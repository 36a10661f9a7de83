"""Random erasing (Zhong et al., 2020), as timm draws it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpa_jax.data.boxes import BOX_DRAWS, first_fit


def random_erasing(
    key: jax.Array,
    image: jax.Array,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> jax.Array:
    """Fills a random rectangle with noise, a standard normal draw for every value (timm's mode `pixel`, count 1).

    Args:
      key: a typed key.
      image: float [H, W, C], normalised.
      p: the probability that anything is erased; nothing is, too, where none of ten rectangles fits.
      scale: least and greatest area, as a fraction of the image's.
      ratio: least and greatest width divided by height; drawn uniformly in its logarithm.

    Returns:
      [H, W, C] of the image's dtype.
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
