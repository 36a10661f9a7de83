"""Whether a run may go on with the configuration that it is given: one rule for training, evaluation and comparison.

``config.json`` in a run's folder is the configuration of its last training. A key that changes figures may differ from
it only if ``config.allow_change`` names it; any other difference is noted.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dpa_jax.config import changes_figures, default_config, split_keys
from dpa_jax.training.record import replace_file


def check_unchanged(config: ConfigDict, folder: pathlib.Path) -> list[str]:
    """Notes of a line each on what differs, and may, from the configuration that ``folder``'s run was trained with.

    Raises:
        ValueError: for a key that changes figures, with both values and what to do; for a damaged ``config.json``.
    """
    path = folder / "config.json"
    try:
        then, now = _flat(json.loads(path.read_text())), _flat(_plain(config))
    except FileNotFoundError:
        return [f"note: {path} is missing; whether the configuration has changed is not known"]
    except (ValueError, AssertionError) as error:  # flatten_dict asserts that it is given a dict
        raise ValueError(
            f"{path} is damaged ({error or 'not an object'}), so whether the configuration has changed is not known. "
            "Remove it to go on with the configuration given, or use another workdir."
        ) from None
    defaults = _flat(_plain(default_config()))  # what a key that is younger than the file had
    described = {}
    for key in sorted({*then, *now}):
        before, after = then.get(key, defaults.get(key)), now.get(key)
        if before != after and key != "allow_change":
            described[key] = f"{key} was {before!r} and is {after!r} now"
    allowed = tuple(f"{key}." for key in split_keys(config.allow_change))
    refused = [key for key in described if changes_figures(key) and not f"{key}.".startswith(allowed)]
    if refused:
        raise ValueError(
            f"{folder} was trained with another configuration: {'; '.join(described[key] for key in refused)}. "
            f"That changes its figures: keep the configuration, use another workdir, or pass "
            f"--config.allow_change={','.join(refused)}"
        )
    return [f"note: {text}" for text in described.values()]


def write_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """Writes ``config.json``, in process 0: from now on the run in this folder is trained with this configuration."""
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "config.json", json.dumps(_plain(config), indent=2) + "\n")


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON gives it back: plain values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")
