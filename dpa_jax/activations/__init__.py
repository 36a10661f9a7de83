"""Activations that remember, and the plain ones they are compared with."""

from dpa_jax.activations.aiec import AIEC, reset_counters
from dpa_jax.activations.arr import ARR
from dpa_jax.activations.baselines import GDN, Elementwise
from dpa_jax.activations.dpa import DPA
from dpa_jax.activations.penalties import COLLECTIONS, MUTABLE, Summary, penalties, summarize
from dpa_jax.activations.raa import RAA
from dpa_jax.activations.registry import activation, register
from dpa_jax.activations.supervision import supervise
from dpa_jax.activations.threshold import threshold

__all__ = [
    "AIEC",
    "ARR",
    "COLLECTIONS",
    "DPA",
    "GDN",
    "MUTABLE",
    "RAA",
    "Elementwise",
    "Summary",
    "activation",
    "penalties",
    "register",
    "reset_counters",
    "summarize",
    "supervise",
    "threshold",
]
