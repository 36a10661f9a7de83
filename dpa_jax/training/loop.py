"""The run from its configuration to its last figures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.activations import reset_counters
from dpa_jax.config import validate
from dpa_jax.data.feeds import make_feed
from dpa_jax.data.feeds.base import BaseFeed
from dpa_jax.data.sources import open_source
from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.optimizer import make_optimizer, make_schedule
from dpa_jax.training.preemption import Preemption
from dpa_jax.training.progress import Progress
from dpa_jax.training.record import Recorder, changed_keys
from dpa_jax.training.state import TrainState, create_model, create_state
from dpa_jax.training.step import Evaluation, make_eval_step, make_train_step


class NonFiniteError(FloatingPointError):
    """A term of the loss, or the gradient, is not a finite number."""


class Preempted(SystemExit):
    """The run was told to stop, has saved, and will continue when it is started again."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What a configuration stands for, ready to run; made by `build`.

    Attributes:
        train_feed: batches of the training images.
        eval_feed: batches of the evaluation images.
        init: (seed=config.seed) -> TrainState on the devices.
        abstract_state: shapes, dtypes and shardings of a TrainState.
        train_step: compiled (state, batch) -> (state, metrics); donates the state.
        eval_step: compiled (variables, batch) -> Evaluation.
        add: compiled sum of two Evaluations.
        clear_metrics: compiled; the state with its averages back at nothing.
        reset_counters: compiled; the state as its mechanism wants it on entering evaluation.
        schedule: step -> learning rate.
    """

    train_feed: BaseFeed
    eval_feed: BaseFeed
    init: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: jax.stages.Wrapped
    eval_step: Callable
    add: Callable
    clear_metrics: Callable
    reset_counters: Callable
    schedule: Callable


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Program:
    """Loads the data and prepares the model, the state and the steps; nothing is compiled yet.

    Args:
        config: a run's configuration.
        devices: those that share each batch; None for all there are.

    Raises:
        ValueError: if the configuration can't run; the message names the key.
        FileNotFoundError: if the data is not there; the message says how to get it.
    """
    validate(config)

    # ---------------- Devices ----------------
    mesh = Mesh(np.asarray(devices or jax.devices()), ("data",))
    replicated, sharded = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    # ---------------- Data ----------------
    source = open_source(config.data)
    train_feed = make_feed(source, mesh, config.batch_size, config, training=True)
    eval_feed = make_feed(source, mesh, config.eval_batch_size, config, training=False)
    transforms = source.spec.transforms(config, train_feed, eval_feed)

    # ---------------- Model ----------------
    model = create_model(config, source.spec.num_classes, **source.spec.model_options())
    size = config.augment.image_size
    for height, width, channels in (train_feed.inputs.shape, eval_feed.inputs.shape):
        given = (size or height, size or width, channels)
        if (wanted := model.example_inputs.shape[1:]) != given:
            raise ValueError(
                f"model {config.model!r} takes images of shape {wanted}; those of data {config.data.name!r} "
                f"come as {given}. Set config.augment.image_size or the model's sizes in config.model_options."
            )

    # ---------------- Optimiser ----------------
    sampler = train_feed.sampler
    steps_per_epoch = sampler.num_examples / sampler.batch_size
    schedule = make_schedule(
        config.schedule, config.optimizer.learning_rate, steps_per_epoch, sampler.steps(config.epochs)
    )
    optimizer = make_optimizer(config, schedule)

    # ---------------- State and steps ----------------
    coefficients = dict(config.coefficients)
    train_step = make_train_step(
        model, optimizer, transforms.train, coefficients, config.label_smoothing, transforms.mix
    )
    eval_step = make_eval_step(model, transforms.evaluate)
    # The step itself says what it measures; the state has an average for each.
    create = functools.partial(create_state, model, optimizer, seed=config.seed)
    _, metrics = jax.eval_shape(train_step, jax.eval_shape(lambda: create(())), train_feed.abstract_batch)
    init = jax.jit(lambda seed=config.seed: create(tuple(metrics), seed=seed), out_shardings=replicated)
    abstract_state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(init)
    )
    return Program(
        train_feed=train_feed,
        eval_feed=eval_feed,
        init=init,
        abstract_state=abstract_state,
        train_step=jax.jit(
            train_step,
            in_shardings=(replicated, sharded),
            out_shardings=(replicated, replicated),
            donate_argnums=0,
        ),
        eval_step=jax.jit(eval_step, in_shardings=(replicated, sharded), out_shardings=replicated),
        add=jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b)),
        clear_metrics=jax.jit(
            lambda state: state.replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics)),
            out_shardings=replicated,
            donate_argnums=0,
        ),
        reset_counters=jax.jit(
            lambda state: state.replace(model_state=reset_counters(state.model_state)),
            out_shardings=replicated,
            donate_argnums=0,
        ),
        schedule=schedule,
    )


def train_and_evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> dict[str, Any]:
    """Trains, evaluates every epoch, and keeps checkpoints and a record; continues what ``workdir`` has.

    Args:
        config: as `dpa_jax.config.default_config` makes it, with the changes of a file in ``configs/``.
        workdir: the run's folder: ``checkpoints/``, ``metrics.jsonl``, ``config.json``, ``tensorboard/``,
            ``curves.png``.

    Returns:
        The last line of ``metrics.jsonl``; nothing where a finished run left none.

    Raises:
        ValueError: for a configuration that can't run, or a checkpoint of another model.
        NonFiniteError: if the loss or the gradient is not finite; the last good checkpoint stays.
        Preempted: after SIGTERM, when the run is saved.
    """
    workdir = pathlib.Path(workdir)
    program = build(config)
    steps_at = program.train_feed.sampler.steps
    total_steps = steps_at(config.epochs)

    def show_epoch(epoch: int, step: int) -> Progress:
        return Progress(
            epoch,
            config.epochs,
            first_step=step,
            last_step=steps_at(epoch),
            batch_size=config.batch_size,
            every=config.log_every_seconds,
        )

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep))
        preemption = stack.enter_context(Preemption())
        stack.enter_context(contextlib.closing(program.train_feed))

        # ---------------- Start or continue ----------------
        start, state = checkpoints.restore(program.abstract_state) or (0, program.init())
        changed = changed_keys(workdir, config) if start else {}
        recorder = stack.enter_context(contextlib.closing(Recorder(workdir, config, start)))
        epoch = next((e for e in range(1, config.epochs + 1) if steps_at(e) > start), config.epochs)
        progress = stack.enter_context(contextlib.closing(show_epoch(epoch, start)))
        if start:
            how = "continuing" if start < total_steps else "nothing left to do"
            progress.write(f"{how} after step {start} of {total_steps} in {workdir}")
            if changed:
                progress.write(f"note: {', '.join(changed)} changed since this run was last started")
        unseen: list[tuple[int, dict[str, jax.Array]]] = []

        for step in range(start + 1, total_steps + 1):
            # ---------------- One step ----------------
            with jax.transfer_guard("disallow"):
                state, metrics = program.train_step(state, program.train_feed.train(step - 1))
            stop = preemption.requested(step)
            epoch_ends = step == steps_at(epoch)
            every = config.checkpoint.every_steps
            save = stop or epoch_ends or (every > 0 and step % every == 0)

            # ---------------- See how it went ----------------
            # One step behind, so that the devices are never waited for; before a save nothing stays unseen.
            unseen.append((step, metrics))
            while len(unseen) > (0 if save else 1):
                seen, figures = unseen.pop(0)
                progress.update(seen, check_finite(jax.device_get(figures), seen, workdir))

            # ---------------- Evaluate and record ----------------
            evaluation: dict[str, float] = {}
            if epoch_ends:
                if epoch % config.eval_every_epochs == 0 or epoch == config.epochs:
                    state = program.reset_counters(state)
                    evaluation = {f"eval_{k}": v for k, v in run_evaluation(program, state, config).items()}
                    check_finite(evaluation, step, workdir)  # the last update is seen here for the first time
                record = {
                    "epoch": epoch,
                    "step": step,
                    "lr": float(program.schedule(step - 1)),
                    **train_figures(state),
                    **evaluation,
                    "images_per_second": progress.images_per_second,
                }
                # Before the save: a line whose checkpoint never came is taken back, a missing line would stay missing.
                recorder.write(record)
                progress.close()
                progress.write(_line(record, config.epochs))
                state = program.clear_metrics(state)

            # ---------------- Save ----------------
            if save:
                checkpoints.save(step, state, evaluation)
            if stop and step < total_steps:
                checkpoints.wait()
                progress.write(f"SIGTERM: saved step {step} of {total_steps}; start again in {workdir} to continue")
                raise Preempted(128 + signal.SIGTERM)
            if epoch_ends and step < total_steps:
                epoch += 1
                progress = stack.enter_context(contextlib.closing(show_epoch(epoch, step)))
        return recorder.history[-1] if recorder.history else {}


def evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> dict[int, dict[str, float]]:
    """Restores the best and the newest checkpoint of a run and evaluates both on the whole test split.

    Args:
        config: the run's configuration.
        workdir: the run's folder; nothing in it is changed.

    Returns:
        {step: {figure: value}}, the best checkpoint first; one entry where it is the newest too.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: as `train_and_evaluate`.
    """
    program = build(config)
    directory = pathlib.Path(workdir) / "checkpoints"
    results = {}
    with Checkpoints(directory, keep=config.checkpoint.keep, read_only=True) as checkpoints:
        best = checkpoints.best_step
        for step in [None] if best in (None, checkpoints.latest_step) else [best, None]:
            restored = checkpoints.restore(program.abstract_state, step)
            if restored is None:
                raise FileNotFoundError(f"no checkpoint in {directory}; train first, without --eval")
            results[restored[0]] = run_evaluation(program, restored[1], config)
    return results


def run_evaluation(program: Program, state: TrainState, config: ConfigDict) -> dict[str, float]:
    """Figures of the whole evaluation split, as `Evaluation.compute` names them."""
    parts = (program.eval_step(state.variables, batch) for batch in program.eval_feed.evaluation())
    evaluation: Evaluation = functools.reduce(program.add, parts)
    figures = jax.device_get(evaluation).compute(config.coefficients)
    return {name: float(value) for name, value in figures.items()}


def check_finite(figures: Mapping[str, float], step: int, workdir: pathlib.Path) -> Mapping[str, float]:
    """The figures of a step; raises NonFiniteError if one of them is not a finite number."""
    for name in sorted(figures, key=lambda name: "loss_" not in name):  # the terms before their sum
        if not np.isfinite(figures[name]):
            raise NonFiniteError(
                f"{name} is {figures[name]} at step {step}. The last good checkpoint is kept in {workdir}; a lower "
                "config.optimizer.learning_rate, or a config.clip_norm, may help."
            )
    return figures


def train_figures(state: TrainState) -> dict[str, float]:
    """The averages of the epoch: ``train_loss`` and ``train_top1`` first, then the rest under their own names."""
    figures = {name: float(ratio.value()) for name, ratio in jax.device_get(state.metrics).items()}
    return {"train_loss": figures.pop("loss"), "train_top1": figures.pop("top1"), **figures}


def _line(record: Mapping[str, float], epochs: int) -> str:
    parts = [f"epoch {record['epoch']}/{epochs}: loss {record['train_loss']:.4f}, top-1 {record['train_top1']:.2%}"]
    if "eval_loss" in record:
        parts.append(f"held out: loss {record['eval_loss']:.4f}, top-1 {record['eval_top1']:.2%}")
    return " | ".join([*parts, f"{record['images_per_second']:,.0f} images/s"])
