"""The progress of a run: a bar on a terminal, plain lines in a log file."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import jax
from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Progress:
    """Shows loss, top-1, images/s and the time left of each epoch; only process 0 shows anything.

    On a terminal it is a bar; elsewhere a line each `every` seconds and one at the end of an epoch, so that a log file
    stays readable. Until the first step is done, which waits for the compiler, it says so; speed and time left come
    with the steps after it.
    """

    def __init__(
        self,
        epochs: int,
        batch_size: int,
        *,
        every: float = 30.0,
        name: str = "",
        unit: str = "images",
        stream: TextIO | None = None,
    ) -> None:
        """Of a run with ``batch_size`` examples a step, of which ``unit`` is the plural.

        Every line to the stream (None: stderr) begins with the run's name.
        """
        self._epochs, self._batch_size, self._every, self._unit = epochs, batch_size, every, unit
        self._name = f"{name}: " if name else ""
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._silent = jax.process_index() != 0 or self._stream is None  # Python's, where it is closed
        self._bar: tqdm | None = None
        self._compiled = False
        self.images_per_second = 0.0  # of the epoch, as of the last update

    def begin(self, epoch: int, first_step: int, last_step: int) -> None:
        """Begins an epoch, or what is left of it: after ``first_step`` steps of the run, up to ``last_step``."""
        self._label = f"epoch {epoch}/{self._epochs}"
        self._step, self._last = first_step, last_step
        # Speed is measured from here, or from the first update on where that waits for the compiler.
        self._since, self._measured = (first_step, time.monotonic()), self._compiled
        self._shown = self._since[1]
        waits = "" if self._compiled else "compiling the training step"
        if not self._silent and self._stream is not None and self._stream.isatty():
            self._bar = tqdm(
                total=last_step - first_step,
                desc=self._name + self._label + (waits and f", {waits}"),
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
                bar_format=_BAR,
            )
        elif waits:
            self.write(waits)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after `step` steps of the run: `loss` and `top1` (a fraction) where known, and the speed."""
        done, self._step = step - self._step, step
        now = time.monotonic()
        since, begin = self._since
        rate = (step - since) / max(now - begin, 1e-9)  # steps a second
        self.images_per_second = rate * self._batch_size
        if not self._measured:
            self._since, self._measured = (step, now), True
        compiled, self._compiled = not self._compiled, True
        if self._silent:
            return
        formats = {"loss": "loss {:.4f}", "top1": "top-1 {:.2%}"}
        parts = [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
        if compiled:
            parts.append(f"compiled in {tqdm.format_interval(now - begin)}")
        else:
            parts.append(f"{self.images_per_second:,.0f} {self._unit}/s")
            if rate > 0 and step < self._last:
                parts.append(f"{tqdm.format_interval((self._last - step) / rate)} left")
        figures = ", ".join(parts)
        if self._bar is not None:
            with self._until_nobody_reads():
                self._bar.set_description_str(self._name + self._label, refresh=False)
                self._bar.set_postfix_str(figures, refresh=False)
                self._bar.update(done)
        elif compiled or step >= self._last or now - self._shown >= self._every:
            self._shown = now
            self.write(f"{self._label}, step {step}/{self._last}: {figures}")

    def write(self, line: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        line = self._name + line
        with self._until_nobody_reads():
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            elif not self._silent:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the epoch and takes the bar away."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with self._until_nobody_reads():
                bar.close()

    @contextlib.contextmanager
    def _until_nobody_reads(self) -> Iterator[None]:
        """A stream that can't be written to, such as the pipe of a `head` that has ended, silences the rest."""
        try:
            yield
        except OSError:
            self._silent, self._bar = True, None
