"""PVT against its recording, its sizes and stochastic depth, and what it refuses."""

import functools

import numpy as np
import pytest

import dpa_jax
from tests.models import zoo

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZES = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dims": (8, 12, 20, 24),
    "num_heads": (1, 2, 5, 4),
    "mlp_ratios": (8, 8, 4, 4),
    "depths": (1, 2, 1, 2),
    "reductions": (8, 4, 2, 1),
}
small = functools.partial(dpa_jax.models.create, "pvt", 6, **SIZES)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_logits_and_gradients_are_the_recorded(kind):
    zoo.check_outputs("pvt", small, kind)


def test_training_with_dpa_is_the_recorded():
    zoo.check_dpa("pvt", small)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("pvt_tiny_patch4_224", 1000, 13_229_288),
        ("pvt_tiny_patch4_32", 100, 12_386_660),
        ("pvt_tiny_patch2_32", 100, 12_408_164),
    ],
)
def test_parameter_counts(name, num_classes, parameters):
    assert zoo.count_parameters(name, num_classes) == parameters


def test_initialisation():
    tokens = "class_token", "position_embedding1", "position_embedding4"
    reduction = "blocks1.attention.reduction.kernel", "blocks1.attention.reduction.bias"
    params = zoo.initial(dpa_jax.models.create("pvt_tiny_patch2_32", 10, depths=(1,) * 4), *tokens, *reduction)
    for name in tokens:
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.15)
    for name in reduction:  # uniform, as PyTorch's convolutions
        bound = (8 * 8 * 64) ** -0.5
        assert 0.9 * bound < np.abs(params[name]).max() <= bound


def test_stochastic_depth_rises_over_all_stages(monkeypatch):
    rates = zoo.drop_rates(small(stochastic_depth=0.5), monkeypatch)
    found = np.concatenate([rates[f"blocks{stage}"] for stage in range(1, 5)], axis=1)
    np.testing.assert_allclose(found, [np.linspace(0, 0.5, 6)] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 66}, "PVT: patch_size 4 does not divide image_size 66"),
        ({"image_size": 80}, "image_size must be a multiple of 32, patch_size 4 doubled for every .*; got 80"),
        ({"image_size": 32, "reductions": (9, 4, 2, 1)}, r"reductions\[0\] is 9; the stage's map has a side of 8 only"),
        ({"reductions": (8, 4, 2, 2)}, r"the last of reductions must be 1, .*; got \(8, 4, 2, 2\)"),
        ({"reductions": (8, 4, 0, 1)}, r"reductions\[2\] must be at least 1; got 0"),
        ({"num_heads": (1, 2, 3, 4)}, r"num_heads\[2\] 3 does not divide embed_dims\[2\] 20"),
        ({"num_heads": (1, 2, 5)}, r"num_heads must have a number for each of the 4 embed_dims; got \(1, 2, 5\)"),
        ({"depths": 2}, "depths must be 1 to 10 numbers, one a stage; got 2"),
        ({"depths": (1, 2, 1.5, 2)}, r"depths\[2\] must be a whole number; got 1\.5"),
        ({"mlp_ratios": (0, 8, 4, 4)}, r"mlp_ratios\[0\] must be in \["),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
