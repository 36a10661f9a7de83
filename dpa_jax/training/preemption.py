"""SIGTERM, by which schedulers and clouds tell a program that it is about to be stopped, and SIGINT, Ctrl-C."""

import signal
import threading
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Tells, between two steps, whether the run was told to stop.

    In a run of one process it catches SIGTERM and SIGINT while the `with` block lasts; a second SIGINT is a
    KeyboardInterrupt, at once. In a run of several, JAX's own service catches SIGTERM in whichever process gets it, and
    lets all of them stop after the same step.

    Attributes:
        signal: the first that came; SIGTERM where that is not known.
    """

    def __init__(self) -> None:
        """Installs nothing yet."""
        self.signal = signal.SIGTERM
        self._told = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Starts to listen; only the main thread may, elsewhere nothing is installed."""
        # With several processes the handler belongs to JAX's service, and taking it away would silence the notice.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # which nohup and `command &` ask for
                    previous = signal.signal(number, self._note)
                    # None stands for a handler that was not installed from Python, which Python can't put back.
                    self._previous[number] = signal.SIG_DFL if previous is None else previous
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back to who had them before."""
        while self._previous:
            signal.signal(*self._previous.popitem())

    def requested(self, step: int) -> bool:
        """True when the run should save and stop after this step; all processes must ask at every step."""
        if jax.process_count() == 1:
            return self._told
        return multihost_utils.reached_preemption_sync_point(step)

    def _note(self, number: int, _: object) -> None:
        if self._told and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._told:
            self._told, self.signal = True, signal.Signals(number)
