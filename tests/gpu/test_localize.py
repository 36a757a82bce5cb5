"""localize down to the engine: layer by layer beside PyTorch, and a model that overflows traced to its line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import DRY_RUN, Report

import trtbridge as tb

CASES = {case.name: case for case in zoo.CASES}


def search(
    case: str, dtype: str, backend: str, device: torch.device, **options: Any
) -> tuple[tb.LocalizeReport, float]:
    """localize() on a model of the zoo with a batch of 2, and the seconds that it took."""
    model = CASES[case]
    if model.missing:
        pytest.skip(f"not installed: {', '.join(model.missing)}")
    module = model.module().to(device, zoo.DTYPES[dtype])
    args, kwargs = model.example(2, 5, zoo.DTYPES[dtype], device)
    started = time.perf_counter()
    report = tb.localize(module, None, (args, kwargs), backend=backend, **options)
    seconds = time.perf_counter() - started
    if folder := os.environ.get("TRTBRIDGE_GPU_LOCALIZE_DIR"):  # for the pages of docs/
        name = f"{case}.{'mixed' if options else dtype}.{backend}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.txt").write_text(f"{report}\n")
        (Path(folder) / f"{name}.json").write_text(json.dumps(report.to_json(), indent=1))
    return report, seconds


@pytest.mark.parametrize("case", ["resnet50", "bert_base"])
@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_layer_by_layer(case: str, dtype: str, backend: str, device: torch.device, report: Report) -> None:
    """A right model in half precision: every layer is compared, none is blamed, in three builds at most."""
    options = {"precision": "fp16"} if dtype == "mixed" else {}
    found, seconds = search(case, "float32" if dtype == "mixed" else dtype, backend, device, **options)
    engine = found.stages[-1]
    assert engine.name == f"engine {backend}", str(found)
    errors = [layer.error for layer in engine.layers if layer.error is not None]
    own = [layer.own_error for stage in found.stages for layer in stage.layers if layer.own_error is not None]
    row = {"model": case, "dtype": dtype, "layers": len(errors), "builds": found.builds, "seconds": round(seconds, 1)}
    row |= {"largest error": f"{max(errors):.1e}", "largest of a layer alone": f"{max(own):.1e}"}
    row["error of results"] = f"{max(engine.output_errors.values()):.1e}"
    report("localize", **row)
    assert not found.found, str(found)
    assert found.builds <= 3
    assert len(errors) >= (20 if DRY_RUN else 100)


class Energy(torch.nn.Module):
    """A square that leaves float16's range."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        energy = y * y * 40000.0
        share = energy / (energy.sum(-1, keepdim=True) + 1.0)
        return self.head(share)


def test_an_overflow_is_traced_to_its_line(backend: str, device: torch.device, report: Report, tmp_path: Path) -> None:
    """A module made half by hand against its original in float32: the graph tells."""
    torch.manual_seed(0)
    original = Energy().eval().to(device)
    half = Energy().eval().to(device)
    half.load_state_dict(original.state_dict())
    x = 2 * torch.randn(16, 64, device=device)
    converted = tb.convert(half.half(), (x.half(),), backend=backend)
    found = tb.localize(original, tb.export(half, (x.half(),)), (x,), repro=tmp_path / "repro")
    assert found.suspect is not None, str(found)
    assert found.suspect.origin.code == "energy = y * y * 40000.0"
    assert (tmp_path / "repro" / "run.py").is_file()
    # Of the engine alone, which does not tell its graph: the stages are those of a copy in its dtype.
    again = tb.localize(original, converted, (x,))
    assert again.suspect is not None, str(again)
    assert again.suspect.origin.code == "energy = y * y * 40000.0"
    row = {"line": found.suspect.origin.line, "stage": again.suspect.stage}
    report("localize", model="overflow", dtype="float16", builds=again.builds, **row)


def test_an_engine_that_overflows_is_traced_to_its_line(
    backend: str, device: torch.device, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is taken for right, so that only the engine's own inner values can tell: they do, in three builds."""
    if DRY_RUN:
        pytest.skip("dry run on a CPU: ONNX Runtime runs such an engine in float32, where nothing overflows")
    torch.manual_seed(0)
    module = Energy().eval().to(device)
    x = 2 * torch.randn(16, 64, device=device)
    # All in float16 although the example overflows: what calibration would have prevented.
    from trtbridge.bridge import localize as localize_module
    from trtbridge.bridge import precision as precision_module

    monkeypatch.setattr(precision_module, "overflowing", lambda ranges, margin: {})
    real = localize_module._Search._compare

    def blind(self: Any, check: Any, before: Any) -> Any:
        stage, _, _ = real(self, check, before)
        return stage, None, None

    monkeypatch.setattr(localize_module._Search, "_compare", blind)
    found = tb.localize(module, None, (x,), backend=backend, precision="fp16")
    assert found.suspect is not None, str(found)
    report(
        "localize",
        model="overflow in the engine",
        dtype="mixed",
        builds=found.builds,
        line=found.suspect.origin.line,
        stage=found.suspect.stage,
    )
    assert found.suspect.stage == f"engine {backend}"
    assert found.suspect.origin.code == "energy = y * y * 40000.0", str(found)
    assert found.builds <= 3
