"""The progress of a run: a bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

import jax
from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"


class Progress:
    """Shows loss, top-1, images/s and the time left of one epoch; only process 0 shows anything.

    On a terminal it is a bar; elsewhere a line each `every` seconds and one at the end of the epoch, so
    that a log file stays readable.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        *,
        first_step: int,
        last_step: int,
        batch_size: int,
        every: float = 30.0,
        name: str = "",
        stream: TextIO | None = None,
    ) -> None:
        """Begins an epoch.

        Args:
            epoch: the number of the epoch as it is shown, from 1.
            epochs: how many there are.
            first_step: steps done when the epoch (or what is left of it after a resume) begins.
            last_step: steps done when it ends.
            batch_size: images a step, over all devices.
            every: seconds between two lines where there is no terminal.
            name: of the run, which every line begins with; empty: nothing.
            stream: where to write; None for stderr.
        """
        self._stream = sys.stderr if stream is None else stream
        self._name, self._label = f"{name}: " if name else "", f"epoch {epoch}/{epochs}"
        self._first, self._step, self._last = first_step, first_step, last_step
        self._batch_size, self._every = batch_size, every
        self._begin = self._shown = time.monotonic()
        self._compiled: tuple[int, float] | None = None  # step and time of the first update
        self.images_per_second = 0.0
        self._silent = jax.process_index() != 0
        self._bar: tqdm | None = None
        if not self._silent and self._stream.isatty():
            self._bar = tqdm(
                total=last_step - first_step,
                desc=self._name + self._label,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
                bar_format=_BAR,
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after `step`.

        Args:
            step: steps done since the beginning of the run.
            metrics: `loss` and `top1` (a fraction) where known; other names are not shown.
        """
        done, self._step = step - self._step, step
        now = time.monotonic()
        since, begin = self._compiled or (self._first, self._begin)
        rate = (step - since) / max(now - begin, 1e-9)  # steps a second
        self.images_per_second = rate * self._batch_size
        # The first step of a run waits for the compiler: speed is measured from its end on.
        self._compiled = self._compiled or (step, now)
        if self._silent:
            return
        figures = _figures(metrics, self.images_per_second)
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(done)
        elif step >= self._last or now - self._shown >= self._every:
            self._shown = now
            if rate > 0 and step < self._last:
                figures += f", {tqdm.format_interval((self._last - step) / rate)} left"
            self.write(f"{self._label}, step {step}/{self._last}: {figures}")

    def write(self, line: str) -> None:
        """Writes a line of its own, above the bar where there is one."""
        line = self._name + line
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif not self._silent:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the epoch and takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _figures(metrics: Mapping[str, float], images_per_second: float) -> str:
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    parts += [f"top-1 {metrics['top1']:.2%}"] if "top1" in metrics else []
    return ", ".join([*parts, f"{images_per_second:,.0f} images/s"])
