"""scripts/bench_threads.py: its table has all ways, of stand-ins and of a model's calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_threads.py"
WAYS = ("each on its own", "a lock", "woken at the end", "as it is")


@pytest.mark.parametrize("of_model", [False, True])
def test_all_ways_are_measured(of_model: bool, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--threads", "3", "--calls", "60", "--rounds", "2"]
    command += ["--model", "twelve_plugins", "--work", str(tmp_path)] if of_model else []
    environment = {**os.environ, "TRTBRIDGE_GPU_TESTS_ON_CPU": "1"} if of_model else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    kinds = ("one module", "a module each") if of_model else ("like an engine", "like twelve plugins")
    assert [row[:2] for row in rows] == [[way, f"3 threads, {kind}"] for way in WAYS for kind in kinds]
    for _, _, alone, together, beside, longest in rows:
        assert float(alone) > 0 < float(together)
        assert float(longest) > 0
        middle, low, high = map(float, re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", beside).groups())  # type: ignore[union-attr]
        assert low <= middle + 0.01 <= high + 0.02


def test_a_model_needs_a_folder() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "twelve_plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model needs --work DIR" in done.stderr
