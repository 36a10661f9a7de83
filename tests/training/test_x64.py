"""JAX with 64 bits: everything that is kept stays float32 and int32, and training is the same."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import dpa_jax
from dpa_jax.activations.registry import ACTIVATIONS
from dpa_jax.data.batch import Batch
from dpa_jax.training.optimizer import make_optimizer, make_schedule
from dpa_jax.training.state import create_model, create_state
from dpa_jax.training.step import make_eval_step, make_train_step
from tests.helpers import tiny_config

MECHANISMS = ("dpa", "dnrt", "aiec")
WIDE = ("float64", "int64", "uint64")


def trained(mechanism):
    """{name: array} of the state after two steps, of their metrics and of an evaluation."""
    config = tiny_config(mechanism=mechanism, label_smoothing=0.1)
    model = create_model(config, 4, in_channels=1)
    optimizer = make_optimizer(config, make_schedule(config.schedule, 0.01, 6, 12))
    transform = lambda key, batch: batch.inputs  # noqa: E731
    step = jax.jit(make_train_step(model, optimizer, transform, config.coefficients, config.label_smoothing))
    random = np.random.default_rng(0)
    labels = random.integers(-1, 4, 8).astype(np.int32)
    batch = Batch(random.normal(size=(8, 8, 8, 1)).astype(np.float32), labels, labels, labels)
    state = jax.jit(lambda: create_state(model, optimizer, ("loss",), seed=0))()
    for _ in range(2):
        state, metrics = step(state, batch)
    evaluation, _ = jax.jit(make_eval_step(model, lambda batch: batch.inputs))(state.variables, batch)
    figures = evaluation.compute(config.coefficients)
    leaves = jax.tree_util.tree_leaves_with_path((state, metrics, evaluation, figures))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def kept_by_activations():
    """{path: dtype} of the first variables of every activation."""
    options = {"dpa": {"num_classes": 3}, "aiec": {"num_classes": 3}}
    x = jax.ShapeDtypeStruct((2, 3, 4), np.float32)
    made = {name: dpa_jax.activation(name, **options.get(name, {}))() for name in ACTIVATIONS}
    first = {name: jax.eval_shape(module.init, jax.random.key(0), x) for name, module in made.items()}
    leaves = jax.tree_util.tree_leaves_with_path(first)
    return {jax.tree_util.keystr(path): str(leaf.dtype) for path, leaf in leaves}


@pytest.fixture(scope="module")
def with_64_bits(tmp_path_factory):
    """{mechanism: what `trained` gives}, and ``kept``, of a process in which JAX has 64 bits."""
    folder = tmp_path_factory.mktemp("x64")
    code = (
        "import sys, numpy; from tests.training.test_x64 import MECHANISMS, kept_by_activations, trained\n"
        "for name in MECHANISMS: numpy.savez(f'{sys.argv[1]}/{name}', **trained(name))\n"
        "numpy.savez(f'{sys.argv[1]}/kept', **kept_by_activations())"
    )
    root = pathlib.Path(__file__).parents[2]
    switches = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, folder], env={**os.environ, **switches}, cwd=root, check=True)
    return {name: dict(np.load(folder / f"{name}.npz")) for name in (*MECHANISMS, "kept")}


@pytest.mark.usefixtures("compile_quickly")
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_training_is_the_same_with_64_bits(with_64_bits, mechanism):
    found, expected = with_64_bits[mechanism], trained(mechanism)
    assert not {name: leaf.dtype for name, leaf in found.items() if leaf.dtype in WIDE}
    assert {name: leaf.dtype for name, leaf in found.items()} == {name: leaf.dtype for name, leaf in expected.items()}
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=1e-7, err_msg=name)


def test_what_activations_keep_has_32_bits(with_64_bits):
    assert {str(dtype) for dtype in with_64_bits["kept"].values()} == {"float32", "int32"}
    assert {name: str(dtype) for name, dtype in with_64_bits["kept"].items()} == kept_by_activations()
