"""scripts/bench_passes.py: what counts as a pass that hurts, the tables, and a dry run that can be resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_passes.py"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return _load(SCRIPT)


def row(model: str, variant: str, ms: float | None = None, error: str = "", **more: Any) -> dict[str, Any]:
    made = {"model": model, "variant": variant, "dtype": "float16", "error": error, **more}
    if ms is not None:
        made |= {"ms": ms, "cosine": 0.9999, "engine_bytes": 1000, "plugins": 0, "segments": 1, "batch": 8,
                 "rewrites": {"A": 3, "B": 1, "C": 0}, "stage_s": {"build": 2.0, "passes": 0.5}}  # fmt: skip
    return made


def test_only_what_exceeds_the_noise_hurts(bench: ModuleType) -> None:
    rows = [
        row("quiet", "default", 1.0), row("quiet", "default again", 1.01),
        row("quiet", "A", 1.2), row("quiet", "B", 0.9),
        row("loud", "default", 1.0), row("loud", "default again", 0.85), row("loud", "B", 0.9),
    ]  # fmt: skip
    assert bench.ratios(rows)["quiet", "float16"] == {"default again": 1.01, "A": 1.2, "B": 0.9}
    assert bench.verdicts(rows) == ["B hurts quiet (float16): without it 0.900 of the time"]
    assert bench.verdicts([row("m", "default", error="BuildError: no")]) == ["m: BuildError: no"]
    assert bench.verdicts([row("m", "default", 1.0), row("m", "A", error="BuildError: no")]) == []


def test_tables(bench: ModuleType, tmp_path: Path) -> None:
    rows = [row("m", "default", 1.0), row("m", "default again", 1.01), row("m", "A", 1.25),
            row("m", "B", 1.0, plugins=0) | {"plugins": 2}]  # fmt: skip
    newer = {
        "rows": [row("m", "A", 1.5)],
        "environment": {"device": "a GPU", "date": "today", "versions": {"torch": "2"}},
    }
    text = bench.render([{"rows": rows}, newer], tmp_path / "out.md")
    assert "| A | m | float16 | 3 | 1.500 | ±0.010 | 1.000 | 0.999900 | 0.999900 |  |" in text
    assert "| B | m | float16 | 1 | 1.000 | ±0.010 | 1.000 | 0.999900 | 0.999900 | 2 plugins instead of 0 |" in text
    assert "| C | none | | 0 |" in text
    assert "| m | float16 | 8 | 1.0000 | 0.999900 | 0.0 | 1 | 0 | 2.0 | 0.50 |" in text
    written = (tmp_path / "out.md").read_text()
    assert "on a GPU, today; torch 2." in written
    assert written.endswith(text)


def test_the_page_of_costs() -> None:
    cost = _load(SCRIPT.with_name("bench_passes_cost.py"))
    cheap = {"model": "small", "parameters": 1000, "stage_s": {"trace": 1.0, "export": 2, "passes": 0.25, "build": 7},
             "share_of_time": 0.025, "passes_bytes": 2**20, "convert_bytes": 100 * 2**20,
             "share_of_memory": 0.01}  # fmt: skip
    dear = {**cheap, "model": "large", "share_of_memory": 0.2}
    record = {"host": "a machine", "date": "today", "versions": "torch 2", "rows": [cheap, dear]}
    text = cost.render(record)
    assert "| small | 1,000 | 1.0 | 2.0 | 0.25 | 7.0 | 2.5% | 1 | 100 | 1.0% |" in text
    assert text.endswith("\nAbove 10%: large, 20.0% of memory.\n")
    assert cost.too_much([cheap]) == []


def test_a_dry_run_and_another(tmp_path: Path) -> None:
    environment = {**os.environ, "TRTBRIDGE_GPU_TESTS_ON_CPU": "1", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # fmt: skip
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "r.json"), "--work", str(tmp_path / "work"),
               "--models", "unet", "--dtype", "float32", "--workers", "2", "--repeats", "2"]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
        # Times of two runs on a busy CPU may differ by more than noise, which is what status 1 says.
        assert done.returncode in (0, 1), done.stderr
        rows = {one["variant"]: one for one in json.loads((tmp_path / "r.json").read_text())["rows"]}
        assert {"default", "default again", "FoldShapes"} <= set(rows)
        for one in rows.values():
            assert one["error"] == ""
            assert one["cosine"] > 0.99999
            assert one["ms"] > 0
            assert one["plugins"] == 0
    assert "unet: default" not in done.stdout, "what was measured is not measured again"
    assert "| FoldShapes | unet | float32 |" in done.stdout
