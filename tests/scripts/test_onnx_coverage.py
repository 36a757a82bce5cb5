"""scripts/onnx_coverage.py: the sweep over ONNX's node tests, on a few of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sweep(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / "onnx_coverage.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.rtx
def test_sweep_resumes_and_writes_the_page(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    record, page = tmp_path / "r.json", tmp_path / "page.md"
    cases = "^test_(abs|det_2d|nonmaxsuppression_limit_output_size|training_dropout)$"
    said = _sweep("--json", str(record), "--filter", cases, "--out", str(page), "--jobs", "1")
    found = json.loads(record.read_text())["cases"]
    assert set(found) == {
        "test_abs", "test_det_2d", "test_nonmaxsuppression_limit_output_size", "test_training_dropout",
    }  # fmt: skip
    outcomes = {name: case["backends"]["tensorrt_rtx"]["outcome"] for name, case in found.items()}
    assert outcomes["test_abs"] == "engine"
    assert outcomes["test_det_2d"] in ("plugin", "mixed")  # from TensorRT-RTX 1.7 on the plugin is inside an engine
    assert "failed" not in {b["outcome"] for case in found.values() for b in case["backends"].values()}, said
    if outcomes["test_det_2d"] == "plugin":
        assert found["test_det_2d"]["backends"]["tensorrt_rtx"]["plugins"][0][0] == "Det"
    text = page.read_text()
    assert "| TensorRT-RTX | 4 | 4 | 100.0 % |" in text
    assert "| sequence input or output |" in text
    again = _sweep("--json", str(record), "--filter", cases, "--no-render")
    assert "test_abs onnxruntime" not in again, "what is in the record is not done again"


def test_types_that_do_not_count() -> None:
    worker = _load("onnx_coverage_worker")

    def model(inputs: str) -> onnx.ModelProto:
        return onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float[2] y) {{ y = Neg(x) }}'
        )

    assert worker.why_skipped(model("float[2] x")) == ""
    assert worker.why_skipped(model("double[2] x")) == "double input or output"
    assert worker.why_skipped(model("seq(float[2]) x")) == "sequence input or output"


@pytest.mark.parametrize(
    ("mine", "expected", "problem"),
    [
        (np.float32([1.0, 1000.0]), np.float32([1.0, 1000.5]), ""),
        (np.float32([1.1, 1000.0]), np.float32([1.0, 1000.0]), "1 of 2 values differ"),
        (np.float32([0.0005, 1000.0]), np.float32([0.0, 1000.0]), ""),
        (np.float32([np.nan, np.inf]), np.float32([np.nan, np.inf]), ""),
        (np.float32([np.nan, -np.inf]), np.float32([np.nan, np.inf]), "values differ, at (1,)"),
        (np.int64([1, 2]), np.int64([1, 3]), "1 of 2"),
        (np.int32([1, 2]), np.int64([1, 2]), "is int32[2], expected int64[2]"),
        (np.float32([1]), np.float32([[1]]), "expected float32[1, 1]"),
        (np.array([True]), np.array([False]), "1 of 1"),
    ],
)
def test_comparison(mine: np.ndarray, expected: np.ndarray, problem: str) -> None:
    worker = _load("onnx_coverage_worker")

    class Case:
        name, rtol, atol = "test_x", 1e-3, 1e-7
        model: Any = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 20]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
        )

    said = worker.compare(Case, [mine], [expected])
    assert problem in said if problem else said == ""


def test_page_lists_failures_and_skips(tmp_path: Path) -> None:
    report = _load("onnx_coverage_report")
    failed = {"outcome": "failed", "stage": "numbers", "reason": "a | b"}
    right = {"outcome": "plugin", "plugins": [["Det", "refused: no such op"]], "max_data_size": 4096}
    record = {
        "environment": {"onnx": "1"},
        "cases": {
            "test_a": {"nodes": ["A"], "backends": {"onnxruntime": failed, "tensorrt_rtx": right}},
            "test_b": {"nodes": ["A"], "backends": {"onnxruntime": {"outcome": "engine", "plugins": []}}},
        },
        "skipped": {"test_c": "double input or output"},
    }
    text = report.render(record)
    assert "| ONNX Runtime | 2 | 1 | 50.0 % | 1 | 0 | 0 | 1 |" in text
    assert "| test_a | ONNX Runtime | numbers | a \\| b |" in text
    assert "| A | 1 engine, 1 failed | 1 plugin |" in text
    assert "| Det | TensorRT-RTX | 1 | refused: no such op |" in text
    assert "| double input or output | 1 |" in text
    assert "1 cases have sizes" in text
