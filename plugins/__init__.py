"""Plugins: torch ops as nodes of a graph, and what their authors need.

The names load when first used, because the processes that build engines import this package and start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .authoring import plugin
    from .check_op import check
    from .check_report import CheckReport, Finding
    from .check_samples import parse_sample
    from .listing import OpInfo, list_ops
    from .registry import find_op
    from .shipped import SHIPPED, load_shipped

# No module here may be named like one of these: importing it would put the module in the name's place.
_LAZY = {
    "CheckReport": ".check_report",
    "Finding": ".check_report",
    "OpInfo": ".listing",
    "SHIPPED": ".shipped",
    "check": ".check_op",
    "find_op": ".registry",
    "list_ops": ".listing",
    "load_shipped": ".shipped",
    "parse_sample": ".check_samples",
    "plugin": ".authoring",
}

__all__ = [
    "SHIPPED",
    "CheckReport",
    "Finding",
    "OpInfo",
    "check",
    "find_op",
    "list_ops",
    "load_shipped",
    "parse_sample",
    "plugin",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
