"""Mechanisms compared over seeds: every run a row's figure rests on, and the table and pictures of them all."""

from dpa_jax.extras import require_train

require_train(__name__)

from dpa_jax.compare.entries import Entry, parse_entries
from dpa_jax.compare.report import write_report
from dpa_jax.compare.run import compare

__all__ = ["Entry", "compare", "parse_entries", "write_report"]
