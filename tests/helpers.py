"""What several test files share: a configuration that trains in seconds, a user's training step, what a run tells."""

import re
import socket
from typing import Any, NamedTuple

import jax
import optax

import dpa_jax
from dpa_jax.config import default_config


def tiny_config(**changes):
    """A run of 6 steps an epoch: 48 training images, 8 a step; 20 held-out images, which do not fill their last batch.

    Args:
        **changes: values by key, with `__` for the dot: ``optimizer__name="sgd"``.
    """
    config = default_config()
    config.model_options = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    config.data.update(name="synthetic", image_size=8, channels=1, num_classes=4)
    config.data.update(train_examples=48, test_examples=20)
    config.update(batch_size=8, eval_batch_size=8, epochs=2)
    config.optimizer.learning_rate = 0.01
    for key, value in changes.items():
        *groups, name = key.split("__")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return config


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Seen(NamedTuple):
    """What a training step saw."""

    loss: Any
    outputs: Any
    penalties: dict[str, Any]
    summary: Any
    gradients: Any  # of the parameters


def train_step(apply, loss_of, rate=0.1, mean_loss=lambda loss: loss, mean_gradients=lambda gradients: gradients):
    """The training step of a user's own loop, with plain gradient descent.

    Args:
        apply: (variables, x, labels, mutable=names) -> (outputs, mutated); such as a linen module's `apply` with
            ``train=True``.
        loss_of: (outputs, x, labels, penalties) -> the loss.
        rate: the learning rate.
        mean_loss: applied to the loss, for steps on a share of the batch.
        mean_gradients: applied to the gradients of the trained collections, likewise.

    Returns:
        (variables, x, labels) -> (new variables, Seen); not compiled.
    """

    def step(variables, x, labels):
        trained = {name: variables[name] for name in ("params", "backward_memory") if name in variables}
        state = {name: value for name, value in variables.items() if name not in trained}

        def loss_fn(trained):
            outputs, mutated = apply({**trained, **state}, x, labels, mutable=[*state, *dpa_jax.MUTABLE])
            summary = dpa_jax.summarize(mutated)
            loss = loss_of(outputs, x, labels, summary.penalties())
            return mean_loss(loss), (outputs, summary, mutated)

        (loss, (outputs, summary, mutated)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        gradients = mean_gradients(gradients)
        new = {name: mutated[name] for name in state}
        if "params" in trained:
            new["params"] = jax.tree.map(lambda p, g: p - rate * g, trained["params"], gradients["params"])
        if "backward_memory" in trained:  # its gradient is its update
            new["backward_memory"] = optax.apply_updates(trained["backward_memory"], gradients["backward_memory"])
        return new, Seen(loss, outputs, summary.penalties(), summary, gradients.get("params"))

    return step


def told(stderr, name=""):
    """The lines of a run's output but for its header and its progress; ``name`` begins those of a comparison."""
    usual = rf"({re.escape(name)}: )?((device|model|data|training|folder): |compiling |epoch )"
    return [line for line in stderr.splitlines() if not re.match(usual, line)]
