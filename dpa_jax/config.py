"""The configuration of a run: every key with its default, its meaning and its check.

A configuration file starts from `default_config` and changes keys; the command line changes them again::

    def get_config():
        config = default_config()
        config.batch_size = 64
        return config
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpa_jax.activations import default_coefficients
from dpa_jax.checks import INT32, MAX_SIZE, check_choice, check_count, check_range, check_type, is_number

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop")
SHARDINGS = ("data", "fsdp")
SCHEDULES = ("cosine", "step", "multistep", "constant")
MAX_SEED = 2**32 - 1

Check = Callable[[str, Any], None]  # (key with its dots, value) -> None; raises ValueError


class Key(NamedTuple):
    """One key of a configuration."""

    # Decides the type. A dict is a group of any keys: the activation, the model and the loss say which they know.
    default: Any
    # What it means, for the help of the command line.
    about: str
    # Refuses values that make no sense.
    check: Check = lambda path, value: None
    # Whether another value gives other figures; if so, a run cannot go on with it unasked.
    changes_figures: bool = True


def _must(be: str, holds: Callable[[Any], bool]) -> Check:
    def check(path: str, value: Any) -> None:
        if not holds(value):
            raise ValueError(f"config: {path} must be {be}; got {value}")

    return check


def _range(low: float, high: float | None = None) -> Check:
    return lambda path, value: check_range("config", path, value, low, high)


def _count(low: int, high: int = INT32) -> Check:
    return lambda path, value: check_count("config", path, value, low, high)


def _one_of(*names: str) -> Check:
    return lambda path, value: check_choice("config", path, value, names)


def _numbers(values: tuple, count: int) -> bool:
    return len(values) == count and all(map(is_number, values))


_positive = _must("more than 0", lambda value: value > 0)
_decay = _must("in [0, 1)", lambda value: 0 <= value < 1)  # at 1 the correction of the bias divides by 0
_rising = _must(
    f"whole numbers of epochs, rising, from 1 to {INT32}",
    lambda epochs: all(type(e) is int and 1 <= e <= INT32 for e in epochs) and list(epochs) == sorted(set(epochs)),
)
_means = _must("numbers in [0, 1], one a channel", lambda m: _numbers(m, len(m)) and all(0 <= x <= 1 for x in m))
_deviations = _must("numbers from 1e-6, one a channel", lambda s: _numbers(s, len(s)) and all(x >= 1e-6 for x in s))
_interval = _must("(low, high), more than 0", lambda i: _numbers(i, 2) and 0 < i[0] <= i[1])
_shares = _must("(low, high), more than 0, at most 1.0", lambda i: _numbers(i, 2) and 0 < i[0] <= i[1] <= 1)
_jitter = _must(
    "4 numbers, for brightness, contrast, saturation and hue, none under 0 or over 100 and the last at most 0.5",
    lambda amounts: _numbers(amounts, 4) and 0 <= min(amounts) <= max(amounts) <= 100 and amounts[3] <= 0.5,
)


_path = _must("a path", str.isprintable)


def _coefficients(path: str, coefficients: Mapping[str, Any]) -> None:
    for name, value in coefficients.items():
        check_choice("config", f"a key of {path}", name, default_coefficients())
        if not is_number(value):
            raise ValueError(f"config: {path}.{name} must be a number; got {value!r}")
        check_range("config", f"{path}.{name}", value, 0.0)


def _known_keys(path: str, text: str) -> None:
    for key in split_keys(text):
        check_key(key, f"config: {path}")


def _keys() -> dict[str, Any]:
    """Every key by name; a dict is a group of keys."""
    return {
        "mechanism": Key(
            "dpa", "dpa, aiec, dnrt (RAA, with ARR behind every block), or an activation's name; a wrong one lists all."
        ),
        "mechanism_options": Key(
            {}, "Options of the mechanism, such as mechanism_options.tau=0.1 for dpa; a wrong one lists all."
        ),
        # The mechanism may lack some of these penalties: it is what the command line changes.
        "coefficients": Key(
            default_coefficients(),
            "The weight of each penalty in the loss, such as coefficients.channel=5. Those of penalties that the "
            "mechanism does not have do nothing.",
            _coefficients,
        ),
        "model": Key("vit", "The architecture, such as vit, vit_tiny_patch4_32 or resnet18; a wrong name lists all."),
        "model_options": Key(
            {}, "Sizes and options of the model, such as model_options.depth=4; a wrong one lists all."
        ),
        "init_from": Key(
            "",
            "A file of PyTorch's weights for the model, .pth or .safetensors, that a run begins with, or a Hugging "
            "Face folder; empty: none.",
            _path,
        ),
        "batch_size": Key(256, "Examples in a training batch, over all devices together.", _count(1)),
        "eval_batch_size": Key(256, "Examples in an evaluation batch, over all devices together.", _count(1)),
        "epochs": Key(
            300,
            "How often the training set is gone through. Changed on the command line, the schedule's numbers of "
            "epochs change with it, in proportion, but for those that are given there as well.",
            _count(1),
        ),
        "seed": Key(
            0, "Decides initial parameters, order of the examples, augmentation and dropout.", _range(0, MAX_SEED)
        ),
        "label_smoothing": Key(
            0.0, "The share of the target that is spread evenly over all classes.", _range(0.0, 1.0)
        ),
        "precision": Key(
            "float32",
            "What the model computes in, float32 or bfloat16. Parameters, memories and the loss are float32 always.",
            _one_of("float32", "bfloat16"),
        ),
        "accumulate": Key(
            1,
            "Micro-batches that a training batch goes through the model in, one after the other: less memory for the "
            "same step. What is not quite the same is in docs/training.md.",
            _count(1),
        ),
        "remat": Key(
            False,
            "Transformers: what is in a block is computed again for its gradient, instead of kept: less memory, more "
            "work.",
            changes_figures=False,
        ),
        "sharding": Key(
            "data",
            "What the devices share: data (the batches alone), or fsdp (parameters, the optimiser's state and memories "
            "as well).",
            _one_of(*SHARDINGS),
            changes_figures=False,
        ),
        "clip_norm": Key(1.0, "Gradients are scaled down to this global norm; 0 leaves them as they are.", _range(0.0)),
        "optimizer": {
            "name": Key("adamw", f"One of {', '.join(OPTIMIZERS)}.", _one_of(*OPTIMIZERS)),
            "learning_rate": Key(1e-3, "The highest rate; the schedule leads to it and down from it.", _positive),
            "weight_decay": Key(
                0.05, "On optimizer.decayed: decoupled for adamw, added to the gradient for the others.", _range(0.0)
            ),
            "decayed": Key(
                "*", "Which parameters have weight decay: patterns of their paths between commas, such as head/*."
            ),
            "beta1": Key(0.9, "adamw, adam: decay of the running mean of gradients.", _decay),
            "beta2": Key(0.999, "adamw, adam, rmsprop: decay of the running mean of squared gradients.", _decay),
            "eps": Key(1e-8, "adamw, adam, rmsprop: added to the root of that mean.", _positive),
            "momentum": Key(0.9, "sgd, rmsprop: momentum.", _range(0.0, 1.0)),
        },
        "schedule": {
            "name": Key("cosine", f"One of {', '.join(SCHEDULES)}.", _one_of(*SCHEDULES)),
            "warmup_epochs": Key(0, "Epochs over which the rate rises to optimizer.learning_rate; 0: none.", _count(0)),
            "warmup_learning_rate": Key(1e-6, "The rate that the warm-up begins with.", _range(0.0)),
            "min_learning_rate": Key(
                0.0, "cosine: the rate at the end. It is reached warmup_epochs before the last epoch.", _range(0.0)
            ),
            "step_epochs": Key(
                30, "step: the rate falls by gamma each time so many epochs after the warm-up have passed.", _count(1)
            ),
            "milestones": Key(
                (150, 225),
                "multistep: the rate falls by gamma after each of these numbers of epochs, counted from the warm-up's "
                "end; those that never come do nothing.",
                _rising,
            ),
            "gamma": Key(0.1, "step, multistep: what the rate is multiplied with.", _positive),
        },
        "data": {
            "name": Key(
                "digits",
                "The data set: digits, cifar10, cifar100, imagenet, imagenet100, folder, parquet, synthetic, or "
                "tfds:NAME for a set that TFDS has prepared; of texts r8, mr, 20news, or text:PATH for your "
                "own; of graphs cora, citeseer, pubmed, dgraph, digits_graph, npz:PATH, and r8_graph, mr_graph, "
                "20news_graph, text_graph:PATH of documents and their words.",
            ),
            "dir": Key("", "The folder to look in; empty: the usual places.", changes_figures=False),
            "download": Key(False, "Fetch what is missing.", changes_figures=False),
            "image_size": Key(32, "synthetic: width and height.", _count(1, MAX_SIZE)),
            "channels": Key(3, "synthetic: channels.", _count(1, MAX_SIZE)),
            "num_classes": Key(10, "synthetic: classes.", _count(1)),
            "train_examples": Key(2048, "synthetic: training examples.", _count(1)),
            "test_examples": Key(512, "synthetic: evaluation examples.", _count(1)),
            "resident": Key(
                "auto",
                "Where the images are kept: on the device, in the host's memory, or (auto) wherever they fit. Images "
                "in files are cut with other draws on the device than on the host.",
                _one_of("auto", "device", "host"),
            ),
            "max_length": Key(128, "Texts: the tokens of an example; longer texts are cut.", _count(3, MAX_SIZE)),
            "vocab": Key(
                "",
                "Texts: the vocab.txt of the tokens, or a Hugging Face folder with one; empty: the words that occur "
                "twice in the training documents.",
            ),
            "mean": Key((), "Per channel, of images scaled to [0, 1]; empty: the source's own.", _means),
            "std": Key((), "The standard deviation, likewise.", _deviations),
            "imbalance": Key(
                1.0,
                "How many times more training images the first class keeps than the last (a long tail); 1: all stay.",
                _range(1.0),
            ),
            "workers": Key(
                0,
                "Images that are read at every step: processes that decode them; 0: threads of this one.",
                _count(0, 1024),
                changes_figures=False,
            ),
            "corrupt": Key(
                "refuse",
                "An image that cannot be decoded: refuse (stop and name it) or replace (warn and take the next).",
                _one_of("refuse", "replace"),
                changes_figures=False,
            ),
        },
        "augment": {
            "image_size": Key(
                0, "The width and height that the model gets; 0: as the images are stored.", _count(0, MAX_SIZE)
            ),
            "crop": Key(
                "none",
                "Training: none, pad (random crop of the padded image) or resized (random resized crop).",
                _one_of("none", "pad", "resized"),
            ),
            "padding": Key(4, "pad: pixels added on each side.", _count(0)),
            "scale": Key((0.08, 1.0), "resized: the share of the area, drawn from (low, high).", _shares),
            "ratio": Key((3 / 4, 4 / 3), "resized: the width over the height, drawn from (low, high).", _interval),
            "interpolation": Key(
                "random",
                "resized: bilinear, bicubic, or random, either for each image.",
                _one_of("bilinear", "bicubic", "random"),
            ),
            "flip": Key(0.0, "The probability of a horizontal flip.", _range(0.0, 1.0)),
            "rand_augment": Key("", "Random operations in timm's words, like rand-m9-mstd0.5-inc1; empty: none."),
            "color_jitter": Key(
                (0.0, 0.0, 0.0, 0.0),
                "How far brightness, contrast and saturation (factors 1 - x .. 1 + x) and hue (-x .. x turns) may go.",
                _jitter,
            ),
            "erase": Key(0.0, "The probability that a rectangle becomes noise.", _range(0.0, 1.0)),
            "mixup": Key(
                0.0,
                "Pairs of images are mixed, weighed by a draw from Beta(mixup, mixup); 0: none. With cutmix too, a "
                "batch gets one of the two.",
                _range(0.0),
            ),
            "cutmix": Key(
                0.0,
                "A rectangle of one image is put into another, its area by Beta(cutmix, cutmix); 0: none.",
                _range(0.0),
            ),
            "eval_resize": Key(
                0, "Evaluation: resize to this before the centre crop; 0: no resize.", _count(0, MAX_SIZE)
            ),
        },
        "checkpoint": {
            "keep": Key(
                3, "How many of the latest checkpoints are kept, beside the best.", _count(1), changes_figures=False
            ),
            "best": Key(
                "top1",
                "The figure that the best checkpoint has the highest of, such as top1 or auc: on the validation split "
                "where there is one, else on the evaluation split.",
                _one_of("top1", "top5", "recall", "precision", "f1", "auc"),
                changes_figures=False,
            ),
            "every_epochs": Key(
                1, "Epochs between checkpoints; there is one after the last.", _count(1), changes_figures=False
            ),
            "every_steps": Key(
                0, "Steps between checkpoints; 0: at the end of epochs only.", _count(0), changes_figures=False
            ),
        },
        "early_stopping": Key(
            0,
            "Stop when, after more than so many epochs, the cross-entropy on the validation split is above the mean "
            "of so many epochs before it; 0: never.",
            _count(0),
        ),
        "eval_every_epochs": Key(1, "Epochs between evaluations; the last epoch is always followed by one.", _count(1)),
        "steps_per_dispatch": Key(
            0,
            "Training steps in one call of the compiled program, at most, where the training examples are on the "
            "device; 0: one on CPUs and where they are not, else 32.",
            _count(0, 10_000),
            changes_figures=False,
        ),
        "log_every_seconds": Key(
            10.0,
            "Seconds between progress lines where the output is not a terminal.",
            _range(0.0),
            changes_figures=False,
        ),
        "allow_change": Key(
            "",
            "Keys between commas that a run may go on with changed, although its figures change with them.",
            _known_keys,
            changes_figures=False,
        ),
    }


def each_key() -> Iterator[tuple[str, Key]]:
    """All keys in the order of their definition, each by its name with dots."""
    for name, key in _keys().items():
        if isinstance(key, Key):
            yield name, key
        else:
            yield from ((f"{name}.{inner}", of_group) for inner, of_group in key.items())


def default_config() -> ConfigDict:
    """Every key a run has, at its default; locked: setting a key that is not there raises, with the nearest one named.

    `mechanism_options`, `coefficients` and `model_options` alone take new keys.
    """

    def defaults(keys: dict[str, Any]) -> dict[str, Any]:
        return {name: defaults(key) if isinstance(key, dict) else key.default for name, key in keys.items()}

    config = ConfigDict(defaults(_keys()))
    config.lock()
    for name, key in _keys().items():
        if isinstance(key, Key) and isinstance(key.default, dict):
            config[name].unlock()
    return config


def validate(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that cannot run, before anything is loaded or compiled.

    The names of the mechanism, the model and the data are for their registries to check.

    Raises:
        ValueError: for an unknown key (with the nearest one), a missing key, a value of another type than the
            default's, or a value that makes no sense; the key is named with its dots.
    """
    _validate_group("", config, _keys())
    schedule, epochs, augment = config["schedule"], config["epochs"], config["augment"]
    warmup, highest = schedule["warmup_epochs"], config["optimizer"]["learning_rate"]
    if warmup > (longest := longest_warmup(schedule["name"], epochs)):
        cosine = schedule["name"] == "cosine"
        rule = "half of epochs, for the cosine ends as many before the last" if cosine else "epochs, or all is warm-up"
        raise ValueError(
            f"config: schedule.warmup_epochs must be less than {rule}; got {warmup} of {epochs}, where it may be "
            + (f"0 to {longest}" if longest else "only 0")
        )
    for name in ("min_learning_rate", *(["warmup_learning_rate"] if warmup else [])):
        check_range("config", f"schedule.{name}", schedule[name], 0.0, highest)
    if 0 < augment["eval_resize"] < augment["image_size"]:
        raise ValueError(
            f"config: augment.eval_resize must be 0 or at least augment.image_size, {augment['image_size']}, which is "
            f"cut out of it; got {augment['eval_resize']}"
        )
    for name in ("mixup", "cutmix"):
        if augment[name] and config["batch_size"] == 1:
            raise ValueError(f"config: augment.{name} mixes pairs of images; got {augment[name]} with batch_size 1")


