"""The runs of a comparison: every entry with every seed, several seeds at a time."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dpa_jax.compare.ensemble import largest_ensemble, make_ensemble
from dpa_jax.compare.entries import Entry
from dpa_jax.compare.report import Histories, write_report
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.loop import (
    NonFiniteError,
    Preempted,
    Program,
    build,
    check_finite,
    run_evaluation,
    train_figures,
)
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.progress import Progress
from dpa_jax.training.record import Recorder, changed_keys, read_history

# What may change between two starts: it changes no figure.
_FREE = ("checkpoint.", "log_every_seconds", "data.dir", "data.download", "data.resident")


def compare(
    config: ConfigDict,
    entries: Sequence[Entry],
    num_seeds: int,
    workdir: str | pathlib.Path,
    *,
    vmap: int = 0,
    command: str = "",
) -> Histories:
    """Trains every entry with every seed, as `train_and_evaluate` would, and writes the report.

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

    Returns:
        {entry's name: {seed: its records}}.

    Raises:
        ValueError: for a configuration that can't run, or another than the runs in ``workdir`` were started with.
        NonFiniteError: if the loss or the gradient of a run is not finite.
        Preempted: after SIGTERM, when the runs under way are saved.
    """
    if num_seeds < 1 or vmap < 0:
        raise ValueError(f"a comparison needs at least 1 seed, and vmap at least 0; got {num_seeds} and {vmap}")
    workdir = pathlib.Path(workdir)
    seeds = range(config.seed, config.seed + num_seeds)
    folders = {entry.name: workdir / entry.name.replace(":", ",") for entry in entries}
    for entry in entries:
        for seed in seeds:
            _require_same_config(entry.configure(config, seed), folders[entry.name] / f"seed-{seed}")

    histories: Histories = {}
    for entry in entries:
        folder = folders[entry.name]
        _train_entry(entry, config, seeds, folder, vmap)
        histories[entry.name] = {seed: read_history(folder / f"seed-{seed}") for seed in seeds}
        write_report(workdir, histories, command)
    return histories


def _train_entry(entry: Entry, config: ConfigDict, seeds: Iterable[int], folder: pathlib.Path, vmap: int) -> None:
    """Trains those of the seeds that are not finished: the groups under way first, then new ones."""

    def unfinished(some: Iterable[int]) -> list[int]:
        histories = {seed: read_history(folder / f"seed-{seed}") for seed in some}
        return [seed for seed, history in histories.items() if not history or history[-1]["epoch"] < config.epochs]

    groups = []
    for path in sorted(folder.glob("seeds-*-*")):
        first, last = map(int, path.name.split("-")[1:])
        if unfinished(range(first, last + 1)):
            groups.append(range(first, last + 1))
        else:
            shutil.rmtree(path)  # killed after its last record
    rest = np.setdiff1d(unfinished(seeds), np.concatenate([[], *groups])).astype(int)
    if not groups and not rest.size:
        return

    program = build(entry.configure(config, config.seed))
    if rest.size:
        size = vmap or largest_ensemble(program, rest.size)
        for consecutive in np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1):
            groups += [
                range(part[0], part[-1] + 1) for part in np.array_split(consecutive, -(-consecutive.size // size))
            ]
    for group in groups:
        _train_group(program, entry, config, group, folder)


def _train_group(program: Program, entry: Entry, config: ConfigDict, seeds: range, folder: pathlib.Path) -> None:
    """Trains consecutive seeds as one program and leaves the record of each; as `train_and_evaluate` does with one."""
    configs = [entry.configure(config, seed) for seed in seeds]
    workdir = folder / f"seeds-{seeds[0]}-{seeds[-1]}"
    who = f"{entry.name}, seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{entry.name}, seed {seeds[0]}"
    steps_at = program.train_feed.sampler.steps
    total_steps = steps_at(config.epochs)

    def show_epoch(epoch: int, step: int) -> Progress:
        return Progress(
            epoch,
            config.epochs,
            first_step=step,
            last_step=steps_at(epoch),
            batch_size=config.batch_size * len(seeds),
            every=config.log_every_seconds,
        )

    def checked(figures: Sequence[dict[str, Any]], step: int) -> None:
        for seed, of_seed in zip(seeds, figures, strict=True):
            try:
                check_finite(of_seed, step, workdir)
            except NonFiniteError as error:
                raise NonFiniteError(f"{entry.name}, seed {seed}: {error}") from None

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep))
        preemption = stack.enter_context(Preemption())

        # ---------------- Start or continue ----------------
        ensemble = make_ensemble(program, seeds)
        for feed in ensemble.feeds:
            stack.enter_context(contextlib.closing(feed))
        start, states = checkpoints.restore(ensemble.abstract_states) or (0, ensemble.init())
        recorders = [
            stack.enter_context(contextlib.closing(Recorder(folder / f"seed-{seed}", of_seed, start)))
            for seed, of_seed in zip(seeds, configs, strict=True)
        ]
        epoch = next(e for e in range(1, config.epochs + 1) if steps_at(e) > start)
        progress = stack.enter_context(contextlib.closing(show_epoch(epoch, start)))
        progress.write(who + (f": continuing after step {start} of {total_steps}" if start else ""))
        unseen: list[tuple[int, dict[str, jax.Array]]] = []

        for step in range(start + 1, total_steps + 1):
            # ---------------- One step of every seed ----------------
            batches = [feed.train(step - 1) for feed in ensemble.feeds]
            states, metrics = ensemble.train_step(states, batches)
            stop = preemption.requested(step)
            epoch_ends = step == steps_at(epoch)
            every = config.checkpoint.every_steps
            save = stop or epoch_ends or (every > 0 and step % every == 0)

            # ---------------- See how it went ----------------
            unseen.append((step, metrics))
            while len(unseen) > (0 if save else 1):
                seen, figures = unseen.pop(0)
                figures = jax.device_get(figures)
                checked([{name: values[i] for name, values in figures.items()} for i in range(len(seeds))], seen)
                progress.update(seen, {name: values.mean() for name, values in figures.items()})

            # ---------------- Evaluate and record ----------------
            if epoch_ends:
                evaluates = epoch % config.eval_every_epochs == 0 or epoch == config.epochs
                if evaluates:
                    states = program.reset_counters(states)
                members = ensemble.members(states)
                evaluations = [
                    {f"eval_{k}": v for k, v in run_evaluation(program, state, configs[0]).items()} if evaluates else {}
                    for state in members
                ]
                checked(evaluations, step)
                rate = progress.images_per_second
                for recorder, state, evaluation in zip(recorders, members, evaluations, strict=True):
                    recorder.write(
                        {
                            "epoch": epoch,
                            "step": step,
                            "lr": float(program.schedule(step - 1)),
                            **train_figures(state),
                            **evaluation,
                            # Of all seeds together; the time of one is its share.
                            "images_per_second": rate,
                            "seconds": (step - steps_at(epoch - 1)) * config.batch_size / rate,
                        }
                    )
                progress.close()
                states = program.clear_metrics(states)

            # ---------------- Save ----------------
            if step == total_steps:
                break
            if save:
                checkpoints.save(step, states)
            if stop:
                checkpoints.wait()
                progress.write(f"SIGTERM: saved step {step} of {total_steps} of {who}; start again to continue")
                raise Preempted(128 + signal.SIGTERM)
            if epoch_ends:
                epoch += 1
                progress = stack.enter_context(contextlib.closing(show_epoch(epoch, step)))
        accuracies = ", ".join(f"{recorder.history[-1]['eval_top1']:.2%}" for recorder in recorders)
        progress.write(f"{who}: held-out top-1 {accuracies}")
    shutil.rmtree(workdir)  # the records are all that is needed of a finished group


def _require_same_config(config: ConfigDict, folder: pathlib.Path) -> None:
    """Raises ValueError if the run in the folder was started with another configuration."""
    for name, (then, now) in changed_keys(folder, config).items():
        if not name.startswith(_FREE):
            raise ValueError(
                f"{folder} was started with another configuration: {name} was {then} and is {now} now. "
                "Use the one it was started with, or another workdir."
            )
