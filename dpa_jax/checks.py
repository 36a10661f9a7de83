"""Early, plain errors for what users give."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

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


def check_labels(owner: str, x: jax.Array, labels: jax.Array, rows_per_sample: int = 1) -> None:
    """Raises ValueError unless ``labels`` is one integer per sample of ``x`` [B * rows_per_sample, ...]."""
    wanted = (x.shape[0] // rows_per_sample,)
    if labels.shape != wanted:
        raise ValueError(
            f"{owner}: labels must have shape {wanted}, one per sample of the input {x.shape}; got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{owner}: labels must be integers, the class of each sample; got {labels.dtype}")


def check_floating(owner: str, x: jax.Array) -> None:
    """Raises ValueError unless ``x`` is floating: parameters cast to integers would silently be lost."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{owner}: the input must be floating; got {x.dtype}")
