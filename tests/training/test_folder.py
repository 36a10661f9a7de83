"""The folder of a run: what may be in it, and that one program at a time writes to it."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from dpa_jax.training.folder import InUseError, check_kinds, locked, set_aside, writing


def test_the_second_is_told_who_has_the_folder_and_the_file_goes_with_the_lock(tmp_path):
    folder = tmp_path / "runs" / "one"
    with locked(folder):
        with pytest.raises(InUseError) as caught, locked(folder):
            pass
        who = f"process {os.getpid()} on {re.escape(socket.gethostname())} writes to it since [0-9-]+ [0-9:]+ "
        assert re.fullmatch(rf"{folder} is in use: {who}.* Wait until it ends, .* workdir\.", str(caught.value))
        with locked(tmp_path / "runs" / "two"):
            pass
    assert not folder.exists()  # nothing was written
    with locked(folder):
        pass


HOLDER = """
import pathlib, sys, time
from dpa_jax.training.folder import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(InUseError, match=f"process {holder.pid} on "), locked(tmp_path):
        pass
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    holder.stdout.close()
    assert (tmp_path / ".lock").exists()  # which says nothing
    with locked(tmp_path):
        pass


def test_a_file_that_was_removed_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """The one before removes its file when it ends: who has opened that file then holds nothing."""
    flock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(InUseError), locked(tmp_path):
        pass
    assert removed


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(RuntimeWarning, match=r"cannot be locked \(Function not implemented\); see that no"),
        locked(tmp_path),
    ):
        pass


def test_only_process_0_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"file/run cannot be written to: Not a directory; choose another"),
        locked(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("run", lambda path: path.write_text(""), "run must be a folder and is a file"),
        ("run/checkpoints", lambda path: path.write_text(""), "checkpoints must be a folder and is a file"),
        ("run/tensorboard", lambda path: path.symlink_to("nowhere"), "must be a folder and is a link to nothing"),
        ("run/metrics.jsonl", lambda path: path.mkdir(), r"metrics\.jsonl must be a file and is a folder"),
        ("run/config.json", os.mkfifo, r"config\.json must be a file and is a device or a pipe"),
        ("run/curves.png", lambda path: path.symlink_to("/dev/full"), r"curves\.png .* is a device or a pipe"),
    ],
)
def test_what_is_something_else(tmp_path, name, make, message):
    check_kinds(tmp_path / "run")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    with pytest.raises(OSError, match=message):
        check_kinds(tmp_path / "run")


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for count, name in enumerate(("damaged-a.json", "damaged-a.json-2", "damaged-a.json-3")):
        (tmp_path / "a.json").write_text(str(count))
        assert set_aside(tmp_path / "a.json") == tmp_path / name
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["0", "1", "2"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with (
        pytest.raises(OSError, match=r"^a/b could not be written: No space left on device\. .* start again\.$"),
        writing("a/b"),
        open("/dev/full", "w") as file,
    ):
        file.write("text")
