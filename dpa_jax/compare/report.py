"""What a comparison found: a table, as text, numbers and a picture, and the curves."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import platform
import statistics
from collections.abc import Mapping
from typing import Any

import flax
import jax

from dpa_jax.plots import History, run_colours, style_panel

Histories = dict[str, dict[int, History]]
"""{entry's name: {seed: the records of its run}}."""

# Panels of curves.png: title and key of a record. Cross-entropies, for losses have penalties of different weights.
_PANELS = {
    "held-out top-1 (%)": "eval_top1",
    "held-out cross-entropy": "eval_loss_cross_entropy",
    "training cross-entropy": "loss_cross_entropy",
    "masked channels (%)": "masked_fraction",
}
_HEAD = ("mechanism", "seeds", "mean", "std", "best", "masked (%)", "seconds")
_NONE = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One entry over its seeds.

    Attributes:
        mechanism: the entry's name.
        seeds: how many.
        mean: of the top-1 after the last epoch, as a fraction.
        std: its standard deviation (n - 1); None with one seed, which has none.
        best: the best seed's.
        masked_fraction: mean over the last epoch of training and the seeds; None where nothing masks.
        seconds: mean time of a run's training steps, where seeds share a program the share of each; without
            compilation, evaluation and checkpoints.
    """

    mechanism: str
    seeds: int
    mean: float
    std: float | None
    best: float
    masked_fraction: float | None
    seconds: float

    def cells(self) -> list[str]:
        """As the table shows it, under `_HEAD`."""
        percents = [_NONE if f is None else f"{100 * f:.2f}" for f in (self.mean, self.std, self.best)]
        masked = _NONE if self.masked_fraction is None else f"{100 * self.masked_fraction:.1f}"
        return [self.mechanism, str(self.seeds), *percents, masked, f"{self.seconds:.1f}"]


def summarize_runs(mechanism: str, runs: Mapping[int, History]) -> Row:
    """The row of an entry.

    Args:
        mechanism: its name.
        runs: {seed: the records of its whole run}.
    """
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
    """Writes ``results.json``, ``table.md``, ``table.csv``, ``table.png`` and ``curves.png``.

    Args:
        workdir: the folder, which is there.
        histories: finished runs.
        command: what was typed, for the notes below the table.
    """
    rows = [summarize_runs(name, runs) for name, runs in histories.items()]
    epochs = max(record["epoch"] for runs in histories.values() for history in runs.values() for record in history)
    device = jax.devices()[0]
    measured = {
        "command": command,
        "device": f"{jax.device_count()} x {device.device_kind}"
        + (f" ({os.cpu_count()} cores)" if device.platform == "cpu" else ""),
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "python": platform.python_version()},
    }
    last = {name: [{"seed": seed, **history[-1]} for seed, history in runs.items()] for name, runs in histories.items()}
    results = [{**dataclasses.asdict(row), "runs": last[row.mechanism]} for row in rows]
    text = json.dumps({"epochs": epochs, **measured, "results": results}, indent=1)
    (workdir / "results.json").write_text(text + "\n")
    (workdir / "table.md").write_text(_markdown(rows, epochs, measured))
    with (workdir / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
    _draw_table(rows, epochs, workdir / "table.png")
    _draw_curves(histories, workdir / "curves.png")


def _markdown(rows: list[Row], epochs: int, measured: Mapping[str, Any]) -> str:
    lines = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1)), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    notes = [
        f"Top-1 on the held-out images in percent after the last of {epochs} epochs, not the best of them: mean, "
        "standard deviation (n - 1) and best over the seeds. Masked: the share of channels that a penalty held down, "
        "over the last epoch of training. Seconds: the training steps of one run, or its share of a program of "
        "several.",
        f"Measured on {measured['device']} with {versions}"
        + (f":\n\n    {measured['command']}" if measured["command"] else "."),
    ]
    return "\n\n".join([table, *notes]) + "\n"


def _draw_table(rows: list[Row], epochs: int, path: pathlib.Path) -> None:
    """The table as a picture: a line above and below, and one under the head."""
    from matplotlib.figure import Figure

    height = 0.27 * (len(rows) + 2)
    width = max(len(row.mechanism) for row in rows) * 0.075
    right = [width + x for x in (1.0, 1.7, 2.4, 3.1, 4.1, 5.0)]  # the right edges of the columns of figures, inches
    figure = Figure(figsize=(right[-1] + 0.3, height + 0.1), dpi=160, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, right[-1] + 0.1), ylim=(-0.05, height + 0.05))
    axes.axis("off")

    def write(y: float, cells: list[str] | tuple[str, ...], **style: Any) -> None:
        for x, cell in zip([0.0, *right], cells, strict=True):
            axes.text(x, y, cell, ha="right" if x else "left", va="center", fontsize=9, **style)

    tops = [height - 0.27 * i for i in range(len(rows) + 2)]
    axes.text(0, tops[0] - 0.13, f"held-out top-1 (%) after {epochs} epochs", va="center", fontsize=10, color="#222222")
    write(tops[1] - 0.13, _HEAD, color="#444444")
    for row, top, colour in zip(rows, tops[2:], run_colours(len(rows)), strict=True):
        write(top - 0.13, row.cells(), color="#222222")
        axes.plot([-0.1], [top - 0.13], marker="o", markersize=3, color=colour)
    for y in (tops[1], tops[2], tops[2] - 0.27 * len(rows)):
        axes.plot([-0.15, right[-1] + 0.05], [y, y], color="#b8bec5", linewidth=0.8)
    figure.savefig(path)


def _draw_curves(histories: Histories, path: pathlib.Path) -> None:
    """The mean over the seeds as a line, and one standard deviation (n - 1) to either side as a band."""
    from matplotlib.figure import Figure

    recorded = {key for runs in histories.values() for history in runs.values() for record in history for key in record}
    panels = {title: key for title, key in _PANELS.items() if key in recorded}
    rows = 2 if len(panels) == 4 else 1
    columns = len(panels) // rows
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.3), dpi=160, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    colours = dict(zip(histories, run_colours(len(histories)), strict=True))
    lines = {}
    for axes, (title, key) in zip(grid, panels.items(), strict=True):
        scale = 100.0 if title.endswith("(%)") else 1.0
        for name, runs in histories.items():
            # Runs of one configuration have a figure in the same epochs.
            values: dict[int, list[float]] = {}
            for history in runs.values():
                for record in history:
                    if key in record:
                        values.setdefault(record["epoch"], []).append(scale * record[key])
            if not values:
                continue
            epochs, means = list(values), [statistics.fmean(some) for some in values.values()]
            (lines[name],) = axes.plot(
                epochs,
                means,
                color=colours[name],
                linewidth=1.4,
                linestyle="-" if list(histories).index(name) < len(set(colours.values())) else "--",
                marker="o" if len(epochs) == 1 else None,
                markersize=4,
            )
            if len(runs) > 1:
                bands = [statistics.stdev(some) for some in values.values()]
                low, high = ([m + sign * b for m, b in zip(means, bands, strict=True)] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=colours[name], alpha=0.15, linewidth=0)
        style_panel(axes, title)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower center",
        ncols=min(len(lines), 6),
        frameon=False,
        fontsize=8,
        labelcolor="#222222",
    )
    figure.savefig(path)
