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
    """The result of a slow look at the disk, or of the last one where nothing has changed since.

    A file in the cache folder that is damaged, or cannot be written, costs time and nothing else.

    Args:
      key: what is looked at, an absolute path with what else decides the result.
      compute: () -> the result, as JSON has it.
      watched: result -> the files and folders whose modification times have to be the same.

    Raises:
      OSError: what `compute` raises.
    """
    file = _file(key, ".json")
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        stored = json.loads(file.read_text())
        if stored["key"] == key and stored["modified"] == _modified(watched(stored["result"])):
            return stored["result"]
    result = compute()
    with contextlib.suppress(OSError):
        modified = _modified(watched(result))
        if max(modified) < time.time_ns() - _TICK:
            content = json.dumps({"key": key, "modified": modified, "result": result})
            _write(file, lambda part: part.write_text(content))
    return result


def converted(paths: Iterable[str], convert: Callable[[pathlib.Path], Any], suffix: str) -> pathlib.Path:
    """A file in the cache folder that is made of others, anew where one of them has changed.

    Args:
      paths: the absolute paths of the others; their sizes and modification times are looked at too.
      convert: writes the file to a path.
      suffix: the file's ending.

    Raises:
      OSError: the file cannot be written; the message says where to.
    """
    about = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    file = _file(json.dumps(about), suffix)
    if not file.exists():
        try:
            _write(file, convert)
        except OSError as error:
            raise OSError(f"cannot write {file}: {error}. XDG_CACHE_HOME=DIR chooses another cache folder") from error
    return file


def _file(key: str, suffix: str) -> pathlib.Path:
    folder = platformdirs.user_cache_path("dpa_jax", appauthor=False)
    return folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}{suffix}"


def _modified(paths: Iterable[pathlib.Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def _write(goal: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Writes a file that is there whole or not at all."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    part = goal.with_suffix(f".{uuid.uuid4().hex}")
    try:
        write(part)
        os.replace(part, goal)
    finally:
        part.unlink(missing_ok=True)
