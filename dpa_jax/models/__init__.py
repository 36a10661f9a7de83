"""Models by name. A new one: a file here that takes ``activation=``, and a line in `MODELS`, or `register`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from dpa_jax.checks import INT32, add_factory, check_choice, check_options, check_sizes
from dpa_jax.models.alexnet import AlexNet
from dpa_jax.models.bert import Bert
from dpa_jax.models.cait import CaiT
from dpa_jax.models.deit import DeiT
from dpa_jax.models.gcn import GCN
from dpa_jax.models.graphsage import GraphSAGE
from dpa_jax.models.mobilenet_v1 import MobileNetV1
from dpa_jax.models.mobilenet_v2 import MobileNetV2
from dpa_jax.models.pvt import PVT
from dpa_jax.models.resnet import ResNet
from dpa_jax.models.shufflenet_v2 import ShuffleNetV2
from dpa_jax.models.tnt import TNT
from dpa_jax.models.torch import to_torch, variables_from_torch
from dpa_jax.models.vgg import VGG
from dpa_jax.models.vit import ViT

_LARGE: dict[str, Any] = {"image_size": 224, "small_images": False}  # the published form of convolutional networks
_BERT_BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}

MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "alexnet_224": functools.partial(AlexNet, **_LARGE),
    "bert": Bert,
    "bert_base_uncased": functools.partial(Bert, intermediate_size=3072, **_BERT_BASE),
    "cait": CaiT,
    "cait_xxs24_patch4_32": functools.partial(CaiT, image_size=32, patch_size=4),
    "cait_xxs24_patch16_224": functools.partial(CaiT, image_size=224, patch_size=16),
    "deit": DeiT,
    "deit_tiny_patch4_32": functools.partial(DeiT, image_size=32, patch_size=4),
    "deit_tiny_patch16_224": functools.partial(DeiT, image_size=224, patch_size=16),
    "gcn": GCN,
    "graphsage": GraphSAGE,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v1_224": functools.partial(MobileNetV1, **_LARGE),
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v2_224": functools.partial(MobileNetV2, **_LARGE),
    "pvt": PVT,
    "pvt_tiny_patch2_32": functools.partial(PVT, image_size=32, patch_size=2),
    "pvt_tiny_patch4_32": functools.partial(PVT, image_size=32, patch_size=4),
    "pvt_tiny_patch4_224": functools.partial(PVT, image_size=224, patch_size=4),
    "resnet": ResNet,
    "resnet18": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2)),
    "resnet18_224": functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), **_LARGE),
    "shufflenet_v2": ShuffleNetV2,
    "shufflenet_v2_224": functools.partial(ShuffleNetV2, **_LARGE),
    "textgcn": functools.partial(GCN, hidden=200),
    "tnt": TNT,
    "tnt_small_patch4_32": functools.partial(TNT, image_size=32, patch_size=4, first_stride=1),
    "tnt_small_patch16_224": functools.partial(TNT, image_size=224, patch_size=16, first_stride=4),
    "vgg11": VGG,
    "vgg11_224": functools.partial(VGG, **_LARGE),
    "vgg11_bn": functools.partial(VGG, batch_norm=True),
    "vgg11_bn_224": functools.partial(VGG, batch_norm=True, **_LARGE),
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


__all__ = ["MODELS", "PVT", "VGG", "AlexNet", "Bert", "CaiT", "DeiT", "MobileNetV1", "MobileNetV2", "ResNet"]
__all__ += ["TNT", "ShuffleNetV2", "ViT", "create", "register", "to_torch", "variables_from_torch"]
