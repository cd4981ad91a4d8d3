"""What runs on the server: it plans rounds and only ever hears sums.

`coordinator.connect(...)` runs an author's computations on its fleet; nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.connection import connect as connect
    from coordinator.terms import CohortTerms as CohortTerms
    from coordinator.terms import Timing as Timing

_WHERE = {"connect": "connection", "CohortTerms": "terms", "Timing": "terms"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'coordinator' has no attribute {name!r}")
    return getattr(importlib.import_module(f"coordinator.{_WHERE[name]}"), name)
