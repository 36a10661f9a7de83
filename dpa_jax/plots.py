"""Pictures of what runs measured."""

import io
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

History = Sequence[Mapping[str, Any]]
"""The records of a run, oldest first."""

# Panels of a run's picture: title, and (key of a record, what its line is called) for every line.
_RUN_PANELS = {
    "loss": (("train_loss", "train"), ("eval_loss", "eval")),
    "top-1 (%)": (("train_top1", "train"), ("eval_top1", "eval")),
    "masked channels (%)": (("masked_fraction", "train"),),
    "learning rate": (("lr", "train"),),
}
# Panels of a comparison: title and key. Cross-entropies, for losses have penalties of different weights.
_COMPARISON_PANELS = {
    "eval top-1 (%)": "eval_top1",
    "eval cross-entropy": "eval_loss_cross_entropy",
    "train cross-entropy": "loss_cross_entropy",
    "masked channels (%)": "masked_fraction",
}
_COLOURS = ("#1b6ca8", "#d1495b", "#3c8d5a", "#c98a1b", "#7a5195", "#4d4d4d")
_TRAIN_COLOUR, _RULE_COLOUR, _TEXT_COLOUR = "#9aa7b4", "#b8bec5", "#222222"
_LEGEND_STYLE: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": _TEXT_COLOUR}


