"""RandAugment (Cubuk et al., 2020) as timm defines it, from a string like `rand-m9-mstd0.5-inc1`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dpa_jax.checks import check_choice
from dpa_jax.data.augment.operations import OPERATIONS, apply, check_image

# The top of timm's scale of magnitudes; with a greater `mmax` some operations exceed it.
MAX_LEVEL = 10.0
_CHANCE_OF_BICUBIC = {"bilinear": 0.0, "bicubic": 1.0, "random": 0.5}
# mstd may be anything.
_HIGHEST = {"m": 100, "n": 100, "mmax": 100, "inc": 1, "p": 1}
# A name and a number, which is whole for some of the names.
_SECTION = re.compile(r"((?:m|n|mmax|inc)(?!.*\.)|mstd|p)(\d+(?:\.\d+)?|(?<=mstd)inf)")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a RandAugment string says."""

    magnitude: float = MAX_LEVEL  # m, the mean of an operation's magnitude
    std: float = 0.0  # mstd, its standard deviation; infinite (over 100 in the string): uniform from 0 to `magnitude`
    max_magnitude: float = MAX_LEVEL  # mmax, what it is clipped to; from below by 0
    layers: int = 2  # n, operations an image, drawn with replacement
    p: float = 0.5  # the probability that each of them is applied
    increasing: bool = False  # inc, whether Posterize, Solarize and the blends get stronger with the magnitude


def parse_policy(text: str) -> Policy:
    """Reads timm's grammar: `rand`, then `mM`, `mstdS`, `mmaxX`, `nN`, `pP`, `incI` in any order, all optional.

    Anything else raises ValueError, also timm's weighted choice of operations, `t`, and numbers over 100.
    """
    head, *sections = text.split("-")
    values = {match[1]: float(match[2]) for match in map(_SECTION.fullmatch, sections) if match}
    too_high = any(value > _HIGHEST.get(name, value) for name, value in values.items())
    if head != "rand" or len(values) < len(sections) or too_high:
        raise ValueError(
            f"rand_augment: {text!r} is no RandAugment policy; one is rand-m9-mstd0.5-inc1: 'rand', and any of mM, nN, "
            "mmaxX, inc0 or inc1 (whole numbers, up to 100), mstdS and pP (a probability), each once"
        )
    return Policy(
        magnitude=values.get("m", MAX_LEVEL),
        std=math.inf if values.get("mstd", 0.0) > 100 else values.get("mstd", 0.0),
        max_magnitude=values.get("mmax", 0.0) or MAX_LEVEL,
        layers=int(values.get("n", 2)),
        p=values.get("p", 0.5),
        increasing=bool(values.get("inc", 0)),
    )


def rand_augment(
    key: jax.Array,
    image: jax.Array,
    policy: str | Policy = "rand-m9-mstd0.5-inc1",
    fill: int | Sequence[int] = 128,
    interpolation: str = "random",
) -> jax.Array:
    """Applies operations drawn at random, each with a random magnitude and sign.

    The policy is timm's string, or what `parse_policy` makes of it. The image is uint8 [H, W, C] with C 1 or 3. `fill`
    is the level, or the C levels, of what comes from outside the image; timm takes the data's mean. For operations that
    move pixels `interpolation` is "bilinear", "bicubic", or "random" for one of the two with equal chances each time.
    ValueError where one of these is something else.
    """
    if isinstance(policy, str):
        policy = parse_policy(policy)
    check_choice("rand_augment", "interpolation", interpolation, _CHANCE_OF_BICUBIC)
    check_image(image, fill)
    if not policy.layers:
        return image
    # One draw for everything: random bits are most of what this costs to compile.
    kinds_key, strengths_key = jax.random.split(key)
    draws_Lx4 = jax.random.uniform(kinds_key, (policy.layers, 4))
    op_L = jnp.floor(draws_Lx4[:, 0] * len(OPERATIONS)).astype(jnp.int32)
    op_L = jnp.where(draws_Lx4[:, 1] < policy.p, op_L, len(OPERATIONS))
    sign_L = jnp.where(draws_Lx4[:, 2] < 0.5, -1.0, 1.0)
    cubic_L = draws_Lx4[:, 3] < _CHANCE_OF_BICUBIC[interpolation]
    magnitude_L = _magnitudes(strengths_key, policy)

    def layer(image: jax.Array, draws: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        op, sign, cubic, magnitude = draws
        return apply(op, image, arguments_of(magnitude, sign, policy.increasing), cubic, fill), None

    return jax.lax.scan(layer, image, (op_L, sign_L, cubic_L, magnitude_L))[0]


def _magnitudes(key: jax.Array, policy: Policy) -> jax.Array:
    """One for each layer: float32 [layers]."""
    shape = (policy.layers,)
    if policy.std == math.inf:
        magnitudes = jax.random.uniform(key, shape, maxval=policy.magnitude)
    else:
        magnitudes = policy.magnitude + policy.std * jax.random.normal(key, shape)
    return jnp.clip(magnitudes, 0.0, policy.max_magnitude)


def arguments_of(magnitude: jax.Array, sign: jax.Array, increasing: bool) -> jax.Array:
    """What each operation takes at a magnitude: float32 [len(OPERATIONS)], 0 where an operation takes nothing.

    The sign, -1 or 1, is which way an operation goes that has two ways; `increasing` is as in `Policy`.
    """
    share = magnitude / MAX_LEVEL
    factor = jnp.maximum(0.1, 1 + sign * share * 0.9) if increasing else share * 1.8 + 0.1
    bits, threshold = jnp.floor(share * 4), jnp.minimum(jnp.floor(share * 256), 256)
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
    taken: dict[str, jax.Array] = {
        "Posterize": bits,
        "Solarize": threshold,
        "SolarizeAdd": jnp.minimum(jnp.floor(share * 110), 128),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
        "Rotate": sign * share * 30,
        **dict.fromkeys(("ShearX", "ShearY"), sign * share * 0.3),
        **dict.fromkeys(("TranslateXRel", "TranslateYRel"), sign * share * 0.45),
    }
    return jnp.stack([taken.get(name, jnp.zeros(())) for name in OPERATIONS])
