"""Early errors of one line for what configurations, models and activations are given."""

import difflib
import inspect
import math
import numbers
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
    if not isinstance(value, str) or value not in allowed:
        nearest = " or ".join(map(repr, difflib.get_close_matches(str(value), allowed, cutoff=0.5)))
        hint = f" Did you mean {nearest}?" if nearest else ""
        raise ValueError(f"{owner}: {argument} must be one of {', '.join(allowed)}; got {value!r}.{hint}")


def add_factory(table: dict[str, Any], name: str, factory: Callable) -> None:
    """Adds a factory to those by name; raises ValueError if the name is taken, TypeError if it cannot be called."""
    if not isinstance(name, str):
        raise TypeError(f"register: the name must be a string; got {name!r}")
    if name in table:
        raise ValueError(f"register: the name {name!r} is taken by {table[name]}; choose another")
    if not callable(factory):
        raise TypeError(f"register: factory must be a module class or another callable; got {factory!r}")
    table[name] = factory


def check_range(owner: str, argument: str, value: float, low: float | None = None, high: float | None = None) -> None:
    """Raises ValueError unless it is a finite number and ``low <= value <= high``."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    inside = number and (low is None or value >= low) and (high is None or value <= high)
    if not (inside and abs(value) < math.inf):
        allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
        if inside or low is high is None:
            allowed = "a finite number"
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


def host_memory() -> int:
    """The bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(owner: str, what: str, size: int) -> None:
    """Raises ValueError where ``what`` takes so many bytes that this machine's memory could not hold it."""
    memory = host_memory()
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
        elif default is None and _is_union_of_types(annotation) and not isinstance(value, annotation):
            raise ValueError(f"{owner}: {argument} must be {annotation}; got {value!r} of type {type(value).__name__}")
        if type(value) is int and type(default) is int:
            check_range(owner, argument, value, high=INT32)


def _is_union_of_types(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) and all(isinstance(part, type) for part in annotation.__args__)


def check_call(owner: str, function: Callable, **arguments: Any) -> None:
    """Raises TypeError unless the function can be called with these arguments."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise TypeError(f"{owner}: {error}") from error


def as_array(owner: str, what: str, value: Any) -> jax.Array:
    """The value as an array; raises ValueError if it cannot be one."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner}: {what} must be an array of numbers; got a {type(value).__name__}") from error


def check_labels(owner: str, x: jax.Array, labels: Any, rows_per_sample: int = 1) -> jax.Array:
    """``labels`` as int32, of any integer type; what int32 does not hold is its nearest number, or -1 below it.

    Raises ValueError unless there is one integer per sample of ``x``: [B] for [B * rows_per_sample, ...], or [B, N] (or
    more axes) for [B, N, ..., C] where there is a row a sample.
    """
    try:
        labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)  # JAX would cut off what is too large
    except ValueError as error:
        raise ValueError(f"{owner}: labels must be an array; got a {type(labels).__name__}") from error
    wanted = (x.shape[0] // rows_per_sample,)
    each = rows_per_sample == 1 and 1 < labels.ndim < x.ndim and labels.shape == x.shape[: labels.ndim]
    if labels.shape != wanted and not each:
        raise ValueError(
            f"{owner}: labels must have shape {wanted}, one per sample of the input {x.shape}; got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"{owner}: labels must be integers, the class of each sample; got {labels.dtype}")
    held = jnp.iinfo(labels.dtype)
    return jnp.asarray(labels.clip(max(held.min, -1), min(held.max, INT32)).astype(np.int32))


def check_input(owner: str, x: Any) -> jax.Array:
    """``x`` as an array; raises ValueError unless it is floating and has an axis of channels, with some."""
    x = as_array(owner, "the input", x)
    # Parameters cast to integers would silently be lost.
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{owner}: the input must be floating; got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{owner}: the input must have an axis of channels, [..., C], C at least 1; got {x.shape}")
    return x
