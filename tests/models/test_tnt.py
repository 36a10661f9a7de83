"""TNT against its recording, its sizes, initialisation and stochastic depth, and what it refuses."""

import functools

import numpy as np
import pytest

import dpa_jax
from tests.models import zoo

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "first_stride": 1,
    "embed_dim": 24,
    "inner_dim": 8,
    "depth": 3,
    "num_heads": 3,
    "inner_heads": 4,
}
small = functools.partial(dpa_jax.models.create, "tnt", 6, **SIZES)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_logits_and_gradients_are_the_recorded(kind):
    zoo.check_outputs("tnt", small, kind)


def test_training_with_dpa_is_the_recorded():
    zoo.check_dpa("tnt", small)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [("tnt_small_patch16_224", 1000, 23_755_336), ("tnt_small_patch4_32", 100, 23_358_148)],
)
def test_parameter_counts(name, num_classes, parameters):
    assert zoo.count_parameters(name, num_classes) == parameters


def test_initialisation():
    normal = "class_token", "position_embedding", "pixel_position", "blocks.inner.attention.qk.kernel"
    uniform = "pixel_embed.kernel", "pixel_embed.bias"
    model = dpa_jax.models.create("tnt_small_patch4_32", 10, depth=1)
    params = zoo.initial(model, *normal, *uniform)
    for name in normal:
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.15)
    for name in uniform:
        bound = (7 * 7 * 3) ** -0.5
        assert 0.9 * bound < np.abs(params[name]).max() <= bound


def test_stochastic_depth_rises_linearly_inside_and_outside(monkeypatch):
    rates = zoo.drop_rates(small(stochastic_depth=0.5), monkeypatch)
    for part in ("inner", "outer"):
        np.testing.assert_allclose(rates.pop(f"blocks/{part}"), [[0, 0.25, 0.5]] * 2)
    assert not rates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "TNT: patch_size 3 does not divide image_size 16"),
        ({"num_heads": 5}, "TNT: num_heads 5 does not divide embed_dim 24"),
        ({"inner_heads": 3}, "TNT: inner_heads 3 does not divide inner_dim 8"),
        ({"first_stride": 3}, "TNT: first_stride 3 does not divide patch_size 4"),
        ({"first_stride": 0}, "TNT: first_stride must be at least 1; got 0"),
        ({"mlp_ratio": 0.1}, r"mlp_ratio must be in \[0\.125"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
