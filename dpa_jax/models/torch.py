"""Parameters from PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def params_from_torch(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict:
    """The parameters of a model from arrays under their PyTorch names.

    ``{name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}`` is what to pass; PyTorch itself
    is not needed. Linear and convolution weights are transposed to Flax's layouts.

    Args:
        model: a model of this package; its ``torch_names`` says how names correspond.
        arrays: {PyTorch name: array}, all parameters of the model and no others.

    Returns:
        The ``params`` collection, float32, to be used as ``{**variables, "params": params}``.

    Raises:
        ValueError: for a model without PyTorch names; naming the first array that is missing, unknown or of the
            wrong shape (with both shapes).
    """
    if not hasattr(model, "torch_names"):
        raise ValueError(f"{type(model).__name__} has no PyTorch names to load from")
    example = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    expected = flatten_dict(shapes, sep=".")
    params = {}
    for torch_name, array in arrays.items():
        name = torch_name
        for pattern, replacement in model.torch_names:
            name, found = re.subn("^" + pattern, replacement, name)
            if found:
                break
        name, array = _to_flax(name, np.asarray(array, np.float32))
        if name not in expected:
            raise ValueError(f"{torch_name!r} is no parameter of {type(model).__name__} (there is no {name!r})")
        if array.squeeze().shape == expected[name].shape:
            array = array.squeeze()  # a Linear to one feature keeps an axis for it
        if array.shape != expected[name].shape:
            raise ValueError(
                f"{torch_name!r} has shape {array.shape} in Flax's layout; "
                f"{type(model).__name__} wants {expected[name].shape} for {name!r}"
            )
        params[name] = jnp.asarray(array)
    missing = sorted(expected.keys() - params.keys())
    if missing:
        raise ValueError(f"no array given for {missing[0]!r} ({len(missing)} of {len(expected)} are missing)")
    return unflatten_dict(params, sep=".")


def _to_flax(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    if not name.endswith(".weight"):
        return name, array
    module = name.removesuffix("weight")
    if array.ndim == 1:
        return module + "scale", array
    # Linear [out, in] -> [in, out]; convolution [out, in, H, W] -> [H, W, in, out].
    return module + "kernel", np.moveaxis(array, (1, 0), (-2, -1))
