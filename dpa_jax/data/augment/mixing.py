"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), one draw a batch, as timm's default is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dpa_jax.data.batch import Mixed


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, mixup: float = 0.0, cutmix: float = 0.0, switch: float = 0.5
) -> Mixed:
    """Mixes each image float [B, H, W, C] with its neighbour: image 2j with 2j + 1.

    Neighbours are on the same device where each has an even share of the batch, so that no image is sent anywhere. The
    last of an odd batch has no neighbour and stays as it is.

    Mixup adds the two, weighed by a draw from Beta(mixup, mixup). CutMix puts a box of the other in, whose share of the
    area is a draw from Beta(cutmix, cutmix) until the rim of the image clips it. An alpha of 0 turns either off; with
    both on, `switch` is the probability that a batch gets CutMix. Labels are int32 [B]. ValueError where both are off,
    or an alpha is negative.
    """
    if min(mixup, cutmix) < 0 or max(mixup, cutmix) == 0:
        raise ValueError(f"mix: alphas must be at least 0 and not both 0; got mixup {mixup}, cutmix {cutmix}")
    switch_key, share_key, box_key = jax.random.split(key, 3)
    cut = jax.random.bernoulli(switch_key, switch if mixup and cutmix else float(cutmix > 0))
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(share_key, alpha, alpha)

    own_HxW = jnp.where(cut, _outside_of_a_box(box_key, 1 - share, *images.shape[1:3]), share)
    own = own_HxW.astype(images.dtype)[None, :, :, None]
    weight = jnp.mean(own_HxW)
    more, others = weight >= 0.5, _neighbours(labels)
    return Mixed(
        inputs=own * images + (1 - own) * _neighbours(images),
        labels=jnp.where(more, labels, others),
        others=jnp.where(more, others, labels),
        weight=jnp.maximum(weight, 1 - weight),
    )


def _neighbours(rows: jax.Array) -> jax.Array:
    """Rows 1, 0, 3, 2, ... of [B, ...]."""
    even = len(rows) // 2 * 2
    swapped = rows[:even].reshape(even // 2, 2, *rows.shape[1:])[:, ::-1].reshape(even, *rows.shape[1:])
    return swapped if even == len(rows) else jnp.concatenate([swapped, rows[even:]])


def _outside_of_a_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Float32 [H, W], 0 in a box of such a share of the area with its middle anywhere, and 1 around it."""
    draws = jax.random.uniform(key, (2,))
    away = jnp.zeros((height, width), bool)
    for axis, (length, draw) in enumerate(zip((height, width), draws, strict=True)):
        extent = jnp.floor(length * jnp.sqrt(share)).astype(jnp.int32)
        middle = jnp.floor(draw * length).astype(jnp.int32)
        place = jax.lax.broadcasted_iota(jnp.int32, (height, width), axis)
        away |= (place < middle - extent // 2) | (place >= middle + (extent + 1) // 2)
    return away.astype(jnp.float32)
