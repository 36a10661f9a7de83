"""The runs of a comparison: every entry with every seed, several seeds at a time."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dpa_jax.compare.entries import Entry
from dpa_jax.compare.report import FILES, Histories, write_report
from dpa_jax.config import MAX_SEED
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.continuation import check_unchanged
from dpa_jax.training.folder import check_kinds, folder_of, locked
from dpa_jax.training.loop import train
from dpa_jax.training.record import finished, read_history
from dpa_jax.training.run import Figures, Run, build

# What a device must keep free beside the training step: the evaluation's buffers, and the allocator's gaps.
_SHARE = 0.8


def compare(
    config: ConfigDict,
    entries: Sequence[Entry],
    num_seeds: int,
    workdir: str | pathlib.Path,
    *,
    vmap: int = 0,
    command: str = "",
) -> Histories:
    """Trains every entry with every seed, as `train_and_evaluate` would, writes the report, and returns the records.

    Whatever ``workdir`` has already is kept: finished runs as they are, and those under way go on from their last
    checkpoint, in the groups that they were started in, so that they end with the same bits.

    Args:
        config: a run's configuration. Its seed is the first; its mechanism is replaced.
        entries: what is compared, of `parse_entries`.
        num_seeds: how many seeds each is trained with.
        workdir: the comparison's folder: ``ENTRY/seed-N/`` with the record of each run, and the files of
            `write_report`, which are written anew whenever an entry is finished.
        vmap: how many seeds are trained at a time in one program; 0 for all on CPUs, and elsewhere as many as fit.
        command: what to type to do it again, for the report.

    Raises:
        ValueError: for a configuration that can't run, or another than the runs in ``workdir`` were trained with.
        InUseError: if another program writes to ``workdir``.
        NonFiniteError: if the loss or the gradient of a run is not finite.
        Preempted: after SIGTERM or SIGINT, when the runs under way are saved.
    """
    if num_seeds < 1 or vmap < 0:
        raise ValueError(f"a comparison needs at least 1 seed, and vmap at least 0; got {num_seeds} and {vmap}")
    if config.seed + num_seeds - 1 > MAX_SEED:
        raise ValueError(f"config: {num_seeds} seeds from seed {config.seed} on go beyond the last one, {MAX_SEED}")
    workdir = folder_of(workdir)
    seeds = range(config.seed, config.seed + num_seeds)
    folders = {entry.name: workdir / entry.name.replace(":", ",") for entry in entries}
    check_kinds(workdir, FILES, (folder.name for folder in folders.values()))
    with locked(workdir):
        for entry in entries:
            for seed in seeds:
                check_kinds(folder := folders[entry.name] / f"seed-{seed}")
                if history := read_history(folder):
                    notes = check_unchanged(entry.configure(config, seed), folder)
                    if jax.process_index() == 0 and finished(history, config):  # the others' are told when they go on
                        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)

        def size(run: Run, wanted: int) -> int:
            return vmap or seeds_that_fit(run, wanted)

        histories: Histories = {}
        for entry in entries:
            folder = folders[entry.name]
            train_entry(entry.name, entry.configure(config, config.seed), seeds, folder, size, train_group)
            histories[entry.name] = {seed: _whole(folder / f"seed-{seed}", config) for seed in seeds}
            write_report(workdir, histories, command)
        return histories


def _whole(folder: pathlib.Path, config: ConfigDict) -> list[dict[str, Any]]:
    """The records of a finished run; ValueError where what the report needs is not in them."""
    history = read_history(folder)
    lacking = [] if finished(history, config) else ["the record of the last epoch"]
    for key in ("epoch", "seconds"):
        lacking += [f"{key} at step {record['step']}" for record in history if record.get(key) is None]
    lacking += [] if lacking or history[-1].get("eval_top1") is not None else ["eval_top1 in its last record"]
    if lacking:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} lacks {lacking[0]}, so there is no row for it. Put it back, or remove "
            f"{folder.parent} to train it again."
        )
    return history


def train_entry(
    name: str,
    config: ConfigDict,
    seeds: Iterable[int],
    folder: pathlib.Path,
    size: Callable[[Run, int], int],
    train_group: Callable[[Run, str, range, pathlib.Path], object],
) -> None:
    """Trains those of the seeds that are not finished: the groups under way first, then new ones.

    ``size`` says how many seeds of a run, of those wanted, are trained at a time; ``train_group`` trains them, as the
    function of that name.
    """

    def unfinished(some: Iterable[int]) -> list[int]:
        return [seed for seed in some if not finished(read_history(folder / f"seed-{seed}"), config)]

    def under_way(group: range) -> bool:
        if unfinished(group):
            return True
        with Checkpoints(group_folder(folder, group) / "checkpoints", keep=1, read_only=True) as checkpoints:
            newest = checkpoints.latest_step
        # A kill can come between the last line of the records and the last checkpoint.
        return newest is not None and newest < read_history(folder / f"seed-{group[0]}")[-1]["step"]

    matches = (re.fullmatch("seeds-([0-9]+)-([0-9]+)", path.name) for path in folder.glob("seeds-*-*"))
    ends = sorted((int(match[1]), int(match[2])) for match in matches if match)
    groups = [group for first, last in ends if under_way(group := range(first, last + 1))]
    rest = np.setdiff1d(unfinished(seeds), np.concatenate([[], *groups])).astype(int)
    if not groups and not rest.size:
        return

    run = build(config)
    if rest.size:
        most = size(run, rest.size)
        for consecutive in np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1):
            groups += [
                range(part[0], part[-1] + 1) for part in np.array_split(consecutive, -(-consecutive.size // most))
            ]
    for group in groups:
        train_group(run, name, group, folder)


def group_folder(folder: pathlib.Path, seeds: range) -> pathlib.Path:
    """Where the checkpoints are of consecutive seeds that are trained together."""
    return folder / f"seeds-{seeds[0]}-{seeds[-1]}"


def train_group(
    run: Run, name: str, seeds: range, folder: pathlib.Path, until: Callable[[bool, bool], bool] | None = None
) -> list[list[Figures]]:
    """Trains consecutive seeds as one program, with one checkpoint; the record of each is in a folder of its own.

    ``until`` and the records that are returned are those of `train`.
    """
    who = f"{name}, seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{name}, seed {seeds[0]}"
    folders = [folder / f"seed-{seed}" for seed in seeds]
    return train(run.with_seeds(seeds), group_folder(folder, seeds), folders, who, until)


def seeds_that_fit(run: Run, wanted: int) -> int:
    """How many seeds to train at a time: all that are ``wanted`` on a CPU, elsewhere as many as fit into its memory."""
    device = jax.local_devices()[0]
    limits = device.memory_stats() if device.platform != "cpu" else None
    if wanted == 1 or not limits or "bytes_limit" not in limits:
        return wanted
    run.load()  # what is measured below is what the data leaves
    memory = run.lower().compile().memory_analysis()
    if memory is None:  # a backend that does not tell
        return wanted
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    needed -= memory.alias_size_in_bytes
    free = limits["bytes_limit"] - limits["bytes_in_use"]
    return max(1, min(wanted, int(_SHARE * free) // max(needed, 1)))
