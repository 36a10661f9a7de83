"""The tables of a campaign beside the papers', of whatever is finished."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from dpa_jax.campaign.plan import Plan, Table
from dpa_jax.compare.report import Histories, summarize_runs
from dpa_jax.plots import plot_table
from dpa_jax.training.record import replace_file

FILES = ("table.md", "table.png")

_HEAD = ("mechanism", "seeds", "mean", "std", "margin", "paper", "its margin")
_NONE = "\N{EN DASH}"


def write_tables(
    folder: pathlib.Path, plan: Plan, histories: Mapping[str, Histories], index: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Writes ``table.md`` and ``table.png``, and returns the rows' figures by the tables' names.

    Args:
        folder: where to.
        plan: the campaign.
        histories: the records of the finished runs, by the tables' names.
        index: of the bundle: calls, unfinished runs, those that failed.
    """
    rows = {table.name: _rows(table, histories[table.name]) for table in plan.tables}
    texts = [f"# {plan.title}"]
    for table in plan.tables:
        lines = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1)), *map(_cells, rows[table.name])]
        cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        texts.append(f"## {table.title}\n\n{cells}\n\n{_about(table)}")
    texts.append(
        "Of finished runs alone: top-1 on the evaluation images in percent after the last epoch, mean and standard "
        "deviation (n - 1) over the seeds. Margin: over the baseline's mean, in points."
    )
    for failed, why in index.get("failed", {}).items():
        texts.append(f"Failed: {failed}: {why}")
    if unfinished := index["unfinished"]:
        texts.append(f"Open: {len(unfinished)} runs, the first of them {unfinished[0]}.")
    devices = dict.fromkeys(
        f"{call['device']}, " + ", ".join(f"{name} {version}" for name, version in call["versions"].items())
        for call in index["calls"]
    )
    texts.append("Trained on " + "; ".join(devices) + ".")
    replace_file(folder / "table.md", ("\n\n".join(texts) + "\n").encode())
    drawn: list[list[str]] = []
    for table in plan.tables:
        drawn += [[table.title, *[""] * (len(_HEAD) - 1)], *map(_cells, rows[table.name])]
    picture = folder / ".table.png"
    plot_table(plan.title, _HEAD, drawn, picture, curves=False)
    picture.replace(folder / "table.png")
    return rows


def _rows(table: Table, histories: Histories) -> list[dict[str, Any]]:
    """Each entry's figures in percent; None where there is none."""
    means = {name: summarize_runs(name, runs) for name, runs in histories.items()}
    ours, papers = means.get(table.baseline), table.papers
    rows = []
    for entry in table.entries:
        row, paper = means.get(entry.name), papers.get(entry.name)
        compared = entry.name != table.baseline
        rows.append(
            {
                "mechanism": entry.name,
                "seeds": sorted(histories.get(entry.name, {})),
                "mean": 100 * row.mean if row else None,
                "std": 100 * row.std if row and row.std is not None else None,
                "margin": 100 * (row.mean - ours.mean) if row and ours and compared else None,
                "paper": paper,
                "paper_margin": paper - papers[table.baseline]
                if paper is not None and compared and table.baseline in papers
                else None,
            }
        )
    return rows


def _cells(row: Mapping[str, Any]) -> list[str]:
    """As the table shows it, under `_HEAD`."""
    forms = {"mean": ".2f", "std": ".2f", "margin": "+.2f", "paper": ".1f", "paper_margin": "+.1f"}
    figures = [_NONE if row[name] is None else format(row[name], form) for name, form in forms.items()]
    return [row["mechanism"], str(len(row["seeds"])), *figures]


def _about(table: Table) -> str:
    config = table.config
    return (
        f"{config.data.name}, {config.model}, {config.epochs} epochs of batches of {config.batch_size}, "
        f"{config.precision}; margins over {table.baseline}."
    )
