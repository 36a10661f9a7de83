import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from dpa_jax.data import augment
from dpa_jax.data.augment import operations

FILL = (129, 124, 112)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


compiled = jax.jit(augment.apply_op, static_argnums=(0, 3, 4))


def images(*shape, seed=0) -> np.ndarray:
    """Smooth images with noise, narrow in contrast, with some black and white."""
    random = np.random.default_rng(seed)
    waves = 127 + 60 * np.sin(np.cumsum(random.normal(0, 0.4, shape), axis=-2))
    waves += random.normal(0, 20, shape) * (random.random(shape) < 0.5)
    return np.clip(waves, 0, 255).astype(np.uint8)


@pytest.mark.core
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_operations_equal_the_recorded_ones(golden, name):
    recorded = golden("augment")
    arguments = json.loads(str(recorded["args"]))
    assert tuple(recorded["fill"]) == FILL
    entries = [entry for entry in recorded if entry.split("/")[0].removesuffix("Increasing") == name]
    assert len(entries) == (4 if name in operations.WARPS else 2)

    def run(image, argument, resample):
        return augment.apply_op(name, image, argument, resample, FILL)

    run = jax.jit(jax.vmap(run, in_axes=(0, None, None)), static_argnums=2)
    for entry in entries:
        long_name, sign, resample = [*entry.split("/"), "bilinear"][:3]
        given = [arguments[f"{long_name}/{sign}/{level}"] for level in range(6)]
        ours = (
            [run(recorded["images"], *map(np.float32, argument or [None]), resample) for argument in given]
            if given[0]
            else [run(recorded["images"], None, resample)] * 6
        )
        off = np.abs(np.stack(ours).astype(int) - recorded[entry])
        if name in operations.WARPS:
            # Pillow works coordinates and weights out in float64 and rounds down: at whole numbers rounding decides.
            assert off.max() <= 1 and (off > 0).mean() < 0.005
        else:
            assert off.max() == 0


def test_auto_contrast_tables_are_pillows_for_every_range():
    low, high = np.triu_indices(256, 1)
    pixels = np.stack([low, high], 1)[:, :, None, None]
    tables = jax.jit(jax.vmap(lambda levels: operations._auto_contrast(levels, None)))(pixels)[..., 0]
    scale = 255.0 / (high - low)
    expected = np.arange(256) * scale[:, None] - (low * scale)[:, None]  # float64, as in Pillow's source
    np.testing.assert_array_equal(tables, np.clip(expected.astype(int), 0, 255))


@pytest.mark.parametrize(
    "image",
    [
        images(40, 23, 3),
        images(3, 3, 3),
        np.full((8, 9, 3), 77, np.uint8),
        (np.arange(12 * 12 * 3).reshape(12, 12, 3) % 2 * 200).astype(np.uint8),  # two levels
        images(30, 30, 1),
    ],
    ids=["wide", "tiny", "one level", "two levels", "grey"],
)
def test_point_operations_and_blends_equal_pillows(image):
    grey = image.shape[-1] == 1
    pillow = Image.fromarray(image[..., 0] if grey else image)

    def add(i: int) -> int:
        return min(255, i + 60) if i < 128 else i

    cases = [
        ("AutoContrast", None, ImageOps.autocontrast(pillow)),
        ("Equalize", None, ImageOps.equalize(pillow)),
        ("Invert", None, ImageOps.invert(pillow)),
        *(("Posterize", bits, ImageOps.posterize(pillow, bits)) for bits in (1, 3, 8)),
        *(("Solarize", level, ImageOps.solarize(pillow, level)) for level in (0, 100, 256)),
        ("SolarizeAdd", 60, pillow.point([add(i) for i in range(256)] * (1 if grey else 3))),
    ]
    for factor in (0.0, 0.1, 0.73, 1.0, 1.27, 1.9, 3.3):
        for name in ("Color", "Contrast", "Brightness", "Sharpness"):
            cases.append((name, factor, getattr(ImageEnhance, name)(pillow).enhance(factor)))
    for name, argument, expected in cases:
        ours = np.asarray(compiled(name, image, argument, "bilinear", FILL[: image.shape[-1]]))
        theirs = np.asarray(expected).reshape(image.shape)
        off = np.abs(ours.astype(int) - theirs)
        assert off.max() <= 1 and (off > 0).mean() <= 1e-3, (name, argument)


