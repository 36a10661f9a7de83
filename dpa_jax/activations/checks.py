"""Early, plain errors for what activations are given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp


def check_choice(owner: str, argument: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises ValueError, with the nearest name, unless ``value`` is one of ``allowed``."""
    allowed = list(allowed)
    if value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
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
