"""The configuration of a run: every key with its default, and the check that refuses what cannot run.

A configuration file starts from `default_config` and changes keys; the command line changes them again::

    def get_config():
        config = default_config()
        config.batch_size = 64
        return config
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dpa_jax.checks import check_choice, check_range
from dpa_jax.data.augment import parse_policy

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
SCHEDULES = ("cosine", "step", "multistep", "constant")
PRECISIONS = ("float32", "bfloat16")
CROPS = ("none", "pad", "resized")
INTERPOLATIONS = ("bilinear", "bicubic", "random")
RESIDENCES = ("auto", "device", "host")
CORRUPT = ("refuse", "replace")

# What a mechanism may add to the loss. A configuration may weigh one that its own mechanism does not have:
# the mechanism is what the command line changes.
PENALTIES = ("channel", "arr", "aux", "gate")

# What is in these is for the activation, the model and the loss to say: any key may be added.
FREE = ("mechanism_options", "coefficients", "model_options")


def default_config() -> ConfigDict:
    """Every key a run has, at its default.

    Returns:
        A locked ConfigDict: setting a key that it does not have raises, with the nearest one named.
        `mechanism_options`, `coefficients` and `model_options` alone take new keys.
    """
    config = ConfigDict(
        {
            # A name that `dpa_jax.activation` knows, or dnrt (RAA, with ARR behind every block); the options it has.
            "mechanism": "dpa",
            "mechanism_options": {},
            # The weight of each penalty in the loss; these are the papers' for CIFAR-100.
            "coefficients": {"channel": 5.0, "arr": 20.0, "aux": 1.0, "gate": 200.0},
            # The architecture: a name that `dpa_jax.models.create` knows, and its sizes.
            "model": "vit",
            "model_options": {},
            # Images in a training batch and in an evaluation batch, over all devices together.
            "batch_size": 256,
            "eval_batch_size": 256,
            # How often the training images are gone through.
            "epochs": 300,
            # Of the initial parameters, the order of the images, augmentation and dropout.
            "seed": 0,
            # The share of the target that is spread evenly over all classes.
            "label_smoothing": 0.0,
            # What the model computes in; parameters, memories and the loss are float32 always.
            "precision": "float32",
            # Gradients are scaled down to this global norm; 0 leaves them as they are.
            "clip_norm": 1.0,
            "optimizer": {
                "name": "adamw",
                # The highest rate; the schedule leads to it and down from it.
                "learning_rate": 1e-3,
                # On every parameter: decoupled for adamw, added to the gradient for the others.
                "weight_decay": 0.05,
                # adamw and adam: decay of the running mean of gradients.
                "beta1": 0.9,
                # adamw, adam and rmsprop: decay of the running mean of squared gradients.
                "beta2": 0.999,
                # adamw, adam and rmsprop: added to the root of that mean.
                "eps": 1e-8,
                # sgd and rmsprop.
                "momentum": 0.9,
            },
            "schedule": {
                "name": "cosine",
                # Epochs over which the rate rises from warmup_learning_rate to optimizer.learning_rate.
                "warmup_epochs": 0,
                "warmup_learning_rate": 1e-6,
                # cosine: the rate at the end.
                "min_learning_rate": 0.0,
                # step: the rate falls by gamma each time so many epochs after the warm-up have passed.
                "step_epochs": 30,
                # multistep: the same after each of these numbers of epochs.
                "milestones": (150, 225),
                "gamma": 0.1,
            },
            "data": {
                # Where images come from: digits, cifar10, cifar100, imagenet, imagenet100, folder, parquet,
                # synthetic, or tfds:NAME for a set that TFDS has prepared.
                "name": "digits",
                # The folder to look in; empty: the usual places.
                "dir": "",
                # Fetch what is missing.
                "download": False,
                # synthetic: what is made.
                "image_size": 32,
                "channels": 3,
                "num_classes": 10,
                "train_examples": 2048,
                "test_examples": 512,
                # Where the images are kept: on the device, in the host's memory, or wherever they fit.
                "resident": "auto",
                # Per channel, of images scaled to [0, 1]; empty: the source's own.
                "mean": (),
                "std": (),
                # How many times more training images the first class keeps than the last (a long tail); 1: all stay.
                "imbalance": 1.0,
                # Images that are read at every step: processes that decode them; 0: threads of this one.
                "workers": 0,
                # An image that can't be decoded: refuse (stop and name it) or replace (warn and take the next).
                "corrupt": "refuse",
            },
            "augment": {
                # The width and height that the model gets; 0: as the images are stored.
                "image_size": 0,
                # Training: none, pad (random crop of the padded image), resized (random resized crop).
                "crop": "none",
                # pad: pixels added on each side.
                "padding": 4,
                # resized: the share of the area and the width-to-height ratio that are drawn from.
                "scale": (0.08, 1.0),
                "ratio": (3 / 4, 4 / 3),
                "interpolation": "random",
                # The probability of a horizontal flip.
                "flip": 0.0,
                # Random operations in timm's words, like rand-m9-mstd0.5-inc1; empty: none.
                "rand_augment": "",
                # How far brightness, contrast and saturation (factors 1 - x .. 1 + x) and hue (-x .. x turns) may go.
                "color_jitter": (0.0, 0.0, 0.0, 0.0),
                # The probability that a rectangle becomes noise.
                "erase": 0.0,
                # Pairs of images are mixed, weighed by a draw from Beta(alpha, alpha); 0: none. With both, either.
                "mixup": 0.0,
                "cutmix": 0.0,
                # Evaluation: resize to this before the centre crop; 0: no resize.
                "eval_resize": 0,
            },
            "checkpoint": {
                # How many of the latest are kept, beside the best.
                "keep": 3,
                # Steps between them; 0: at the end of each epoch only.
                "every_steps": 0,
            },
            # Epochs between evaluations; the last epoch is always followed by one.
            "eval_every_epochs": 1,
            # Seconds between progress lines where the output is not a terminal.
            "log_every_seconds": 10.0,
        }
    )
    config.lock()
    for name in FREE:
        config[name].unlock()
    return config


def validate(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that cannot run, before anything is loaded or compiled.

    The names of the mechanism, the model and the data are for their registries to check.

    Args:
        config: as `default_config` makes it, with other values.

    Raises:
        ValueError: for an unknown key (with the nearest one), a missing key, a value of another type than the
            default's, or a value that makes no sense; the key is named with its dots.
    """
    _check_structure("", config, default_config())

    for path in ("batch_size", "eval_batch_size", "epochs", "eval_every_epochs"):
        _check_range(config, path, low=1)
    _check_range(config, "seed", low=0, high=2**32 - 1)
    _check_range(config, "label_smoothing", low=0.0, high=1.0)
    _check_range(config, "clip_norm", low=0.0)
    _check_range(config, "log_every_seconds", low=0.0)
    check_choice("config", "precision", config["precision"], PRECISIONS)
    for name, value in config["coefficients"].items():
        check_choice("config", "a key of coefficients", name, PENALTIES)
        if not _is_number(value):
            raise ValueError(f"config: coefficients.{name} must be a number; got {value!r}")

    check_choice("config", "optimizer.name", config["optimizer"]["name"], OPTIMIZERS)
    _check_positive(config, "optimizer.learning_rate")
    _check_positive(config, "optimizer.eps")
    _check_range(config, "optimizer.weight_decay", low=0.0)
    _check_range(config, "optimizer.momentum", low=0.0, high=1.0)
    for name in ("beta1", "beta2"):
        if not 0 <= config["optimizer"][name] < 1:  # at 1 the correction of the bias divides by 0
            raise ValueError(f"config: optimizer.{name} must be in [0, 1); got {config['optimizer'][name]}")

    schedule = config["schedule"]
    check_choice("config", "schedule.name", schedule["name"], SCHEDULES)
    _check_range(config, "schedule.warmup_epochs", low=0)
    if schedule["warmup_epochs"] > config["epochs"]:
        raise ValueError(
            f"config: schedule.warmup_epochs must be at most epochs; got {schedule['warmup_epochs']} of "
            f"{config['epochs']}. Set both for a shorter run: --config.schedule.warmup_epochs={config['epochs']}."
        )
    _check_range(config, "schedule.warmup_learning_rate", low=0.0)
    _check_range(config, "schedule.min_learning_rate", low=0.0, high=config["optimizer"]["learning_rate"])
    _check_range(config, "schedule.step_epochs", low=1)
    _check_positive(config, "schedule.gamma")
    milestones = schedule["milestones"]
    if not all(type(m) is int and m >= 1 for m in milestones) or list(milestones) != sorted(set(milestones)):
        raise ValueError(
            f"config: schedule.milestones must be whole numbers of epochs, rising, from 1; got {milestones}"
        )

    for name in ("image_size", "channels", "num_classes", "train_examples", "test_examples"):
        _check_range(config, f"data.{name}", low=1)
    check_choice("config", "data.resident", config["data"]["resident"], RESIDENCES)
    check_choice("config", "data.corrupt", config["data"]["corrupt"], CORRUPT)
    _check_range(config, "data.workers", low=0)
    _check_range(config, "data.imbalance", low=1.0)

    check_choice("config", "augment.crop", config["augment"]["crop"], CROPS)
    check_choice("config", "augment.interpolation", config["augment"]["interpolation"], INTERPOLATIONS)
    for name in ("image_size", "padding", "eval_resize"):
        _check_range(config, f"augment.{name}", low=0)
    for name in ("flip", "erase"):
        _check_range(config, f"augment.{name}", low=0.0, high=1.0)
    for name in ("mixup", "cutmix"):
        _check_range(config, f"augment.{name}", low=0.0)
    if config["augment"]["rand_augment"]:
        parse_policy(config["augment"]["rand_augment"])
    amounts = config["augment"]["color_jitter"]
    if len(amounts) != 4 or not all(_is_number(amount) and amount >= 0 for amount in amounts) or amounts[3] > 0.5:
        raise ValueError(
            "config: augment.color_jitter must be 4 numbers, for brightness, contrast, saturation and hue, none "
            f"under 0 and the last at most 0.5; got {amounts}"
        )
    _check_interval(config, "augment.scale", high=1.0)
    _check_interval(config, "augment.ratio")

    _check_range(config, "checkpoint.keep", low=1)
    _check_range(config, "checkpoint.every_steps", low=0)


