"""What is compared: one entry for each row of the table, and the configuration that it stands for."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dpa_jax.config import validate
from dpa_jax.training.state import create_model

_FORM = "NAME[+arr][:OPTION=VALUE]..., as in dpa, relu+arr or dpa:criterion=union:tau=0.1"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str  # as it was given; also the name of its folder
    mechanism: str
    options: dict[str, Any]  # of the mechanism
    arr: bool  # whether an ARR is behind every block

    def configure(self, config: ConfigDict, seed: int) -> ConfigDict:
        """A copy of a configuration without `mechanism_options`, with this entry's mechanism and this seed in it."""
        config = config.copy_and_resolve_references()
        config.seed = seed
        config.mechanism = self.mechanism
        config.mechanism_options.update(self.options)
        if self.arr:
            config.model_options.arr = True
        return config


def parse_entries(text: str, config: ConfigDict) -> list[Entry]:
    """The entries of a list such as ``relu,gelu,dpa,relu+arr,dpa:criterion=union``, to be put into a configuration.

    Raises:
        ValueError: for an entry of another form or one that comes twice; for a mechanism or an option that does not
            exist, with the nearest names; for `mechanism_options` in ``config``, which every entry has its own of.
    """
    validate(config)
    if config.mechanism_options:
        raise ValueError(
            f"config.mechanism_options must be empty in a comparison; got {config.mechanism_options.to_dict()}. "
            f"Give options with the mechanism that they are of: {_FORM}"
        )
    entries = [_parse(part.strip()) for part in text.split(",")]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--mechanisms: {name} is given twice")
    for entry in entries:
        configured = entry.configure(config, config.seed)
        validate(configured)
        create_model(configured, num_classes=2)  # a wrong name shows here, not after hours of training
    return entries


def _parse(text: str) -> Entry:
    head, *pairs = text.split(":")
    mechanism, *extras = head.split("+")
    options = dict(pair.split("=", 1) for pair in pairs if "=" in pair)  # shorter if one is given twice
    if not mechanism or extras not in ([], ["arr"]) or len(options) != len(pairs):
        raise ValueError(f"--mechanisms: {text!r} is not of the form {_FORM}")
    return Entry(text, mechanism, {name: _value(value) for name, value in options.items()}, arr=bool(extras))


def _value(text: str) -> Any:
    """A number or a truth value where it reads as one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # the parser's, of any text
        return text
