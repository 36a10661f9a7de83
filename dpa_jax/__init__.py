"""Activations that remember: DPA and its family for JAX and Flax."""

from typing import Any

from dpa_jax import activations, models
from dpa_jax.activations import (
    AIEC,
    ARR,
    DPA,
    RAA,
    Mechanism,
    Variable,
    activation,
    penalties,
    register,
    reset_counters,
    summarize,
    supervise,
)

__all__ = [
    "AIEC",
    "ARR",
    "COLLECTIONS",
    "DPA",
    "MUTABLE",
    "RAA",
    "Mechanism",
    "Variable",
    "activation",
    "models",
    "penalties",
    "register",
    "reset_counters",
    "summarize",
    "supervise",
]
__version__ = "0.1.0"

MUTABLE: tuple[str, ...]
COLLECTIONS: tuple[str, ...]


def __getattr__(name: str) -> Any:
    if name in ("MUTABLE", "COLLECTIONS"):  # which grow with the registered mechanisms
        return getattr(activations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
