"""docs/passes.md: every file and command in it works as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_passes_guide(run_guide: Callable[..., Any]) -> None:
    run_guide("passes.md", blocks=8, outputs=6)
