"""The state of a run as one pytree, and the model that a configuration asks for."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from ml_collections import ConfigDict

from dpa_jax import models
from dpa_jax.activations import activation
from dpa_jax.activations.penalties import Ratio
from dpa_jax.activations.registry import ACTIVATIONS
from dpa_jax.checks import check_choice, check_options
from dpa_jax.models.torch import put


class TrainState(struct.PyTreeNode):
    """A run after ``step`` training steps. A checkpoint holds this and nothing else."""

    step: jax.Array  # int32 scalar; the position in the data follows from it
    params: Any  # float32
    backward_memory: Any  # the collection whose gradient is its update; empty for models without
    model_state: dict[str, Any]  # every other collection of the model: forward memories, batch statistics, ...
    opt_state: optax.OptState
    metrics: dict[str, Ratio]  # the training figures of the epoch under way
    key: jax.Array  # uint32, the data of the run's random key; every step folds its number in

    @property
    def variables(self) -> dict[str, Any]:
        """What ``model.apply`` takes."""
        memory = {"backward_memory": self.backward_memory} if self.backward_memory else {}
        return {"params": self.params, **memory, **self.model_state}


def create_model(config: ConfigDict, num_classes: int, **data_options: Any) -> nn.Module:
    """The configured model with the configured mechanism in it.

    ValueError for names and options that do not exist, and for options of another type or outside of their range.

    ``num_classes`` and ``data_options`` follow from the data (`Spec.model_options`).
    """
    check_choice("config", "mechanism", config.mechanism, [*ACTIVATIONS, "dnrt"])
    check_choice("config", "model", config.model, models.MODELS)
    # DNRT is two things: RAA as every activation, and ARR behind the blocks.
    dnrt = config.mechanism == "dnrt"
    name, arr = ("raa", {"arr": True}) if dnrt else (config.mechanism, {})
    model, mechanism = models.MODELS[config.model], ACTIVATIONS[name]
    if lacking := data_options.keys() - inspect.signature(model).parameters:
        raise ValueError(
            f"config: model {config.model!r} does not take data {config.data.name!r}: it has no {min(lacking)}"
        )
    given = {**arr, **data_options, "activation": None, "dtype": jnp.dtype(config.precision)}
    if "remat" in inspect.signature(model).parameters:
        given["remat"] = config.remat
    elif config.remat:
        raise ValueError(f"config: remat is for models of equal blocks, the transformers; {config.model!r} is none")
    # Follow from the data, and from how the run shares a batch among the devices.
    decided = ("num_classes", "axis_name")
    check_options("config", model, config.model_options, "model_options", ("num_classes", *given))
    check_options("config", mechanism, config.mechanism_options, "mechanism_options", decided)
    options = dict(config.mechanism_options)
    if "num_classes" in inspect.signature(mechanism).parameters:
        options["num_classes"] = num_classes
    given["activation"] = activation(name, **options)
    places = {"activation_places": "all"} if dnrt and "activation_places" in inspect.signature(model).parameters else {}
    return models.create(config.model, num_classes, **given, **{**places, **config.model_options})


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    metric_names: tuple[str, ...],
    seed: jax.typing.ArrayLike,
    arrays: Mapping[str, jax.typing.ArrayLike] = types.MappingProxyType({}),
) -> TrainState:
    """The state before the first step: a function of the seed and of the arrays, variables by path (`models.torch`)."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    examples = jax.tree.map(lambda example: jnp.zeros(example.shape, example.dtype), model.example_inputs)
    variables = put(arrays, model.init(init_key, examples))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        backward_memory=variables.pop("backward_memory", {}),
        model_state=variables,
        opt_state=optimizer.init(params),
        metrics={name: Ratio.zero() for name in metric_names},
        key=jax.random.key_data(run_key),
    )
