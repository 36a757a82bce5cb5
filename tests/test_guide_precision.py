"""docs/precision.md: every file and command in it works as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_precision_guide(run_guide: Callable[..., Any]) -> None:
    run_guide("precision.md", blocks=4, outputs=3)
