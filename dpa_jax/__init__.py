"""Activations that remember: DPA and its family for JAX and Flax.

Nothing is imported, not even JAX, until a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpa_jax import activations, data, models, nnx
    from dpa_jax.activations import (
        AIEC,
        ARR,
        COLLECTIONS,
        DPA,
        MUTABLE,
        RAA,
        Mechanism,
        Variable,
        activation,
        apply_updates,
        current_labels,
        diagnose,
        penalties,
        register,
        reset_counters,
        summarize,
        supervise,
        swap,
    )

__all__ = ["AIEC", "ARR", "COLLECTIONS", "DPA", "MUTABLE", "RAA", "Mechanism", "Variable", "activation"]
__all__ += ["apply_updates", "current_labels", "diagnose", "penalties", "register", "reset_counters", "summarize"]
__all__ += ["supervise", "swap"]
__all__ += ["activations", "data", "models", "nnx"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("activations", "data", "models", "nnx"):
        return import_module(f"dpa_jax.{name}")
    if name in __all__:  # asked for anew each time: MUTABLE and COLLECTIONS grow with the registered mechanisms
        return getattr(import_module("dpa_jax.activations"), name)
    raise AttributeError(f"module 'dpa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
