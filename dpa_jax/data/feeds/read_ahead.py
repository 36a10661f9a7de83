"""Images that are read ahead, in threads of this process or in worker processes.

Worker processes import this. Nothing here imports JAX, so that they need not.
"""

from __future__ import annotations

import collections
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np

from dpa_jax.data.feeds.examples import Examples, Rows

_AHEAD = 2  # batches
_CHUNK = 16  # images that a worker reads at a time, at most


def read_ahead(examples: Examples, batches: Iterable[np.ndarray], workers: int) -> Generator[Rows, None, None]:
    """Reads batches one after the other, two ahead of the one that is taken.

    Args:
      examples: says what is at a position; it is sent to each worker process once.
      batches: the positions of each batch, int [R].
      workers: how many processes read, each with two threads; 0: two threads a core in this process.

    Yields:
      The rows of each batch. Close the iterator to end the threads or processes.

    Raises:
      OSError: an image cannot be read.
      CorruptImageError: no image can be decoded.
      BrokenProcessPool: a worker process was killed.
    """
    size = workers or 2 * (os.cpu_count() or 1)
    pool: Executor = ProcessPoolExecutor(size, _Context(), _start, (examples,)) if workers else ThreadPoolExecutor(size)

    def submit(positions: np.ndarray) -> Future[Rows]:
        if not workers:
            return pool.submit(examples.read, positions)
        # Workers are started here, with these signals blocked: a signal to all processes of a run is for the main one
        # to act on, which may still need images then.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return pool.submit(_read, positions)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    waiting: collections.deque[list[Future[Rows]]] = collections.deque()
    try:
        for positions in batches:
            parts = max(math.ceil(len(positions) / _CHUNK), min(size, len(positions)))
            waiting.append([submit(part) for part in np.array_split(positions, parts)])
            if len(waiting) > _AHEAD:
                yield _joined(waiting.popleft())
        while waiting:
            yield _joined(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


class _Process(multiprocessing.context.SpawnProcess):
    """A worker. Its SIGTERM is blocked, so that the pool, which ends the others when one has died, needs SIGKILL."""

    def terminate(self) -> None:
        self.kill()


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process


def _joined(parts: list[Future[Rows]]) -> Rows:
    return Rows(*map(np.concatenate, zip(*(part.result() for part in parts), strict=True)))


# ---------------- In a worker process ----------------

_examples: Examples
_threads = ThreadPoolExecutor(2)  # one decodes while the other waits for the disk


def _start(examples: Examples) -> None:
    global _examples
    _examples = examples
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _read(positions: np.ndarray) -> Rows:
    return _examples.read(positions, _threads.map)
