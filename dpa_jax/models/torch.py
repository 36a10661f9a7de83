"""Parameters from PyTorch.

A model's ``torch_names`` maps the dotted names of its modules (or single parameters) to PyTorch's; the longest one that
fits counts, and names without an entry are the same there. A ``*`` stands for the number of a layer, whose arrays
are stacked along the leading axis here.
"""

from collections import defaultdict
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def params_from_torch(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> dict:
    """The parameters of a model from arrays under their PyTorch names.

    ``{name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}`` is what to pass, all parameters of
    the model and no others; PyTorch itself is not needed. Linear and convolution weights are transposed to Flax's
    layouts. Returns the ``params`` collection, float32, to be used as ``{**variables, "params": params}``.

    Raises:
        ValueError: for a model without PyTorch names; naming the first array that is missing, unknown or of the
            wrong shape (with both shapes).
    """
    owner = type(model).__name__
    if not hasattr(model, "torch_names"):
        raise ValueError(f"{owner} has no PyTorch names to load from")
    if not isinstance(arrays, Mapping):
        raise TypeError(f"params_from_torch: takes arrays by name; got a {type(arrays).__name__}")
    params = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), model.example_inputs)["params"], sep=".")
    # {PyTorch name: (name here, shape of one layer)}, the layers of a stack in order.
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path, leaf in params.items():
        name = torch_name(path, model.torch_names)
        if "*" in name:
            places |= {name.replace("*", str(layer)): (path, leaf.shape[1:]) for layer in range(leaf.shape[0])}
        else:
            places[name] = (path, leaf.shape)

    found = {}
    for name, array in arrays.items():
        if name not in places:
            raise ValueError(f"{name!r} is no parameter of {owner}")
        path, shape = places[name]
        try:
            array = np.asarray(array, np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name!r} must be an array of numbers; got a {type(array).__name__}") from error
        if path.endswith(".kernel") and array.ndim > 1:
            # Linear [out, in] -> [in, out]; convolution [out, in, H, W] -> [H, W, in, out]
            array = np.moveaxis(array, (1, 0), (-2, -1))
        if array.squeeze().shape == shape:
            array = array.squeeze()  # a Linear to one feature keeps an axis for it
        if array.shape != shape:
            raise ValueError(f"{name!r} has shape {array.shape} in Flax's layout; {owner} wants {shape} for {path!r}")
        found[name] = array
    missing = [name for name in places if name not in found]
    if missing:
        raise ValueError(f"no array given for {missing[0]!r} ({len(missing)} of {len(places)} are missing)")

    layers = defaultdict(list)
    for name, (path, _) in places.items():
        layers[path].append(found[name])
    stacked = {path: jnp.asarray(np.stack(layers[path])).reshape(leaf.shape) for path, leaf in params.items()}
    return unflatten_dict(stacked, sep=".")


def torch_name(path: str, names: Mapping[str, str]) -> str:
    """PyTorch's name of a parameter by a model's ``torch_names``: "blocks.norm1.scale" is "blocks.*.norm1.weight"."""
    if path in names:
        return names[path]
    module, _, leaf = path.rpartition(".")
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    known = max((ours for ours in names if f"{module}.".startswith(f"{ours}.")), key=len, default="")
    return f"{names.get(known, known)}{module.removeprefix(known)}.{leaf}"
