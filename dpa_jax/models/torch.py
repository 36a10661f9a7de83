"""Weights from PyTorch and back: its names and layouts, and a model's variables here.

A model's ``torch_names`` maps the dotted names of its modules (or single variables) to PyTorch's; the longest one that
fits counts, and names without an entry are the same there. A ``*`` stands for the number of a layer, whose arrays
are stacked along the leading axis here. Two more attributes are for models that need them:

- ``torch_flattened``, {dotted name of a Dense: (C, H, W)}: its inputs are feature maps, flattened here as [H, W, C] and
  in PyTorch as [C, H, W].
- ``torch_aliases``, {regular expression: what replaces it in the names of a file's arrays, one after the other}, for
  other programs' names; an array with a name that None belongs to is left out.
"""

import math
import os
import pathlib
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dpa_jax.models.hugging_face import check_architecture, weights_file
from dpa_jax.models.weight_files import read_weights, state_dict

_COLLECTIONS = ("params", "batch_stats")  # what PyTorch's state dicts have
_WRAPPERS = ("module.", "model.", "_orig_mod.")  # before every name of a model that was saved inside of another
_POSITIONS = re.compile(r"(pos_embed\d*|patch_pos)")  # PyTorch's names of position embeddings [1, N, D]
_ACTIVATION = re.compile(r"(^|\.)activation\w*\.")  # what is under such a module is a mechanism's


class Weights(NamedTuple):
    """What a model gets from a state dict."""

    arrays: dict[str, np.ndarray]  # by the path of the variable, such as params/head/kernel; float32, in Flax's layout
    summary: str  # what was loaded, what was changed and what stays fresh, as one line


class _Place(NamedTuple):
    """Where an array of a state dict belongs."""

    path: str  # of the variable, with its collection
    shape: tuple[int, ...]  # in PyTorch