def _check_structure(path: str, given: Any, default: Any) -> None:
    """Raises ValueError unless `given` has the keys and types of `default`."""
    if isinstance(default, ConfigDict):
        if not isinstance(given, Mapping | ConfigDict):
            raise ValueError(f"config: {path} must be a group of keys; got {_described(given)}")
        if path in FREE:
            return
        prefix = f"{path}." if path else ""
        for key in given:
            if key not in default:
                raise ValueError(f"config: there is no key {prefix}{key}. {_nearest_key(prefix, key)}")
        for key in default:
            if key not in given:
                raise ValueError(f"config: the key {prefix}{key} is missing; start from default_config()")
            _check_structure(prefix + key, given[key], default[key])
    else:
        check_type(path, given, default)


def check_key(path: str) -> None:
    """Raises ValueError, with the nearest one, unless there is a key of this name; groups are told by dots."""
    group: Any = default_config()
    prefix = ""
    for key in path.split("."):
        if prefix.rstrip(".") in FREE:
            return
        if not isinstance(group, ConfigDict):
            raise ValueError(f"config: {prefix.rstrip('.')} is no group of keys; got {path}")
        if key not in group:
            raise ValueError(f"config: there is no key {prefix}{key}. {_nearest_key(prefix, key)}")
        group, prefix = group[key], f"{prefix}{key}."


