"""Models by name. A new one: a file here that takes ``activation=``, and a line in `MODELS`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dpa_jax.checks import check_choice
from dpa_jax.models.resnet import ResNet
from dpa_jax.models.torch import params_from_torch
from dpa_jax.models.vit import ViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    "vit": ViT,
    "vit_tiny_patch4_32": functools.partial(ViT, image_size=32, patch_size=4),
    "vit_tiny_patch16_224": functools.partial(ViT, image_size=224, patch_size=16),
}


def create(name: str, num_classes: int, **options) -> nn.Module:
    """A model by name.

    Args:
        name: a key of `MODELS`: ``"vit"`` or a named size of it.
        num_classes: K, the width of the logits.
        **options: attributes of the model: ``activation=`` (a factory, see `dpa_jax.activation`), sizes.

    Returns:
        A linen module; ``model.apply(variables, images, labels=None, train=False)`` returns logits [B, K].

    Raises:
        ValueError: for an unknown name or option, with the nearest one.
    """
    check_choice("models.create", "name", name, MODELS)
    factory = MODELS[name]
    fields = inspect.signature(model_class(name)).parameters.keys() - {"parent", "name"}
    for option in options:
        check_choice(f"model {name!r}", "an option", option, sorted(fields))
    return factory(num_classes=num_classes, **options)


def model_class(name: str) -> Any:
    """The class that a key of `MODELS` makes modules of; its ``pool`` is what its activations want."""
    factory: Any = MODELS[name]
    return factory.func if isinstance(factory, functools.partial) else factory


__all__ = ["MODELS", "ResNet", "ViT", "create", "model_class", "params_from_torch"]
