"""Data sets: sources, feeds that bring batches to the devices, the augmentation of images, and graphs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpa_jax.data.graphs import graph as graph


def __getattr__(name: str) -> Any:
    if name != "graph":
        raise AttributeError(f"module 'dpa_jax.data' has no attribute {name!r}")
    from dpa_jax.data.graphs import graph  # not above: it imports JAX, which worker processes should not

    return graph