def check_type(path: str, given: Any, default: Any) -> None:
    """Raises ValueError unless `given` is of the type of `default`; an int is fine where a float is wanted."""
    if isinstance(default, float):
        if not _is_number(given):
            raise ValueError(f"config: {path} must be a finite float; got {_described(given)}")
    elif type(given) is not type(default):
        raise ValueError(f"config: {path} must be of type {type(default).__name__}; got {_described(given)}")


def _nearest_key(prefix: str, key: str) -> str:
    """A sentence naming the key most like `key`: in the group that it was looked for in, else in any."""
    keys: dict[str, list[str]] = {"": []}
    for name, value in default_config().items():
        keys[""].append(name)
        if isinstance(value, ConfigDict):
            keys[f"{name}."] = list(value)
    for group in (prefix, *keys):
        nearest = difflib.get_close_matches(key, keys[group], n=1)
        if nearest:
            return f"Did you mean {group}{nearest[0]}?"
    return f"The keys there are {', '.join(keys[prefix])}."


def _described(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _get(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = value[key]
    return value


def _check_range(config: Mapping[str, Any], path: str, low: float | None = None, high: float | None = None) -> None:
    check_range("config", path, _get(config, path), low, high)


def _check_positive(config: Mapping[str, Any], path: str) -> None:
    if _get(config, path) <= 0:
        raise ValueError(f"config: {path} must be more than 0; got {_get(config, path)}")


def _check_interval(config: Mapping[str, Any], path: str, high: float = math.inf) -> None:
    interval = _get(config, path)
    if len(interval) != 2 or not all(map(_is_number, interval)) or not 0 < interval[0] <= interval[1] <= high:
        upper = "" if high == math.inf else f", at most {high}"
        raise ValueError(f"config: {path} must be (low, high), more than 0{upper}; got {interval}")