def plot_curves(history: History, path: str | os.PathLike[str]) -> None:
    """Draws a run's loss and top-1 over its epochs, and masked channels and learning rate where they were recorded.

    Raises ValueError if there is no record with an ``epoch``.
    """

    def draw(axes: Any, title: str, scale: float) -> None:
        lines = _RUN_PANELS[title]
        for key, label in lines:
            colour = _TRAIN_COLOUR if label == "train" and len(lines) > 1 else _COLOURS[0]
            if points := _points([history], key, scale):
                _line(axes, points, label=label, color=colour, linewidth=1.6)

    recorded = _recorded([history])
    panels = [title for title, lines in _RUN_PANELS.items() if any(key in recorded for key, _ in lines)]
    figure = _panels(panels, draw)
    first = figure.axes[0]
    first.legend(*first.get_legend_handles_labels(), **_LEGEND_STYLE)
    _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a picture in the format that its name says, also to a path in a bucket, which has `write_bytes`."""
    picture = io.BytesIO()
    figure.savefig(picture, format=pathlib.PurePath(path).suffix[1:] or "png")
    (path if hasattr(path, "write_bytes") else pathlib.Path(path)).write_bytes(picture.getvalue())


def plot_comparison(runs: Mapping[str, Sequence[History]], path: str | os.PathLike[str]) -> None:
    """Draws means over the runs of each name as lines, and one standard deviation (n - 1) to either side as bands.

    Raises ValueError if there is no record with an ``epoch``.
    """
    lines = {}

    def draw(axes: Any, title: str, scale: float) -> None:
        for place, (name, histories) in enumerate(runs.items()):
            if points := _points(histories, _COMPARISON_PANELS[title], scale):
                colour, style = _COLOURS[place % len(_COLOURS)], "-" if place < len(_COLOURS) else "--"
                lines[name] = _line(axes, points, color=colour, linestyle=style, linewidth=1.4)
                if len(histories) > 1:
                    # Runs that have ended early leave a single one, which has no spread.
                    spreads = [(statistics.fmean(v), statistics.stdev(v) if v[1:] else 0.0) for v in points.values()]
                    low, high = [mean - spread for mean, spread in spreads], [mean + spread for mean, spread in spreads]
                    axes.fill_between(list(points), low, high, color=colour, alpha=0.15, linewidth=0)

    recorded = _recorded([history for histories in runs.values() for history in histories])
    figure = _panels([title for title, key in _COMPARISON_PANELS.items() if key in recorded], draw, legend=0.3)
    place = {"loc": "outside lower center", "ncols": min(len(lines), 6)}
    figure.legend(lines.values(), lines.keys(), **place, **_LEGEND_STYLE)
    _save(figure, path)


def plot_table(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    path: str | os.PathLike[str],
    curves: bool = True,
) -> None:
    """Draws a table: a line above and below, one under the head, and before each row the colour of its curve, if any.

    The cells of the first column stand at the left, the others' at the right.
    """
    from matplotlib.figure import Figure

    height = 0.27 * (len(rows) + 2)
    width = max(len(row[0]) for row in rows) * 0.075
    right = [width + x for x in (1.0, 1.7, 2.4, 3.1, 4.1, 5.0)]  # the right edges of the columns, inches
    figure = Figure(figsize=(right[-1] + 0.3, height + 0.1), dpi=160, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.2, right[-1] + 0.1), ylim=(-0.05, height + 0.05))
    axes.axis("off")

    def write(y: float, cells: Sequence[str], **style: Any) -> None:
        for x, cell in zip([0.0, *right], cells, strict=True):
            axes.text(x, y, cell, ha="right" if x else "left", va="center", fontsize=9, **style)

    tops = [height - 0.27 * i for i in range(len(rows) + 2)]
    axes.text(0, tops[0] - 0.13, title, va="center", fontsize=10, color=_TEXT_COLOUR)
    write(tops[1] - 0.13, head, color="#444444")
    for place, (row, top) in enumerate(zip(rows, tops[2:], strict=True)):
        write(top - 0.13, row, color=_TEXT_COLOUR)
        if curves:
            axes.plot([-0.1], [top - 0.13], marker="o", markersize=3, color=_COLOURS[place % len(_COLOURS)])
    for y in (tops[1], tops[2], tops[2] - 0.27 * len(rows)):
        axes.plot([-0.15, right[-1] + 0.05], [y, y], color=_RULE_COLOUR, linewidth=0.8)
    _save(figure, path)


def _recorded(histories: Iterable[History]) -> set[str]:
    recorded = {key for history in histories for record in history for key in record}
    if "epoch" not in recorded:
        raise ValueError("nothing to draw: the history has no record with an epoch")
    return recorded


def _points(histories: Iterable[History], key: str, scale: float) -> dict[int, list[float]]:
    """{epoch: the value of each run}; runs of one configuration have a figure in the same epochs."""
    points: dict[int, list[float]] = {}
    for history in histories:
        for record in history:
            if record.get(key) is not None:
                points.setdefault(record["epoch"], []).append(scale * record[key])
    return points


def _line(axes: Any, points: Mapping[int, list[float]], **style: Any) -> Any:
    means = [statistics.fmean(values) for values in points.values()]
    (line,) = axes.plot(list(points), means, marker="o" if len(points) == 1 else None, markersize=4, **style)
    return line


def _panels(titles: Sequence[str], draw: Callable[[Any, str, float], None], legend: float = 0.0) -> Any:
    """A figure of panels with epochs along them; ``draw(axes, title, scale)`` fills one.

    A title that ends in "(%)" has the scale 100. ``legend`` is the height in inches that a legend below will take.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = 2 if len(titles) == 4 else 1  # four abreast are too small to read on a page
    columns = len(titles) // rows
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + legend), dpi=160, layout="constrained", facecolor="white")
    for axes, title in zip(figure.subplots(rows, columns, squeeze=False).flat, titles, strict=True):
        draw(axes, title, 100.0 if title.endswith("(%)") else 1.0)
        axes.set_title(title, fontsize=10, loc="left", color=_TEXT_COLOUR)
        axes.set_xlabel("epoch", fontsize=9, color="#444444")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.tick_params(labelsize=8, length=0, colors="#444444")
        axes.grid(axis="y", color="#e8eaed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE_COLOUR)
        if title == "learning rate":
            axes.yaxis.set_major_formatter("{x:g}")  # an exponent of its own would push the title up
    return figure