@pytest.mark.parametrize("resample", PILLOW)
@pytest.mark.parametrize("shape", [(40, 23, 3), (17, 30, 1), (1, 1, 3)], ids=str)
def test_warps_equal_pillows(shape, resample):
    image, fill = images(*shape), FILL[: shape[-1]]
    pillow = Image.fromarray(image[..., 0] if shape[-1] == 1 else image)
    color = fill[0] if shape[-1] == 1 else fill
    height, width, _ = shape

    def affine(*data):
        return pillow.transform(pillow.size, Image.Transform.AFFINE, data, resample=PILLOW[resample], fillcolor=color)

    cases = [("Rotate", d, pillow.rotate(d, PILLOW[resample], fillcolor=color)) for d in (-30.0, 0.0, 3.3, 29.1, 170.0)]
    for share in (-0.3, 0.0, 0.123, 0.5, 1.5):
        cases += [
            ("ShearX", share, affine(1, share, 0, 0, 1, 0)),
            ("ShearY", share, affine(1, 0, 0, share, 1, 0)),
            ("TranslateXRel", share, affine(1, 0, share * width, 0, 1, 0)),
            ("TranslateYRel", share, affine(1, 0, 0, 0, 1, share * height)),
        ]
    differing = []
    for name, argument, expected in cases:
        ours = np.asarray(compiled(name, image, argument, resample, fill)).astype(int)
        off = np.abs(ours - np.asarray(expected).reshape(shape))
        assert (off > 2).mean() <= 0.01, (name, argument)
        differing.append((off > 0).mean())
    assert np.mean(differing) < 0.005


def test_posterizing_to_no_bits_is_black():
    image = images(5, 6, 3)
    assert not np.asarray(augment.apply_op("PosterizeIncreasing", image, 0)).any()
    assert np.array_equal(augment.apply_op("Posterize", image, 8), image)


def test_an_operation_chosen_at_run_time_is_the_same():
    image = images(11, 14, 3)
    arguments = dict.fromkeys(augment.OPERATIONS, 0.2)
    arguments |= {"Posterize": 3, "Solarize": 90, "SolarizeAdd": 40, "Rotate": -20, "Sharpness": 1.7}
    given = jnp.array(list(arguments.values()), jnp.float32)
    places = jnp.arange(len(arguments) + 1)
    for resample in PILLOW:
        cubic = jnp.asarray(resample == "bicubic")
        chosen = jax.jit(jax.vmap(lambda op, cubic=cubic: operations.apply(op, image, given, cubic, FILL)))(places)
        for name, ours in zip(arguments, chosen, strict=False):
            argument = None if name in operations.WITHOUT_ARGUMENT else arguments[name]
            alone = np.asarray(augment.apply_op(name, image, argument, resample, FILL)).astype(int)
            # Another program may round coordinates another way: one level, at whole numbers.
            limit = 1e-2 if name in operations.WARPS else 0
            assert (alone != ours).mean() <= limit and np.abs(alone - ours).max() <= 1, name
        assert np.array_equal(chosen[-1], image)


def test_what_is_not_allowed_is_named():
    image = images(4, 5, 3)
    for arguments, message in [
        (("Rotat", image, 3.0), "Rotate"),
        (("Rotate", image, 3.0, "nearest"), "bilinear"),
        (("Rotate", image), "Rotate takes an argument"),
        (("Invert", image.astype(np.float32)), r"uint8 \[H, W, 1 or 3\], not float32 \[4, 5, 3\]"),
        (("Invert", image[None]), r"not uint8 \[1, 4, 5, 3\]"),
        (("Rotate", image, 3.0, "bilinear", (1, 2)), r"one for each of the 3 channels, not \(1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            augment.apply_op(*arguments)


def test_both_ways_to_look_up_are_the_same():
    table = np.random.default_rng(0).permuted(np.tile(np.arange(256), (3, 1)), axis=1).T
    levels = images(9, 30, 3).astype(np.int32)
    expected = np.stack([table[levels[..., c], c] for c in range(3)], -1)
    for look_up in (operations._look_up_by_index, operations._look_up_by_product):
        np.testing.assert_array_equal(jax.jit(look_up)(table, levels), expected)