def variables_from_torch(
    model: nn.Module, source: Mapping[str, Any] | str | os.PathLike, variables: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A model's variables with the weights of PyTorch's: parameters and running statistics.

    The weights must be all that the model has under its ``torch_names``, and no others. These differences are bridged:

    - Names that all begin with ``module.``, ``model.`` or ``_orig_mod.``; a state dict under ``model``, ``state_dict``
      or ``module``; names of ``torch_aliases``. ``num_batches_tracked`` is ignored.
    - Another number of classes: the head stays fresh, with a warning that names both numbers. So does a head of which
      the source has nothing.
    - Another grid of patches: position embeddings are interpolated (bicubic with antialiasing, as timm does).
    - Parameters of the activations, such as a mechanism's own, may be missing and stay fresh. So do all memories.

    Args:
        model: a model of `dpa_jax.models`, or one that has ``torch_names``.
        source: the path of a ``.pth`` or ``.safetensors`` file, which is read without PyTorch and runs no code; of a
            Hugging Face folder with ``config.json``, for models that have one (`Bert`); or a state dict: {name: array},
            such as ``torch_model.state_dict()``.
        variables: the fresh ones, of ``model.init``; None: those of seed 0; {}: none, for what the source has alone.

    Returns:
        The variables, float32 where they come from the source. Those given are not changed.

    Raises:
        ValueError: for a model without PyTorch names, a file that is damaged, hostile or of another kind, and naming
            the first array that is missing, unknown, not finite or of the wrong shape (with both, PyTorch's).
        TypeError: for a source that is neither.
        FileNotFoundError, ImportError: as `dpa_jax.models.weight_files.read_weights`; a folder may lack a file, too.
    """
    weights = match(model, source)
    if variables is None:
        examples = jax.tree.map(lambda example: jnp.zeros(example.shape, example.dtype), model.example_inputs)
        variables = jax.jit(model.init)(jax.random.key(0), examples)
    return put(weights.arrays, variables)


def to_torch(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state dict of a model's variables: {PyTorch's name: array in PyTorch's layout}.

    Parameters, or what has their shapes, such as gradients, and running statistics; collections that are not given are
    left out, memories have no place there. `variables_from_torch` gives the same bits back. To publish::

        safetensors.numpy.save_file(to_torch(model, variables), "model.safetensors")

    PyTorch takes ``{name: torch.from_numpy(array) for name, array in to_torch(model, variables).items()}``.

    Raises:
        ValueError: for a model without PyTorch names, and naming the first variable that is missing, unknown or of
            another shape than the model's (with both shapes).
    """
    owner = type(model).__name__
    wanted, given = _abstract(model), _flat(variables)
    result = {}
    for path, leaf in wanted.items():
        if path.split("/")[0] not in variables:
            continue
        if path not in given:
            raise ValueError(f"to_torch: the variables have no {path!r}, which {owner} has")
        stacked = np.asarray(given[path])
        if stacked.shape != leaf.shape:
            raise ValueError(f"to_torch: {path!r} has shape {stacked.shape}; {owner} wants {leaf.shape}")
        name = _name(model, path)
        for layer, array in enumerate(stacked if "*" in name else [stacked]):
            result[name.replace("*", str(layer))] = np.ascontiguousarray(_to_torch(model, path, array))
    if unknown := [path for path in given if path not in wanted]:
        raise ValueError(f"to_torch: {unknown[0]!r} is no variable of {owner}")
    return result


def match(model: nn.Module, source: Mapping[str, Any] | str | os.PathLike) -> Weights:
    """Finds each array's place in a model; see `variables_from_torch`, whose errors these are."""
    wanted = _abstract(model)
    where, arrays = _read(model, source)
    places = _places(model, wanted)
    found: dict[str, np.ndarray] = {}
    changes: list[str] = []
    other_head: dict[str, int] = {}  # {name of an array of a head for other classes: their number}
    for name, value in _renamed(where, arrays, getattr(model, "torch_aliases", {})).items():
        if name not in places:
            raise ValueError(
                f"{where}{name!r} is no parameter of {type(model).__name__}; are these the weights of another model?"
            )
        path, shape = places[name]
        array = _numbers(where, name, value)
        if array.ndim > len(shape) == 2 and path.endswith("/kernel"):
            array = _as_linear(model, path, array)
        if array.shape != shape and (resized := _resized(name, array, shape)) is not None:
            changes.append(f"{name} interpolated from {array.shape[1]} to {shape[1]} positions")
            array = resized
        if array.shape != shape:
            if not array.ndim or array.shape[1:] != shape[1:] or path not in _head(model, wanted):
                raise ValueError(
                    f"{where}{name!r} has shape {array.shape}; {type(model).__name__} wants {shape} for {path!r}"
                )
            other_head[name] = len(array)
        found[name] = array

    # ---------------- what stays fresh ----------------
    fresh: set[str] = set()
    some = {places[name].path for name in found}
    if other_head or len(found) < len(places):
        head = _head(model, wanted)
        if other_head:
            heads = {name.rpartition(".")[0]: classes for name, classes in other_head.items()}
            text = ", ".join(f"{name} is for {classes} classes" for name, classes in heads.items())
            fresh, text = head, f"{text}, not {model.num_classes}"
        elif some and not head & some:
            names = {name.rpartition(".")[0] for name, (path, _) in places.items() if path in head}
            fresh, text = head, f"{', '.join(sorted(names))} is not there"
    if fresh:
        changes.append(f"{text}: it stays fresh")
    missing = {name: path for name, (path, _) in places.items() if name not in found and path not in fresh}
    own = {path for path in missing.values() if _ACTIVATION.search(_dotted(path)) and path not in some}
    if lacking := [name for name, path in missing.items() if path not in own]:
        raise ValueError(f"{where}no array given for {lacking[0]!r} ({len(lacking)} of {len(places)} are missing)")
    if fresh:
        warnings.warn(f"{where}{changes[-1]}", stacklevel=3)
    if own:
        changes.append(f"{', '.join(map(_dotted, sorted(own)))} not there: fresh")

    # ---------------- layouts ----------------
    layers = defaultdict(list)
    for name, (path, _) in places.items():
        if path not in fresh | own:
            layers[path].append(_from_torch(model, path, found[name]))
    stacked = {}
    for path, several in layers.items():  # a single one may be large, and is not copied
        stacked[path] = (np.stack(several) if len(several) > 1 else several[0]).reshape(wanted[path].shape)
    return Weights(stacked, "; ".join([f"{sum(map(len, layers.values()))} of {len(places)} arrays loaded", *changes]))


def put(arrays: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with some replaced, by their paths; may be traced."""
    flat = flatten_dict(dict(variables), sep="/", keep_empty_nodes=True)
    return unflatten_dict({**flat, **{path: jnp.asarray(array) for path, array in arrays.items()}}, sep="/")


def torch_name(path: str, names: Mapping[str, str]) -> str:
    """PyTorch's name of a parameter by a model's ``torch_names``: "blocks.norm1.scale" is "blocks.*.norm1.weight"."""
    if path in names:
        return names[path]
    module, _, leaf = path.rpartition(".")
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    known = max((ours for ours in names if f"{module}.".startswith(f"{ours}.")), key=len, default="")
    return f"{names.get(known, known)}{module.removeprefix(known)}.{leaf}"


# ---------------- a model's variables ----------------


def _abstract(model: nn.Module) -> dict[str, Any]:
    """Shapes of the variables that PyTorch has too, by path; ValueError for a model without PyTorch names."""
    if not hasattr(model, "torch_names"):
        raise ValueError(f"{type(model).__name__} has no PyTorch names to load from")
    return _flat(jax.eval_shape(model.init, jax.random.key(0), model.example_inputs))


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict({name: dict(variables[name]) for name in _COLLECTIONS if name in variables}, sep="/")


def _dotted(path: str) -> str:
    """The name of a variable within its collection."""
    return path.partition("/")[2].replace("/", ".")


def _name(model: nn.Module, path: str) -> str:
    """PyTorch's name of a variable."""
    name = torch_name(_dotted(path), model.torch_names)
    if not path.startswith("batch_stats/"):
        return name
    module, dot, leaf = name.rpartition(".")
    return module + dot + {"mean": "running_mean", "var": "running_var"}.get(leaf, leaf)


def _places(model: nn.Module, wanted: Mapping[str, Any]) -> dict[str, _Place]:
    """{PyTorch's name: its place}, the layers of a stack in order."""
    places: dict[str, _Place] = {}
    for path, leaf in wanted.items():
        name = _name(model, path)
        layers = range(leaf.shape[0]) if "*" in name else [0]
        place = _Place(path, _torch_shape(path, leaf.shape["*" in name :]))
        places |= {name.replace("*", str(layer)): place for layer in layers}
    return places


def _head(model: nn.Module, wanted: Mapping[str, Any]) -> set[str]:
    """Paths of the parameters whose shape follows from the number of classes."""
    other = _abstract(model.clone(num_classes=model.num_classes + 1))
    return {path for path, leaf in wanted.items() if other[path].shape != leaf.shape}


# ---------------- layouts of one layer's array ----------------


def _torch_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path.endswith("/kernel") and len(shape) > 1:
        return (shape[-1], shape[-2], *shape[:-2])
    return (1, *shape) if _is_shift(path) else shape


def _is_shift(path: str) -> bool:
    """Whether it is RAA's shift, in PyTorch a Linear to one feature, which keeps an axis for it."""
    return path.endswith(("/shift_kernel", "/shift_bias"))


def _to_torch(model: nn.Module, path: str, array: np.ndarray) -> np.ndarray:
    """Linear [in, out] -> [out, in]; convolution [H, W, in, out] -> [out, in, H, W]."""
    if flattened := getattr(model, "torch_flattened", {}).get(_dotted(path).removesuffix(".kernel")):
        channels, height, width = flattened
        return array.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(array.shape[::-1])
    if path.endswith("/kernel") and array.ndim > 1:
        return np.moveaxis(array, (-2, -1), (1, 0))
    return array[None] if _is_shift(path) else array


def _from_torch(model: nn.Module, path: str, array: np.ndarray) -> np.ndarray:
    """The way back."""
    if flattened := getattr(model, "torch_flattened", {}).get(_dotted(path).removesuffix(".kernel")):
        return array.reshape(-1, *flattened).transpose(2, 3, 1, 0).reshape(array.shape[::-1])
    if path.endswith("/kernel") and array.ndim > 1:
        return np.moveaxis(array, (1, 0), (-2, -1))
    return array[0] if _is_shift(path) else array


def _as_linear(model: nn.Module, path: str, array: np.ndarray) -> np.ndarray:
    """A convolution [out, C, H, W] over all of a map as the Linear [out, C * H * W] that it is."""
    one = {_dotted(path).removesuffix(".kernel"): (array.shape[1], 1, 1)}
    flattened = {**one, **getattr(model, "torch_flattened", {})}
    fits = array.shape[1:] == tuple(flattened[next(iter(one))])
    return array.reshape(len(array), -1) if fits else array


# ---------------- arrays of a state dict ----------------


def _read(model: nn.Module, source: Any) -> tuple[str, Mapping[Any, Any]]:
    """What errors begin with, and the state dict."""
    if isinstance(source, Mapping):
        return "", state_dict(source)
    if isinstance(source, str | os.PathLike):
        path = pathlib.Path(source)
        if path.is_dir():
            check_architecture(model, path)
        file = weights_file(path)
        return f"{file}: ", read_weights(file)
    raise TypeError(
        f"variables_from_torch: takes a mapping of arrays by name or the path of a file; got a {type(source).__name__}"
    )


def _renamed(where: str, arrays: Mapping[Any, Any], aliases: Mapping[str, str | None]) -> dict[Any, Any]:
    """The state dict under the names of ``torch_names``, without counts of batches and what is to be left out."""
    names = {name: name for name in arrays}
    texts = all(isinstance(name, str) for name in arrays)
    while texts and names and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), "")):
        names = {name.removeprefix(prefix): own for name, own in names.items()}
    renamed = {}
    for name, own in names.items():
        if isinstance(name, str):
            if name.rpartition(".")[2] == "num_batches_tracked":
                continue
            if any(other is None and re.search(pattern, name) for pattern, other in aliases.items()):
                continue
            for pattern, other in aliases.items():
                name = re.sub(pattern, other or "", name)
        if name in renamed:
            raise ValueError(f"{where}{name!r} is given twice, under two names")
        renamed[name] = arrays[own]
    return renamed


def _numbers(where: str, name: str, value: Any) -> np.ndarray:
    """The array as float32; ValueError for what is no array of finite floating numbers."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}{name!r} must be an array of numbers; got a {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{where}{name!r} must be an array of floating numbers; got {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}{name!r} has numbers that are not finite in float32")
    return array


def _resized(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Position embeddings [1, P + G * G, D] for another grid, or None where it is not that.

    The first P, of other tokens, stay. No two squares differ by 1 or 2, so P follows from the lengths.
    """
    if not _POSITIONS.fullmatch(name.rpartition(".")[2]) or array.ndim != 3 or array.shape[::2] != shape[::2]:
        return None
    for others in range(3):
        old, new = (math.isqrt(max(n - others, 0)) for n in (array.shape[1], shape[1]))
        if old and new and (old**2, new**2) == (array.shape[1] - others, shape[1] - others):
            grid = array[:, others:].reshape(1, old, old, -1)
            grid = jax.image.resize(grid, (1, new, new, shape[2]), "bicubic")
            return np.concatenate([array[:, :others], np.asarray(grid).reshape(1, new * new, -1)], axis=1)
    return None
