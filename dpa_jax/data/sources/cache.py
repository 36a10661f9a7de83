"""What was found out about data on disk, kept so that the next start is quick."""

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

# Within so many nanoseconds a file system may give a second change the time of the first.
_TICK = 2 * 10**9


def remembered(key: str, compute: Callable[[], Any], watched: Callable[[Any], Iterable[pathlib.Path]]) -> Any:
    """The result of a slow look at the disk, or of the last one where nothing has changed since.

    It is kept in `$XDG_CACHE_HOME/dpa_jax`, or `~/.cache/dpa_jax`. A file there that is damaged, or cannot be
    written, costs time and nothing else.

    Args:
      key: what is looked at, an absolute path with what else decides the result.
      compute: () -> the result, as JSON has it.
      watched: result -> the files and folders whose modification times have to be the same.

    Raises:
      OSError: what `compute` raises.
    """
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpa_jax"
    file = root / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        stored = json.loads(file.read_text())
        if stored["key"] == key and stored["modified"] == _modified(watched(stored["result"])):
            return stored["result"]
    result = compute()
    with contextlib.suppress(OSError):
        modified = _modified(watched(result))
        if max(modified) < time.time_ns() - _TICK:
            _write(file, json.dumps({"key": key, "modified": modified, "result": result}))
    return result


def _modified(paths: Iterable[pathlib.Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def _write(goal: pathlib.Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    part = goal.with_suffix(f".{uuid.uuid4().hex}")
    try:
        part.write_text(text)
        os.replace(part, goal)
    finally:
        part.unlink(missing_ok=True)