def longest_warmup(schedule: str, epochs: int) -> int:
    """The most epochs of warm-up that a schedule, by its name, has a place for."""
    # The cosine is counted from the first step on and ends as many epochs before the last as the warm-up takes: with
    # half of them it is at its end when the warm-up is.
    return (epochs - 1) // 2 if schedule == "cosine" else epochs - 1


def _validate_group(prefix: str, given: Any, keys: dict[str, Any]) -> None:
    _check_group(prefix.rstrip("."), given)
    for name in given:
        if name not in keys:
            raise ValueError(f"config: there is no key {prefix}{name}. {_nearest_key(prefix, name)}")
    for name, key in keys.items():
        path = prefix + name
        if name not in given:
            raise ValueError(f"config: the key {path} is missing; start from default_config()")
        value = given[name]
        if isinstance(key, dict):
            _validate_group(f"{path}.", value, key)
            continue
        if isinstance(key.default, dict):
            _check_group(path, value)
        else:
            check_type("config", path, value, key.default)
        key.check(path, value)


def _check_group(path: str, value: Any) -> None:
    whole = path or "a configuration"
    if not isinstance(value, Mapping | ConfigDict):
        raise ValueError(f"config: {whole} must be a group of keys; got {value!r} of type {type(value).__name__}")
    try:
        texts = all(isinstance(name, str) for name in value)
    except TypeError:  # a ConfigDict sorts its keys, which takes keys of one type
        texts = False
    if not texts:
        raise ValueError(f"config: the keys of {whole} must be text")
    if path.count(".") > 9:
        raise ValueError(f"config: {path} is a group in a group, too deep")
    for name, inner in value.items():
        if isinstance(inner, Mapping | ConfigDict):
            _check_group(f"{path}.{name}".lstrip("."), inner)


