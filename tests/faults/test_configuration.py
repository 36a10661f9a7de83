"""Configurations of any values: taken, or refused with the key that is wrong."""

import contextlib
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from dpa_jax import command_line
from dpa_jax.config import default_config, validate
from tests.faults.harness import Fault

DEFAULTS = default_config().to_dict()
OPEN = ("mechanism_options", "coefficients", "model_options")


def paths(group, prefix=""):
    """The keys with their dots, those of groups too."""
    found = []
    for name, value in group.items():
        found.append(prefix + name)
        if isinstance(value, dict) and name not in OPEN:
            found += paths(value, f"{prefix}{name}.")
    return found


NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.floats(-2, 2),
    st.sampled_from([10**400, -(10**400), 2**31, 2**31 - 1, 2**32, -0.0, 1e-45, 1e300, 1 - 2**-53]),
)
PLAIN = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(), st.binary(), st.complex_numbers())
TREES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner, max_size=4),
    ),
    max_leaves=20,
)


def like(value):
    """Values of the type of a default."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.one_of(st.integers(), st.integers(0, 300))
    if isinstance(value, float):
        return NUMBERS
    if isinstance(value, str):
        return st.one_of(st.text(), st.sampled_from(["cosine", "adamw", "none", "rand-m9", "seed,epochs", "data.x"]))
    if isinstance(value, tuple):
        return st.lists(st.one_of(NUMBERS, PLAIN), max_size=5).map(tuple)
    return st.dictionaries(st.one_of(st.text(), st.sampled_from(["channel", "tau"])), PLAIN, max_size=4)


def of(path, config=DEFAULTS):
    for name in path.split("."):
        config = config[name]
    return config


def check(case, call, *keys):
    """The call returns, or raises a ValueError of ours that names one of the keys, if there are any."""
    case.tried += 1
    try:
        call()
    except ValueError as error:
        if type(error) is not ValueError or (keys and not any(key in str(error) for key in keys)):
            raise Fault("traceback", f"{error!r} does not name {keys}") from error
    except Exception as error:
        raise Fault("traceback", repr(error)) from error


def set_in(path, value):
    config = copy.deepcopy(DEFAULTS)
    *groups, name = path.split(".")
    group = config
    for part in groups:
        group = group[part]
    group[name] = value
    return config


@pytest.mark.parametrize("path", paths(DEFAULTS))
def test_a_key_with_any_value_is_taken_or_refused_by_its_name(case, path):
    @given(st.one_of(like(of(path)), TREES))
    def each(value):
        config = set_in(path, value)
        # What does not go together may be told of the other of the two.
        other = {
            "epochs": "schedule.warmup_epochs",
            "optimizer.learning_rate": "learning_rate",
            "batch_size": "augment.mixup",
        }
        check(case, lambda: validate(config), path, *([other[path]] if path in other else []))
        with contextlib.suppress(Exception):  # what ml_collections does not take is not ours
            made = ConfigDict(config)
            check(case, lambda: validate(made), path, *([other[path]] if path in other else []))

    each()


def test_any_tree_is_taken_or_refused(case):
    @given(TREES)
    def each(tree):
        check(case, lambda: validate(tree))

    each()


def test_the_defaults_with_trees_in_them_are_taken_or_refused(case):
    @given(st.dictionaries(st.one_of(st.sampled_from(paths(DEFAULTS)), st.text()), TREES, min_size=1, max_size=4))
    def each(changes):
        config = copy.deepcopy(DEFAULTS)
        for path, value in changes.items():
            *groups, name = path.split(".")
            group = config
            for part in groups:
                group = group.get(part) if isinstance(group, dict) else None
            if isinstance(group, dict):
                group[name] = value
        check(case, lambda: validate(config))

    each()


def test_a_key_that_there_is_not_is_named(case):
    known = paths(DEFAULTS)

    @given(st.sampled_from(["", "data.", "optimizer.", "augment."]), st.text(), PLAIN)
    def each(prefix, name, value):
        path = prefix + name
        if path not in known:
            config = copy.deepcopy(DEFAULTS)
            (config[prefix[:-1]] if prefix else config)[name] = value
            with case.raises(path):
                validate(config)
            case.tried += 1

    each()


def parse(case, *arguments):
    """The configuration of a command line, None where it is refused; a refusal is a ValueError."""
    case.tried += 1
    try:
        return command_line.parse(lambda options: None, ["x", *arguments], default_config="digits_vit").config
    except ValueError as error:
        if not str(error):
            raise Fault("traceback", "an error without a word") from error
    except Exception as error:
        raise Fault("traceback", repr(error)) from error
    return None


# What people type, and what nobody does.
TYPED = st.one_of(
    st.text(),
    st.text("0123456789+-.eE_xjinfa ()[]{},'\"\\\n:", max_size=30),
    TREES.map(repr),
    st.sampled_from(
        ["", "True", "none", "nan", "1e999", "((1)", "{1:2", "0x10", "1_0", "'", "\\", "\x00", "$(x)", "--config"]
    ),
)


@pytest.mark.parametrize("path", [*paths(DEFAULTS), "mechanism_options.tau", "coefficients.arr", "model_options.a.b"])
def test_any_override_is_parsed_or_refused(case, path):
    @given(TYPED, st.booleans())
    def each(text, apart):
        config = parse(case, *([f"--config.{path}", text] if apart else [f"--config.{path}={text}"]))
        if config is not None:
            check(
                case, lambda: validate(config), path.split(".")[0], "missing", "learning_rate", "warmup_epochs", "mixup"
            )

    each()


def test_any_arguments_are_parsed_or_refused(case):
    arguments = st.one_of(
        TYPED, TYPED.map("--{}".format), TYPED.map("--config.{}".format), TYPED.map("--help={}".format)
    )

    @given(st.lists(arguments, max_size=4))
    def each(several):
        if "--flagfile" not in " ".join(several):
            parse(case, *several)

    each()
