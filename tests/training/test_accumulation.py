"""Micro-batches give what the large batch gives: parameters, memories, penalties and metrics."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import dpa_jax
from dpa_jax.activations import ARR
from dpa_jax.config import default_config
from dpa_jax.data import augment
from dpa_jax.data.batch import Batch
from dpa_jax.training import sharding
from dpa_jax.training.run import build
from dpa_jax.training.state import create_state
from dpa_jax.training.step import make_train_step
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")

COEFFICIENTS = dict.fromkeys(default_config().coefficients, 0.3)
CLASSES, EXAMPLES = 5, 24


class Mlp(nn.Module):
    """Two hidden layers with an activation, the first also with ARR."""

    activation: str

    example_inputs = jax.ShapeDtypeStruct((1, 7), np.float32)

    @nn.compact
    def __call__(self, x, labels=None, train=False):
        options = {} if self.activation == "relu" else {"num_classes": CLASSES, "update_interval": 2}
        for width in (16, 12):
            x = nn.Dense(width)(x)
            act = dpa_jax.activation(self.activation, **options)()
            x = act(x, labels, train) if options else act(x)
            if width == 16 and options:
                x = ARR(CLASSES)(x, labels, train)
        return nn.Dense(CLASSES)(x)


def batches(steps):
    random = np.random.default_rng(0)
    for _ in range(steps):
        labels = random.integers(-1, CLASSES, EXAMPLES).astype(np.int32)  # -1: some take no part
        inputs = random.normal(size=(EXAMPLES, 7)).astype(np.float32) + labels[:, None] % 3
        yield Batch(inputs, labels, labels, labels)


def train(activation, accumulate, steps, mix=None):
    """The state and the metrics after each step."""
    model, optimizer = Mlp(activation), optax.sgd(0.1, momentum=0.9)

    def split(batch):
        return jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)

    step = make_train_step(
        model, optimizer, lambda _, batch: batch.inputs, COEFFICIENTS, 0.1, mix, accumulate=accumulate, split=split
    )
    step, state, seen = jax.jit(step), create_state(model, optimizer, (), seed=0), []
    for batch in batches(steps):
        state, metrics = step(state, batch)
        seen.append(jax.device_get((state, metrics)))
    return seen


def mixup(key, inputs, labels):
    return augment.mix(key, inputs[:, :, None, None], labels, mixup=0.8)._replace(inputs=inputs)


@pytest.mark.parametrize(("activation", "mix"), [("relu", None), ("dpa", mixup)], ids=["relu", "dpa and arr, mixed"])
def test_micro_batches_are_the_large_batch(activation, mix):
    whole, parts = train(activation, 1, 6, mix), train(activation, 4, 6, mix)
    for step, (wanted, found) in enumerate(zip(whole, parts, strict=True), start=1):
        chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=2e-6)
        chex.assert_trees_all_equal_dtypes(found, wanted)
        if activation == "dpa":
            assert found[0].model_state["forward_memory"]["DPA_0"]["step"] == step % 2
    if activation == "dpa":
        state, metrics = parts[-1]
        assert metrics["masked_fraction"] > 0 and metrics["loss_channel"] > 0
        assert all(
            leaf.any() for leaf in jax.tree.leaves((state.backward_memory, state.model_state["response_memory"]))
        )


def test_counters_are_those_of_the_large_batch_and_its_masks_where_it_does_not_count():
    (first, second), (wanted_first, wanted_second) = train("aiec", 4, 2), train("aiec", 1, 2)
    chex.assert_trees_all_close(first, wanted_first, rtol=1e-5, atol=2e-6)
    # In the second step samples are counted. The counts are the same; a micro-batch's masks show those up to itself.
    counters = second[0].model_state["activity_counters"]
    assert sum(leaf.sum() for leaf in jax.tree.leaves(counters)) > 2 * CLASSES
    chex.assert_trees_all_equal(counters, wanted_second[0].model_state["activity_counters"])
    assert second[1]["loss_cross_entropy"] == pytest.approx(wanted_second[1]["loss_cross_entropy"], rel=1e-5)
    assert second[1]["masked_fraction"] > wanted_second[1]["masked_fraction"]


def test_micro_batches_are_shared_in_the_order_of_the_batch():
    mesh, count = sharding.make_mesh(jax.devices()), 4
    batch = jax.device_put(jnp.arange(64.0), jax.NamedSharding(mesh, PartitionSpec("data")))
    split = jax.jit(lambda batch: sharding.split(batch, mesh, count))
    parts = split(batch)
    np.testing.assert_array_equal(parts, np.arange(64.0).reshape(4, 16))
    assert parts.sharding.spec == PartitionSpec(None, "data")
    assert "all-gather" not in split.lower(batch).compile().as_text()


def test_a_batch_that_does_not_divide_is_refused():
    expected = "batch_size must be a positive multiple of the 2 devices times accumulate 3, not 8"
    with pytest.raises(ValueError, match=expected):
        build(tiny_config(accumulate=3), jax.devices()[:2])
