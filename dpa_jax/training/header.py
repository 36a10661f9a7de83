"""What a run says of itself before it trains."""

from __future__ import annotations

import bisect
import os
import pathlib
from collections.abc import Sequence

import jax

from dpa_jax.training.run import Run


def header(run: Run, workdir: pathlib.Path) -> list[str]:
    """Lines on the device, the model, the data, the training and the folder of a run."""
    config, spec, schedule = run.config, run.spec, run.config.schedule
    warmup = f", warm-up {schedule.warmup_epochs} epochs" if schedule.warmup_epochs else ""
    return [
        f"device: {describe(run.devices)}, jax {jax.__version__}, {config.precision}",
        model_line(run),
        f"data: {spec.describe()}",
        f"training: {config.epochs:,} epochs, {run.total_steps:,} steps of {config.batch_size:,}, "
        f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g} ({schedule.name}{warmup})",
        f"folder: {workdir}",
    ]


def model_line(run: Run) -> str:
    """The line on the model."""
    return f"model: {run.config.model} with {run.config.mechanism}, {run.num_parameters:,} parameters"


def describe(devices: Sequence[jax.Device]) -> str:
    """How many devices there are, and of what kind."""
    cores = f" ({os.cpu_count()} cores)" if devices[0].platform == "cpu" else ""
    return f"{len(devices)} x {devices[0].device_kind}{cores}"


def note_of_rate(run: Run) -> list[str]:
    """A note, where a run ends with steps whose learning rate is 0 and which change no parameter."""

    def is_zero(step: int) -> bool:
        return float(run.schedule(step)) == 0

    total = run.total_steps
    if not is_zero(total - 1):
        return []
    zero = bisect.bisect_left(range(total), True, lo=run.steps_at(run.config.schedule.warmup_epochs), key=is_zero)
    cosine = run.config.schedule.name == "cosine"
    remedy = "schedule.min_learning_rate keeps it above" if cosine else "see schedule.gamma"
    return [f"note: the learning rate is 0 from step {zero + 1} of {total} on and nothing more is learnt; {remedy}"]
