"""Files of weights: PyTorch's ``.pth``, read without PyTorch and without running code from it, and ``.safetensors``."""

import io
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpa_jax.checks import check_memory
from dpa_jax.extras import require_train
from dpa_jax.models.torch_pickle import DTYPES, Storage, Tensor, unpickle

_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number that files before PyTorch 1.6 begin with
_OLD_PROTOCOL = 1001
_NESTED = ("model", "state_dict", "module")  # where programs put the state dict of a checkpoint
_CUT = "it is damaged or was not downloaded to its end"
# Types of numbers in .safetensors that PyTorch's models have.
_SAFETENSORS = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
}

Blocks = Callable[[Storage], bytes]
"""The bytes of a storage, as many as it says; ValueError where a file has not those."""


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """The state dict in a file: {name: numpy array}; a ``.pth`` may have numbers and containers among them.

    A state dict under ``model``, ``state_dict`` or ``module`` is found there. What a file is follows from its content,
    not from its name. Arrays may be views that are read-only, in bfloat16 or half precision where the file is.

    Raises:
        FileNotFoundError: if there is no such file; folders, pipes and devices are none.
        ValueError: for a file of another kind or a damaged one, one that asks for more than tensors, and one that has
            no state dict; the message begins with the path.
        ImportError: for a ``.safetensors`` file without the package of that name.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    check_memory("reading weights", str(path), path.stat().st_size)
    data = path.read_bytes()
    try:
        if data.startswith(b"PK\x03\x04"):
            return _arrays(*_read_zip(data), len(data))
        if data.startswith(_OLD):
            return _arrays(*_read_old(data), len(data))
        if data[8:9] == b"{":
            return _read_safetensors(data)
        raise ValueError("it is neither a .pth nor a .safetensors file")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def state_dict(tree: Any) -> Any:
    """The state dict of a checkpoint: what is under ``model``, ``state_dict`` or ``module``, also one in another."""
    for _ in _NESTED:
        inner = [tree[name] for name in _NESTED if isinstance(tree, Mapping) and isinstance(tree.get(name), Mapping)]
        tree = inner[0] if inner else tree
    return tree


def _arrays(tree: Any, blocks: Blocks, file_size: int) -> dict[str, Any]:
    """The state dict with arrays for its tensors; each of them is at most as large as the file."""
    found, loaded = state_dict(tree), dict[Storage, bytes]()
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        keys = ", ".join(repr(key)[:40] for key in list(found)[:8]) if isinstance(found, dict) else ""
        raise ValueError(
            f"it has no tensors by their names, nor has what is under {', '.join(_NESTED)}; it is a "
            f"{type(found).__name__}{keys and f' with the keys {keys}'}"
        )

    def array(name: Any, tensor: Tensor) -> np.ndarray:
        storage, offset, shape, strides = tensor
        sized = [(n, stride * storage.dtype.itemsize if n > 1 else 0) for n, stride in zip(shape, strides, strict=True)]
        last = offset * storage.dtype.itemsize + sum((n - 1) * stride for n, stride in sized)
        numbers = math.prod(shape)
        if numbers == 0:
            return np.zeros(shape, storage.dtype)
        # Strides of 0 repeat numbers: a small file must not become a large array.
        if last >= storage.size * storage.dtype.itemsize or numbers * storage.dtype.itemsize > file_size:
            raise ValueError(f"tensor {str(name)[:80]!r} of shape {shape} is larger than its storage")
        if storage not in loaded:
            loaded[storage] = blocks(storage)
        block = np.frombuffer(loaded[storage], storage.dtype)[offset:]
        return np.lib.stride_tricks.as_strided(block, shape, [stride for _, stride in sized], writeable=False)

    return {name: array(name, value) if isinstance(value, Tensor) else value for name, value in found.items()}


def _read_zip(data: bytes) -> tuple[Any, Blocks]:
    """What `torch.save` writes: PREFIX/data.pkl, and each storage as PREFIX/data/KEY, none of them compressed."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except _ZIP_ERRORS as error:
        raise ValueError(f"{_CUT}: {error}") from error
    members = {info.filename: info for info in archive.infolist()}
    prefixes = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(prefixes) != 1:
        raise ValueError("it is a zip file, but not what torch.save writes: there is no data.pkl in it")
    (prefix,) = prefixes
    if f"{prefix}constants.pkl" in members:
        raise ValueError("it is a TorchScript archive, which holds code; save the model's state_dict() instead")

    def content(name: str) -> bytes:
        info = members.get(prefix + name)
        if info is None:
            raise ValueError(f"{_CUT}: {name[:80]!r} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size > len(data):
            raise ValueError(
                f"its {name[:80]!r} is compressed, encrypted or larger than the file; torch.save writes none"
            )
        try:
            return archive.read(info)
        except _ZIP_ERRORS as error:
            raise ValueError(f"{_CUT}: {error}") from error

    def block(storage: Storage) -> bytes:
        found = content(f"data/{storage.key}")
        if len(found) != storage.size * storage.dtype.itemsize:
            raise ValueError(f"{_CUT}: storage {storage.key[:80]!r} has {len(found)} bytes for {storage.size} numbers")
        return found

    if f"{prefix}byteorder" in members and content("byteorder") != b"little":
        raise ValueError("its numbers are not little-endian, which are not read")
    return unpickle(io.BytesIO(content("data.pkl"))), block


# What zipfile raises for headers that make no sense, and for a wrong sum.
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError)


def _read_old(data: bytes) -> tuple[Any, Blocks]:
    """What `torch.save` wrote before PyTorch 1.6: pickles one after the other, then the storages.

    The pickles are a magic number, the protocol, properties of the machine, the object, and the keys of the storages in
    their order. A storage is the number of its numbers, int64, and these.
    """
    stream, storages = io.BytesIO(data), dict[str, Storage]()
    _, protocol, machine, tree, keys = (unpickle(stream, storages) for _ in range(5))
    if protocol != _OLD_PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it is damaged, or its numbers are not little-endian, which are not read")
    starts, at = dict[str, int](), stream.tell()
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or int.from_bytes(data[at : at + 8], "little") != storage.size:
            raise ValueError(f"{_CUT}: its list of storages does not fit its tensors")
        starts[key] = at + 8
        at += 8 + storage.size * storage.dtype.itemsize

    def block(storage: Storage) -> bytes:
        size = storage.size * storage.dtype.itemsize
        start = starts.get(storage.key, len(data))
        if start + size > len(data):
            raise ValueError(f"{_CUT}: storage {storage.key[:80]!r} is not there")
        return data[start : start + size]

    return tree, block


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    require_train("reading .safetensors", ["safetensors"])
    import safetensors

    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{_CUT}: {error}") from error
    found = {}
    for name, tensor in sorted(tensors, key=lambda item: item[0]):  # which come in another order every time
        if tensor["dtype"] not in _SAFETENSORS:
            raise ValueError(f"tensor {name[:80]!r} has the dtype {tensor['dtype']}, which is not read")
        dtype = DTYPES[_SAFETENSORS[tensor["dtype"]]]
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found
