import functools

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.data import augment
from dpa_jax.data.batch import Batch
from dpa_jax.training.state import create_state
from dpa_jax.training.step import make_train_step

COEFFICIENTS = {"channel": 5.0}


class Mlp(nn.Module):
    example_inputs = jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        x = nn.Dense(16)(x.reshape(len(x), -1))
        x = dpa_jax.DPA(num_classes=5, pool="none", update_interval=1)(x, labels, train)
        return nn.Dense(5)(x)


def make_batch(examples=8) -> Batch:
    random = np.random.default_rng(0)
    zeros = np.zeros(examples, np.int32)
    images = random.normal(size=(examples, 4, 4, 3)).astype(np.float32)
    return Batch(images, random.integers(0, 5, examples).astype(np.int32), zeros, zeros)


def run(mix=None, smoothing=0.0, batch=None, steps=1):
    optimizer = optax.sgd(0.1)
    state = create_state(Mlp(), optimizer, (), seed=0)
    step = jax.jit(make_train_step(Mlp(), optimizer, lambda key, batch: batch.inputs, COEFFICIENTS, smoothing, mix))
    for _ in range(steps):
        state, metrics = step(state, batch or make_batch())
    return jax.device_get((state, metrics))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_are_learnt_with_both_labels_and_remembered_under_the_greater(smoothing):
    seen = []

    def mix(key, images, labels):
        mixed = augment.mix(key, images, labels, mixup=0.8)
        jax.debug.callback(lambda mixed: seen.append(jax.device_get(mixed)), mixed)
        return mixed

    state, metrics = run(mix, smoothing)
    jax.effects_barrier()
    (mixed,) = seen
    # The same images under one label each: memories, masks and penalty are the same, the cross-entropies add up.
    parts = [
        run(None, smoothing, make_batch()._replace(inputs=mixed.inputs, labels=labels))
        for labels in (mixed.labels, mixed.others)
    ]
    losses = [metrics["loss_cross_entropy"] for _, metrics in parts]
    expected = mixed.weight * losses[0] + (1 - mixed.weight) * losses[1]
    np.testing.assert_allclose(metrics["loss_cross_entropy"], expected, rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3
    (greater, _), _ = parts
    chex.assert_trees_all_equal(state.model_state, greater.model_state)


def test_each_step_mixes_anew_and_the_same_step_alike():
    mix = functools.partial(augment.mix, mixup=0.8, cutmix=1.0)
    one, other = run(mix, steps=3), run(mix, steps=3)
    chex.assert_trees_all_equal(one, other)
    weights = []

    def watched(key, images, labels):
        mixed = mix(key, images, labels)
        jax.debug.callback(lambda weight: weights.append(float(weight)), mixed.weight)
        return mixed

    run(watched, steps=3)
    jax.effects_barrier()
    assert len(set(weights)) == 3
