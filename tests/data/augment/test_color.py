import jax
import numpy as np
import pytest
from PIL import Image

from dpa_jax.data import augment

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.27, 0.5])
def test_hues_are_turned_as_pillow_and_torchvision_do(turn):
    image = IMAGE.copy()
    image[:5] = image[:5] // 50 + 90  # hardly any saturation
    image[5] = 128  # none
    hue, saturation, value = Image.fromarray(image).convert("HSV").split()
    turned = (np.asarray(hue).astype(int) + int(turn * 255)) % 256
    hue = Image.fromarray(turned.astype(np.uint8))
    expected = np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB")).astype(int)
    off = np.abs(np.asarray(augment.adjust_hue(image, np.float32(turn))) - expected)
    # Where a float32 quotient in Pillow falls short of a whole hue or saturation, that is one less there.
    assert (off > 0).mean() < 1e-3 and off.max() < 8


def test_one_amount_draws_from_its_range():
    keys = jax.random.split(jax.random.key(0), 500)
    image = np.full((2, 2, 3), 100, np.uint8)
    run = jax.jit(jax.vmap(lambda key: augment.color_jitter(key, image, brightness=0.4)))
    factors = np.asarray(run(keys))[:, 0, 0, 0] / 100
    assert 0.59 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.03
    run = jax.jit(jax.vmap(lambda key: augment.color_jitter(key, image, brightness=2.0)))
    assert np.asarray(run(keys)).min() < 5  # never below a factor of 0


def test_all_orders_occur():
    image, keys = IMAGE[:3, :3], jax.random.split(jax.random.key(0), 60)
    both = np.asarray(jax.jit(jax.vmap(lambda key: augment.color_jitter(key, image, 0.9, 0.9)))(keys))
    # With brightness last, one factor takes the mean of what contrast left; told apart by doing both by hand.
    orders = set()
    for key, ours in zip(keys, both, strict=True):
        _, first, second = jax.random.split(key, 3)
        factors = {
            "Brightness": jax.random.uniform(first, minval=1 - 0.9, maxval=1.9),
            "Contrast": jax.random.uniform(second, minval=1 - 0.9, maxval=1.9),
        }
        for order in (("Brightness", "Contrast"), ("Contrast", "Brightness")):
            image_ = image
            for name in order:
                image_ = augment.apply_op(name, image_, factors[name])
            if np.array_equal(image_, ours):
                orders.add(order)
    assert len(orders) == 2


def test_grey_images_and_nothing_to_do():
    key = jax.random.key(0)
    assert np.array_equal(augment.color_jitter(key, IMAGE), IMAGE)
    grey = IMAGE[..., :1]
    assert augment.color_jitter(key, grey, 0.4, 0.4, 0.4).shape == grey.shape
    for amounts in ((0.1, 0.1, 0.1, 0.1), (-0.1,), (0, 0, 0, 0.6)):
        with pytest.raises(ValueError, match=r"hue at most 0\.5 and of a colour image"):
            augment.color_jitter(key, grey, *amounts)
