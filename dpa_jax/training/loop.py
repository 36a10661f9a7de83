"""Training from a configuration to the last figures; the same loop for one seed and for several at a time."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dpa_jax.models.hugging_face import weights_file
from dpa_jax.plots import plot_curves
from dpa_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from dpa_jax.training.continuation import check_unchanged, write_config
from dpa_jax.training.folder import check_kinds, folder_of, locked, writing
from dpa_jax.training.header import header, model_line, note_of_rate
from dpa_jax.training.hosts import agree, facts_of
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.progress import Progress
from dpa_jax.training.record import Recorder, finished
from dpa_jax.training.run import Figures, Run, build


class NonFiniteError(FloatingPointError):
    """A term of the loss, or the gradient, is not a finite number."""


class Preempted(SystemExit):
    """The run was told to stop, has saved, and will continue when it is started again."""


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains, evaluates every epoch, and keeps checkpoints and a record; continues what ``workdir`` has.

    Args:
        config: as `dpa_jax.config.default_config` makes it, with the changes of a file in ``configs/``.
        workdir: the run's folder, local or ``gs://BUCKET/NAME``: checkpoints, ``metrics.jsonl``, ``config.json``,
            ``position.json``, ``tensorboard/``, ``curves.png``.

    Returns:
        The last line of ``metrics.jsonl``; nothing where a finished run left none.

    Raises:
        ValueError: for a configuration that can't run, another one than ``workdir`` was trained with (see
            `check_unchanged`), or a checkpoint of another model.
        FileNotFoundError: if the data is not there; the message says how to get it.
        InUseError: if another program trains in ``workdir``.
        OSError: if ``workdir`` cannot be written to.
        DamagedCheckpointError: if there are checkpoints, but none that can be read.
        NonFiniteError: if the loss or the gradient is not finite; the last good checkpoint stays.
        Preempted: after SIGTERM or SIGINT, when the run is saved.
        KeyboardInterrupt: after a second SIGINT, at once.
    """
    workdir = folder_of(workdir)
    (history,) = train(build(config), workdir, [workdir])
    return history[-1] if history else {}


