import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from dpa_jax.config import default_config
from dpa_jax.data import augment
from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds import make_feed
from dpa_jax.data.images import image_spec
from dpa_jax.data.sources import Source
from dpa_jax.data.splits import ArraySplit

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def config(**changes):
    part = default_config().augment
    part.update(changes)
    return part


RECIPES = {
    "pad": config(crop="pad", flip=0.5),
    "resized": config(crop="resized", image_size=12, flip=0.5),
    "none": config(image_size=12),
    "whole": config(
        crop="resized",
        image_size=12,
        flip=0.5,
        rand_augment="rand-m9-mstd0.5-inc1",
        color_jitter=(0.4, 0.4, 0.4, 0.1),
        erase=0.25,
    ),
}


def images(*shape, seed=0) -> np.ndarray:
    """Smooth images with noise, and full black and white, where a cubic kernel overshoots."""
    random = np.random.default_rng(seed)
    waves = 127 + 200 * np.sin(np.cumsum(random.normal(0, 0.4, shape), axis=-2))
    return np.clip(waves + random.normal(0, 20, shape), 0, 255).astype(np.uint8)


def batch(examples=6, size=16, seed=0) -> Batch:
    random = np.random.default_rng(seed)
    return Batch(
        inputs=jnp.asarray(images(examples, size, size, 3)),
        labels=jnp.zeros(examples, jnp.int32),
        index=jnp.asarray(random.permutation(1000)[:examples], jnp.int32),
        epoch=jnp.asarray(random.integers(0, 2, examples), jnp.int32),
    )


def rows(one: Batch, which) -> Batch:
    return jax.tree.map(lambda leaf: leaf[np.asarray(which)], one)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_resized_crops_equal_the_recorded_ones(golden, method):
    recorded = golden("augment")
    boxes = jnp.asarray(recorded["crop_boxes_top_left_height_width"], jnp.int32)
    crop = functools.partial(augment.resized_crop, size=32, method=method)
    every_box_of_every_image = jax.jit(jax.vmap(jax.vmap(crop, in_axes=(0, None)), in_axes=(None, 0)))
    ours = np.asarray(every_box_of_every_image(recorded["images"], boxes)).astype(int)
    off = np.abs(ours - recorded[f"resized_crop/{method}"])
    assert off.max() <= 1 and (off > 0).mean() < 1e-4


@pytest.mark.core
def test_the_evaluation_transform_equals_the_recorded_one(golden):
    recorded = golden("augment")
    transform = augment.eval_transform(config(image_size=32, eval_resize=36), MEAN, STD)
    values = np.asarray(jax.jit(transform)(recorded["images"]))
    levels = (values * np.array(STD) + np.array(MEAN)) * 255
    assert np.allclose(levels, np.rint(levels), atol=1e-3)
    np.testing.assert_array_equal(np.rint(levels), recorded["eval_resize36_crop32"])


@pytest.mark.parametrize("method", PILLOW)
@pytest.mark.parametrize("size", [(36, 36), (7, 80), (40, 5), (53, 53), (1, 1)], ids=str)
def test_whole_images_are_resized_as_pillow_does(method, size):
    image = images(40, 53, 3)
    # The rows first in tall images, which Pillow 13 does by itself and the papers' Pillow did not.
    expected = Image.fromarray(image).resize((size[1], 40), PILLOW[method]).resize(size[::-1], PILLOW[method])
    np.testing.assert_array_equal(augment.resize(image, size, method), expected)


