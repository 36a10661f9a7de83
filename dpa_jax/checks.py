"""Early, plain errors for what activations are given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def check_choice(owner: str, argument: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError, with the nearest names, unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        nearest = " or ".join(map(repr, difflib.get_close_matches(str(value), allowed, cutoff=0.5)))
        hint = f" Did you mean {nearest}?" if nearest else ""
        raise ValueError(f"{owner}: {argument} must be one of {', '.join(allowed)}; got {value!r}.{hint}")


def check_range(owner: str, argument: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raises ValueError unless ``low <= value <= high``."""
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}: {argument} must be {allowed}; got {value}")


def check_labels(owner: str, x: jax.Array, labels: jax.Array) -> None:
    """Raises ValueError unless ``labels`` is one integer per sample of ``x`` [B, ...]."""
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{owner}: labels must have shape {x.shape[:1]}, one per sample of the input {x.shape}; got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{owner}: labels must be integers, the class of each sample; got {labels.dtype}")


def check_memory(owner: str, memory: jax.Array, num_classes: int, channels: int) -> None:
    """Raises ValueError unless ``memory`` is [num_classes, channels]."""
    if memory.shape != (num_classes, channels):
        raise ValueError(
            f"{owner}: an input of {channels} channels needs a memory of shape {(num_classes, channels)}; "
            f"the one given has {memory.shape}"
        )


def check_floating(owner: str, x: jax.Array) -> None:
    """Raises ValueError unless ``x`` is floating: parameters cast to integers would silently be lost."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{owner}: the input must be floating; got {x.dtype}")


def stored_variable(module: nn.Module, collection: str, name: str) -> nn.Variable:
    """A variable that ``init`` made; ValueError, naming its collection, if the caller left it out."""
    if not module.has_variable(collection, name):
        raise ValueError(
            f"{type(module).__name__} {'/'.join(module.path)!r}: {collection!r} is missing from the variables. "
            "Pass every collection that model.init returned to model.apply."
        )
    return module.variable(collection, name, None)
