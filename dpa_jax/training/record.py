"""The record of a run: metrics.jsonl and TensorBoard files."""

import functools
import json
import math
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax


class Recorder:
    """Writes what a run measures into its folder; only process 0 writes.

    `metrics.jsonl` has one JSON object a line, `tensorboard/` the same figures. `history` holds all records of the run
    so far, oldest first, those of earlier starts included.
    """

    def __init__(self, workdir: str | pathlib.Path, step: int) -> None:
        """Opens the record of a run that begins, or goes on, after `step` steps, and makes the folder if need be.

        Lines of later steps, which a killed run wrote after its last checkpoint, are removed, and so is
        a last line that was cut off. TensorBoard is told to hide the same steps.
        """
        self.workdir = pathlib.Path(workdir)
        self.history: list[dict[str, Any]] = []
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._path = self.workdir / "metrics.jsonl"
        if self._path.exists():
            self.history = [record for record in read_history(self.workdir) if record["step"] <= step]
            replace_file(self._path, "".join(map(_line, self.history)))
        self._step = step

    @functools.cached_property
    def _tensorboard(self) -> Any:
        # Made with the first record: a start with nothing left to do leaves no empty file.
        from tensorboardX import SummaryWriter

        # The suffix keeps apart two runs that begin in the same second, whose files would else have one name.
        suffix = f".{self._step}.{os.getpid()}"
        return SummaryWriter(str(self.workdir / "tensorboard"), purge_step=self._step + 1, filename_suffix=suffix)

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
        with self._path.open("a") as file:
            file.write(_line(values))
            file.flush()
            os.fsync(file.fileno())
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._tensorboard.add_scalar(name, value, values["step"])
        self._tensorboard.flush()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if "_tensorboard" in vars(self):
            self._tensorboard.close()


def read_history(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The records in a run's folder, oldest first, without a last line that was cut off; [] if there are none."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    records = []
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
            if line.endswith("\n"):
                records.append(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # a kill can only cut the last one
                warnings.warn(f"{path}: line {number} is no record and is dropped", RuntimeWarning, stacklevel=3)
    return records


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves either the old one or the new one, whole."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
