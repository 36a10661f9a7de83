"""Reading what somebody else made: nothing in it is trusted, and what is wrong is told in one line.

Links are followed, as the caches of other programs are made of them; a name that a file's content gives is not a path.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import stat
from typing import Any, BinaryIO


def folder_path(directory: str) -> pathlib.Path:
    """A configuration's folder as an absolute path, `~` replaced; ValueError where a user after it is unknown."""
    try:
        return pathlib.Path(directory).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"data.dir: there is no home folder for {directory}") from error


def open_plain(path: str | pathlib.Path) -> BinaryIO:
    """Opens a file to read; OSError where it is none, or is a pipe, a socket or a device.

    Opening a pipe would wait until somebody writes to it.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a plain file but a pipe or a device")
    return file


def read_text(path: pathlib.Path) -> str:
    """The text of a file; ValueError where it is not UTF-8, OSError where it cannot be read."""
    with open_plain(path) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged: it is no UTF-8") from error


def parse_object(text: str | bytes, where: str | pathlib.Path) -> dict[str, Any]:
    """The object that a text holds as JSON; ValueError, which says `where`, for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{where} is damaged: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is no JSON object")
    return value


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object that a file holds as JSON; raises as `read_text` and `parse_object` do."""
    return parse_object(read_text(path), path)


def member(values: dict[str, Any], key: str, kind: type, where: str | pathlib.Path, default: Any = None) -> Any:
    """The value of a key, or the default where there is none; ValueError, which says `where`, for another type."""
    value = values.get(key, default)
    if type(value) is not kind:
        raise ValueError(f"{where} is damaged: {key!r} is {str(value)[:100]}, not of type {kind.__name__}")
    return value


def integer(value: Any, where: str | pathlib.Path, least: int) -> int:
    """An integer below 2^31, also as a text, as protocol buffers have them in JSON; else ValueError."""
    text = str(value) if type(value) in (int, str) else ""
    if not re.fullmatch(r"-?\d{1,10}", text, re.ASCII) or not least <= int(text) < 2**31:
        raise ValueError(f"{where} is damaged: {str(value)[:100]} is no integer from {least} to 2^31 - 1")
    return int(text)


def one_line(error: Exception) -> str:
    """What another library's error says, without its line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
