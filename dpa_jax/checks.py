"""Early errors of one line for what configurations, models and activations are given."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
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


def add_factory(table: dict[str, Any], name: str, factory: Callable) -> None:
    """Adds a factory to those by name; raises ValueError if the name is taken, TypeError if it cannot be called."""
    if name in table:
        raise ValueError(f"register: the name {name!r} is taken by {table[name]}; choose another")
    if not callable(factory):
        raise TypeError(f"register: factory must be a module class or another callable; got {factory!r}")
    table[name] = factory


def check_range(owner: str, argument: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raises ValueError unless ``low <= value <= high``."""
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}: {argument} must be {allowed}; got {value}")


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; a bool is none."""
    return type(value) in (int, float) and math.isfinite(value)


def check_type(owner: str, argument: str, value: Any, default: Any) -> None:
    """Raises ValueError unless ``value`` is of the type of ``default``; an int will do for a float."""
    if isinstance(default, float):
        fits, wanted = is_number(value), "a finite float"
    else:
        fits, wanted = type(value) is type(default), f"of type {type(default).__name__}"
    if not fits:
        raise ValueError(f"{owner}: {argument} must be {wanted}; got {value!r} of type {type(value).__name__}")


def check_options(
    owner: str, factory: Callable, options: Mapping[str, Any], group: str = "options", given: Iterable[str] = ()
) -> None:
    """Raises ValueError for an option that a module does not have, or whose type is not its default's.

    ``factory`` is the module's class or takes its attributes as parameters, of which the caller itself sets the
    ``given`` ones; messages say that ``owner`` has ``options``, under the name ``group``.
    """
    parameters = inspect.signature(factory).parameters
    allowed = [name for name in parameters if name not in ("parent", "name", *given)]
    for name, value in options.items():
        if not allowed:
            raise ValueError(f"{owner}: {group} must be empty here, there are no options; got {name!r}")
        check_choice(owner, f"a key of {group}", name, allowed)
        default = parameters[name].default
        if isinstance(default, bool | int | float | str):  # the types of others do not show in the default
            check_type(owner, f"{group}.{name}", value, default)


def check_labels(owner: str, x: jax.Array, labels: jax.Array, rows_per_sample: int = 1) -> None:
    """Raises ValueError unless ``labels`` is one integer per sample of ``x`` [B * rows_per_sample, ...]."""
    wanted = (x.shape[0] // rows_per_sample,)
    if labels.shape != wanted:
        raise ValueError(
            f"{owner}: labels must have shape {wanted}, one per sample of the input {x.shape}; got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{owner}: labels must be integers, the class of each sample; got {labels.dtype}")


def check_input(owner: str, x: jax.Array) -> None:
    """Raises ValueError unless ``x`` is floating and has an axis of channels."""
    check_floating(owner, x)
    if x.ndim == 0:
        raise ValueError(f"{owner}: the input must have an axis of channels, [..., C]; got the shape ()")


def check_floating(owner: str, x: jax.Array) -> None:
    """Raises ValueError unless ``x`` is floating: parameters cast to integers would silently be lost."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{owner}: the input must be floating; got {x.dtype}")
