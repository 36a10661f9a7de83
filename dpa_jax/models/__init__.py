"""Models by name. A new one: a file here that takes ``activation=``, and a line in `MODELS`, or `register`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from dpa_jax.checks import check_choice, check_options
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
"""Name -> factory of models; `register` adds to it."""


def create(name: str, num_classes: int, **options) -> nn.Module:
    """A model by name.

    Args:
        name: a key of `MODELS`: ``"vit"`` or a named size of it.
        num_classes: K, the width of the logits.
        **options: attributes of the model: ``activation=`` (a factory, see `dpa_jax.activation`), sizes.

    Returns:
        A linen module; ``model.apply(variables, inputs, labels=None, train=False)`` returns logits [B, K], and
        ``model.example_inputs`` are the shapes and dtypes of its inputs, with a batch axis of 1.

    Raises:
        ValueError: for an unknown name or option, with the nearest one, and for an option of another type.
    """
    check_choice("models.create", "name", name, MODELS)
    check_options(f"model {name!r}", MODELS[name], options, given=("num_classes",))
    return MODELS[name](num_classes=num_classes, **options)


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Adds a model, so that `create` and the configurations know it by name.

    Args:
        name: not taken yet.
        factory: a linen module class, or what takes its options by name, ``num_classes`` and ``activation`` among
            them. Its modules have ``example_inputs`` and are called as `create` says.

    Raises:
        ValueError: if the name is taken.
        TypeError: if ``factory`` cannot be called.
    """
    if name in MODELS:
        raise ValueError(f"register: the name {name!r} is taken by {MODELS[name]}; choose another")
    if not callable(factory):
        raise TypeError(f"register: factory must be a module class or another callable; got {factory!r}")
    MODELS[name] = factory


__all__ = ["MODELS", "ResNet", "ViT", "create", "params_from_torch", "register"]
