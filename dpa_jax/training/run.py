"""What belongs to a run: its data, its model and its compiled functions, for one seed or for several at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.activations import reset_counters
from dpa_jax.activations.penalties import Ratio
from dpa_jax.config import validate
from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds import make_feed
from dpa_jax.data.feeds.base import BaseFeed
from dpa_jax.data.sources import open_source
from dpa_jax.training.optimizer import Schedule, make_optimizer, make_schedule
from dpa_jax.training.state import TrainState, create_model, create_state
from dpa_jax.training.step import make_eval_step, make_train_step

Figures = dict[str, float]


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None, seeds: Sequence[int] | None = None) -> Run:
    """Prepares a run. Nothing is loaded or compiled yet, and the devices need not be here.

    Args:
        config: a run's configuration.
        devices: those that share each batch; None for all there are.
        seeds: of the members that are trained in one program; None for the configuration's seed alone.

    Raises:
        ValueError: if the configuration can't run; the message names the key.
        FileNotFoundError: if the data is not there; the message says how to get it.
    """
    validate(config)

    # ---------------- Devices ----------------
    devices = list(devices or jax.devices())
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    # ---------------- Data ----------------
    source = open_source(config.data)
    train_feed = make_feed(source, mesh, config.batch_size, config, training=True)
    eval_feed = make_feed(source, mesh, config.eval_batch_size, config, training=False)
    transforms = source.spec.transforms(config, train_feed, eval_feed)

    # ---------------- Model ----------------
    model = create_model(config, source.spec.num_classes, **source.spec.model_options())
    key = jax.eval_shape(lambda: jax.random.key(0))
    for given in (
        jax.eval_shape(transforms.train, key, train_feed.abstract_batch),
        jax.eval_shape(transforms.evaluate, eval_feed.abstract_batch),
    ):
        wanted, given = (_shapes_of_one(inputs) for inputs in (model.example_inputs, given))
        if wanted != given:
            raise ValueError(
                f"model {config.model!r} takes inputs of shape {wanted}; those of data {config.data.name!r} come as "
                f"{given}. Set config.augment.image_size or the model's sizes in config.model_options."
            )

    # ---------------- Optimiser ----------------
    sampler = train_feed.sampler
    steps_per_epoch = sampler.num_examples / sampler.batch_size
    schedule = make_schedule(
        config.schedule, config.optimizer.learning_rate, steps_per_epoch, sampler.steps(config.epochs)
    )
    optimizer = make_optimizer(config, schedule)

    # ---------------- Steps ----------------
    # Under jit, so that it is traced once: the state has an average of each metric, whose names are found here, and
    # the compiled step takes the trace over.
    train_step = jax.jit(
        make_train_step(
            model, optimizer, transforms.train, dict(config.coefficients), config.label_smoothing, transforms.mix
        ),
        inline=True,
    )
    create = functools.partial(create_state, model, optimizer)
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract_state = _placed(jax.eval_shape(lambda: create((), seed=0)), everywhere)
    _, metrics = jax.eval_shape(train_step, abstract_state, train_feed.abstract_batch)
    run = Run(
        config,
        model,
        schedule,
        functools.partial(create, tuple(metrics)),
        train_step,
        make_eval_step(model, transforms.evaluate),
        train_feed,
        eval_feed,
        everywhere,
    )
    return run if seeds is None else run.with_seeds(seeds)


class Run:
    """A run of one seed, or of several that are its members: the same program, with a leading axis under ``vmap``.

    One seed's states are `TrainState`s as they are. With S seeds every leaf of a state, and every metric of a step,
    has an axis S in front; what is said *of each member* is a list of S.

    Attributes:
        config: the configuration; of its members `configs`.
        seeds: of the members.
        model: the linen module.
        schedule: 0-based number of a step -> its learning rate.
        feeds: the training examples of each member, in its own order.
        eval_feed: the held-out examples.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        schedule: Schedule,
        create: Callable[..., TrainState],
        train_step: Callable,
        eval_step: Callable,
        train_feed: BaseFeed,
        eval_feed: BaseFeed,
        everywhere: NamedSharding,
    ):
        """For `build`."""
        self.config, self.model, self.schedule = config, model, schedule
        self.seeds: tuple[int, ...] = (config.seed,)
        self.feeds, self.eval_feed = [train_feed], eval_feed
        self._everywhere, self._abstract_member = everywhere, jax.eval_shape(lambda: create(seed=0))

        # The number of members is that of the batches, or the length of a state's first axis: functions that are
        # compiled for a number serve other seeds as well.
        def one_step(state: TrainState, batch: Batch):
            new, metrics = train_step(state.replace(metrics={}), batch)
            averages = {name: mean + Ratio(metrics[name], jnp.ones(())) for name, mean in state.metrics.items()}
            return new.replace(metrics=averages), metrics

        def step(state: TrainState, batches: list[Batch]):
            if len(batches) == 1:
                return one_step(state, batches[0])
            return jax.vmap(one_step)(state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches))

        def apart(tree: Any) -> list[Any]:
            """Of each member."""
            return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(jax.tree.leaves(tree)[0]))]

        def clear_metrics(state: TrainState) -> TrainState:
            return state.replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))

        def enter_evaluation(state: TrainState) -> TrainState:
            return state.replace(model_state=reset_counters(state.model_state))

        jit = functools.partial(jax.jit, out_shardings=everywhere)
        self._init = jit(lambda seed: create(seed=seed), static_argnums=0)
        self._init_several = jit(jax.vmap(lambda seed: create(seed=seed)))
        self._step = jit(step, donate_argnums=0)
        self._eval_step = jit(eval_step)
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self._apart = jit(apart)
        self._clear_metrics = jit(clear_metrics, donate_argnums=0)
        self._enter_evaluation = jit(enter_evaluation, donate_argnums=0)

    # ---------------- Members ----------------

    def with_seeds(self, seeds: Sequence[int]) -> Self:
        """The same run with other seeds: the data and the compiled functions are shared.

        Args:
            seeds: different ones, of 0 .. 2^32 - 1.
        """
        run = copy.copy(self)
        run.seeds, run.feeds = tuple(seeds), [self.feeds[0].reordered(seed) for seed in seeds]
        return run

    @property
    def configs(self) -> list[ConfigDict]:
        """The configuration of each member, which is that of its run alone."""
        configs = [self.config.copy_and_resolve_references() for _ in self.seeds]
        for config, seed in zip(configs, self.seeds, strict=True):
            config.seed = seed
        return configs

    def of_each(self, figures: Any) -> list[Any]:
        """A pytree of figures on the devices, such as a step's metrics, on the host and of each member."""
        figures = jax.device_get(figures)
        if len(self.seeds) == 1:
            return [figures]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], figures) for i in range(len(self.seeds))]

    # ---------------- States ----------------

    def init(self) -> TrainState:
        """The state before the first step, on the devices."""
        if len(self.seeds) == 1:
            return self._init(self.seeds[0])
        return self._init_several(jnp.asarray(self.seeds, jnp.uint32))

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        members = () if len(self.seeds) == 1 else (len(self.seeds),)
        return _placed(self._abstract_member, self._everywhere, members)

    @property
    def abstract_batch(self) -> list[Batch]:
        """Shapes, dtypes and shardings of what a step takes: a batch of each member."""
        return [feed.abstract_batch for feed in self.feeds]

    # ---------------- Training ----------------

    def load(self) -> None:
        """Loads the data and puts it where it is taken from; done by the first step or evaluation if not before.

        Raises:
            FileNotFoundError: if the data is not there; the message says how to get it.
        """
        self.eval_feed.load()
        for feed in self.feeds:
            feed.load()

    def close(self) -> None:
        """Ends what reads ahead for training."""
        for feed in self.feeds:
            feed.close()

    def steps_at(self, epoch: float) -> int:
        """How many steps are done at the end of an epoch."""
        return self.feeds[0].sampler.steps(epoch)

    @property
    def total_steps(self) -> int:
        """The steps of the whole run."""
        return self.steps_at(self.config.epochs)

    def lower(self) -> jax.stages.Lowered:
        """The training step as it is handed to the compiler; needs neither the data nor the devices."""
        return self._step.lower(self.abstract_state, self.abstract_batch)

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """One training step.

        Args:
            state: after ``number`` steps; it is donated.
            number: of the step, from 0; says which examples it sees.

        Returns:
            The new state and the step's metrics, as `make_train_step` has them.
        """
        return self._step(state, [feed.train(number) for feed in self.feeds])

    def clear_metrics(self, state: TrainState) -> TrainState:
        """The state with nothing in its averages; the one given is donated."""
        return self._clear_metrics(state)

    # ---------------- Figures ----------------

    def figures(self, state: TrainState) -> list[Figures]:
        """The averages of the epoch, of each member: ``train_loss``, ``train_top1`` and the rest by their own names."""
        averages = [
            {name: float(ratio.value()) for name, ratio in metrics.items()} for metrics in self.of_each(state.metrics)
        ]
        return [{"train_loss": a.pop("loss"), "train_top1": a.pop("top1"), **a} for a in averages]

    def evaluate(self, state: TrainState) -> tuple[TrainState, list[Figures]]:
        """Evaluates the whole held-out split.

        Args:
            state: it is donated.

        Returns:
            The state as it is after entering evaluation, which starts the counters of some mechanisms anew; and
            of each member its figures, as `Evaluation.compute` names them.
        """
        state = self._enter_evaluation(state)
        members = [state.variables] if len(self.seeds) == 1 else self._apart(state.variables)
        sums = None
        for batch in self.eval_feed.evaluation():
            parts = [self._eval_step(variables, batch) for variables in members]
            sums = parts if sums is None else self._add(sums, parts)
        computed = [evaluation.compute(self.config.coefficients) for evaluation in jax.device_get(sums)]
        return state, [{name: float(value) for name, value in figures.items()} for figures in computed]


def _shapes_of_one(inputs: Any) -> Any:
    """The shapes of one example, in the structure of a batch of them."""
    return jax.tree.map(lambda leaf: leaf.shape[1:], inputs)


def _placed(abstract: Any, sharding: NamedSharding, leading: tuple[int, ...] = ()) -> Any:
    """Shapes and dtypes, with axes in front, and with this sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype, sharding=sharding), abstract
    )
