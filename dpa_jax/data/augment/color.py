"""Colour jitter as torchvision draws it and Pillow computes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpa_jax.data.augment.operations import apply_op, check_image


def color_jitter(
    key: jax.Array,
    image: jax.Array,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue by random amounts, in random order.

    An amount x of brightness, contrast or saturation gives a factor that is uniform in max(0, 1 - x) .. 1 + x; one of
    hue, at most 0.5, a turn that is uniform in -x .. x of the whole circle. 0 leaves it as it is. The image is uint8
    [H, W, C] with C 1 or 3, for hue 3. ValueError for other amounts and images.
    """
    check_image(image)
    amounts = {"Brightness": brightness, "Contrast": contrast, "Color": saturation, "hue": hue}
    if min(amounts.values()) < 0 or hue > 0.5 or (hue and image.shape[-1] != 3):
        raise ValueError(
            f"color_jitter: amounts must be at least 0, hue at most 0.5 and of a colour image; got {amounts} for "
            f"an image {list(image.shape)}"
        )
    amounts = {name: amount for name, amount in amounts.items() if amount}
    if not amounts:
        return image
    order_key, *keys = jax.random.split(key, 1 + len(amounts))
    drawn = dict(zip(amounts, keys, strict=True))

    def adjusted(name: str, image: jax.Array) -> jax.Array:
        amount = amounts[name]
        if name == "hue":
            return adjust_hue(image, jax.random.uniform(drawn[name], minval=-amount, maxval=amount))
        factor = jax.random.uniform(drawn[name], minval=max(0.0, 1 - amount), maxval=1 + amount)
        return apply_op(name, image, factor)

    def one(image: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.select_n(place, *(adjusted(name, image) for name in amounts)), None

    return jax.lax.scan(one, image, jax.random.permutation(order_key, len(amounts)))[0]


def adjust_hue(image: jax.Array, turn: jax.Array) -> jax.Array:
    """Turns the hues of an image uint8 [H, W, 3] by a share of the circle, in -0.5 .. 0.5, through Pillow's HSV."""
    levels = jnp.asarray(image, jnp.int32)
    red, green, blue = jnp.moveaxis(levels, -1, 0)
    value = jnp.max(levels, axis=-1)
    span = value - jnp.min(levels, axis=-1)
    saturation = span * 255 // jnp.maximum(value, 1)
    # In units of a sixth of the circle times the span, which are whole numbers.
    sixths = jnp.select([value == red, value == green], [green - blue, 2 * span + blue - red], 4 * span + red - green)
    circle = 6 * jnp.maximum(span, 1)
    hue = jnp.where(span > 0, (sixths % circle) * 255 // circle, 0)

    sector, within = jnp.divmod((hue + (turn * 255).astype(jnp.int32)) % 256 * 6, 255)

    def less(share_of_65025: jax.Array) -> jax.Array:
        """The value times 1 - saturation * share, the nearest level; halves go up."""
        return (2 * value * (65025 - share_of_65025) + 65025) // (2 * 65025)

    low = less(saturation * 255)
    falling, rising = less(saturation * within), less(saturation * (255 - within))
    channels = [
        (value, falling, low, low, rising, value),
        (rising, value, value, falling, low, low),
        (low, low, rising, value, value, falling),
    ]
    return jnp.stack([jax.lax.select_n(sector % 6, *levels) for levels in channels], axis=-1).astype(jnp.uint8)
