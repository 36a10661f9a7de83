"""What takes long to find out about data on disk, kept in the user's cache folder for the next start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import platformdirs

# Within so many nanoseconds a file system may give a second change the time of the first.
_TICK = 2 * 10**9


def remembered(key: str, compute: Callable[[], Any], watched: Callable[[Any], Iterable[pathlib.Path]]) -> Any:
    """The result of `compute`, or of the last time while the files and folders `watched(result)` are the same.

    That is, while each has the size and the modification time that it had. The key holds all else that decides the
    result, which is as JSON has it. A file in the cache folder that is damaged, or cannot be written, costs time and
    nothing else: its first line is the sum of the rest.
    """
    file = _file(key, ".json")
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        digest, _, content = file.read_bytes().partition(b"\n")
        stored = json.loads(content) if digest.decode() == _sum(content) else {}
        if stored["key"] == key and stored["files"] == _facts(watched(stored["result"])):
            return stored["result"]
    before = time.time_ns()
    result = compute()
    with contextlib.suppress(OSError):
        facts = _facts(watched(result))
        if max(modified for _, modified in facts) < before - _TICK:
            content = json.dumps({"key": key, "files": facts, "result": result}).encode()
            write_whole(file, lambda part: part.write_bytes(f"{_sum(content)}\n".encode() + content))
    return result


def converted(paths: Iterable[str], convert: Callable[[pathlib.Path], Any], suffix: str) -> pathlib.Path:
    """A file in the cache folder that `convert` makes of others, anew where one has another size or time."""
    paths = list(paths)
    return computed(json.dumps([paths, _facts(map(pathlib.Path, paths))]), convert, suffix)


def computed(key: str, compute: Callable[[pathlib.Path], Any], suffix: str) -> pathlib.Path:
    """A file in the cache folder that `compute` writes once for all that the key says."""
    file = _file(key, suffix)
    if not file.exists():
        try:
            write_whole(file, compute)
        except OSError as error:
            raise OSError(f"cannot write {file}: {error}. XDG_CACHE_HOME=DIR chooses another cache folder") from error
    return file


def _file(key: str, suffix: str) -> pathlib.Path:
    folder = platformdirs.user_cache_path("dpa_jax", appauthor=False)
    return folder / f"{_sum(os.fsencode(key))[:32]}{suffix}"


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _facts(paths: Iterable[pathlib.Path]) -> list[list[int]]:
    """Size and modification time, in nanoseconds, of each."""
    return [[found.st_size, found.st_mtime_ns] for found in map(os.stat, paths)]


def write_whole(goal: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Has a file written under another name first, so that it is there whole or not at all."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    part = goal.with_suffix(f".{uuid.uuid4().hex}")  # not by tempfile, whose files only their owner can read
    try:
        write(part)
        os.replace(part, goal)
    finally:
        part.unlink(missing_ok=True)
