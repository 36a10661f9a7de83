"""What a comparison measured: a table as text, numbers and a picture, and the curves."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import pathlib
import platform
import statistics
from collections.abc import Mapping
from typing import Any

import flax
import jax

from dpa_jax.plots import History, plot_comparison, plot_table
from dpa_jax.training.header import describe

Histories = dict[str, dict[int, History]]  # {entry's name: {seed: the records of its run}}

FILES = ("results.json", "table.md", "table.csv", "table.png", "curves.png")  # what is written

_HEAD = ("mechanism", "seeds", "mean", "std", "best", "masked (%)", "seconds")
_NONE = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry over its seeds."""

    mechanism: str  # the entry's name
    seeds: int  # how many
    mean: float  # of the top-1 after the last epoch, as a fraction
    std: float | None  # its standard deviation (n - 1); None with one seed, which has none
    best: float  # the best seed's top-1
    masked_fraction: float | None  # mean over the last epoch of training and the seeds; None where nothing masks
    # Mean time of a run's training steps, where seeds share a program the share of each; without compilation,
    # evaluation and checkpoints.
    seconds: float

    def cells(self) -> list[str]:
        """As the table shows it, under `_HEAD`."""
        percents = [_NONE if f is None else f"{100 * f:.2f}" for f in (self.mean, self.std, self.best)]
        masked = _NONE if self.masked_fraction is None else f"{100 * self.masked_fraction:.1f}"
        return [self.mechanism, str(self.seeds), *percents, masked, f"{self.seconds:.1f}"]


def summarize_runs(mechanism: str, runs: Mapping[int, History]) -> Row:
    """The row of an entry with this name and {seed: the records of its whole run}."""
    last = [history[-1] for history in runs.values()]
    top1 = [record["eval_top1"] for record in last]
    masked = [record["masked_fraction"] for record in last if "masked_fraction" in record]
    return Row(
        mechanism=mechanism,
        seeds=len(runs),
        mean=statistics.fmean(top1),
        std=statistics.stdev(top1) if len(top1) > 1 else None,
        best=max(top1),
        masked_fraction=statistics.fmean(masked) if masked else None,
        seconds=statistics.fmean(sum(record["seconds"] for record in history) for history in runs.values()),
    )


def write_report(workdir: pathlib.Path, histories: Histories, command: str = "") -> None:
    """Writes ``results.json``, ``table.md``, ``table.csv``, ``table.png`` and ``curves.png`` of finished runs.

    ``command`` is what was typed, for the notes below the table.
    """
    rows = [summarize_runs(name, runs) for name, runs in histories.items()]
    epochs = max(record["epoch"] for runs in histories.values() for history in runs.values() for record in history)
    measured = {
        "command": command,
        "device": describe(jax.devices()),
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()},
    }
    last = {name: [{"seed": seed, **history[-1]} for seed, history in runs.items()] for name, runs in histories.items()}
    results = [{**dataclasses.asdict(row), "runs": last[row.mechanism]} for row in rows]
    text = json.dumps({"epochs": epochs, **measured, "results": results}, indent=1)
    (workdir / "results.json").write_text(text + "\n")
    (workdir / "table.md").write_text(_markdown(rows, epochs, measured))
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(Row)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    (workdir / "table.csv").write_bytes(table.getvalue().encode())
    title = f"eval top-1 (%) after {epochs} epochs"
    plot_table(title, _HEAD, [row.cells() for row in rows], workdir / "table.png")
    plot_comparison({name: list(runs.values()) for name, runs in histories.items()}, workdir / "curves.png")


def _markdown(rows: list[Row], epochs: int, measured: Mapping[str, Any]) -> str:
    lines = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1)), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    notes = [
        f"Top-1 on the evaluation images in percent after the last of {epochs} epochs, not the best of them: mean, "
        "standard deviation (n - 1) and best over the seeds. Masked: the share of channels that a penalty held down, "
        "over the last epoch of training. Seconds: the training steps of one run, or its share of a program of "
        "several.",
        f"Measured on {measured['device']} with {versions}"
        + (f":\n\n    {measured['command']}" if measured["command"] else "."),
    ]
    return "\n\n".join([table, *notes]) + "\n"
