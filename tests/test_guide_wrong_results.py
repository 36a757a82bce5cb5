"""docs/wrong-results.md: every file and command in it works as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_wrong_results_guide(run_guide: Callable[..., Any]) -> None:
    run_guide("wrong-results.md", blocks=10, outputs=8)
