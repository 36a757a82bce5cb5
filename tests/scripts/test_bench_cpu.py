"""scripts/bench_cpu.py: a short run, and its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_cpu.py"


def test_a_short_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    short = ["--calls", "2", "--turns", "1", "--layers", "1"]
    command = [sys.executable, str(SCRIPT), *short, "--output", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][2:]
    assert [row[:3] for row in rows] == [
        [name, plugins, behind]
        for name, plugins in (("no plugins", "0"), ("norms as plugins", "2"), ("linear layers as plugins", "4"))
        for behind in ("no", "yes")
    ]
    assert all(re.fullmatch(r"\d+\.\d\d", figure) for row in rows for figure in row[3:])
    assert all(float(figure) > 0 for row in rows for figure in row[3:])
