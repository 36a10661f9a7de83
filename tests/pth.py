"""Writes PyTorch's files without PyTorch: those that torch.save makes, and those that somebody else would."""

import io
import pickle
import struct
import zipfile

import numpy as np

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
_KINDS = {"float64": "Double", "float32": "Float", "float16": "Half", "int64": "Long", "bool": "Bool"}


class Raw(bytes):
    """A part of a pickle as it is."""


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def reduced(module, name, *arguments):
    """A call of a function in the pickle."""
    return Raw(f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR")


def storage(key, size, kind="Float", device="cpu", module="torch"):
    """The persistent identity of a storage."""
    named = text("storage") + f"c{module}\n{kind}Storage\n".encode() + text(key) + text(device)
    return Raw(b"(" + named + number(size) + b"tQ")


def tensor(key, shape, strides=None, *, offset=0, size=None, kind="Float"):
    """A call that makes a tensor of a storage, which has as many numbers as are needed unless ``size`` says more."""
    strides = strides if strides is not None else [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    size = int(np.prod(shape)) if size is None else size
    arguments = storage(key, size, kind), number(offset), number(tuple(shape)), number(tuple(strides))
    hooks = reduced("collections", "OrderedDict")
    return reduced("torch._utils", "_rebuild_tensor_v2", *arguments, number(False), hooks)


def written(tree, storages):
    """The operations that make a tree of dicts, lists, numbers, texts and arrays, without a pickle's ends.

    ``storages``, {key: bytes}, gets one for each array.
    """
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, np.ndarray):
        key = str(len(storages))
        storages[key] = tree.tobytes()
        return tensor(key, tree.shape, kind=_KINDS[tree.dtype.name])
    if isinstance(tree, dict):
        items = b"".join(number(key) + written(value, storages) for key, value in tree.items())
        return b"}(" + items + b"u"
    if isinstance(tree, list | tuple):
        items = b"".join(written(value, storages) for value in tree)
        return b"](" + items + b"e" if isinstance(tree, list) else b"(" + items + b"t"
    return number(tree)


def zipped(tree, *, more=None, compression=zipfile.ZIP_STORED, prefix="archive", pickled=None):
    """The file of today: a zip archive of the pickle and the storages, and of ``more``, {name: bytes}."""
    storages, file = {}, io.BytesIO()
    operations = b"\x80\x02" + written(tree, storages) + b"." if pickled is None else pickled
    members = {"data.pkl": operations, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": block for key, block in storages.items()} | (more or {})
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{prefix}/{name}", content)
    return file.getvalue()


def old(tree, *, blocks=None, machine=None, protocol=1001):
    """The file of before PyTorch 1.6: five pickles, and the storages."""
    storages = {}
    operations = b"\x80\x02" + written(tree, storages) + b"."
    machine = {"protocol_version": protocol, "little_endian": True} if machine is None else machine
    parts = [MAGIC, pickle.dumps(protocol, 2), pickle.dumps(machine, 2), operations]
    parts.append(pickle.dumps(list(storages) if blocks is None else list(blocks), 2))
    for size, block in blocks.values() if blocks is not None else ((len(b) // 4, b) for b in storages.values()):
        parts += [struct.pack("<q", size), block]
    return b"".join(parts)
