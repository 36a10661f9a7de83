"""Activations that remember, and the plain ones they are compared with."""

from typing import Any

from dpa_jax.activations import registry
from dpa_jax.activations.aiec import AIEC
from dpa_jax.activations.arr import ARR
from dpa_jax.activations.baselines import GDN, Elementwise
from dpa_jax.activations.diagnose import diagnose
from dpa_jax.activations.dpa import DPA, threshold
from dpa_jax.activations.mechanism import Mechanism, Variable
from dpa_jax.activations.memory import remember_gradient
from dpa_jax.activations.penalties import Ratio, Record, Summary, penalties, summarize
from dpa_jax.activations.raa import RAA
from dpa_jax.activations.registry import activation, apply_updates, default_coefficients, register, reset_counters
from dpa_jax.activations.supervision import current_labels, supervise
from dpa_jax.activations.swap import Site, swap

__all__ = ["AIEC", "ARR", "COLLECTIONS", "DPA", "GDN", "MUTABLE", "RAA", "Elementwise", "Mechanism", "Ratio"]
__all__ += ["Record", "Site", "Summary", "Variable", "activation", "apply_updates", "current_labels"]
__all__ += ["default_coefficients", "diagnose", "penalties", "register", "remember_gradient", "reset_counters"]
__all__ += ["summarize", "supervise", "swap", "threshold"]

MUTABLE: tuple[str, ...]
COLLECTIONS: tuple[str, ...]


def __getattr__(name: str) -> Any:
    # These follow from the registered mechanisms, of which there may be more the next time.
    if name == "MUTABLE":
        return registry.mutable_collections()
    if name == "COLLECTIONS":
        return registry.collections()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
