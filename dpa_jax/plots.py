"""Pictures of what runs measured over their epochs."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]
"""The records of a run, oldest first."""

# Panels of the picture: title, and (key of a record, what its line is called) for every line.
_PANELS = {
    "loss": (("train_loss", "train"), ("eval_loss", "eval")),
    "top-1 (%)": (("train_top1", "train"), ("eval_top1", "eval")),
    "masked channels (%)": (("masked_fraction", "train"),),
    "learning rate": (("lr", "train"),),
}
_RUN_COLOURS = ("#1b6ca8", "#d1495b", "#3c8d5a", "#c98a1b", "#7a5195", "#4d4d4d")
_TRAIN_COLOUR = "#9aa7b4"


def plot_curves(histories: History | Mapping[str, History], path: str | pathlib.Path) -> None:
    """Draws loss and top-1 over the epochs, and masked channels and learning rate where they were recorded.

    Args:
        histories: the records of one run, or of several by name, as `Recorder.history` has them.
        path: the picture to write; its ending tells the format.

    Raises:
        ValueError: there is no record with an `epoch`.
    """
    from matplotlib.figure import Figure

    runs = dict(histories) if isinstance(histories, Mapping) else {"": histories}
    recorded = {name for history in runs.values() for record in history for name in record}
    if "epoch" not in recorded:
        raise ValueError("nothing to draw: the history has no record with an epoch")
    panels = {title: lines for title, lines in _PANELS.items() if any(key in recorded for key, _ in lines)}
    rows = 2 if len(panels) == 4 else 1  # four abreast are too small to read on a page
    columns = len(panels) // rows
    size = (3.4 * columns, 2.5 * rows)
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, lines) in zip(grid, panels.items(), strict=True):
        both = len(lines) > 1  # train and eval, to be told apart
        scale = 100.0 if title.endswith("(%)") else 1.0
        for (run, history), colour in zip(runs.items(), run_colours(len(runs)), strict=True):
            for key, split in lines:
                points = [(r["epoch"], scale * r[key]) for r in history if r.get(key) is not None]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=_TRAIN_COLOUR if both and split == "train" and len(runs) == 1 else colour,
                        linestyle="--" if both and split == "train" and len(runs) > 1 else "-",
                        linewidth=1.6,
                        marker="o" if len(points) == 1 else None,
                        markersize=4,
                        label=f"{run} {split}".strip() if both else run,
                    )
        style_panel(axes, title)
    first = figure.axes[0]
    first.legend(*first.get_legend_handles_labels(), frameon=False, fontsize=8, labelcolor="#222222")
    figure.savefig(path)


def style_panel(axes: Any, title: str) -> None:
    """Gives a panel with epochs along it the look that all pictures share.

    Args:
        axes: matplotlib's, with the lines in them.
        title: of the panel.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10, loc="left", color="#222222")
    axes.set_xlabel("epoch", fontsize=9, color="#444444")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8, length=0, colors="#444444")
    axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b8bec5")
    if title == "learning rate":
        axes.yaxis.set_major_formatter("{x:g}")  # an exponent of its own would push the title up


def run_colours(count: int) -> list[str]:
    """So many colours for runs beside each other; from the seventh on they come again."""
    return [_RUN_COLOURS[i % len(_RUN_COLOURS)] for i in range(count)]
