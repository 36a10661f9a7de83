"""Labels for activations inside a model that never heard of labels."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np


class Supervision(NamedTuple):
    """What `supervise` was given: labels [B] or [B, N], or None, and whether memories are updated."""

    labels: jax.Array | None
    train: bool


_NOTHING = Supervision(None, False)
_current = contextvars.ContextVar("supervision", default=_NOTHING)
# JAX keys its trace caches on this: a function traced under one set of labels is not taken for another.
_cache_key = jax.make_user_context(None)


@contextlib.contextmanager
def supervise(labels: jax.Array | None, train: bool = False) -> Iterator[None]:
    """Hands labels to every stateful activation that is called without them while the block lasts.

    Labels are [B], or [B, N] with one for each token of [B, N, C]. Enter it inside the jitted step, around
    ``model.apply``, with the labels that the step was given::

        with dpa_jax.supervise(labels, train=True):
            logits, mutated = model.apply(variables, images, mutable=dpa_jax.MUTABLE)

    Blocks nest: the innermost counts, and ``supervise(None)`` takes the labels away, as around a teacher that must not
    learn. Outside of every block an
    activation without labels is the plain threshold. Around a jitted function, rather than inside it, the
    result is the same, but new labels compile the function anew. ``train`` says whether memories are updated.
    """
    if isinstance(labels, jax.core.Tracer):
        key: object = object()  # a tracer is alive in this block only: no trace made here may serve again
    elif labels is None:
        key = (None, train)
    else:
        values = np.asarray(jax.device_get(labels))
        key = (values.tobytes(), values.shape, values.dtype.str, train)
    token = _current.set(Supervision(labels, train))
    try:
        with _cache_key(key):
            yield
    finally:
        _current.reset(token)


def supervised(labels: jax.Array | None, train: bool) -> Supervision:
    """A call's own labels where it has some, those of the innermost `supervise` otherwise."""
    return _current.get() if labels is None else Supervision(labels, train)


def current_labels() -> jax.Array | None:
    """The labels that the innermost `supervise` was given; None outside of all, and inside of ``supervise(None)``."""
    return _current.get().labels
