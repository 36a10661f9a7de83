"""Files of weights, as PyTorch wrote them. What is hostile is in tests/faults/test_weights.py."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dpa_jax.models.weight_files import read_weights
from tests import pth

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8


@pytest.mark.parametrize("file", ["torch.pth", "torch_old.pth"])
def test_what_pytorch_wrote(file):
    """Recorded with PyTorch 2.13: a checkpoint whose state dict is under "model"."""
    found = read_weights(GOLDEN / file)
    expected = {
        "whole": BASE,
        "transposed": BASE.T,
        "part": BASE[1:3, 2:],
        "every_second": BASE[:, ::2],
        "half": BASE.astype(np.float16),
        "bfloat16": BASE.astype(jnp.bfloat16),
        "double": BASE.astype(np.float64),
        "parameter": BASE,
        "scalar": np.float32(0.5),
        "repeated": np.full(3, 0.25, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "whole_number": np.array([1, -2]),
        "flag": np.array([True, False]),
        "norm.weight": np.ones(3, np.float32),
        "norm.bias": np.zeros(3, np.float32),
        "norm.num_batches_tracked": np.int64(1),
    }
    assert list(found) == [*list(expected)[:-1], "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, strict=True)
    np.testing.assert_array_equal(
        found["norm.running_var"], np.float32([0.9439916610717773, 1.054843544960022, 1.0273462533950806])
    )


@pytest.mark.parametrize("write", [pth.zipped, pth.old])
@pytest.mark.parametrize("nested", [(), ("model",), ("state_dict",), ("module",), ("state_dict", "model")])
def test_where_the_state_dict_is(tmp_path, write, nested):
    tree = {"a": BASE, "b": BASE[0]}
    for name in nested:
        tree = {"epoch": 3, name: tree}
    (tmp_path / "file").write_bytes(write(tree))
    found = read_weights(tmp_path / "file")
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["a"], BASE)


def test_an_ordered_dict_of_python_2(tmp_path):
    pairs = b"](" + b"](" + pth.Raw(b"U\x01a") + pth.tensor("0", (2,)) + b"e" + b"e"
    (tmp_path / "file").write_bytes(
        pth.zipped(pth.reduced("collections", "OrderedDict", pairs), more={"data/0": bytes(8)})
    )
    np.testing.assert_array_equal(read_weights(tmp_path / "file")["a"], np.zeros(2, np.float32))


def test_safetensors(tmp_path):
    arrays = {"a": BASE, "half": BASE.astype(np.float16), "whole": np.arange(3), "empty": np.zeros((0, 2), np.float32)}
    safetensors.numpy.save_file({**arrays, "bfloat16": BASE.astype(jnp.bfloat16)}, tmp_path / "file")
    found = read_weights(str(tmp_path / "file"))
    assert found["bfloat16"].dtype == jnp.bfloat16
    for name, array in {**arrays, "bfloat16": BASE}.items():
        np.testing.assert_array_equal(found[name], array)


def test_safetensors_without_the_package(tmp_path, monkeypatch):
    safetensors.numpy.save_file({"a": BASE}, tmp_path / "file")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"reading .safetensors needs safetensors: pip install 'dpa_jax\[train\]'"):
        read_weights(tmp_path / "file")