def train(
    run: Run,
    workdir: pathlib.Path,
    folders: Sequence[pathlib.Path],
    name: str = "",
    until: Callable[[bool, bool], bool] | None = None,
) -> list[list[Figures]]:
    """Trains a run from its last checkpoint, or from the start, to its end; closes it; returns each member's records.

    A checkpoint holds all members; it is in ``workdir``, and the best is that of the highest mean top-1. The record of
    each member is in its own one of ``folders``. Lines of output begin with ``name``, if any.

    ``until`` is asked after every call of the compiled steps, and ends the training, when it is saved, by True. It is
    told whether an evaluation follows at once, and whether one follows the next call. Raises what `train_and_evaluate`
    raises.
    """
    config, total_steps = run.config, run.total_steps
    agree(facts_of(config, run.spec, "training"), workdir)
    place = "" if name else f" in {workdir}"  # a member's folder is not what a comparison is started with
    for folder in {workdir, *folders}:
        check_kinds(folder)

    def check_finite(members: Sequence[Figures], step: int) -> None:
        for seed, figures in zip(run.seeds, members, strict=True):
            for key in sorted(figures, key=lambda key: "loss_" not in key):  # the terms before their sum
                if not np.isfinite(figures[key]):
                    raise NonFiniteError(
                        f"{f'{name}, seed {seed}: ' if name else ''}{key} is {figures[key]} at step {step}. The last "
                        f"good checkpoint is kept in {workdir}; a lower config.optimizer.learning_rate, or a "
                        "config.clip_norm, may help."
                    )

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(run))
        stack.enter_context(locked(workdir))
        notes = _check_continued(run, workdir, folders, resumes=True)
        if notes is None:
            notes = _weights_of(run)
        images, every = config.batch_size * len(run.seeds), config.log_every_seconds
        progress = Progress(config.epochs, images, every=every, name=name, unit=run.spec.unit)
        stack.enter_context(contextlib.closing(progress))
        for line in [model_line(run)] if name else header(run, workdir):
            progress.write(line)
        run.load()
        keep, best = config.checkpoint.keep, _best(run)
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=keep, best=best))
        preemption = stack.enter_context(Preemption())

        # ---------------- Start or continue ----------------
        start, state = checkpoints.restore(run.abstract_state) or (0, run.init())
        recorders = [stack.enter_context(contextlib.closing(Recorder(folder, start))) for folder in folders]
        stack.push(lambda kind, *_: _draw(recorders, start, kind))
        if all(finished(recorder.history, config) for recorder in recorders):
            total_steps = start
        if start < total_steps:
            for member, folder in zip(run.configs, folders, strict=True):
                write_config(member, folder, _examples(run))
        ended = bisect.bisect_right(range(1, config.epochs + 1), start, key=run.steps_at)  # epochs
        epoch = min(ended + 1, config.epochs)
        notes += [recorder.note for recorder in recorders if recorder.note]
        for folder, recorder in zip(folders, recorders, strict=True):
            recorded = {record["epoch"] for record in recorder.history if "epoch" in record}
            last = max(recorded, default=0) if finished(recorder.history, config) else ended
            if jax.process_index() == 0 and (lacking := [e for e in range(1, last + 1) if e not in recorded]):
                notes.append(f"note: {folder / 'metrics.jsonl'} lacks epoch {', '.join(map(str, lacking))}")
        if start:
            how = "continuing" if start < total_steps else "nothing left to do"
            notes.insert(0, f"{how} after step {start} of {total_steps}{place}")
        if start < total_steps:
            notes += note_of_rate(run)
        for line in notes:
            progress.write(line)
        if start < total_steps:
            progress.begin(epoch, start, run.steps_at(epoch))
        unseen: list[tuple[int, int, dict[str, jax.Array]]] = []

        step, per_dispatch, every_steps = start, run.steps_per_dispatch, config.checkpoint.every_steps or total_steps

        def steps_ahead(step: int, epoch: int) -> int:
            return min(per_dispatch, run.steps_at(epoch) - step, every_steps - step % every_steps)

        def due(step: int, epoch: int, every: int) -> bool:
            return step == run.steps_at(epoch) and (epoch % every == 0 or epoch == config.epochs)

        while step < total_steps:
            # ---------------- One step, or several in one call ----------------
            count = steps_ahead(step, epoch)
            with jax.transfer_guard("disallow"):
                state, metrics = run.steps(state, step, count)
            step += count
            told = any(preemption.requested(done) for done in range(step - count + 1, step + 1))
            epoch_ends, evaluates = step == run.steps_at(epoch), due(step, epoch, config.eval_every_epochs)
            following = epoch + epoch_ends
            stop = told
            if until is not None and step < total_steps:
                next_step = step + steps_ahead(step, following)
                stop |= until(evaluates, due(next_step, following, config.eval_every_epochs))
            save = stop or due(step, epoch, config.checkpoint.every_epochs) or step % every_steps == 0

            # ---------------- See how it went ----------------
            # One call behind, so that the devices are never waited for; before a save nothing stays unseen.
            unseen.append((step, count, metrics))
            while len(unseen) > (0 if save or epoch_ends else 1):
                last, several, arrays = unseen.pop(0)
                for done, members in enumerate(run.seen(arrays, several), start=last - several + 1):
                    check_finite(members, done)
                progress.update(last, _means(members))

            # ---------------- Evaluate and record ----------------
            evaluations: list[Figures] = [{} for _ in folders]
            if epoch_ends:
                wrong = run.diagnose(state) if epoch == 1 else []  # before the evaluation, which resets counters
                if evaluates:
                    state, evaluations = run.evaluate(state)
                    check_finite(evaluations, step)  # the last update is seen here for the first time
                speed = progress.images_per_second  # of all members together; the time of each is its share
                records = [
                    {
                        "epoch": epoch,
                        "step": step,
                        "lr": float(run.schedule(step - 1)),
                        **figures,
                        **evaluation,
                        "images_per_second": speed,
                        "seconds": (step - run.steps_at(epoch - 1)) * config.batch_size / speed,
                    }
                    for figures, evaluation in zip(run.figures(state), evaluations, strict=True)
                ]
                # Before the save: a line whose checkpoint never came is taken back, a missing line would stay missing.
                for recorder, record in zip(recorders, records, strict=True):
                    if not finished(recorder.history, config):  # a member that has stopped early waits for the others
                        recorder.write(record)
                progress.close()
                progress.write(_line(_means(records), config.epochs, run.spec.unit))
                state = run.clear_metrics(state)
                for line in wrong:
                    progress.write(f"warning: {line}")

                if all(finished(recorder.history, config) for recorder in recorders):
                    total_steps, save = step, True

            # ---------------- Save ----------------
            if save:
                checkpoints.save(step, state, _means(evaluations))
            if stop and step < total_steps:
                checkpoints.wait()
                why = preemption.signal.name if told else "time is up"
                progress.write(f"{why}: saved step {step} of {total_steps}; start again{place} to continue")
                if told:
                    raise Preempted(128 + preemption.signal)
                break
            if epoch_ends and step < total_steps:
                epoch += 1
                progress.begin(epoch, step, run.steps_at(epoch))
        return [recorder.history for recorder in recorders]


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[int, Figures]:
    """Evaluates the best and the newest checkpoint of a run on its whole evaluation split; its folder stays as it is.

    Returns:
        {step: {figure: value}}, the best checkpoint first; one entry where it is the newest too.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no data.
        ValueError: as `train_and_evaluate`.
    """
    workdir = folder_of(workdir)
    run = build(config)
    check_kinds(workdir)
    for note in _check_continued(run, workdir, [workdir]) or []:
        if jax.process_index() == 0:
            print(note, file=sys.stderr)
    results: dict[int, Figures] = {}
    keep, best = config.checkpoint.keep, _best(run)
    with Checkpoints(workdir / "checkpoints", keep=keep, best=best, read_only=True) as checkpoints:
        steps = [checkpoints.best_step, checkpoints.latest_step]
        agree({**facts_of(config, run.spec, "evaluation"), "the best and the newest checkpoint": steps})
        while True:  # one that is damaged is passed over from then on
            newest = checkpoints.latest_step
            wanted = list(dict.fromkeys(step for step in (checkpoints.best_step, newest) if step is not None))
            waiting = [step for step in wanted if step not in results]
            if not waiting:
                break
            try:
                restored = checkpoints.restore(run.abstract_state, waiting[0])
            except (DamagedCheckpointError, FileNotFoundError):  # or deleted by a training that runs there
                continue
            if restored is not None:
                _, (figures,) = run.evaluate(restored[1])
                results[restored[0]] = {name.removeprefix("eval_"): value for name, value in figures.items()}
        if not wanted:
            checkpoints.restore(run.abstract_state)  # says which are damaged, if any
            raise FileNotFoundError(f"no checkpoint in {checkpoints.directory}; train first, without --eval")
    return {step: results[step] for step in wanted}


