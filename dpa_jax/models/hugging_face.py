"""Folders of weights as Hugging Face has them: ``config.json`` with the architecture, and a file of tensors."""

import json
import pathlib
from typing import Any

import flax.linen as nn

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def weights_file(path: pathlib.Path) -> pathlib.Path:
    """The file of weights that a path means: itself, or the one in a folder; FileNotFoundError if that has none."""
    if not path.is_dir():
        return path
    found = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"there is no {' or '.join(_WEIGHTS)} in the folder {path}")
    return found[0]


def check_architecture(model: nn.Module, folder: pathlib.Path) -> None:
    """Compares a folder's ``config.json`` with a model.

    The model has the attribute ``hugging_face``, {key of ``config.json``: its value for all models of this class, or
    None for an attribute of the same name}.

    Raises:
        FileNotFoundError: if there is no ``config.json``.
        ValueError: for a model without that attribute, a file that is no JSON object, another architecture, and sizes
            that differ, naming all of them with both values.
    """
    owner, wanted = type(model).__name__, getattr(model, "hugging_face", None)
    if wanted is None:
        raise ValueError(f"{folder} is a folder, and {owner} is loaded from files alone")
    told = _config(folder / "config.json")
    for key, value in wanted.items():
        if value is not None and told.get(key, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: another architecture than {owner}: {key} is {told[key]!r}, not {value!r}"
            )
    sizes = {key: getattr(model, key) for key, value in wanted.items() if value is None}
    if other := [key for key, size in sizes.items() if told.get(key, "missing") != size]:
        raise ValueError(
            f"{folder / 'config.json'}: "
            + ", ".join(f"{key} is {told.get(key, 'missing')}, the model's {sizes[key]}" for key in other)
            + "; give the model these sizes, and the data this folder's vocabulary"
        )


def _config(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}, which says what the weights beside it are of")
    try:
        told = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{file} is damaged: it is no JSON object")
    return told
