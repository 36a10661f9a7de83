"""The bundle: all that a campaign needs to go on, in a few files that are small enough to be carried.

``campaign.json`` names the pieces with their digests; it is replaced last, so a program that is killed while it writes
leaves the bundle of before. The pieces, one after the other, are a tar archive: the records of all runs, and of each
group of runs under way its newest checkpoint, packed without loss.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import re
import tarfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow

from dpa_jax.training.checkpoint import Checkpoints
from dpa_jax.training.record import replace_file

INDEX = "campaign.json"
FILES, FILE_BYTES, TOTAL_BYTES = 8, 16 * 2**20, 64 * 2**20
# Of these, what is left for the archive beside campaign.json, table.md and table.png.
PIECES, ARCHIVE_BYTES = FILES - 3, TOTAL_BYTES - 2**20
PACKED = 0.87  # a packed state's share of its bytes, at most: exponents get small, most of a mantissa is noise

_RECORDS = ("metrics.jsonl", "config.json", "position.json")
_CHECKPOINT = re.compile(r"(.+)/checkpoint-([0-9]+)")
_ZSTD_LEVEL = 3


class DamagedBundleError(ValueError):
    """The files of a bundle are not those that were written."""


def read(folder: pathlib.Path, workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Puts what a bundle holds into an empty folder, in the form of runs' folders; nothing, where there is no bundle.

    Returns:
        What else ``campaign.json`` has, and the packed checkpoints, as `write` takes them.

    Raises:
        DamagedBundleError: the message names the file.
    """
    if not (folder / INDEX).exists():
        return {}, {}
    try:
        index = json.loads((folder / INDEX).read_text())
        pieces = index.pop("pieces")
        archive = b"".join(_piece(folder / name, digest) for name, digest in pieces.items())
    except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        raise DamagedBundleError(f"the bundle in {folder} is damaged: {error}; copy it there again") from error
    packed = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        for member in outer.getmembers():
            content = outer.extractfile(member)
            assert content is not None
            if member.name == "records":
                with tarfile.open(fileobj=content, mode="r:xz") as records:
                    records.extractall(workdir, filter="data")
            elif found := _CHECKPOINT.fullmatch(member.name):
                packed[member.name] = content.read()
                with Checkpoints(workdir / found[1] / "checkpoints", keep=1) as checkpoints:
                    checkpoints.save(int(found[2]), _nested(unpack(packed[member.name])))
    return index, packed


def _piece(path: pathlib.Path, digest: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path.name} has other contents than were written")
    return content


def write(
    folder: pathlib.Path, workdir: pathlib.Path, checkpoints: Mapping[str, bytes], index: Mapping[str, Any]
) -> list[str]:
    """Writes the bundle anew: the runs' records below ``workdir``, checkpoints, and what else ``campaign.json`` has.

    Args:
        folder: of the bundle.
        workdir: where the runs are.
        checkpoints: {group's folder, relative, and ``/checkpoint-STEP``: packed state}, the more important first.
        index: as JSON takes it.

    Returns:
        The names of checkpoints that there was no room for.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as records:
        for path in sorted(path for name in _RECORDS for path in workdir.glob(f"*/*/seed-*/{name}")):
            records.add(path, path.relative_to(workdir).as_posix(), filter=_plain)
    held, left_out, size = {"records": buffer.getvalue()}, [], len(buffer.getvalue())
    for name, content in checkpoints.items():
        if size + len(content) + 2**14 > min(ARCHIVE_BYTES, PIECES * FILE_BYTES):  # tar's blocks are added
            left_out.append(name)
        else:
            held[name] = content
            size += len(content) + 2**11
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as outer:
        for name, content in held.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            outer.addfile(member, io.BytesIO(content))
    content = archive.getvalue()
    name = f"campaign-{hashlib.sha256(content).hexdigest()[:12]}"
    pieces = {}
    for number, start in enumerate(range(0, len(content), FILE_BYTES)):
        piece = content[start : start + FILE_BYTES]
        pieces[f"{name}.{number}"] = hashlib.sha256(piece).hexdigest()
        replace_file(folder / f"{name}.{number}", piece)
    replace_file(folder / INDEX, (json.dumps({**index, "pieces": pieces}, indent=1) + "\n").encode())
    for path in folder.glob("campaign-*"):
        if path.name not in pieces:
            path.unlink()
    return left_out


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same files give the same archive, whoever writes it and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


# ---------------- A state as bytes ----------------


def pack(arrays: Mapping[tuple[str, ...], np.ndarray]) -> bytes:
    """Arrays by their paths, of any dtype, as few bytes; `unpack` gives the same bits back.

    The bytes of equal significance are compressed together, of 32 bits after a turn by one, which puts the exponents of
    float32 into one byte.
    """
    codec, head, blobs = pyarrow.Codec("zstd", _ZSTD_LEVEL), [], []
    for path, array in arrays.items():
        array = np.asarray(array)
        planes = [codec.compress(plane.tobytes(), asbytes=True) for plane in _planes(array)]
        head.append([list(path), array.dtype.name, list(array.shape), [len(plane) for plane in planes]])
        blobs += planes
    return b"\n".join([json.dumps(head).encode(), b"".join(blobs)])


def unpack(content: bytes) -> dict[tuple[str, ...], np.ndarray]:
    """What `pack` was given."""
    codec, arrays = pyarrow.Codec("zstd"), {}
    line, _, blobs = content.partition(b"\n")
    start = 0
    for path, name, shape, sizes in json.loads(line):
        dtype = jnp.dtype(name)
        count, planes = int(np.prod(shape)), []
        for size in sizes:
            planes.append(np.frombuffer(codec.decompress(blobs[start : start + size], count, asbytes=True), np.uint8))
            start += size
        raw = np.ascontiguousarray(np.stack(planes, axis=-1)).reshape(-1)
        if dtype.itemsize == 4:
            words = raw.view("<u4")
            raw = (words >> 1 | words << 31).view(np.uint8)
        arrays[tuple(path)] = raw.view(dtype).reshape(shape)
    return arrays


def _planes(array: np.ndarray) -> np.ndarray:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if array.dtype.itemsize == 4:
        words = raw.view("<u4")
        raw = (words << 1 | words >> 31).view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, array.dtype.itemsize).T)


def _nested(arrays: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in arrays.items():
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = array
    return tree
