"""Models by name. A new one: a file here that takes ``activation=``, and a line in `MODELS`, or `register`."""

import functools
from collections.abc import Callable

import flax.linen as nn

from dpa_jax.checks import add_factory, check_choice, check_options
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
    """A linen model of `MODELS` by name; options are its attributes: ``activation=`` (`dpa_jax.activation`), sizes.

    ``model.apply(variables, inputs, labels=None, train=False)`` returns logits [B, num_classes], and
    ``model.example_inputs`` are the shapes and dtypes of its inputs, with a batch axis of 1.

    Raises:
        ValueError: for an unknown name or option, with the nearest one, and for an option of another type.
    """
    check_choice("models.create", "name", name, MODELS)
    check_options(f"model {name!r}", MODELS[name], options, given=("num_classes",))
    return MODELS[name](num_classes=num_classes, **options)


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Adds a model, so that `create` and the configurations know it by name.

    The factory is a linen module class, or what takes its options by name, ``num_classes`` and ``activation`` among
    them. Its modules have ``example_inputs`` and are called as `create` says.

    Raises:
        ValueError: if the name is taken.
        TypeError: if ``factory`` cannot be called.
    """
    add_factory(MODELS, name, factory)


__all__ = ["MODELS", "ResNet", "ViT", "create", "params_from_torch", "register"]
