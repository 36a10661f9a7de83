import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpa_jax.data import augment
from dpa_jax.data.augment import OPERATIONS, Policy, operations, policy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", Policy(magnitude=9, std=0.5, increasing=True)),
        ("rand", Policy(magnitude=10, std=0, max_magnitude=10, layers=2, p=0.5, increasing=False)),
        ("rand-n3-m7", Policy(magnitude=7, layers=3)),
        ("rand-m15-mmax30-mstd1-n1-p1-inc0", Policy(magnitude=15, std=1, max_magnitude=30, layers=1, p=1)),
        ("rand-m9-mstd101", Policy(magnitude=9, std=math.inf)),
        ("rand-m9-mstdinf", Policy(magnitude=9, std=math.inf)),
    ],
)
def test_timms_grammar_is_read(text, expected):
    assert augment.parse_policy(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m9",
        "augmix-m3",
        "rand-",
        "rand-m",
        "rand-m9.5",
        "rand-x3",
        "rand-m9-m8",
        "rand-tweights",
        "rand-p2",
        "rand-inc2",
        "rand-m101",
        "rand-n1000000000",
        "rand-n" + 400 * "9",
        "rand-m-1",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"is no RandAugment policy; one is rand-m9-mstd0\.5-inc1"):
        augment.parse_policy(text)


def test_arguments_follow_from_magnitudes_as_recorded(golden):
    recorded = golden("augment")
    arguments = json.loads(str(recorded["args"]))
    for level, magnitude in enumerate(recorded["levels"]):
        for name, sign in (("pos", 1.0), ("neg", -1.0)):
            ours = np.asarray(policy.arguments_of(jnp.float32(magnitude), jnp.float32(sign), increasing=True))
            for operation, argument in zip(OPERATIONS, ours, strict=True):
                entry = f"{operation}/{name}/{level}"
                given = arguments.get(entry, arguments.get(entry.replace("/", "Increasing/", 1)))
                np.testing.assert_allclose(argument, given or 0, rtol=3e-6, atol=1e-6)


def test_without_increasing_strength_the_arguments_are_timms_older_ones():
    at = {m: dict(zip(OPERATIONS, policy.arguments_of(m, 1.0, False).tolist(), strict=True)) for m in (0.0, 5.0, 10.0)}
    for name, expected in {
        "Posterize": (0, 2, 4),
        "Solarize": (0, 128, 256),
        "Color": (0.1, 1.0, 1.9),
        "Sharpness": (0.1, 1.0, 1.9),
        "Rotate": (0, 15, 30),
    }.items():
        np.testing.assert_allclose([at[m][name] for m in at], expected, rtol=1e-6)


def test_magnitudes_are_distributed_as_the_policy_says():
    def drawn(text):
        one = jax.jit(jax.vmap(lambda key: policy._magnitudes(key, augment.parse_policy(text))))
        return np.asarray(one(jax.random.split(jax.random.key(0), 10_000))).ravel()

    normal = drawn("rand-m9-mstd0.5")
    assert normal.min() >= 0 and normal.max() == 10
    assert abs((normal == 10).mean() - 0.0228) < 0.005  # two standard deviations up
    assert abs(np.median(normal) - 9) < 0.02 and abs(np.quantile(normal, 0.1587) - 8.5) < 0.03
    assert (drawn("rand-m7") == 7).all() and (drawn("rand-m12") == 10).all() and (drawn("rand-m12-mmax30") == 12).all()
    uniform = drawn("rand-m8-mstd101")
    np.testing.assert_allclose(np.quantile(uniform, [0, 0.25, 0.5, 0.75, 1]), [0, 2, 4, 6, 8], atol=0.12)


