"""scripts/bench_turns.py: its table has all ways, of calls that stand for others and of a model's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_turns.py"
WAYS = ("no turns", "a turn each call", "as it is")


@pytest.mark.parametrize("of_model", [False, True])
def test_all_ways_are_measured(of_model: bool, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--threads", "3", "--calls", "60", "--rounds", "1"]
    command += ["--model", "twelve_plugins", "--work", str(tmp_path)] if of_model else []
    environment = {**os.environ, "TRTBRIDGE_GPU_TESTS_ON_CPU": "1"} if of_model else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    crowds = ["3 threads, one module", "3 threads, a module each"] if of_model else ["3 threads"]
    assert [row[:2] for row in rows] == [[way, kind] for way in WAYS for kind in ("one thread", *crowds)]
    assert all(float(row[2]) > 0 for row in rows)
    assert all(float(row[3]) == 1.0 for row in rows if row[1] == "one thread")


def test_a_model_needs_a_folder() -> None:
    command = [sys.executable, str(SCRIPT), "--model", "twelve_plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--model needs --work DIR" in done.stderr
