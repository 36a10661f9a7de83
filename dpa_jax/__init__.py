"""Activations that remember: DPA and its family for JAX and Flax."""

from dpa_jax import models
from dpa_jax.activations import COLLECTIONS, DPA, MUTABLE, activation, penalties, summarize

__all__ = ["COLLECTIONS", "DPA", "MUTABLE", "activation", "models", "penalties", "summarize"]
__version__ = "0.1.0"
