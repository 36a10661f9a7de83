"""A campaign: tables of many runs, trained in slices of time, each of which goes on from the last one's small bundle.

Names are imported when they are used: the loader's worker processes import this package, and should not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpa_jax.extras import require_train

if TYPE_CHECKING:
    from dpa_jax.campaign.plan import Plan, read_plan
    from dpa_jax.campaign.run import continue_campaign

require_train(__name__)

__all__ = ["Plan", "continue_campaign", "read_plan"]

_MODULES = {"Plan": "plan", "continue_campaign": "run", "read_plan": "plan"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"dpa_jax.campaign.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
