"""What follows from a key that the command line changes, unless it is given too."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpa_jax.checks import INT32
from dpa_jax.config import longest_warmup, validate


class Paper(NamedTuple):
    """A model of the papers, which have it for 32 and for 224 pixels, and what its runs set."""

    small: str
    large: str
    stochastic_depth: bool = False  # whether it has any; how much is the recipe's
    channel: float | None = 1.0  # the weight of DPA's channel penalty; None: that of ViT on the same data


PAPERS = {
    "alexnet": Paper("alexnet", "alexnet_224"),
    "cait_xxs24": Paper("cait_xxs24_patch4_32", "cait_xxs24_patch16_224", stochastic_depth=True),
    "deit_tiny": Paper("deit_tiny_patch4_32", "deit_tiny_patch16_224", stochastic_depth=True, channel=None),
    "mobilenet_v1": Paper("mobilenet_v1", "mobilenet_v1_224"),
    "mobilenet_v2": Paper("mobilenet_v2", "mobilenet_v2_224"),
    "pvt_tiny": Paper("pvt_tiny_patch2_32", "pvt_tiny_patch4_224", stochastic_depth=True),
    "resnet18": Paper("resnet18", "resnet18_224"),
    "shufflenet_v2": Paper("shufflenet_v2", "shufflenet_v2_224"),
    "tnt_small": Paper("tnt_small_patch4_32", "tnt_small_patch16_224", stochastic_depth=True, channel=None),
    "vgg11": Paper("vgg11", "vgg11_224"),
    "vgg11_bn": Paper("vgg11_bn", "vgg11_bn_224"),
    "vit_tiny": Paper("vit_tiny_patch4_32", "vit_tiny_patch16_224", stochastic_depth=True, channel=None),
}
"""By the name that the command line takes for both sizes."""


def follow_model(config: ConfigDict, before: ConfigDict, given: Collection[str]) -> str:
    """Gives a run of another model what the papers set for it: the form for the size of the images, and `PAPERS`' rest.

    Of the model's options the size of the images and the stochastic depth stay; the others were the old model's.

    Args:
        config: what is changed; it need not be valid.
        before: the same configuration before `model` was changed.
        given: the keys that were set together with `model`; these stay as they are.

    Returns:
        A note of what was changed; "" where nothing was, as with a model that is not the papers'.
    """
    known = {name: paper for short, paper in PAPERS.items() for name in (short, paper.small, paper.large)}
    if (paper := known.get(config.model)) is None or config.model == before.model or "model_options" in given:
        return ""
    if config.model in PAPERS:
        config.model = paper.large if config.augment.image_size >= 64 else paper.small
    changes = [f"model is {config.model}"]
    stay = ("image_size", "stochastic_depth")[: 1 + paper.stochastic_depth]
    for name in set(before.model_options) - {*stay, *(key.removeprefix("model_options.") for key in given)}:
        del config.model_options[name]
        changes.append(f"without model_options.{name}")
    if paper.channel is not None and "coefficients.channel" not in given and "channel" in config.coefficients:
        if config.coefficients.channel != paper.channel:
            changes.append(f"coefficients.channel from {config.coefficients.channel} to {paper.channel}")
        config.coefficients.channel = paper.channel
    return f"note: {', '.join([changes[0], *sorted(changes[1:])])}"


# The keys of a schedule that are numbers of epochs, by its name.
_LENGTHS = {
    "cosine": ("warmup_epochs",),
    "constant": ("warmup_epochs",),
    "step": ("warmup_epochs", "step_epochs"),
    "multistep": ("warmup_epochs", "milestones"),
}


def follow_epochs(config: ConfigDict, before: ConfigDict, given: Collection[str]) -> str:
    """Gives the schedule's numbers of epochs the share of `epochs` that they had before `epochs` was changed.

    Args:
        config: what they are changed in; it need not be valid.
        before: the same configuration before the change; where it is not valid, nothing is done.
        given: the keys that were set together with `epochs`; these stay as they are.

    Returns:
        A note of what was changed; "" where nothing was.
    """
    try:
        validate(before)
    except ValueError:
        return ""
    old, new = before.epochs, config.epochs
    if new < 1 or "schedule" in given:
        return ""

    def share(epochs: int, least: int, most: int = INT32) -> int:
        return max(least, min(round(epochs * new / old), most))

    changes = []
    for name in _LENGTHS.get(config.schedule.name, ()):
        value = config.schedule[name]
        if f"schedule.{name}" in given or value != before.schedule[name]:  # the latter: it follows epochs by itself
            continue
        if name == "milestones":
            now: Any = tuple(sorted({share(epochs, 1) for epochs in value}))
        elif name == "step_epochs":
            now = share(value, 1)
        else:
            now = share(value, 0, longest_warmup(config.schedule.name, new))
        if now != value:
            config.schedule[name] = now
            changes.append(f"schedule.{name} from {value} to {now}")
    return f"note: epochs changed from {old} to {new}, and in proportion {', '.join(changes)}" if changes else ""


FOLLOWED = {"model": follow_model, "epochs": follow_epochs}
"""What a change of these keys has others follow."""
