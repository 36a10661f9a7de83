"""ResNet: its sizes, and the mechanisms on feature maps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpa_jax
from dpa_jax.config import default_config
from dpa_jax.data.batch import Batch
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_train_step

SMALL = {"image_size": 8, "stage_sizes": (1, 1), "width": 4}


def small_run(mechanism, **options):
    config = default_config()
    config.mechanism, config.model = mechanism, "resnet"
    config.mechanism_options.update(options)
    config.model_options.update(SMALL)
    return create_model(config, 3, in_channels=3), config.coefficients


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 11_173_962), (100, 11_220_132)])
def test_parameter_counts(num_classes, parameters):
    model = dpa_jax.models.create("resnet18", num_classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_stages_halve_the_resolution_and_double_the_width():
    model = dpa_jax.models.create("resnet18", 10, arr=True)
    seen = []

    def look(next_method, args, kwargs, context):
        if isinstance(context.module, dpa_jax.ARR) and context.method_name == "__call__":
            seen.append(args[0].shape)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(look):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert seen == [(2, 32, 32, 64), (2, 16, 16, 128), (2, 8, 8, 256), (2, 4, 4, 512)]


@pytest.mark.parametrize(
    ("mechanism", "options", "penalties"),
    [("dpa", {"update_interval": 1}, ["channel"]), ("dnrt", {}, ["arr"]), ("aiec", {}, ["aux", "gate"])],
)
def test_mechanisms_train_on_feature_maps(mechanism, options, penalties):
    model, coefficients = small_run(mechanism, **options)
    optimizer = optax.adam(2e-2)
    state = jax.jit(lambda: create_state(model, optimizer, (), seed=0))()
    rng = np.random.default_rng(0)
    labels = np.arange(12, dtype=np.int32) % 3
    images = (rng.normal(size=(12, 8, 8, 3)) + labels[:, None, None, None]).astype(np.float32)
    zeros = np.zeros(12, np.int32)
    step = jax.jit(make_train_step(model, optimizer, lambda key, batch: batch.inputs, coefficients))
    history = []
    for _ in range(30):
        state, metrics = step(state, Batch(images, labels, zeros, zeros))
        history.append(metrics)
    assert history[-1]["loss_cross_entropy"] < 0.7 * history[0]["loss_cross_entropy"]
    for name in penalties:
        assert max(metrics[f"loss_{name}"] for metrics in history) > 0
    if mechanism == "dnrt":  # behind both stages, each with its own width
        assert {name: leaf["mean"].shape for name, leaf in state.model_state["response_memory"].items()} == {
            "arr0": (3, 4),
            "arr1": (3, 8),
        }
    # Evaluation takes the running statistics: a sample's logits do not depend on its batch.
    apply = jax.jit(functools.partial(model.apply, state.variables))
    np.testing.assert_allclose(apply(images)[:4], apply(images[:4]), rtol=1e-4, atol=1e-5)


def test_a_pool_that_was_chosen_stays():
    model, _ = small_run("dpa", pool="none")
    with pytest.raises(ValueError, match="pool='none'"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage_sizes": ()}, r"stage_sizes must be 1 to 10 numbers of blocks; got \(\)"),
        ({"stage_sizes": "abc"}, "stage_sizes must be 1 to 10 numbers of blocks; got 'abc'"),
        ({"stage_sizes": (2, 0)}, r"stage_sizes\[1\] must be at least 1; got 0"),
        ({"stage_sizes": (2, 1.5)}, r"stage_sizes\[1\] must be a whole number; got 1\.5"),
        ({"stage_sizes": (10**9,)}, r"stage_sizes\[0\] must be at most 500"),
        ({"stage_sizes": (1,) * 10, "width": 512}, "width must be at most 128; got 512"),
        ({"width": 0}, "width must be at least 1; got 0"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpa_jax.models.create("resnet", 10, **options)


def test_images_of_another_shape_are_refused_with_both_shapes():
    model, _ = small_run("relu")
    with pytest.raises(ValueError, match=r"images must be \[B, 8, 8, 3\]; got \(1, 9, 8, 3\)"):
        model.init(jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
