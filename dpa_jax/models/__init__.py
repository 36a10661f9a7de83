"""Models by name. A new one: a file here that takes ``activation=``, and a line in `MODELS`, or `register`."""

import functools
from collections.abc import Callable

import flax.linen as nn

from dpa_jax.checks import INT32, add_factory, check_choice, check_options, check_sizes
from dpa_jax.models.resnet import ResNet
from dpa_jax.models.torch import to_torch, variables_from_torch
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
        TypeError: for an activation that is no factory, and a registered factory that makes no model.
    """
    check_choice("models.create", "name", name, MODELS)
    check_options(f"model {name!r}", MODELS[name], options, given=("num_classes",))
    check_sizes("models.create", {"num_classes": num_classes}, high=INT32)
    model = MODELS[name](num_classes=num_classes, **options)
    if not isinstance(model, nn.Module) or not hasattr(model, "example_inputs"):
        raise TypeError(f"models.create: the factory of {name!r} must make linen modules with example_inputs")
    return model


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Adds a model, so that `create` and the configurations know it by name.

    The factory is a linen module class, or what takes its options by name, ``num_classes`` and ``activation`` among
    them. Its modules have ``example_inputs`` and are called as `create` says.

    Raises:
        ValueError: if the name is taken.
        TypeError: if the name is no string or ``factory`` cannot be called.
    """
    add_factory(MODELS, name, factory)


__all__ = ["MODELS", "ResNet", "ViT", "create", "register", "to_torch", "variables_from_torch"]
