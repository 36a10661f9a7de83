"""DeiT against its recording, its sizes, its initialisation, and what it refuses."""

import functools

import numpy as np
import pytest

import dpa_jax
from tests.models import zoo

pytestmark = pytest.mark.usefixtures("compile_quickly")
SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
small = functools.partial(dpa_jax.models.create, "deit", 6, **SIZES)


@pytest.mark.parametrize("kind", ["gelu", "relu"])
def test_logits_and_gradients_are_the_recorded(kind):
    zoo.check_outputs("deit", small, kind)


def test_training_with_dpa_is_the_recorded():
    zoo.check_dpa("deit", small)


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [("deit_tiny_patch16_224", 1000, 5_910_800), ("deit_tiny_patch4_32", 100, 5_399_816)],
)
def test_parameter_counts(name, num_classes, parameters):
    assert zoo.count_parameters(name, num_classes) == parameters


def test_initialisation():
    names = "class_token", "distillation_token", "position_embedding"
    heads = "head.kernel", "head_distillation.kernel"
    params = zoo.initial(dpa_jax.models.create("deit_tiny_patch4_32", 100, depth=1), *names, *heads)
    assert 0 < np.abs(params["class_token"]).max() < 1e-5
    for name in (*names[1:], *heads):
        np.testing.assert_allclose(np.std(params[name]), 0.02, rtol=0.15)
    assert not np.array_equal(*(params[head] for head in heads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "DeiT: patch_size 3 does not divide image_size 16"),
        ({"num_heads": 5}, "DeiT: num_heads 5 does not divide embed_dim 24"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
