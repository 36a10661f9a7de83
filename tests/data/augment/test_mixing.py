import re

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpa_jax.data import augment

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 10, 3)).astype(np.float32)
LABELS = np.arange(6, dtype=np.int32)
OTHERS = IMAGES[[1, 0, 3, 2, 5, 4]]


def mixes(draws=400, **options) -> augment.Mixed:
    run = jax.jit(jax.vmap(lambda key: augment.mix(key, IMAGES, LABELS, **options)))
    return jax.device_get(run(jax.random.split(jax.random.key(0), draws)))


def own_share(mixed: augment.Mixed) -> np.ndarray:
    """The weight of each image itself, [draws], from the labels."""
    return np.where((mixed.labels == LABELS).all(1), mixed.weight, 1 - mixed.weight)


def test_mixup_weighs_the_images_and_names_the_greater_part():
    mixed = mixes(mixup=0.8)
    share = own_share(mixed)
    expected = share[:, None, None, None, None] * IMAGES + (1 - share)[:, None, None, None, None] * OTHERS
    np.testing.assert_allclose(mixed.inputs, expected, atol=1e-5)
    assert (mixed.weight >= 0.5).all() and np.array_equal(mixed.others, mixed.labels ^ 1)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 * 0.8 + 1)).
    assert abs(share.mean() - 0.5) < 0.05 and abs(share.var() - 1 / (4 * 2.6)) < 0.015


def test_cutmix_puts_a_box_in_and_weighs_by_what_is_left():
    mixed = mixes(cutmix=1.0)
    share = own_share(mixed)
    own, other = ((mixed.inputs == images).all(-1) for images in (IMAGES, OTHERS))
    assert (own ^ other).all() and (own == own[:, :1]).all()  # the same box in every image
    np.testing.assert_allclose(own[:, 0].mean(axis=(1, 2)), share, atol=1e-6)
    for mask in other[:, 0]:
        assert mask.sum() == mask.any(0).sum() * mask.any(1).sum()
    # The published drawing written plainly: a box of the area 1 - share, its middle anywhere, clipped by the rim.
    random = np.random.default_rng(0)
    extents = (np.array([8, 10]) * np.sqrt(1 - random.random((4000, 1)))).astype(int)
    middles = random.integers(0, [8, 10], (4000, 2))
    low, high = middles - extents // 2, middles + (extents + 1) // 2
    plain = 1 - np.prod(np.minimum(high, [8, 10]) - np.maximum(low, 0), axis=1) / 80
    assert abs(share.mean() - plain.mean()) < 4 * plain.std() / np.sqrt(len(share))
    assert abs(share.std() - plain.std()) < 0.03


def test_with_both_a_batch_gets_either():
    mixed = mixes(mixup=0.8, cutmix=1.0)
    cut = ((mixed.inputs == IMAGES) | (mixed.inputs == OTHERS)).all(axis=(1, 2, 3, 4))
    assert 0.4 < cut.mean() < 0.6
    rarely = mixes(mixup=0.8, cutmix=1.0, switch=0.1)
    cut = ((rarely.inputs == IMAGES) | (rarely.inputs == OTHERS)).all(axis=(1, 2, 3, 4))
    assert 0.04 < cut.mean() < 0.17


def test_any_devices_mix_alike_and_send_nothing():
    images, labels, results = np.tile(IMAGES[:4], (4, 1, 1, 1)), np.arange(16), []
    for devices in (1, 2, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        run = jax.jit(
            lambda images, labels: augment.mix(jax.random.key(2), images, labels, 0.8, 1.0),
            in_shardings=rows,
            out_shardings=augment.Mixed(rows, rows, rows, whole),
        )
        program = run.lower(images, labels).compile()
        assert not re.search(r"(all|reduce|collective)-(gather|reduce|to-all|scatter|permute)", program.as_text())
        results.append(jax.device_get(program(*jax.device_put((images, labels), rows))))
    for other in results[1:]:
        chex.assert_trees_all_equal(other, results[0])
    assert np.array_equal(results[0].others, results[0].labels ^ 1)


def test_the_last_of_an_odd_batch_stays_as_it_is():
    mixed = augment.mix(jax.random.key(0), IMAGES[:5], LABELS[:5], mixup=0.8)
    np.testing.assert_allclose(mixed.inputs[4], IMAGES[4], atol=1e-6)
    assert (mixed.labels[4], mixed.others[4]) == (4, 4)
    assert np.array_equal(mixed.others[:4], mixed.labels[:4] ^ 1)


def test_alphas_are_checked():
    for options in ({}, {"mixup": -1.0, "cutmix": 1.0}):
        with pytest.raises(ValueError, match="alphas must be at least 0 and not both 0"):
            augment.mix(jax.random.key(0), IMAGES, LABELS, **options)
