"""Learning rates and optimisers, composed of Optax's."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from dpa_jax.checks import check_range

_MAX_CHANGES = 10**6  # of the rate by whole epochs, of which there is a table
Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(config: ConfigDict, learning_rate: float, steps_per_epoch: float, total_steps: int) -> Schedule:
    """The learning rate at every step, as the papers' programs have it.

    Their schedules are asked *after* a step: a step uses what the schedule says for the one before it, the
    first step what it says at the start. ``"cosine"`` and ``"constant"`` change at every step, and the cosine
    is counted from the very first step on, not from the end of the warm-up: it reaches
    ``min_learning_rate`` W steps before the end, W being the steps of the warm-up. ``"step"`` and
    ``"multistep"`` change, in the warm-up too, at the start of an epoch only, and count their epochs from the
    end of the warm-up.

    Args:
        config: the group ``schedule`` of a run's configuration.
        learning_rate: the highest rate.
        steps_per_epoch: training images over batch size; need not be whole.
        total_steps: steps of the whole run.

    Raises:
        ValueError: if the rate changes more than a million times by whole epochs.

    Returns:
        From a step (int scalar, 0 is the first) to its rate (float32 scalar); works under jit.
    """
    by_epoch = config.name in ("step", "multistep")
    epochs = math.ceil(total_steps / steps_per_epoch)
    warmup_time = config.warmup_epochs if by_epoch else round(config.warmup_epochs * steps_per_epoch)
    warmup = optax.linear_schedule(config.warmup_learning_rate, learning_rate, warmup_time)

    if config.name == "cosine":
        main = optax.cosine_decay_schedule(
            learning_rate, max(total_steps - warmup_time, 1), alpha=config.min_learning_rate / learning_rate
        )
    elif config.name == "constant":
        main = optax.constant_schedule(learning_rate)
    else:
        every = range(config.step_epochs, epochs - config.warmup_epochs, config.step_epochs)
        milestones = every if config.name == "step" else config.milestones
        check_range("config", "schedule.warmup_epochs", warmup_time, high=_MAX_CHANGES)
        if len(milestones) > _MAX_CHANGES:
            raise ValueError(
                f"config: schedule.step_epochs must be at least {-(-epochs // _MAX_CHANGES)} for {epochs} epochs; got "
                f"{config.step_epochs}"
            )
        falls = np.asarray(milestones, np.int32)
        with np.errstate(over="ignore"):  # a rate of infinity is told by the loss
            rates = np.multiply.accumulate(np.array([learning_rate, *[config.gamma] * len(falls)], np.float32))
        rates[rates < np.finfo(np.float32).tiny] = 0  # as devices have it
        # Only in these epochs does the rate change; in the one after the warm-up, too.
        changes = np.union1d(np.arange(1, warmup_time + 2), falls.astype(np.int64) + warmup_time)
        changes = changes[changes < epochs]
        first_steps = np.array([round(epoch * steps_per_epoch) for epoch in changes.tolist()], np.int32)
        changes = np.concatenate([[0], changes]).astype(np.int32)

        def main(epoch):
            return jnp.asarray(rates)[jnp.searchsorted(falls, epoch, side="right")]

        def last_change(step):
            return jnp.asarray(changes)[jnp.searchsorted(first_steps, step, side="right")]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        now = last_change(step) if by_epoch else jnp.asarray(step)
        before = jnp.maximum(now - 1, 0)
        rate = main(now - warmup_time) if by_epoch else main(before)
        return jnp.where(before < warmup_time, warmup(before), rate).astype(jnp.float32)

    return schedule


def make_optimizer(config: ConfigDict, schedule: Schedule) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimiser that ``config.optimizer`` names.

    Each follows PyTorch's of that name, which the papers' programs use. Weight decay is on the parameters of
    ``optimizer.decayed``: decoupled for ``"adamw"`` (Loshchilov and Hutter, 2019), added to the clipped gradient for
    the others. ``"rmsprop"`` takes ``beta2`` as the decay of its squares (PyTorch's default is 0.99). The optimiser
    counts the steps that the schedule is asked for itself, from 0.
    """
    options = config.optimizer
    patterns = [pattern.strip() for pattern in options.decayed.split(",")]

    def decayed(params: Any) -> Any:
        """Which parameters are, as a pytree of bool."""
        paths = {path: any(fnmatch.fnmatchcase(path, p) for p in patterns) for path in flatten_dict(params, sep="/")}
        if not any(paths.values()):
            raise ValueError(f"config: optimizer.decayed {options.decayed!r} fits none of {', '.join(paths)}")
        return unflatten_dict(paths, sep="/")

    decay = optax.add_decayed_weights(options.weight_decay, None if patterns == ["*"] else decayed)
    momentum = optax.trace(options.momentum) if options.momentum else optax.identity()
    directions = {
        "adamw": lambda: [
            scale_by_adam(options.beta1, options.beta2, options.eps),
            decay,
        ],
        "adam": lambda: [
            decay,
            scale_by_adam(options.beta1, options.beta2, options.eps),
        ],
        "sgd": lambda: [decay, momentum],
        # Not optax.rmsprop: its momentum gathers updates already scaled by the rate, PyTorch's does not.
        "rmsprop": lambda: [
            decay,
            optax.scale_by_rms(options.beta2, options.eps, eps_in_sqrt=False),
            momentum,
        ],
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, *directions[options.name](), optax.scale_by_learning_rate(schedule))


def scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction (Kingma and Ba, 2015, Algorithm 1), with the state of ``optax.scale_by_adam``.

    Optax takes ``1 - beta ** t`` in float32, where 0.999 is off by 1e-8: a relative error of 1e-5 in the first
    updates, which grows over a run until losses differ from the papers' programs in the fifth digit.
    """

    def correction(beta: float, count: jax.Array) -> jax.Array:
        """1 - beta ** count, from a logarithm in double precision."""
        return -jnp.expm1(count.astype(jnp.float32) * math.log(beta)) if beta else jnp.ones(())

    def init(params):
        zeros = optax.tree.zeros_like
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu=zeros(params), nu=zeros(params))

    def update(gradients, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradients, state.mu, beta1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, beta2, 2)
        unbias1, unbias2 = correction(beta1, count), correction(beta2, count)
        directions = jax.tree.map(lambda m, v: (m / unbias1) / (jnp.sqrt(v / unbias2) + eps), mu, nu)
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