def _check_continued(
    run: Run, workdir: pathlib.Path, folders: Sequence[pathlib.Path], resumes: bool = False
) -> list[str] | None:
    """Notes on what has changed since the checkpoints were written, None without any; ValueError for what may not."""
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        if checkpoints.latest_step is None:
            return None
    examples = _examples(run) if resumes else None
    notes = [check_unchanged(member, folder, examples) for member, folder in zip(run.configs, folders, strict=True)]
    return list(dict.fromkeys(note for some in notes for note in some))


def _weights_of(run: Run) -> list[str]:
    """Reads the weights that a run begins with, the same on all hosts, before its data: a note on them, if any."""
    if not (path := run.config.init_from):
        return []
    summary = run.weights.summary
    with open(weights_file(pathlib.Path(path)), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    agree({"the digest of config.init_from": digest})
    return [f"{path} (SHA-256 {digest}): {summary}"]


def _best(run: Run) -> str:
    """The figure that the best checkpoint has the highest of, as the records name it."""
    return f"{'valid' if 'valid' in run.spec.splits else 'eval'}_{run.config.checkpoint.best}"


def _examples(run: Run) -> int:
    return run.feeds[0].sampler.num_examples


def _means(members: Sequence[Mapping[str, Any]]) -> Figures:
    return {name: statistics.fmean(member[name] for member in members) for name in members[0]}


def _draw(recorders: Sequence[Recorder], start: int, ended_by: type[BaseException] | None) -> None:
    """Draws the curves of what was recorded since a step, or those that were never drawn."""
    if ended_by is KeyboardInterrupt:
        return
    for recorder in recorders:
        path = recorder.workdir / "curves.png"
        drawable = [record for record in recorder.history if "epoch" in record]
        new = drawable and (drawable[-1]["step"] > start or not path.exists())
        if new and jax.process_index() == 0:
            # A disk that is full is told of by what first could not be written.
            with contextlib.suppress(OSError) if ended_by else writing(path):
                plot_curves(drawable, path)


def _line(record: Mapping[str, float], epochs: int, unit: str) -> str:
    parts = [f"epoch {record['epoch']:.0f}/{epochs}: loss {record['train_loss']:.4f}, top-1 {record['train_top1']:.2%}"]
    for split in ("valid", "eval"):
        if f"{split}_loss" in record:
            parts.append(f"{split}: loss {record[f'{split}_loss']:.4f}, top-1 {record[f'{split}_top1']:.2%}")
    return " | ".join([*parts, f"{record['images_per_second']:,.0f} {unit}/s"])
