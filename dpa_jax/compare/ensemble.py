"""Several seeds of one configuration as one program: the training step under ``vmap``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpa_jax.data.batch import Batch
from dpa_jax.data.feeds.base import BaseFeed
from dpa_jax.training.loop import Program
from dpa_jax.training.state import TrainState

# What a device must keep free beside the training step: the evaluation's buffers, and the allocator's gaps.
_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Runs that differ in their seed alone. S is their number; each leaf of their states has it in front.

    Attributes:
        init: () -> the states.
        abstract_states: shapes, dtypes and shardings of the states.
        feeds: the training images of every seed, each in its own order.
        train_step: compiled (states, batches) -> (states, {metric: [S]}); donates the states.
        members: states -> [state of each seed].
    """

    init: Callable[[], TrainState]
    abstract_states: TrainState
    feeds: list[BaseFeed]
    train_step: Callable[[TrainState, list[Batch]], tuple[TrainState, dict[str, jax.Array]]]
    members: Callable[[TrainState], list[TrainState]]


def make_ensemble(program: Program, seeds: Sequence[int]) -> Ensemble:
    """Compiles the training of these seeds.

    Args:
        program: that of the configuration; its own seed is not used.
        seeds: S different ones, below 2^31.
    """
    replicated = program.abstract_state.step.sharding
    feeds = [program.train_feed.reordered(seed) for seed in seeds]

    def train_step(states: TrainState, batches: list[Batch]) -> Any:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return jax.vmap(program.train_step)(states, stacked)

    def members(states: TrainState) -> list[TrainState]:
        return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(len(seeds))]

    abstract_states = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((len(seeds), *leaf.shape), leaf.dtype, sharding=leaf.sharding),
        program.abstract_state,
    )
    compiled = jax.jit(train_step, out_shardings=replicated, donate_argnums=0)
    return Ensemble(
        init=lambda: jax.jit(jax.vmap(program.init), out_shardings=replicated)(jnp.asarray(seeds, jnp.int32)),
        abstract_states=abstract_states,
        feeds=feeds,
        train_step=compiled.lower(abstract_states, [feed.abstract_batch for feed in feeds]).compile(),
        members=jax.jit(members, out_shardings=replicated),
    )


def largest_ensemble(program: Program, wanted: int) -> int:
    """How many seeds to train at a time: all that are ``wanted``, or, beside a CPU, as many as fit into its memory."""
    device = jax.local_devices()[0]
    limits = device.memory_stats() if device.platform != "cpu" else None
    if not limits or "bytes_limit" not in limits:
        return wanted
    step = program.train_step.lower(program.abstract_state, program.train_feed.abstract_batch).compile()
    memory = step.memory_analysis()
    if memory is None:  # a backend that does not tell
        return wanted
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    needed -= memory.alias_size_in_bytes
    free = limits["bytes_limit"] - limits["bytes_in_use"]
    return max(1, min(wanted, int(_SHARE * free) // max(needed, 1)))
