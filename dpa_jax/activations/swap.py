"""Stateful activations in a linen model whose code calls `relu`, `gelu` or `silu`, without a change to it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import fnmatch
import functools
import inspect
import operator
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict

from dpa_jax.activations.mechanism import Mechanism

Function = Callable[..., jax.Array]

# `nn.relu`, `nn.swish` and the like are these same objects.
REPLACED: dict[str, Function] = {name: getattr(jax.nn, name) for name in ("relu", "gelu", "silu")}
"""The functions that `swap` replaces, by name."""

Call = Callable[[str, Function, jax.Array, tuple, dict], jax.Array]
"""Takes a call of one of them: its name, the function, its input and its other arguments."""

_active: contextvars.ContextVar[Call | None] = contextvars.ContextVar("swap", default=None)
# JAX keys its trace caches on this: what was traced with the plain functions is not taken for the swapped.
_cache_key = jax.make_user_context(None)


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a function was replaced: the module path of the activation, and what it was called with."""

    path: str
    function: str
    shape: tuple[int, ...]
    dtype: Any


class Sites(dict[str, Site]):
    """The sites of a model by path; printed, a table."""

    def __str__(self) -> str:
        rows = [(site.path, site.function, f"{site.dtype}{list(site.shape)}") for site in self.values()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@contextlib.contextmanager
def swap(
    factory: Callable[..., nn.Module],
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    pool: str | Callable[[Site], str] = "auto",
) -> Iterator[Sites]:
    """Makes every `relu`, `gelu` and `silu` that a linen model calls a stateful activation, while the block lasts.

    The model's code stays as it is. Enter the block around ``init`` and around ``apply``; labels come from
    `supervise`::

        factory = dpa_jax.activation("dpa", num_classes=10)
        with dpa_jax.swap(factory) as sites:
            variables = model.init(jax.random.key(0), images)
        print(sites)

        @jax.jit
        def train_step(params, backward_memory, memories, images, labels):
            def loss_fn(params, backward_memory):
                variables = {"params": params, "backward_memory": backward_memory, **memories}
                with dpa_jax.swap(factory), dpa_jax.supervise(labels, train=True):
                    logits, mutated = model.apply(variables, images, mutable=dpa_jax.MUTABLE)
                ...

    Each call of a function becomes a module of its own below the module whose method makes it, named after the
    function and counted: ``Block_0/relu_0``, and ``Block_0/mlp_relu_0`` where a method ``mlp`` makes it. The model's
    parameters have the names and, at the start, the values that they had: trained ones can be loaded.

    Replaced are the functions of `jax.nn` and `flax.linen` (``swish`` too) wherever code finds them: in ``nn.relu``,
    imported by name, in fields and lists of modules, in default arguments, in tables, in `functools.partial`, which
    keeps its arguments. It works under ``jit``, ``nn.remat``, ``nn.vmap`` and ``nn.scan``; the last two need an axis
    for the collections of the activation. A function that was traced outside of the block is traced anew in it.

    Args:
        factory: as `dpa_jax.activation` makes it, or a module class with every attribute at a default.
        include: a pattern of module paths, or several, as `fnmatch` has them; a call elsewhere stays as it is.
        exclude: those that stay although ``include`` has them.
        pool: for mechanisms whose ``pool`` is not set, how features become one vector a sample: by the rank, as
            `DPA` says, or a function from a `Site` to the name of a pool.

    Yields:
        The sites, by path, of what is traced in the block; none where a function was traced in an earlier block,
        and one for all equal modules under `nn.jit`.

    Raises:
        TypeError: if ``factory`` cannot be called.
    """
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(f"swap: factory must make modules, as dpa_jax.activation(...) does; got {factory!r}")
    block = _Swap(factory, _patterns(include), _patterns(exclude), pool)
    key = (factory, block.include, block.exclude, pool)
    with replacing(block.call), nn.intercept_methods(block.intercept), _cache_key(key):
        yield block.sites


@dataclasses.dataclass
class _Frame:
    """A method of a module that is running, and how often each function was called since the module was entered."""

    module: nn.Module
    method: str
    calls: Counter[str]


@dataclasses.dataclass
class _Swap:
    """What a block replaces, and where it has."""

    factory: Callable[..., nn.Module]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    pool: str | Callable[[Site], str]
    sites: Sites = dataclasses.field(default_factory=Sites)
    frames: list[_Frame] = dataclasses.field(default_factory=list)
    inside: bool = False  # of an activation, whose own function stays

    def intercept(self, method: Function, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """Runs a method of a module with the functions in its fields replaced."""
        if self.inside:
            return method(*args, **kwargs)
        module, before = context.module, {}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name, None)
            if field.name not in ("parent", "name") and (new := with_replacements(value)) is not value:
                before[field.name] = value
                object.__setattr__(module, field.name, new)
        # A method that its own module calls goes on counting.
        calls = next((frame.calls for frame in self.frames if frame.module is module), Counter())
        self.frames.append(_Frame(module, context.method_name, calls))
        try:
            return method(*args, **kwargs)
        finally:
            self.frames.pop()
            for name, value in before.items():
                object.__setattr__(module, name, value)

    def call(self, name: str, original: Function, x: jax.Array, args: tuple, kwargs: dict) -> jax.Array:
        """In place of a call of the function: the activation's, in a scope of its own below the module that calls."""
        frame = self.frames[-1] if self.frames else None
        if frame is None or frame.module.scope is None or self.inside or isinstance(frame.module, Mechanism):
            return original(x, *args, **kwargs)
        own = name if frame.method == "__call__" else f"{frame.method}_{name}"
        own = f"{own}_{frame.calls[own]}"
        frame.calls[own.rpartition("_")[0]] += 1
        path = "/".join((*frame.module.scope.path, own))
        if not _matches(path, self.include) or _matches(path, self.exclude):
            return original(x, *args, **kwargs)
        site = Site(path, name, x.shape, x.dtype)
        module = self.factory(parent=frame.module.scope.push(own, reuse=True))
        self.sites[path] = site
        pooled = isinstance(module, Mechanism) and getattr(module, "pool", "") is None
        options = {"pool": self.pool(site) if callable(self.pool) else self.pool} if pooled else {}
        self.inside = True
        try:
            return module(x, **options)
        finally:
            self.inside = False


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


# ---------------- Where the functions are ----------------


def _make_replacement(name: str, original: Function) -> Function:
    @functools.wraps(original)
    def replacement(x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        call = _active.get()
        return original(x, *args, **kwargs) if call is None else call(name, original, x, args, kwargs)

    return replacement


_REPLACEMENTS = {id(function): _make_replacement(name, function) for name, function in REPLACED.items()}


def name_of(value: Any) -> str | None:
    """The name of one of the functions, also where some of its arguments are set; None of anything else."""
    function = value.func if isinstance(value, functools.partial) else value
    return next((name for name, replaced in REPLACED.items() if function is replaced), None)


def with_replacements(value: Any) -> Any:
    """The value with replacements for the functions in it; itself where there are none."""
    if id(value) in _REPLACEMENTS:
        return _REPLACEMENTS[id(value)]
    if isinstance(value, functools.partial):
        function = with_replacements(value.func)
        return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
    if type(value) in (tuple, list):
        items = [with_replacements(item) for item in value]
        return type(value)(items) if any(map(operator.is_not, items, value)) else value
    if type(value) in (dict, FrozenDict):
        named = {key: with_replacements(item) for key, item in value.items()}
        return type(value)(named) if any(map(operator.is_not, named.values(), value.values())) else value
    return value


_lock = threading.Lock()
_blocks = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def replacing(call: Call) -> Iterator[None]:
    """Hands every call of the functions to ``call``, wherever code finds them, while the block lasts."""
    global _blocks
    with _lock:  # another thread's block may last already: what is put in place does nothing outside of a block
        _blocks += 1
        if _blocks == 1:
            _undo[:] = [put(new) or functools.partial(put, value) for put, value, new in _references()]
    token = _active.set(call)
    try:
        yield
    finally:
        _active.reset(token)
        with _lock:
            _blocks -= 1
            if not _blocks:
                for undo in _undo:
                    undo()


def _references() -> list[tuple[Callable[[Any], None], Any, Any]]:
    """(what puts another value there, the value, the value to put) of every place that has one of the functions."""
    found = []

    def look(put: Callable[[Any], None], value: Any) -> None:
        if (new := with_replacements(value)) is not value:
            found.append((put, value, new))

    def look_inside(function: Any) -> None:
        function = inspect.unwrap(function) if callable(function) else None  # as it was written, not as flax wraps it
        if isinstance(function, types.FunctionType):
            for part in ("__defaults__", "__kwdefaults__"):
                look(functools.partial(setattr, function, part), getattr(function, part))
            for cell in function.__closure__ or ():
                with contextlib.suppress(ValueError):  # not yet filled
                    look(functools.partial(setattr, cell, "cell_contents"), cell.cell_contents)

    for name, module in list(sys.modules.items()):
        if module is not None and not name.startswith(("jax._src", "dpa_jax")):
            for key, value in list(vars(module).items()):
                if type(value) is types.FunctionType and value.__module__ == name:
                    look_inside(value)
                elif type(value) in (dict, list):  # such as a table by name; it stays the same object
                    for place, item in list(value.items() if type(value) is dict else enumerate(value)):
                        if name_of(item):  # and not what is in it: some tables hold themselves
                            look(functools.partial(value.__setitem__, place), item)
                else:
                    look(functools.partial(setattr, module, key), value)
    classes = [nn.Module]
    for cls in classes:
        classes += cls.__subclasses__()
        for method in vars(cls).values():
            look_inside(method)
    return found
