"""profile(), inspect(), stats() and annotate() on a GPU: TensorRT's own profiler and inspector."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import zoo
from helpers import DRY_RUN, Report

import trtbridge as tb
from trtbridge.bridge.profile_report import UNKNOWN

CASES = {case.name: case for case in zoo.CASES}


class Net(torch.nn.Module):
    """Fusions, products, and a plugin between two engines."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32)
        self.up, self.down = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        x = torch.cummax(x, 1).values
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


@pytest.fixture(scope="module")
def net(backend: str, device: torch.device) -> tb.EngineModule:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64, device=device)
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    model = Net().eval().to(device)
    return tb.convert(model, (x,), dynamic_shapes=shapes, backend=backend, plugin_host="segments")


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_layers_of_a_small_model(
    net: tb.EngineModule, device: torch.device, tmp_path: Path, report: Report, batch: int
) -> None:
    x = torch.randn(batch, 3, 64, 64, device=device)
    found = net.profile((x,), iterations=20)
    assert [bool(step.op) for step in found.steps] == [False, True, False]
    assert all(step.time_ms > 0 for step in found.steps)
    assert {layer.segment for layer in found.layers} == {"segment0", "segment1"}
    assert {"conv", "up", "down"} <= {row.path for row in found.by_module()}
    assert math.isclose(sum(row.time_ms for row in found.by_line()), found.parts_ms)
    known = sum(layer.time_ms for layer in found.layers if layer.module != UNKNOWN)
    total = sum(layer.time_ms for layer in found.layers)
    report(
        "profile", model="small", batch=batch, layers=len(found.layers), call_ms=round(found.call_ms, 3),
        steps_ms=round(found.steps_ms, 3), layers_ms=round(total, 3), known=f"{known / total:.1%}",
    )  # fmt: skip
    assert known / total > 0.85, str(found)  # what computes shapes shows in so small a model
    assert tb.ProfileReport.from_json(json.loads(json.dumps(found.to_json()))) == found
    found.to_chrome_trace(tmp_path / "trace.json")
    spans = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {span["cat"] for span in spans} == {"call", "segment", "plugin", "layer"}


@pytest.mark.parametrize("case", ["resnet50", "bert_base"])
def test_layers_of_real_models(case: str, backend: str, device: torch.device, report: Report) -> None:
    """Nearly all of the time is traced to a line, and the layers add up to about the engine."""
    model = CASES[case]
    if model.missing:
        pytest.skip(f"not installed: {', '.join(model.missing)}")
    dtype = torch.float16
    args, kwargs = model.example(8, 5, dtype, device)
    fast = tb.convert(model.module().to(device, dtype), args, kwargs, backend=backend)
    found = fast.profile(args, kwargs, iterations=20)
    layers_ms = sum(layer.time_ms for layer in found.layers)
    known = sum(layer.time_ms for layer in found.layers if layer.origin is not None) / layers_ms
    row = {"model": case, "batch": 8, "layers": len(found.layers), "call_ms": round(found.call_ms, 3)}
    row |= {"steps_ms": round(found.steps_ms, 3), "layers_ms": round(layers_ms, 3), "known": f"{known:.1%}"}
    report("profile", **row)
    assert known > 0.9, str(found)
    assert len(found.layers) >= (5 if DRY_RUN else 20)


def test_profiling_changes_no_result(net: tb.EngineModule, device: torch.device) -> None:
    x = torch.randn(4, 3, 64, 64, device=device)
    before = net(x)
    net.profile((x,), iterations=2)
    # Not equal: kernels that were specialized in the background meanwhile may round in another order.
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_inspector(net: tb.EngineModule, device: torch.device) -> None:
    found = net.inspect()
    for engine in found.engines:
        assert engine.layers is not None
        assert engine.layers.layers
    assert any({"Conv", "Relu"} <= set(fusion.ops) for fusion in found.engines[0].fusions), str(found)
    if device.type == "cuda":
        assert found.memory_bytes is not None
        assert "inspector" in found.engines[0].layers.source


def test_stats(net: tb.EngineModule, device: torch.device) -> None:
    before = net.stats().calls
    net(torch.randn(4, 3, 64, 64, device=device))
    found = net.stats()
    assert found.calls == before + 1
    assert found.peak_memory_bytes is not None
    assert found.peak_memory_bytes > found.engine_bytes


def test_ranges(net: tb.EngineModule, device: torch.device) -> None:
    x = torch.randn(4, 3, 64, 64, device=device)
    expected = net(x)
    with torch.profiler.profile() as profiler, tb.annotate():
        result = net(x)
    names = {event.key for event in profiler.key_averages()}
    assert {"trtbridge: segment0", "trtbridge: plugin aten::cummax.default", "trtbridge: segment1"} <= names
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
