"""A run that begins with the weights of a file."""

import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from dpa_jax.models import to_torch
from dpa_jax.training.loop import train, train_and_evaluate
from dpa_jax.training.run import build
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of another seed, for 6 classes; the tiny run has 4."""
    model = build(tiny_config()).model.clone(num_classes=6)
    variables = jax.jit(model.init)(jax.random.key(7), np.zeros(model.example_inputs.shape, np.float32))
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.numpy.save_file(to_torch(model, variables), path)
    return path


def leaves(state):
    return flatten_dict(jax.device_get(state.variables), sep="/")


def test_the_first_state_has_the_weights(file):
    weights = safetensors.numpy.load_file(file)
    plain, seeds = leaves(build(tiny_config()).init()), (0, 5)
    run = build(tiny_config(init_from=str(file)))
    with pytest.warns(UserWarning, match="head is for 6 classes, not 4"):
        state = leaves(run.init())
    group = leaves(run.with_seeds(seeds).init())
    assert state.keys() == plain.keys() == group.keys()
    for path, array in state.items():
        if path == "params/norm/scale" or path.startswith("params/blocks"):
            np.testing.assert_array_equal(group[path][0], group[path][1])
        if not path.startswith("params") or path.startswith("params/head"):  # as without a file
            np.testing.assert_array_equal(array, plain[path])
        np.testing.assert_array_equal(group[path][0], array)
    np.testing.assert_array_equal(state["params/patch_embed/bias"], weights["patch_embed.proj.bias"])
    qkv = state["params/blocks/attention/qkv/kernel"]
    np.testing.assert_array_equal(qkv[0], weights["blocks.0.attn.qkv.weight"].T)
    assert not np.array_equal(group["params/head/kernel"][0], group["params/head/kernel"][1])


def test_a_run_says_what_it_began_with_and_goes_on_without_the_file(file, tmp_path, capsys):
    own, workdir = tmp_path / "own.safetensors", tmp_path / "run"
    shutil.copy(file, own)
    config = tiny_config(init_from=str(own), epochs=1)
    with pytest.warns(UserWarning, match="head is for 6 classes"):
        train_and_evaluate(config, workdir)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "SHA-256" in line]
    assert f"{own} (SHA-256 " in line
    assert line.endswith("18 of 20 arrays loaded; head is for 6 classes, not 4: it stays fresh")

    own.unlink()
    train_and_evaluate(config, workdir)
    assert "nothing left to do after step 6 of 6" in capsys.readouterr().err
    config.init_from = ""
    with pytest.raises(ValueError, match=r"init_from was '.*own.safetensors' and is '' now"):
        train_and_evaluate(config, workdir)


def test_a_file_that_does_not_fit_is_told_before_the_data_are_loaded(file, tmp_path, monkeypatch):
    for config, error, message in (
        (tiny_config(init_from="no/such.pth"), FileNotFoundError, "config: init_from: there is no file no/such.pth"),
        (tiny_config(init_from=str(file), model="resnet", model_options={"image_size": 8}), ValueError, "ResNet"),
        (
            tiny_config(init_from=str(file), model_options__embed_dim=16),
            ValueError,
            r"'blocks.0.attn.proj.bias' has shape \(8,\)",
        ),
    ):
        run = build(config)
        monkeypatch.setattr(run, "load", lambda: pytest.fail("it was loaded"))
        with pytest.raises(error, match=message):
            train(run, tmp_path, [tmp_path])
