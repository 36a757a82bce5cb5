"""scripts/bench_attention.py: what counts as a wrong choice, and the page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_attention.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_attention"] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def rows(model: str, decomposed: float, fused: float, auto: float) -> list[dict[str, Any]]:
    times = {"decomposed": decomposed, "fused": fused, "auto": auto}
    made = [
        {"model": model, "form": form, "batch": 32, "ms": ms, "cosine": 0.9999, "error": ""}
        for form, ms in times.items()
    ]
    group = {"kind": "float16 (32, 12, 197, 64)", "count": 12, "form": "fused", "reason": "measured",
             "fused_ms": 0.05, "decomposed_ms": 0.1}  # fmt: skip
    made[2]["attention"] = {"groups": [group]}
    return made


def test_auto_must_be_as_fast_as_the_faster_form_and_gain_a_tenth_on_vit(bench: ModuleType) -> None:
    assert bench.verdicts(rows("vit_b16", 4.34, 3.79, 3.8)) == []
    assert bench.verdicts(rows("bert", 1.0, 1.2, 1.02)) == []
    assert bench.verdicts(rows("bert", 1.0, 1.2, 1.2)) == ["bert: auto takes 1.200 of the time of the faster form"]
    assert bench.verdicts(rows("vit_b16", 4.0, 3.8, 3.8)) == ["vit_b16: auto takes 0.950 of the time in parts"]
    failed = rows("bert", 1.0, 1.2, 1.0)
    failed[1] = {"model": "bert", "form": "fused", "error": "BuildError: no\nmore"}
    assert bench.verdicts(failed) == ["bert, fused: BuildError: no"]


def test_the_page(bench: ModuleType, tmp_path: Path) -> None:
    about = {"device": "a GPU", "date": "today", "versions": {"torch": "2"}}
    record = {"environment": about, "dry_run": False, "rows": rows("vit_b16", 4.34, 3.79, 3.8)}
    text, wrong = bench.render(record)
    assert wrong == []
    expected = "| vit_b16 | 32 | 4.3400 | 3.7900 | 3.8000 | 0.876 | 12, 0 | 0.999900 | 0.999900 | 0.999900 |"
    assert expected in text
    assert "| vit_b16 | 12 | float16 (32, 12, 197, 64) | 0.0500 | 0.1000 | fused | measured |" in text
    assert "on a GPU, today; torch 2." in text
    (tmp_path / "record.json").write_text(json.dumps(record))
    command = [sys.executable, str(SCRIPT), "--render", str(tmp_path / "record.json"), "--out", str(tmp_path / "page")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "page").read_text() == text


def test_models_and_examples_are_the_same_each_time(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "DRY_RUN", True)
    for case in bench.CASES:
        if case.precision is None:
            weights = [next(case.module().parameters()) for _ in range(2)]
            assert torch.equal(*weights)
        assert case.example(0)[0].shape == case.example(1)[0].shape
        assert all(map(torch.equal, case.example(0), case.example(0)))