def test_evaluation_resizes_the_shorter_side_and_cuts_the_middle_out():
    image = images(20, 31, 3)
    expected = (
        Image.fromarray(image).resize((15 * 31 // 20, 15), PILLOW["bilinear"]).crop((6, 2, 18, 14))
    )  # 5.5 and 1.5, rounded to even
    for recipe, theirs in ((config(image_size=12, eval_resize=15), expected), (config(), image)):
        ours = augment.eval_transform(recipe, MEAN, STD)(image[None])[0]
        np.testing.assert_allclose(ours, augment.normalize(np.asarray(theirs), MEAN, STD), atol=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 29, 61])
def test_crops_of_any_proportion_equal_pillows(method, size):
    random = np.random.default_rng(size)
    image = images(40, 53, 3, seed=size)
    crop = jax.jit(functools.partial(augment.resized_crop, size=size, method=method))
    for _ in range(12):
        # Wide boxes: in narrow ones Pillow 13 takes the rows first, the papers' Pillow always the columns.
        height, width = sorted(random.integers(1, 41, 2))
        top, left = random.integers(0, 41 - height), random.integers(0, 54 - width)
        cut = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(cut.resize((size, size), PILLOW[method])).astype(int)
        ours = np.asarray(crop(image, jnp.array([top, left, height, width]))).astype(int)
        assert np.abs(ours - expected).max() <= 2
        assert (ours != expected).mean() < 0.03  # ties, which fixed point rounds either way


def test_resize_to_its_own_size_is_the_image():
    image = images(9, 9, 3)
    assert np.array_equal(augment.resize(image, 9), image)
    whole = jnp.array([0, 0, 9, 9])
    for method in ("bilinear", "bicubic"):
        assert np.array_equal(augment.resized_crop(image, whole, 9, method), image)


def test_random_boxes_are_drawn_as_published():
    """Against the published algorithm written plainly, in distribution."""
    random = np.random.default_rng(0)
    scale, ratio, height, width = (0.08, 1.0), (3 / 4, 4 / 3), 32, 24

    def plain() -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * random.uniform(*scale)
            aspect = np.exp(random.uniform(*np.log(ratio)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w
        raise AssertionError("ten tries without a box")

    draws = 20_000
    theirs = np.array([plain() for _ in range(draws)], float)
    draw = jax.jit(jax.vmap(lambda draws: augment.box_from_draws(draws, height, width, scale, ratio)))
    ours = np.asarray(draw(jax.random.uniform(jax.random.key(0), (draws, 22)))).astype(float)
    top, left, box_height, box_width = ours.T
    assert (ours >= 0).all() and (box_height > 0).all() and (box_width > 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    products = [(0,), (1,), (2,), (3,), (2, 3), (0, 2), (1, 3), (2, 2), (0, 0)]
    for columns in products:
        one, other = (boxes[:, columns].prod(1) for boxes in (ours, theirs))
        error = np.hypot(one.std(), other.std()) / np.sqrt(draws)
        assert abs(one.mean() - other.mean()) < 4 * error, columns


@pytest.mark.parametrize(("ratio", "expected"), [((8.0, 9.0), [14, 0, 4, 32]), ((1 / 9, 1 / 8), [0, 14, 32, 4])])
def test_without_a_fitting_box_the_largest_central_one_is_taken(ratio, expected):
    box = augment.box_from_draws(np.random.default_rng(0).random(22, np.float32), 32, 32, (0.9, 1.0), ratio)
    assert box.tolist() == expected


def test_random_interpolation_is_one_of_the_two():
    image, full = images(16, 16, 3), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    bilinear, bicubic = (np.asarray(augment.resized_crop(image, jnp.array([0, 0, 16, 16]), 11, m)) for m in PILLOW)
    crop = jax.jit(jax.vmap(lambda key: augment.random_resized_crop(key, image, 11, **full)))
    crops = np.asarray(crop(jax.random.split(jax.random.key(0), 200)))
    is_bilinear = (crops == bilinear).all(axis=(1, 2, 3))
    is_bicubic = (crops == bicubic).all(axis=(1, 2, 3))
    assert (is_bilinear ^ is_bicubic).all()
    assert 70 < is_bilinear.sum() < 130


def test_random_crops_are_all_windows_of_the_padded_image():
    image = images(5, 7, 2) | 1  # nowhere black
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = [padded[top : top + 5, left : left + 7].tobytes() for top in range(5) for left in range(5)]
    crop = jax.jit(jax.vmap(lambda key: augment.random_crop(key, image, 2)))
    crops = np.asarray(crop(jax.random.split(jax.random.key(1), 1000)))
    counts = [sum(one.tobytes() == window for one in crops) for window in windows]
    assert sum(counts) == 1000 and min(counts) > 15 and crops.dtype == np.uint8


def test_flips():
    image = images(4, 6, 3)
    keys = jax.random.split(jax.random.key(2), 400)

    def flipped(p):
        flips = np.asarray(jax.vmap(lambda key: augment.random_flip(key, image, p))(keys))
        mirrored = (flips == image[:, ::-1]).all(axis=(1, 2, 3))
        assert (mirrored | (flips == image).all(axis=(1, 2, 3))).all()
        return mirrored.mean()

    assert flipped(0.0) == 0 and flipped(1.0) == 1 and abs(flipped(0.25) - 0.25) < 0.09


def test_center_crop():
    image = images(6, 9, 1)
    assert np.array_equal(augment.center_crop(image, 4), image[1:5, 2:6])  # 2.5 rounds to the even 2
    with pytest.raises(ValueError, match="cannot cut 7 x 7 out of an image of 6 x 9"):
        augment.center_crop(image, 7)


def test_normalize():
    image = images(3, 4, 3)
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    ours = augment.normalize(jnp.asarray(image), MEAN, STD)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (9, 14)], ids=str)
def test_transforms_without_operations_only_normalize(shape):
    data = batch()._replace(inputs=jnp.asarray(images(6, *shape, 3)))
    for values in (
        augment.train_transform(config(), MEAN, STD)(jax.random.key(0), data),
        augment.eval_transform(config(), MEAN, STD)(data.inputs),
    ):
        np.testing.assert_array_equal(values, jax.vmap(lambda i: augment.normalize(i, MEAN, STD))(data.inputs))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_jit_and_vmap_change_nothing(recipe):
    data, key = batch(), jax.random.key(3)
    transform = augment.train_transform(recipe, MEAN, STD)
    with jax.transfer_guard("disallow"):
        together = jax.jit(transform)(key, data)
    size = recipe.image_size or 16
    assert together.shape == (6, size, size, 3) and together.dtype == jnp.float32
    np.testing.assert_allclose(transform(key, data), together, atol=1e-6)
    alone = jax.jit(transform)
    for i in range(6):
        np.testing.assert_allclose(alone(key, rows(data, [i]))[0], together[i], atol=1e-6)


def test_the_operations_come_in_timms_order():
    data, key = batch(), jax.random.key(1)
    ours = jax.jit(augment.train_transform(RECIPES["whole"], MEAN, STD))(key, data)

    @jax.jit
    def by_hand(image, key):
        keys = [jax.random.fold_in(key, place) for place in range(7)]
        image = augment.random_resized_crop(keys[0], image, 12)
        image = augment.random_flip(keys[2], image)
        image = augment.rand_augment(keys[3], image, fill=(129, 124, 112))  # the mean, in levels
        image = augment.color_jitter(keys[4], image, 0.4, 0.4, 0.4, 0.1)
        return augment.random_erasing(keys[6], augment.normalize(image, MEAN, STD), 0.25)

    for i in range(6):
        image_key = jax.random.fold_in(jax.random.fold_in(key, data.epoch[i]), data.index[i])
        np.testing.assert_allclose(ours[i], by_hand(data.inputs[i], image_key), atol=1e-6)


@pytest.mark.parametrize("name", ["pad", "resized", "whole"])
def test_draws_follow_from_key_epoch_and_index_alone(name):
    transform = jax.jit(augment.train_transform(RECIPES[name], MEAN, STD))
    data, key = batch(), jax.random.key(3)
    order = [4, 1, 5, 0, 2, 3]
    values = np.asarray(transform(key, data))
    np.testing.assert_array_equal(transform(key, rows(data, order)), values[order])
    np.testing.assert_array_equal(transform(key, data._replace(labels=data.labels + 3)), values)
    for other in (
        transform(jax.random.key(4), data),
        transform(key, data._replace(epoch=data.epoch + 1)),
        transform(key, data._replace(index=data.index + 1)),
    ):
        assert (np.asarray(other) != values).any(axis=(1, 2, 3)).sum() >= 5


@pytest.mark.parametrize("name", ["pad", "resized", "whole"])
def test_two_and_eight_devices_give_what_one_gives(name):
    split = ArraySplit(images(30, 16, 16, 3), np.zeros(30, np.int32))
    source = Source(image_spec("set", (16, 16, 3), ("a",), 30, 30), lambda: (split, split), lambda: [30])
    transform = jax.jit(augment.train_transform(RECIPES[name], MEAN, STD))

    def values(devices: int) -> list[np.ndarray]:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        feed = make_feed(source, mesh, 16, default_config(), split="train")
        return [np.asarray(transform(jax.random.key(0), feed.train(step))) for step in range(3)]

    for one, two, eight in zip(values(1), values(2), values(8), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, eight)


def test_values_that_are_not_allowed_are_named():
    with pytest.raises(ValueError, match="none, pad or resized, not 'center'"):
        augment.train_transform(config(crop="center"), MEAN, STD)
    with pytest.raises(ValueError, match="one of bilinear, bicubic; got 'nearest'"):
        augment.resize(images(4, 4, 3), 8, "nearest")