def split_keys(text: str) -> list[str]:
    """The keys of a text like "epochs, optimizer.name"; none in an empty one."""
    return [key.strip() for key in text.split(",") if key.strip()]


def check_key(path: str, owner: str = "config") -> Any:
    """The `Key` of this name, or the dict of a group; for what is in a group that takes any key, that group's `Key`.

    Raises:
        ValueError: if there is none, with the nearest one named; the message begins with ``owner``.
    """
    found, prefix = _keys(), ""
    for name in path.split("."):
        if isinstance(found, Key):
            if isinstance(found.default, dict):
                return found
            raise ValueError(f"{owner}: {prefix.rstrip('.')} is no group of keys; got {path}")
        if name not in found:
            raise ValueError(f"{owner}: there is no key {prefix}{name}. {_nearest_key(prefix, name)}")
        found, prefix = found[name], f"{prefix}{name}."
    return found


def changes_figures(path: str) -> bool:
    """Whether another value of a key gives a run other figures; so may a group, and a key that there is not."""
    try:
        key = check_key(path)
    except ValueError:  # of another version of the program
        return True
    return key.changes_figures if isinstance(key, Key) else True


def _nearest_key(prefix: str, key: str) -> str:
    """A sentence naming the key most like `key`: in the group that it was looked for in, else in any."""
    keys = _keys()
    groups = {"": list(keys)} | {f"{name}.": list(group) for name, group in keys.items() if isinstance(group, dict)}
    for group in (prefix, *groups):
        nearest = difflib.get_close_matches(key, groups[group], n=1)
        if nearest:
            return f"Did you mean {group}{nearest[0]}?"
    return f"The keys there are {', '.join(sorted(groups[prefix]))}."
