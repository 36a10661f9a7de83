"""Early errors of one line for what configurations, models and activations are given."""

import difflib
import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INT32 = 2**31 - 1  # the greatest whole number that devices count with
MAX_SIZE = 2**16  # of a side of an image, or of a layer
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


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
    try:
        inside = (low is None or value >= low) and (high is None or value <= high)
    except TypeError:  # no number
        inside = False
    if not inside:
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}: {argument} must be {allowed}; got {value}")


def check_count(owner: str, argument: str, value: int, low: int, high: int = INT32) -> None:
    """Raises ValueError unless ``low <= value <= high``, for a count whose upper end is only a limit of the machine."""
    check_range(owner, argument, value, low)
    check_range(owner, argument, value, high=high)


def check_rate(owner: str, argument: str, value: float) -> None:
    """Raises ValueError unless ``0 <= value < 1``, in float32."""
    if not is_number(value) or not 0 <= np.float32(value) < 1:
        raise ValueError(f"{owner}: {argument} must be in [0, 1); got {value!r}")


def check_sizes(owner: str, sizes: Mapping[str, Any], high: int = MAX_SIZE) -> None:
    """Raises ValueError unless each of these, by name, is a whole number in [1, high]."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool):
            raise ValueError(f"{owner}: {name} must be a whole number; got {size!r}")
        check_count(owner, name, int(size), 1, high)


def check_memory(owner: str, what: str, size: int) -> None:
    """Raises ValueError where ``what`` takes so many bytes that this machine's memory could not hold it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"{owner}: {what} would take {size / 1e9:,.1f} GB; this machine has {memory / 1e9:,.1f} GB of memory"
        )


def is_number(value: Any) -> bool:
    """Whether it is an int or a float that float32 can hold, neither too large nor too near 0; a bool is none."""
    return type(value) in (int, float) and (value == 0 or _TINY <= abs(value) <= _HUGE)


def check_type(owner: str, argument: str, value: Any, default: Any) -> None:
    """Raises ValueError unless ``value`` is of the type of ``default``; an int will do for a float."""
    if isinstance(default, float):
        fits, wanted = is_number(value), "a finite float"
        finite = type(value) in (int, float) and abs(value) < float("inf")
        hint = f"; float32 has 0 and {_TINY:.1e} to {_HUGE:.1e}" if finite else ""
    else:
        fits, wanted, hint = type(value) is type(default), f"of type {type(default).__name__}", ""
    if not fits:
        raise ValueError(f"{owner}: {argument} must be {wanted}; got {value!r} of type {type(value).__name__}{hint}")


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
        argument = f"{group}.{name}"
        if not allowed:
            raise ValueError(f"{owner}: {group} must be empty here, there are no options; got {name!r}")
        check_choice(owner, f"a key of {group}", name, allowed)
        default, annotation = parameters[name].default, parameters[name].annotation
        if isinstance(default, bool | int | float | str):  # the types of others do not show in the default
            check_type(owner, argument, value, default)
        elif default is None and isinstance(annotation, types.UnionType) and not isinstance(value, annotation):
            raise ValueError(f"{owner}: {argument} must be {annotation}; got {value!r} of type {type(value).__name__}")
        if type(value) is int and type(default) is int:
            check_range(owner, argument, value, high=INT32)


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
