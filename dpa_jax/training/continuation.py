"""Whether a run may go on with the configuration that it is given: one rule for training, evaluation and comparison.

``config.json`` in a run's folder is the configuration of its last training. A key that changes figures may differ from
it only if ``config.allow_change`` names it; any other difference is noted. ``position.json`` has what the position in
the data follows from, beside the step: that may not differ at all where a run goes on.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dpa_jax.config import changes_figures, default_config, split_keys
from dpa_jax.training.folder import set_aside
from dpa_jax.training.record import replace_file

_CONFIG, _POSITION = "config.json", "position.json"
_NEEDED = {_CONFIG: ("batch_size", "seed"), _POSITION: ("batch_size", "seed", "training examples")}


class _DamagedError(ValueError):
    """A file is not what was written."""


def check_unchanged(config: ConfigDict, folder: pathlib.Path, examples: int | None = None) -> list[str]:
    """Notes of a line each on what differs, and may, from the configuration that ``folder``'s run was trained with.

    Args:
        config: what the run is given now.
        folder: of the run.
        examples: to go on training: how many training examples there are now. None where nothing is trained.

    Raises:
        ValueError: for a key that changes figures, with both values and what to do; where ``examples`` is given, for
            another batch size, seed or number of training examples, which no ``allow_change`` excuses.
    """
    notes, then, now = [], _read(folder / _CONFIG), _flat(_plain(config))
    position = _read(folder / _POSITION)
    for name, found in ((_CONFIG, then), (_POSITION, position)):
        if isinstance(found, str) and not (name == _POSITION and "missing" in found):  # older runs have none
            notes.append(f"note: {folder / name} is {found}; whether the configuration has changed is not known")
    then, position = (found if isinstance(found, dict) else {} for found in (then, position))
    if examples is not None:
        _check_position(folder, {**then, **position}, _position(config, examples))
    if not then:
        return notes
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
    return notes + [f"note: {text}" for text in described.values()]


def _check_position(folder: pathlib.Path, then: dict[str, Any], now: dict[str, int]) -> None:
    changed = [f"{key} was {then[key]!r} and is {now[key]!r} now" for key in now if then.get(key, now[key]) != now[key]]
    if changed:
        raise ValueError(
            f"{folder} cannot go on: {'; '.join(changed)}, so its steps stand for other places in the data. Put that "
            "back, or use another workdir."
        )


def write_config(config: ConfigDict, folder: pathlib.Path, examples: int) -> None:
    """Writes ``config.json`` and ``position.json``, in process 0: from now on the run is trained with these.

    A damaged one that is there is kept as ``damaged-NAME``. ``examples`` is the number of training examples.
    """
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in ((_POSITION, _position(config, examples)), (_CONFIG, _plain(config))):
        try:
            _parse(folder / name)
        except FileNotFoundError:
            pass
        except _DamagedError:
            set_aside(folder / name)
        replace_file(folder / name, (json.dumps(values, indent=2) + "\n").encode())


def _position(config: ConfigDict, examples: int) -> dict[str, int]:
    return {"batch_size": config.batch_size, "seed": config.seed, "training examples": examples}


def _read(path: pathlib.Path) -> dict[str, Any] | str:
    """The values in a file by their names with dots, or why there are none."""
    try:
        return _parse(path)
    except FileNotFoundError:
        return "missing"
    except _DamagedError as error:
        return f"damaged ({error})"


def _parse(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = _flat(json.loads(path.read_text()))
    except AssertionError:  # flatten_dict's, which wants a dict
        raise _DamagedError("not an object") from None
    except (ValueError, RecursionError) as error:
        raise _DamagedError(error) from None
    if lacking := [key for key in _NEEDED[path.name] if key not in values]:
        raise _DamagedError(f"without {lacking[0]}")
    return values


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The configuration as JSON gives it back: plain values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")
