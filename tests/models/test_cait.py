"""CaiT against its recording, its sizes, its initialisation and stochastic depth, and what it refuses."""

import functools

import numpy as np
import pytest

import dpa_jax
from tests.models import zoo

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "class_depth": 2, "num_heads": 4}
small = functools.partial(dpa_jax.models.create, "cait", 6, **SIZES)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_logits_and_gradients_are_the_recorded(kind):
    zoo.check_outputs("cait", small, kind)


def test_training_with_dpa_is_the_recorded():
    zoo.check_dpa("cait", small)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [("cait_xxs24_patch16_224", 1000, 11_956_264), ("cait_xxs24_patch4_32", 100, 11_618_980)],
)
def test_parameter_counts(name, num_classes, parameters):
    assert zoo.count_parameters(name, num_classes) == parameters


def test_initialisation():
    scales = [f"{blocks}.layer_scale{i}" for blocks in ("blocks", "class_blocks") for i in (1, 2)]
    mixes = [f"blocks.attention.{name}" for name in ("mix_scores", "mix_shares")]
    kernels, biases = [f"{mix}.kernel" for mix in mixes], [f"{mix}.bias" for mix in mixes]
    model = dpa_jax.models.create("cait_xxs24_patch4_32", 100, depth=1, class_depth=1)
    params = zoo.initial(model, "class_token", *scales, *kernels, *biases)
    np.testing.assert_allclose(np.std(params["class_token"]), 0.02, rtol=0.15)
    for name in scales:
        np.testing.assert_array_equal(params[name], np.full((1, 192), 1e-5, np.float32))
    for kernel, bias in zip(kernels, biases, strict=True):
        assert 0 < np.abs(params[kernel]).max() < 0.1 and not params[bias].any()


def test_stochastic_depth_is_the_same_in_all_blocks_on_patches_and_none_after(monkeypatch):
    rates = zoo.drop_rates(small(stochastic_depth=0.1), monkeypatch)
    assert rates.keys() == {"blocks"}
    np.testing.assert_array_equal(rates["blocks"], np.full((2, 3), 0.1, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "CaiT: patch_size 5 does not divide image_size 16"),
        ({"num_heads": 5}, "CaiT: num_heads 5 does not divide embed_dim 24"),
        ({"class_depth": 0}, "CaiT: class_depth must be at least 1; got 0"),
        ({"layer_scale": float("inf")}, "layer_scale must be a finite float"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
