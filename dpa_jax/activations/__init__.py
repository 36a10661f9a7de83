"""Activations that remember, and the plain ones they are compared with."""

from dpa_jax.activations.dpa import DPA
from dpa_jax.activations.penalties import COLLECTIONS, MUTABLE, Summary, penalties, summarize
from dpa_jax.activations.registry import activation
from dpa_jax.activations.threshold import threshold

__all__ = ["COLLECTIONS", "DPA", "MUTABLE", "Summary", "activation", "penalties", "summarize", "threshold"]
