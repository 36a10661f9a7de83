"""The record of a run: metrics.jsonl and TensorBoard files."""

import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import IO, Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpa_jax.training.folder import folder_of, in_bucket, writing


class Recorder:
    """Writes what a run measures into its folder; only process 0 writes.

    `metrics.jsonl` has one JSON object a line, `tensorboard/` the same figures in the groups `train`, `eval` and
    `run`. `history` holds all records of the run so far, oldest first, those of earlier starts included.
    """

    def __init__(self, workdir: str | pathlib.Path, step: int) -> None:
        """Opens the record of a run that begins, or goes on, after `step` steps; a whole file stays as it is.

        Lines of later steps, which a killed run wrote after its last checkpoint, are taken out, and so is what is no
        record. It is kept in `metrics.discarded.jsonl`, and `note` says so. TensorBoard is told to hide the same steps.
        """
        self.workdir = folder_of(workdir)
        self.history: list[dict[str, Any]] = []
        self.note = ""
        self._step = step
        self._path = self.workdir / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if self._writes:
            self._take_over()
        elif self._path.exists():
            self.history += [line.record for line in _parse(self._path, self._path.read_bytes(), step) if line.record]

    def _take_over(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        before = self._path.read_bytes() if self._path.exists() else b""
        kept, others, later = [], [], 0
        for line in _parse(self._path, before, self._step):
            if line.record is None:
                others.append(line.text)
                later += line.later
            else:
                kept.append(line.text)
                self.history.append(line.record)
        if others:
            discarded = self._path.with_name("metrics.discarded.jsonl")
            append(discarded, b"".join(text + b"\n" for text in others))
            if later:
                self.note = (
                    f"note: {later} record{'s' if later > 1 else ''} after step {self._step}, where no checkpoint is, "
                    f"moved from {self._path} to {discarded.name}; these steps are trained again"
                )
        if (after := b"".join(text + b"\n" for text in kept)) != before:
            replace_file(self._path, after)

    @functools.cached_property
    def _tensorboard(self) -> Any:
        # Made with the first record: a start with nothing left to do leaves no empty file. Not a SummaryWriter, whose
        # thread ends where the disk is full, and whose queue then waits for it for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = self.workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The suffix keeps apart two runs that begin in the same second, whose files would else have one name.
        writer = EventsWriter(str(folder / "events"), f".{self._step}.{os.getpid()}")
        writer.write_event(Event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START)))
        return writer

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, and returns when it is on the disk.

        The figures are Python, NumPy or JAX scalars; one that is not finite becomes null. ValueError without `step`.
        """
        if "step" not in record:
            raise ValueError(f"a record needs the step it belongs to; got {sorted(record)}")
        values = {name: _plain(value) for name, value in record.items()}
        self.history.append(values)
        if not self._writes:
            return
        append(self._path, (json.dumps(values, allow_nan=False) + "\n").encode())
        with writing(self.workdir / "tensorboard"):
            self._write_scalars(values)

    def _write_scalars(self, values: Mapping[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                event = Event(wall_time=time.time(), step=values["step"], summary=scalar(_tag(name), value))
                self._tensorboard.write_event(event)
        self._tensorboard.flush()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if "_tensorboard" in vars(self):
            with contextlib.suppress(OSError):  # `write` has told of it
                self._tensorboard.close()


def _tag(name: str) -> str:
    """The name of a figure in TensorBoard, which groups by what comes before the slash."""
    if name in ("epoch", "images_per_second", "seconds"):
        return f"run/{name}"
    split, _, figure = name.partition("_")
    return f"{split}/{figure}" if split in ("eval", "valid") else f"train/{name.removeprefix('train_')}"


_STOPS = "valid_loss_cross_entropy"


def finished(history: Sequence[Mapping[str, Any]], config: ConfigDict) -> bool:
    """Whether a run with these records has come to its end: its last epoch, or where ``config.early_stopping`` says.

    That is Kipf's rule: after more epochs than the window and one, the cross-entropy on the validation split is above
    the mean of the window before it.
    """
    epochs, window = [record for record in history if "epoch" in record], config.early_stopping
    if not epochs or epochs[-1]["epoch"] >= config.epochs:
        return bool(epochs)
    losses = [record[_STOPS] for record in epochs if record.get(_STOPS) is not None]
    return 0 < window < len(losses) - 1 and losses[-1] > statistics.fmean(losses[-1 - window : -1])


def read_history(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The records in a run's folder, oldest first; [] if there are none. What is no record is warned of."""
    path = folder_of(workdir) / "metrics.jsonl"
    lines = _parse(path, path.read_bytes()) if path.exists() else []
    return [line.record for line in lines if line.record is not None]


class _Line(NamedTuple):
    text: bytes  # without its end
    record: dict[str, Any] | None  # None where it does not count
    later: bool = False  # than the run has come


def _parse(path: pathlib.Path, text: bytes, until: int | None = None) -> list[_Line]:
    """The lines of a record that are not blank; warns of those that are no record, or whose step does not rise."""
    lines, last, numbered = [], -1, [*enumerate(text.split(b"\n"), start=1)]
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            record = _record(line)
            if until is not None and record["step"] > until:
                lines.append(_Line(line, None, later=True))
                continue
            if record["step"] <= last:
                raise ValueError(f"its step {record['step']} does not rise; the one before it is {last}")
            last = record["step"]
            lines.append(_Line(line, record))
        except (ValueError, OverflowError, RecursionError) as error:
            lines.append(_Line(line, None))
            if number < len(numbered) or not line.startswith(b"{"):  # a kill can cut the last one only
                warnings.warn(f"{path}: line {number} is no record ({error}) and is left out", RuntimeWarning, 4)
    return lines


def _record(line: bytes) -> dict[str, Any]:
    """The record in a line; ValueError and the like say what it is instead."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(record, dict):
        raise ValueError("not an object")
    for name in ("step", "epoch"):
        value = record.get(name, 0 if name == "epoch" else None)
        if type(value) is not int or value < 0:
            raise ValueError(f"its {name} is {value!r:.40}, no whole number")
    for name, value in record.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"its {name} is {value!r:.40}, no finite number")
    return record


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def append(path: pathlib.Path, text: bytes) -> None:
    """Adds to the end of a file, and returns when it is on the disk; one in a bucket is written anew as a whole."""
    if in_bucket(path):
        replace_file(path, (path.read_bytes() if path.exists() else b"") + text)
        return
    with writing(path), path.open("ab") as file:
        file.write(text)
        _sync(file)


def replace_file(path: pathlib.Path, text: bytes) -> None:
    """Writes a file so that a kill leaves either the old one or the new one, whole."""
    new = path.with_name(path.name + ".new")
    with writing(path):
        if in_bucket(path):
            path.write_bytes(text)
            return
        with new.open("wb") as file:
            file.write(text)
            _sync(file)
        new.replace(path)
