"""The pickles in PyTorch's files, read without PyTorch and without calling anything that they name.

Python's unpickler calls whatever a pickle names. `unpickle` knows the few operations that ``torch.save`` writes, and
makes dicts, lists, tuples, texts, numbers and descriptions of tensors of them; a pickle that asks for more is refused.
"""

import io
import pickletools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, Any] = {
    "Double": np.dtype("<f8"),
    "Float": np.dtype("<f4"),
    "Half": np.dtype("<f2"),
    "BFloat16": jnp.dtype(jnp.bfloat16),
    "Long": np.dtype("<i8"),
    "Int": np.dtype("<i4"),
    "Short": np.dtype("<i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype("?"),
}
"""PyTorch's names of types of numbers -> dtypes, little-endian."""

_MAX_OPERATIONS = 2**20  # a thousand tensors take 30,000
_MAX_AXES = 32


class Storage(NamedTuple):
    """A block of numbers that a pickle refers to."""

    key: str
    dtype: np.dtype
    size: int  # in numbers


class Tensor(NamedTuple):
    """A view of a storage; its offset and strides count numbers. Nothing of it is checked against the storage yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Function(NamedTuple):
    """What a pickle may call, by its name; `_called` does what the real one does."""

    name: str


_FUNCTIONS = (
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
)
_GLOBALS: dict[str, Any] = {name: _Function(name) for name in _FUNCTIONS} | {
    f"{module} {name}Storage": dtype for module in ("torch", "torch.cuda") for name, dtype in DTYPES.items()
}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINSTRING", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(stream: io.BytesIO, storages: dict[str, Storage] | None = None) -> Any:
    """The object of the pickle at a stream's position, which moves to the pickle's end.

    Time and memory are bounded by the stream's length and by `_MAX_OPERATIONS`; objects may hold themselves.

    Args:
        stream: of bytes, so that no more can be read than there is.
        storages: where to note the storages that the pickle refers to, by key; None: nowhere.

    Raises:
        ValueError: for a pickle that is damaged, too long, or asks for what is not admitted, which is named.
    """
    machine = _Machine(storages)
    try:
        # pickletools decodes escapes, and Python warns of unknown ones.
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return machine.run(stream)
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    # What pickletools raises, and Python where the stack or the memo lacks what an operation takes.
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"it is damaged or was not downloaded to its end: {error}") from error


class _RefusedError(ValueError):
    """The pickle asks for what is not admitted."""


class _Machine:
    """The stack machine of one pickle; see `pickletools` for what each operation means."""

    def __init__(self, storages: dict[str, Storage] | None) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # for each mark, the stack under it
        self.memo: dict[int, Any] = {}
        self.storages = {} if storages is None else storages
        self.left = _MAX_OPERATIONS

    def run(self, stream: io.BytesIO) -> Any:
        """Carries out all operations, and returns what is on top then."""
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "STOP":
                return self.stack.pop()
            if self.left <= 0:
                raise _RefusedError(
                    f"its pickle has more than {_MAX_OPERATIONS} operations; a state dict has far fewer"
                )
            self.step(operation.name, argument)

    def step(self, name: str, argument: Any) -> None:
        """Carries out one operation."""
        self.left -= 1
        match name:
            case _ if name in _VALUES:
                self.stack.append(argument)
            case _ if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            case _ if name in _TUPLES:
                self.stack.append(tuple(self.taken(_TUPLES[name])))
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.marked()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = self.marked() if name == "APPENDS" else self.taken(1)
                _checked(self.stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.marked() if name == "SETITEMS" else self.taken(2)
                _set(_checked(self.stack[-1], dict), items[::2], items[1::2])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_admitted(argument))
            case "REDUCE":
                function, arguments = self.taken(2)
                self.stack.append(self.called(_checked(function, _Function).name, _checked(arguments, tuple)))
            case "BUILD":  # attributes of an OrderedDict, such as the versions of the modules
                self.stack.pop()
                _checked(self.stack[-1], dict)
            case "BINPERSID":
                self.stack.append(self.storage(*_checked(self.stack.pop(), tuple)))
            case "PROTO":
                pass
            case _:
                raise _RefusedError(f"its pickle has the operation {name}, which torch.save does not write")

    def taken(self, count: int) -> list[Any]:
        """The uppermost items, which are taken off."""
        if len(self.stack) < count:
            raise IndexError("an operation lacks what it takes")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def marked(self) -> list[Any]:
        """The items above the last mark, which are taken off with it."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def storage(self, kind: Any, dtype: Any, key: Any, device: Any, size: Any, view: Any = None) -> Storage:
        """The storage that a persistent identity describes."""
        if kind != "storage" or not isinstance(dtype, np.dtype) or view is not None:
            raise TypeError("a storage is described in a way that torch.save does not use")
        storage = Storage(_checked(key, str), dtype, _whole(size))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError("a storage is described in two ways")
        return storage

    def called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What the function makes."""
        if name.startswith("torch._utils _rebuild_tensor"):
            storage, offset, shape, strides, *_ = arguments
            if not len(_checked(shape, tuple)) == len(_checked(strides, tuple)) <= _MAX_AXES:
                raise ValueError("a tensor has another number of strides than of axes, or too many")
            shape, strides = tuple(map(_whole, shape)), tuple(map(_whole, strides))
            return Tensor(_checked(storage, Storage), _whole(offset), shape, strides)
        if name == "torch._utils _rebuild_parameter":
            return _checked(arguments[0], Tensor)
        made: dict[Any, Any] = {}
        if arguments:  # an OrderedDict of Python 2: pairs in a list
            (pairs,) = arguments
            self.left -= len(_checked(pairs, list))
            keys, values = zip(*pairs, strict=True) if pairs else ((), ())
            _set(made, keys, values)
        return made


def _admitted(name: str) -> Any:
    if name not in _GLOBALS:
        raise _RefusedError(
            f"it asks for {name.replace(' ', '.')[:80]!r}, which no state dict needs; no code of it was run. Save the "
            "state dict alone, as torch.save(model.state_dict(), PATH)"
        )
    return _GLOBALS[name]


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"it has a {type(value).__name__} where a {kind.__name__.lstrip('_')} must be")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise TypeError("it has something else where a size must be")
    return value


def _set(target: dict[Any, Any], keys: Sequence[Any], values: Sequence[Any]) -> None:
    """Sets items. Names and numbers alone are keys: to hash tuples in tuples may take more stack than Python has."""
    if len(keys) != len(values) or not all(type(key) in (str, int, float) for key in keys):
        raise TypeError("a dict has keys that are no names")
    target.update(zip(keys, values, strict=True))
