"""A campaign's file: which tables there are, and in which order their runs are trained."""

from __future__ import annotations

import difflib
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpa_jax import command_line
from dpa_jax.checks import is_number
from dpa_jax.compare.entries import Entry, parse_entries


class Table(NamedTuple):
    """One table: runs that differ in mechanism and seed."""

    name: str  # of its folder
    title: str
    config: ConfigDict
    entries: list[Entry]  # its rows, in the order of the file
    papers: dict[str, float]  # {entry's name: the paper's top-1 in percent}
    baseline: str  # the entry that the others' margin is over


class Step(NamedTuple):
    """What is trained next: these entries of a table, each with the seeds from the configuration's on."""

    table: Table
    entries: list[Entry]
    seeds: int


class Plan(NamedTuple):
    """A campaign, as its file says it."""

    title: str
    tables: list[Table]
    steps: list[Step]
    notes: list[str]  # what follows from the changes in the configurations


# Of each group of the file its keys: the type, and whether it must be there.
_PLAN = {"title": (str, True), "tables": (dict, True), "runs": (list, True)}
_TABLE = {"title": (str, True), "config": (str, True), "set": (dict, False), "papers": (dict, False)}
_TABLE |= {"baseline": (str, False)}
_RUNS = {"table": (str, True), "mechanisms": (list, True), "seeds": (int, True)}


def read_plan(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Plan:
    """The campaign in a TOML file; docs/campaign.md says what it holds.

    Args:
        path: of the file.
        overrides: changes of every table's configuration, as ``--config.KEY=VALUE``.

    Raises:
        ValueError: for what is not TOML, unknown or missing keys, values that make no sense, configurations and
            mechanisms that do not exist: one line, which begins with the file's name and the place in it.
        OSError: if the file cannot be read.
    """
    path = pathlib.Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no TOML: {error}") from None
    try:
        return _plan(values, overrides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _plan(values: Mapping[str, Any], overrides: Sequence[str]) -> Plan:
    _check("the file", values, _PLAN)
    for name in values["tables"]:
        _check(f"[tables.{name}]", values["tables"][name], _TABLE)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"[tables.{name}]: a table's name has letters, digits, _ and - alone")
    wanted: dict[str, list[str]] = {name: [] for name in values["tables"]}
    for number, runs in enumerate(values["runs"], start=1):
        where = f"[[runs]] {number}"
        _check(where, runs, _RUNS)
        if runs["table"] not in wanted:
            raise ValueError(f"{where}: there is no table {runs['table']!r}.{_nearest(runs['table'], wanted)}")
        if not runs["mechanisms"] or not all(type(name) is str for name in runs["mechanisms"]):
            raise ValueError(f"{where}: mechanisms must be a list of names; got {runs['mechanisms']!r}")
        if not 1 <= runs["seeds"] <= 1000:
            raise ValueError(f"{where}: seeds must be in [1, 1000]; got {runs['seeds']}")
        rows = wanted[runs["table"]]
        rows += [name for name in dict.fromkeys(runs["mechanisms"]) if name not in rows]
    tables, notes = {}, []
    for name, rows in wanted.items():
        tables[name], said = _table(name, values["tables"][name], rows, overrides)
        notes += said
    steps = []
    for runs in values["runs"]:
        table = tables[runs["table"]]
        steps.append(Step(table, [e for e in table.entries if e.name in runs["mechanisms"]], runs["seeds"]))
    return Plan(values["title"], list(tables.values()), steps, notes)


def _table(name: str, values: Mapping[str, Any], rows: list[str], overrides: Sequence[str]) -> tuple[Table, list[str]]:
    where = f"[tables.{name}]"
    if not rows:
        raise ValueError(f"{where}: no [[runs]] are of this table")
    changes = [f"--config.{key}={value}" for key, value in values.get("set", {}).items()]
    try:
        given = ["campaign", f"--config={values['config']}", *changes, *overrides]
        options = command_line.parse(lambda options: None, given)
        entries = parse_entries(",".join(rows), options.config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    papers = values.get("papers", {})
    for row, figure in papers.items():
        if row not in rows:
            raise ValueError(f"{where}: papers has {row!r}, and no [[runs]] have.{_nearest(row, rows)}")
        if not is_number(figure) or not 0 <= figure <= 100:
            raise ValueError(f"{where}: papers.{row} must be a top-1 accuracy in percent; got {figure!r}")
    table = Table(name, values["title"], options.config, entries, papers, values.get("baseline", "relu"))
    return table, [f"{values['title']}: {note}" for note in options.notes]


def _check(where: str, values: Any, keys: Mapping[str, tuple[type, bool]]) -> None:
    """ValueError for a group of the file that lacks a key, or has one too many or of another type."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a group of keys; got {values!r}")
    for name, value in values.items():
        if name not in keys:
            raise ValueError(f"{where}: there is no key {name!r}.{_nearest(name, keys)}")
        if type(value) is not keys[name][0]:
            raise ValueError(f"{where}: {name} must be of type {keys[name][0].__name__}; got {value!r}")
    if lacking := [name for name, (_, needed) in keys.items() if needed and name not in values]:
        raise ValueError(f"{where}: the key {lacking[0]} is missing")


def _nearest(name: str, names: Any) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" There are {', '.join(sorted(names))}."
