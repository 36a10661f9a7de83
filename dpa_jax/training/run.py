"""What belongs to a run: its data, its model and its compiled functions, for one seed or for several at a time."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpa_jax.activations import diagnose, reset_counters
from dpa_jax.activations.penalties import RECORDS, Ratio
from dpa_jax.activations.registry import collections
from dpa_jax.checks import INT32, check_memory, check_range
from dpa_jax.config import validate
from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds import make_feed
from dpa_jax.data.feeds.base import BaseFeed
from dpa_jax.data.feeds.memory import MemoryFeed
from dpa_jax.data.sources import open_source
from dpa_jax.models.torch import Weights, match
from dpa_jax.training import sharding
from dpa_jax.training.metrics import auc_of_logits
from dpa_jax.training.optimizer import make_optimizer, make_schedule
from dpa_jax.training.state import TrainState, create_model, create_state
from dpa_jax.training.step import make_eval_step, make_train_step

Figures = dict[str, float]

_STEPS_PER_DISPATCH = 32  # on accelerators, where the examples wait there


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None, seeds: Sequence[int] | None = None) -> Run:
    """Prepares a run. Nothing is loaded or compiled yet, and the devices need not be here.

    Args:
        config: a run's configuration.
        devices: those that share each batch; None for all there are.
        seeds: of the members that are trained in one program; None for the configuration's seed alone.

    Raises:
        ValueError: if the configuration can't run; the message names the key.
        FileNotFoundError: if even the description of the data is not there; the message says how to get it.
    """
    run = Run(config, devices)
    return run if seeds is None else run.with_seeds(seeds)


class _Compiled(NamedTuple):
    """What is compiled for states that are spread in one way."""

    shardings: TrainState
    init: jax.stages.Wrapped
    step: jax.stages.Wrapped
    several_steps: jax.stages.Wrapped
    clear_metrics: jax.stages.Wrapped
    enter_evaluation: jax.stages.Wrapped


class Run:
    """A run of one seed, or of several that are its members: the same program, with a leading axis under ``vmap``.

    One seed's states are `TrainState`s as they are. With S seeds every leaf of a state, and every metric of a step,
    has an axis S in front; what is said *of each member* is a list of S. Made by `build`.

    Attributes:
        config: the configuration; of its members `configs`.
        seeds: of the members.
        devices: those that share each batch.
        spec: of the data.
        model: the linen module.
        num_parameters: of one member.
        schedule: 0-based number of a step -> its learning rate.
        feeds: the training examples of each member, in its own order.
        eval_feeds: the examples of each split that is evaluated, by its name.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device] | None = None):
        """See `build`."""
        validate(config)
        self.config = config
        self.seeds: tuple[int, ...] = (config.seed,)

        # ---------------- Devices ----------------
        devices = list(devices or _all_devices())
        self._mesh = mesh = sharding.make_mesh(devices)
        everywhere, self.devices = sharding.whole(mesh), devices

        here = len(mesh.local_devices)

        # ---------------- Data ----------------
        source = open_source(config.data)
        self.spec = source.spec
        for key in ("batch_size", "eval_batch_size"):
            if config[key] % len(devices) and not self.spec.whole:
                raise ValueError(f"{key} must be a positive multiple of the {len(devices)} devices, not {config[key]}")
        if config.batch_size % (config.accumulate * (1 if self.spec.whole else len(devices))):
            raise ValueError(
                f"batch_size must be a positive multiple of the {len(devices)} devices times accumulate "
                f"{config.accumulate}, not {config.batch_size}"
            )
        if config.early_stopping and "valid" not in self.spec.splits:
            raise ValueError(f"config: early_stopping needs a validation split; data {config.data.name!r} has none")
        feed = make_feed(source, mesh, config.batch_size, config, "train")
        self.feeds = [feed]
        self.eval_feeds = {
            split: make_feed(source, mesh, config.eval_batch_size, config, split) for split in self.spec.splits
        }
        eval_feed = self.eval_feeds["eval"]
        transforms = self.spec.transforms(config, feed, eval_feed)

        # ---------------- Model ----------------
        self.model = model = create_model(config, self.spec.num_classes, **self.spec.model_options())
        wanted = self.spec.example(model.example_inputs)
        key = jax.eval_shape(lambda: jax.random.key(0))
        inputs = {
            "batch_size": jax.eval_shape(transforms.train, key, feed.abstract_batch),
            "eval_batch_size": jax.eval_shape(transforms.evaluate, eval_feed.abstract_batch),
        }
        for size, given in inputs.items():
            if (found := self.spec.example(given)) != wanted:
                raise ValueError(
                    f"model {config.model!r} takes inputs of shape {wanted}; those of data {config.data.name!r} come "
                    f"as {found}. Set config.augment.image_size or the model's sizes in config.model_options."
                )
            self._check_memory(f"a batch of {size} {config[size]}", given, here / len(devices))

        # ---------------- Optimiser ----------------
        rate, steps_per_epoch = config.optimizer.learning_rate, feed.sampler.num_examples / config.batch_size
        check_range("config", f"the steps of epochs {config.epochs}", self.total_steps, high=INT32)
        self.schedule = make_schedule(config.schedule, rate, steps_per_epoch, self.total_steps)
        optimizer = make_optimizer(config, self.schedule)

        # ---------------- One member's functions ----------------
        over_samples = functools.partial(sharding.over_samples, mesh=mesh, sharding=config.sharding)
        coefficients = dict(config.coefficients)
        split = functools.partial(sharding.split, mesh=mesh, number=config.accumulate)
        smoothing, mix, number = config.label_smoothing, transforms.mix, config.accumulate
        train_step = make_train_step(model, optimizer, transforms.train, coefficients, smoothing, mix, number, split)
        # Under jit, so that it is traced once: the state has an average of each metric, whose names are found here, and
        # the compiled step takes the trace over.
        train_step = jax.jit(sharding.known(mesh, over_samples(train_step)), inline=True)
        abstract_state = jax.eval_shape(lambda: create_state(model, optimizer, (), seed=0))
        shardings = sharding.of_state(abstract_state, mesh, config.sharding)
        abstract_state = sharding.placed(abstract_state, shardings)
        self._check_memory("the model with its optimiser, by model_options,", abstract_state, here)
        _, metrics = jax.eval_shape(train_step, abstract_state, feed.abstract_batch)

        def create(seed: jax.typing.ArrayLike, arrays: dict[str, jax.typing.ArrayLike]) -> TrainState:
            return create_state(model, optimizer, tuple(metrics), seed, arrays)

        def one_step(state: TrainState, batch: Batch):
            new, metrics = train_step(state.replace(metrics={}), batch)
            averages = {
                name: mean + Ratio(metrics[name], jnp.ones((), jnp.float32)) for name, mean in state.metrics.items()
            }
            return new.replace(metrics=averages), metrics

        # ---------------- All members' functions ----------------
        # How many members there are is read off what they are given: what is compiled serves other seeds as well.
        def step(state: TrainState, batches: list[Batch], leading: tuple[str | None, ...]):
            if state.step.ndim == 0:
                return one_step(state, batches[0])
            if len(batches) == 1:  # all members see the same
                return jax.vmap(one_step, in_axes=(0, None))(state, batches[0])
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
            return sharding.over_members(one_step, mesh, leading)(state, stacked)

        # How many of them is an argument, so that one program serves every number: an epoch need not be a multiple, and
        # a run that is cut anywhere goes on with the same bits. A batch is taken, and metrics are put down, in the turn
        # before and after their step, so that they are not fused with it.
        def several_steps(state: TrainState, waiting: Any, orders: list[Batch], count: jax.Array, leading: tuple):
            def take(number: jax.typing.ArrayLike) -> list[Batch]:
                return [self._resident[0].take(waiting, order, number) for order in orders]

            def put(seen: Any, number: jax.typing.ArrayLike, metrics: Any) -> Any:
                return jax.tree.map(lambda all_steps, one: all_steps.at[number].set(one), seen, metrics)

            def body(number: jax.Array, carry):
                state, batches, metrics, seen = carry
                seen = put(seen, number, metrics)
                state, metrics = step(state, batches, leading)
                return state, take(number + 1), metrics, seen

            batches, length = take(0), orders[0].labels.shape[0]
            _, abstract = jax.eval_shape(functools.partial(step, leading=leading), state, batches)
            metrics = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), abstract)
            seen = jax.tree.map(lambda one: jnp.zeros((length + 1, *one.shape), one.dtype), metrics)
            state, _, metrics, seen = jax.lax.fori_loop(0, count, body, (state, batches, metrics, seen))
            return state, jax.tree.map(lambda all_steps: all_steps[1:], put(seen, count, metrics))

        def members(tree: Any) -> list[Any]:
            return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(jax.tree.leaves(tree)[0]))]

        def clear_metrics(state: TrainState) -> TrainState:
            return state.replace(metrics=jax.tree.map(jnp.zeros_like, state.metrics))

        def enter_evaluation(state: TrainState) -> TrainState:
            return state.replace(model_state=reset_counters(state.model_state))

        def compiled(leading: tuple[str | None, ...]) -> _Compiled:
            shardings = sharding.of_state(self._abstract_member, mesh, config.sharding, leading)
            like = NamedSharding(mesh, PartitionSpec(*leading))
            jit = functools.partial(jax.jit, out_shardings=shardings)
            return _Compiled(
                shardings=shardings,
                init=jit(jax.vmap(create, in_axes=(0, None))) if leading else jit(create, static_argnums=0),
                step=jit(functools.partial(step, leading=leading), donate_argnums=0, out_shardings=(shardings, like)),
                several_steps=jit(
                    functools.partial(several_steps, leading=leading),
                    donate_argnums=0,
                    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec(None, *leading))),
                ),
                clear_metrics=jit(clear_metrics, donate_argnums=0),
                enter_evaluation=jit(enter_evaluation, donate_argnums=0),
            )

        jit = functools.partial(jax.jit, out_shardings=everywhere)
        self._abstract_member = jax.eval_shape(lambda: create(0, {}))
        self.num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self._abstract_member.params))
        # Once for all copies of the run.
        self._compiled_for = functools.cache(compiled)
        eval_step = make_eval_step(model, transforms.evaluate, self.spec.auc)

        def evaluate_splits(variables: Any, inputs: Any, batches: dict[str, Batch]) -> dict[str, Any]:
            # Of splits that share their inputs the compiler runs the model once.
            return {split: eval_step(variables, batch._replace(inputs=inputs)) for split, batch in batches.items()}

        self._eval_step = jit(sharding.known(mesh, over_samples(evaluate_splits)))
        self._record = jit(
            lambda variables, batch: model.apply(
                variables, transforms.evaluate(batch), batch.labels, mutable=[RECORDS]
            )[1]
        )
        self._add = jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self._members = jit(members)
        self._members_variables = jax.jit(lambda state: members(state.variables))
        self._gather = jit(lambda tree: tree)

    # ---------------- Members ----------------

    def with_seeds(self, seeds: Sequence[int]) -> Self:
        """The same run with other seeds: the data and the compiled functions are shared."""
        run = copy.copy(self)
        run.seeds, run.feeds = tuple(seeds), [self.feeds[0].reordered(seed) for seed in seeds]
        what, copies = f"the state of {len(seeds)} seeds", len(self._mesh.local_devices)
        self._check_memory(what, run.abstract_state, copies)
        return run

    @property
    def _compiled(self) -> _Compiled:
        several = len(self.seeds) > 1
        leading = (
            (None,)
            if several and self.feeds[0].same_for_all
            else sharding.of_members(len(self.seeds), self._mesh, self.config)
        )
        return self._compiled_for(leading)

    def _check_memory(self, what: str, abstract: Any, copies: float) -> None:
        """Raises ValueError where so many devices' parts of a pytree exceed the host's memory, if that is theirs.

        Linux would end the process without a word. An accelerator's own memory is told by the allocator in time.
        """
        if self.devices[0].platform == "cpu":
            check_memory("config", what, round(copies * sharding.bytes_per_device(abstract)))

    @property
    def configs(self) -> list[ConfigDict]:
        """The configuration of each member, which is that of its run alone."""
        configs = [self.config.copy_and_resolve_references() for _ in self.seeds]
        for config, seed in zip(configs, self.seeds, strict=True):
            config.seed = seed
        return configs

    def members(self, tree: Any) -> list[Any]:
        """The members' parts of a pytree on the devices that has the leading axis, such as a step's metrics.

        Of several members each part is whole on every device.
        """
        return [tree] if len(self.seeds) == 1 else self._members(tree)

    def _variables(self, state: TrainState) -> list[dict[str, Any]]:
        """The variables of each member, shared over the devices as those of one are."""
        return [state.variables] if len(self.seeds) == 1 else self._members_variables(state)

    # ---------------- States ----------------

    @functools.cached_property
    def weights(self) -> Weights:
        """What ``config.init_from`` has for the model; read when it is first asked for.

        ValueError and FileNotFoundError as `dpa_jax.models.variables_from_torch`.
        """
        if not self.config.init_from:
            return Weights({}, "")
        try:
            return match(self.model, self.config.init_from)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"config: init_from: {error}") from error

    def init(self) -> TrainState:
        """The state before the first step, on the devices."""
        seeds = self.seeds[0] if len(self.seeds) == 1 else jnp.asarray(self.seeds, jnp.uint32)
        return self._compiled.init(seeds, self.weights.arrays)

    @property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of a state."""
        leading = () if len(self.seeds) == 1 else (len(self.seeds),)
        return sharding.placed(self._abstract_member, self._compiled.shardings, leading)

    @property
    def abstract_batch(self) -> list[Batch]:
        """Shapes, dtypes and shardings of what a step takes: a batch of each member, or one for all."""
        return [feed.abstract_batch for feed in self._own_feeds]

    @property
    def _own_feeds(self) -> list[BaseFeed]:
        """A feed for each member, or one for all where they see the same batches."""
        return self.feeds[:1] if self.feeds[0].same_for_all else self.feeds

    # ---------------- Training ----------------

    def load(self) -> None:
        """Loads the data and puts it where it is taken from; done by the first step or evaluation if not before.

        FileNotFoundError says how to get data that is not there.
        """
        for feed in (*self.eval_feeds.values(), *self.feeds):
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
        return self._compiled.step.lower(self.abstract_state, self.abstract_batch)

    def step(self, state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """One training step: the new state, and the metrics as `make_train_step` has them.

        The state is the one after ``number`` steps, and is donated. The number says which examples the step sees.
        """
        return self._compiled.step(state, [feed.train(number) for feed in self._own_feeds])

    @property
    def _resident(self) -> list[MemoryFeed]:
        """The members' feeds, where the inputs of all examples are on the devices; else none."""
        return [feed for feed in self.feeds if isinstance(feed, MemoryFeed) and feed.resident == "device"]

    @property
    def steps_per_dispatch(self) -> int:
        """How many steps, at most, one call of `steps` is given."""
        here = bool(self._resident)
        if (wanted := self.config.steps_per_dispatch) > 1 and not here:
            raise ValueError(
                f"config: steps_per_dispatch={wanted} needs the training examples on the devices; they do not fit "
                "there, or data.resident says otherwise. Take 1, or 0 for what fits"
            )
        return wanted or (_STEPS_PER_DISPATCH if here and self.devices[0].platform != "cpu" else 1)

    def steps(self, state: TrainState, number: int, count: int) -> tuple[TrainState, dict[str, jax.Array]]:
        """As `step`, for ``count`` steps in one call, at most `steps_per_dispatch`.

        Each metric has an axis of the steps in front, as long as `steps_per_dispatch` where that is not 1; `seen` gives
        them back.
        """
        if (length := self.steps_per_dispatch) == 1:
            return self.step(state, number)
        feeds = self._resident
        orders = [feed.order(number, count, length) for feed in feeds]
        with jax.transfer_guard_host_to_device("allow"):  # the count's, which is meant
            return self._compiled.several_steps(state, feeds[0].waiting, orders, np.int32(count))

    def seen(self, metrics: dict[str, jax.Array], count: int) -> list[list[Figures]]:
        """The metrics of ``count`` steps, which `steps` gave: of each step, of each member. Waits for the devices."""
        arrays = {name: np.reshape(array, (-1, len(self.seeds))) for name, array in jax.device_get(metrics).items()}
        return [
            [{name: array[step, member].item() for name, array in arrays.items()} for member in range(len(self.seeds))]
            for step in range(count)
        ]

    # ---------------- Figures ----------------

    def clear_metrics(self, state: TrainState) -> TrainState:
        """The state, which is donated, with nothing in its averages."""
        return self._compiled.clear_metrics(state)

    def figures(self, state: TrainState) -> list[Figures]:
        """The averages of the epoch, of each member: ``train_loss``, ``train_top1`` and the rest by their own names."""
        members = jax.device_get(self.members(state.metrics))
        averages = [{name: float(ratio.value()) for name, ratio in metrics.items()} for metrics in members]
        return [{"train_loss": a.pop("loss"), "train_top1": a.pop("top1"), **a} for a in averages]

    def evaluate(self, state: TrainState) -> tuple[TrainState, list[Figures]]:
        """Evaluates every split that is to be, whole: of each member its figures, as ``eval_top1`` or ``valid_loss``.

        They are those of `Evaluation.compute` and, where the data asks for it, ``auc``. The state is donated. The one
        returned has entered evaluation: the counters of some mechanisms begin anew.
        """
        state = self._compiled.enter_evaluation(state)
        variables = self._variables(state)
        sums: list[dict[str, Any]] = [{} for _ in variables]
        scores: list[dict[str, list]] = [defaultdict(list) for _ in variables]
        for inputs, batches in self._evaluation_batches():
            for of_member, own, own_scores in zip(variables, sums, scores, strict=True):
                for split, (part, seen) in self._eval_step(of_member, inputs, batches).items():
                    own[split] = self._add(own[split], part) if split in own else part
                    own_scores[split] += jax.device_get(seen)
        figures: list[Figures] = [{} for _ in variables]
        for member, own, own_scores in zip(figures, jax.device_get(sums), scores, strict=True):
            for split, evaluation in own.items():
                computed = evaluation.compute(self.config.coefficients)
                if own_scores[split] and not math.isnan(area := auc_of_logits(own_scores[split])):
                    computed["auc"] = area
                member |= {f"{split}_{name}": float(value) for name, value in computed.items()}
        return state, figures

    def _evaluation_batches(self) -> Iterator[tuple[Any, dict[str, Batch]]]:
        """Inputs, and the batches of splits that have these: without their inputs, by the splits' names."""
        batches = {split: feed.evaluation() for split, feed in self.eval_feeds.items()}
        if self.spec.whole:
            of_splits = {split: next(some) for split, some in batches.items()}
            yield of_splits["eval"].inputs, {split: b._replace(inputs=None) for split, b in of_splits.items()}
            return
        for split, some in batches.items():
            for batch in some:
                yield batch.inputs, {split: batch._replace(inputs=None)}

    def diagnose(self, state: TrainState) -> list[str]:
        """What `dpa_jax.diagnose` finds in the first member, from the start to this state and in one evaluation batch.

        Nothing where the model has no mechanism.
        """
        kept = set(collections()) & state.variables.keys()
        if not kept:
            return []
        before, after = (self._variables(given)[0] for given in (self.init(), state))
        records = self._record(after, next(iter(self.eval_feeds["eval"].evaluation())))
        memories = self._gather([{name: given[name] for name in kept} for given in (before, after)])
        return diagnose(*jax.device_get((*memories, records)))


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, where jax has no CUDA
        why = str(error).splitlines()[:1] or ["it is not there"]
        platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
        raise ValueError(f"no devices with JAX_PLATFORMS={platforms}: {why[0]}") from error
