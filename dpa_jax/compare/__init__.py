"""Mechanisms compared over seeds: every run a row's figure rests on, and the table and pictures of them all.

Names are imported when they are used: the loader's worker processes import this package, and should not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpa_jax.extras import require_train

if TYPE_CHECKING:
    from dpa_jax.compare.entries import Entry, parse_entries
    from dpa_jax.compare.report import write_report
    from dpa_jax.compare.run import compare

require_train(__name__)

__all__ = ["Entry", "compare", "parse_entries", "write_report"]

_MODULES = {"Entry": "entries", "compare": "run", "parse_entries": "entries", "write_report": "report"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"dpa_jax.compare.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
