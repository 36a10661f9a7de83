"""Programs of dpa_jax that are slow, or held short, so that something can happen to them: SLOW:WHERE or LIMIT:BYTES."""

import importlib
import resource
import time


def _slow(owner, name, seconds, after=0):
    inner, calls = getattr(owner, name), iter(range(10**9))

    def outer(*arguments, **named):
        if next(calls) >= after:
            time.sleep(seconds)
        return inner(*arguments, **named)

    setattr(owner, name, outer)


def main(argv):
    """What its first argument says, then the command of dpa_jax that the second names, with the rest of them."""
    (what, _, where), module, *arguments = argv[1].partition(":"), *argv[2:]
    from dpa_jax.data.feeds.memory import MemoryFeed
    from dpa_jax.training.run import Run

    if what == "slow":
        owner, name, seconds, after = {
            "steps": (MemoryFeed, "train", 0.3, 1),
            "a step": (MemoryFeed, "train", 20, 2),
            "loading": (MemoryFeed, "load", 20, 0),
            "the beginning": (Run, "init", 2, 0),
            "evaluation": (Run, "evaluate", 2, 0),
        }[where]
        _slow(owner, name, seconds, after)
    elif what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(where), resource.RLIM_INFINITY))
    importlib.import_module(module).main([module, *arguments])
