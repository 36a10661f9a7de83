"""The folder of a run, local or in a bucket: whether it can be one, who writes to it, where damaged files of it go."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

FILES = ("metrics.jsonl", "metrics.discarded.jsonl", "config.json", "position.json", "curves.png")
FOLDERS = ("checkpoints", "tensorboard")
_LOCK = ".lock"


class InUseError(OSError):
    """Another program writes to the folder."""


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """The local folder of this name, or for ``gs://BUCKET/NAME`` the one in a bucket, an `epath.Path`.

    Both have the methods of `pathlib.Path` that are used on a run's folder. In a bucket an object is written as a whole
    or not at all, there are no locks, and a folder is there as long as something is in it.

    Raises:
        ValueError: there is no file system for such a name; the message says what to install, if anything.
    """
    scheme, separator, _ = os.fspath(path).partition("://")
    if not separator:
        return pathlib.Path(path)
    extra = " (pip install 'dpa_jax[gcs]')" if scheme == "gs" else ""
    try:
        import fsspec

        # Orbax, TensorStore and other hosts write there as well: what was listed before may have changed.
        fsspec.config.conf.setdefault(fsspec.get_filesystem_class(scheme).protocol[0], {})["use_listings_cache"] = False
        os.environ.setdefault("EPATH_USE_TF", "false")  # so does TensorFlow's file system, which has a cache of its own
        made: Any = epath.Path(path)
    except (ImportError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be a run's folder: {error}{extra}") from error
    return made


def in_bucket(path: pathlib.Path) -> bool:
    """Whether a path that `folder_of` has made is not on a local file system."""
    return not isinstance(path, pathlib.Path)


def is_there(path: pathlib.Path) -> bool:
    """Whether something has this name, be it a link to nothing."""
    return path.exists() if in_bucket(path) else os.path.lexists(path)


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, in order."""
    if not in_bucket(folder):
        return [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return sorted(file for path in folder.iterdir() for file in (files_in(path) if path.is_dir() else [path]))


def check_kinds(folder: pathlib.Path, files: Iterable[str] = FILES, folders: Iterable[str] = FOLDERS) -> None:
    """Raises OSError where one of these names in a run's folder, or the folder, is there and is something else.

    In a bucket nothing can be: there a name may be both.
    """
    if in_bucket(folder):
        return
    for path in (folder, *folder.parents, *(folder / name for name in folders)):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(
                f"{path} must be a folder and is {_kind(path)}; move it, or choose another workdir"
            )
    for path in (folder / name for name in files):
        if os.path.lexists(path) and not path.is_file():
            raise OSError(f"{path} must be a file and is {_kind(path)}; move it, or choose another workdir")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps every other program that would write to it out until the block ends.

    It is the operating system's lock (`flock`) on the file ``.lock``, held by process 0: it ends with the process,
    however that ends. On a network folder it keeps out other hosts where the file system shares its locks (NFS, SMB,
    CephFS, Lustre with ``-o flock``); where there are no locks at all, that is warned of. A bucket has none.

    Raises:
        InUseError: the folder is locked, in all processes of the run; the message names the process that holds it.
        OSError: the folder cannot be made or written to.
    """
    with contextlib.ExitStack() as stack:
        error: OSError | None = None
        if jax.process_index() == 0 and not in_bucket(folder):
            try:
                stack.enter_context(_lock(folder))
            except OSError as caught:
                error = caught
        if jax.process_count() > 1:
            refused = bool(multihost_utils.broadcast_one_to_all(np.int32(error is not None)))
            if refused and error is None:
                raise InUseError(f"process 0 could not lock {folder}; it says why")
        if error is not None:
            raise error
        yield


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    path, made = folder / _LOCK, not folder.exists()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # who had the folder until now has just removed it
            continue
        except OSError as error:
            raise OSError(f"{folder} cannot be written to: {error.strerror}; choose another workdir") from None
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUseError(
                    f"{folder} is in use: {_holder(path)}. Wait until it ends, stop it, or choose another workdir."
                ) from None
            except OSError as error:  # a file system without locks
                warnings.warn(
                    f"{folder} cannot be locked ({error.strerror}); see that no other program writes to it",
                    RuntimeWarning,
                    stacklevel=5,
                )
            # Who had it until now may have removed the file, after it was opened here.
            if not _same(file, path):
                continue
            stack.callback(_remove, path, made)
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            with writing(path):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(who).encode(), 0)
            yield
            return


def _holder(path: pathlib.Path) -> str:
    for _ in range(20):  # it may just have begun, and have written nothing yet
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            who: Any = json.loads(path.read_text())
            return f"process {who['pid']} on {who['host']} writes to it since {who['since']}"
        time.sleep(0.05)
    return "another process writes to it"


def _same(file: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: pathlib.Path, made: bool) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
        if made:
            path.parent.rmdir()  # fails where something has been written


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Where the block can't write a file, as on a full disk, the OSError names it and says what to do."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not in_bucket(path):  # whose clients have errors of their own
            raise
        raise OSError(
            f"{path} could not be written: {getattr(error, 'strerror', None) or error}. What was saved before is kept; "
            "make room, or see what is wrong there, and start again."
        ) from error


def set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames what is damaged to ``damaged-NAME`` beside it, with a number where that is taken: its new path."""
    aside, copy = path.with_name(f"damaged-{path.name}"), 1
    while is_there(aside):
        copy += 1
        aside = path.with_name(f"damaged-{path.name}-{copy}")
    return path.rename(aside)


def _kind(path: pathlib.Path) -> str:
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"