def test_operations_signs_and_interpolations_are_equally_frequent():
    """Told by what they do to one image at a fixed magnitude; Posterize, Solarize and the like have one outcome."""
    image = np.random.default_rng(0).integers(20, 220, (18, 18, 3), np.uint8)
    fill, draws = (5, 6, 7), 6000
    share = {}  # outcome: the probability of it
    for sign in (-1.0, 1.0):
        for place, name in enumerate(OPERATIONS):
            argument = policy.arguments_of(7.0, sign, increasing=True)[place]
            argument = None if name in operations.WITHOUT_ARGUMENT else argument
            for resample in ("bilinear", "bicubic"):
                one = tuple(np.asarray(augment.apply_op(name, image, argument, resample, fill)).ravel().tolist())
                share[one] = share.get(one, 0) + 1 / len(OPERATIONS) / 4
    assert len(share) == 6 + 4 * 2 + 5 * 4  # all are told apart
    known_KxP = np.array(list(share))

    def counted(text, interpolation="random"):
        """How often each known outcome came, within a level of rounding."""
        run = jax.vmap(lambda key: augment.rand_augment(key, image, text, fill, interpolation))
        drawn = np.asarray(jax.jit(run)(jax.random.split(jax.random.key(1), draws))).reshape(draws, -1)
        outcomes_NxP, counts = np.unique(drawn.astype(int), axis=0, return_counts=True)
        is_known = (np.abs(outcomes_NxP[:, None] - known_KxP[None]) <= 1).all(-1)
        assert (is_known.sum(1) <= 1).all()
        return counts @ is_known, counts[~is_known.any(1)]

    always, other = counted("rand-m7-n1-p1-inc1")
    expected = draws * np.array(list(share.values()))
    assert not len(other)
    chi2 = np.sum((always - expected) ** 2 / expected)
    assert chi2 < 65  # 33 degrees of freedom: one seed in a thousand is over it

    sometimes, (never,) = counted("rand-m7-n1-inc1")
    assert abs(never / draws - 0.5) < 0.025 and (sometimes > 0).all()
    cubic, other = counted("rand-m7-n1-p1-inc1", "bicubic")
    assert (cubic > 0).sum() == 6 + 4 * 2 + 5 * 2 and not len(other)


def test_layers_come_one_after_the_other():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), 300)

    def changed(text):
        run = jax.jit(jax.vmap(lambda key: augment.rand_augment(key, image, text)))
        return (np.asarray(run(keys)) != image).any(axis=(1, 2, 3)).mean()

    assert changed("rand-m7-n0") == 0 and changed("rand-m7-p0") == 0
    # Each layer leaves the image alone with p 0.5; very few operations do so by themselves at this magnitude.
    assert abs(changed("rand-m7-inc1") - 0.75) < 0.08 and abs(changed("rand-m7-n4-inc1") - 15 / 16) < 0.05


def test_jit_and_vmap_change_nothing():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    keys = jax.random.split(jax.random.key(5), 3)
    together = np.asarray(jax.jit(jax.vmap(augment.rand_augment))(keys, images)).astype(int)
    for key, image, ours in zip(keys, images, together, strict=True):
        assert np.abs(augment.rand_augment(key, image) - ours).max() <= 1


def test_what_is_not_allowed_is_named():
    image, key = np.zeros((4, 4, 3), np.uint8), jax.random.key(0)
    with pytest.raises(ValueError, match="is no RandAugment policy"):
        augment.rand_augment(key, image, "rand-z1")
    with pytest.raises(ValueError, match="bicubic"):
        augment.rand_augment(key, image, interpolation="nearest")
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 1 or 3\], not uint8 \[4, 4, 2\]"):
        augment.rand_augment(key, image[..., :2])


def test_where_jax_has_64_bits_an_image_stays_one():
    image = jax.ShapeDtypeStruct((8, 8, 3), jnp.uint8)
    with jax.enable_x64(True):
        made = jax.eval_shape(augment.rand_augment, jax.eval_shape(lambda: jax.random.key(0)), image)
    assert (made.shape, made.dtype) == (image.shape, image.dtype)
