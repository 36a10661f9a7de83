"""Activations that remember: DPA and its family for JAX and Flax."""

from dpa_jax import models
from dpa_jax.activations import (
    AIEC,
    ARR,
    COLLECTIONS,
    DPA,
    MUTABLE,
    RAA,
    activation,
    penalties,
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
    "activation",
    "models",
    "penalties",
    "reset_counters",
    "summarize",
    "supervise",
]
__version__ = "0.1.0"
