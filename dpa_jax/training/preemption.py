"""SIGTERM, by which schedulers and clouds tell a program that it is about to be stopped."""

import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Tells, between two steps, whether the run was told to stop.

    In a run of one process it catches SIGTERM while the `with` block lasts. In a run of several, JAX's own service
    catches it in whichever process gets it, and lets all of them stop after the same step.
    """

    def __init__(self) -> None:
        """Installs nothing yet."""
        self._told = threading.Event()
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Self:
        """Starts to listen; only the main thread may, elsewhere nothing is installed."""
        # With several processes the handler belongs to JAX's service, and taking it away would silence the
        # notice.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signal back to who had it before."""
        if self._installed:
            # None stands for a handler that was not installed from Python, which Python can't put back.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)
            self._installed = False

    def requested(self, step: int) -> bool:
        """True when the run should save and stop after this step.

        Args:
            step: the step just done. All processes must ask at every step, with the same numbers.
        """
        if jax.process_count() == 1:
            return self._told.is_set()
        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._told.set()
