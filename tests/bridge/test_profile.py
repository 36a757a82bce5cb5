"""module.profile(): layers back to modules and lines, sums, tables, JSON, traces, pictures."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import onnx.parser
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends.layers import Layer
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend
from trtbridge.bridge.backends.ort_layers import read_runs
from trtbridge.bridge.graph_facts import read_nodes
from trtbridge.bridge.model import iterate_nodes
from trtbridge.bridge.profile_report import UNKNOWN, LayerTime, ProfileReport, StepTime
from trtbridge.bridge.profile_trace import make_trace


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.blocks = nn.ModuleList([Block(64) for _ in range(2)])

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = torch.cummax(x, -1).values
        return x + 1 if scale is None else x * scale


X = torch.randn(4, 16, 64)
SCALE = torch.tensor([2.0])


@pytest.fixture(scope="module")
def fast() -> tb.EngineModule:
    torch.manual_seed(0)
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}, "scale": None}
    return tb.convert(Net().eval(), (X,), {"scale": SCALE}, dynamic_shapes=shapes, backend="onnxruntime")


@pytest.fixture(scope="module")
def report(fast: tb.EngineModule) -> ProfileReport:
    return fast.profile((X,), {"scale": SCALE}, iterations=5)


def test_every_layer_leads_to_its_module_and_line(report: ProfileReport) -> None:
    assert {layer.segment for layer in report.layers} == {"segment0", "segment1"}
    assert all(layer.origin is not None and layer.nodes for layer in report.layers)
    products = ("Gemm", "MatMul")
    (product,) = [layer for layer in report.layers if layer.module == "blocks.1.up" and layer.kind in products]
    assert product.origin is not None
    assert product.origin.file == __file__
    assert product.origin.code == "return x + self.down(nn.functional.gelu(self.up(self.norm(x))))"
    assert product.origin.line == Block.forward.__code__.co_firstlineno + 1
    # What was fused counts where the product is, and says what else is in it.
    (convolution,) = [layer for layer in report.layers if layer.module == "conv" and "Conv" in layer.kind]
    assert convolution.fused_with == ("bn", "")
    assert len(convolution.nodes) == 3


def test_sums_agree(report: ProfileReport) -> None:
    modules = report.by_module()
    assert {row.path for row in modules} >= {"conv", "blocks.0.up", "blocks.0.norm", "blocks.1.down", ""}
    for rows in (modules, report.by_module(1), report.by_module(2), report.by_line()):
        assert math.isclose(sum(row.time_ms for row in rows), report.parts_ms)
        assert [row.time_ms for row in rows] == sorted((row.time_ms for row in rows), reverse=True)
    assert {row.path for row in report.by_module(1)} == {"blocks", "conv", ""}
    blocks = next(row for row in report.by_module(1) if row.path == "blocks")
    assert math.isclose(blocks.time_ms, sum(row.time_ms for row in modules if row.path.startswith("blocks.")))
    assert sum(row.layers for row in modules) == len(report.layers)
    assert next(row for row in modules if row.path == "").plugins == 1
    assert sum(row.layers for row in report.by_line()) == len(report.layers) + 1
    parts = report.layers_ms("segment0") + report.layers_ms("segment1") + report.steps[1].time_ms
    assert math.isclose(parts, report.parts_ms)


def test_steps_are_those_of_the_program(fast: tb.EngineModule, report: ProfileReport) -> None:
    assert [step.name for step in report.steps] == [step.name for step in fast.program.steps]
    assert [step.op for step in report.steps] == ["", "aten::cummax.default", ""]
    plugin = report.steps[1].origin
    assert plugin is not None
    assert plugin.code == "x = torch.cummax(x, -1).values"
    assert report.iterations == 5
    assert 0 < report.fastest_ms <= report.call_ms <= report.slowest_ms
    assert report.inputs == "x (4, 16, 64), scale (1,)"
    assert report.device == "cpu"


def test_prints_tables(report: ProfileReport) -> None:
    text = str(report)
    for words in (
        "Net on onnxruntime, cpu",
        "plugin aten::cummax.default",
        "blocks.1.up",
        "test_profile.py:",
        "FusedConv",
    ):
        assert words in text
    assert "the call's rest" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "20 more" not in text


def test_json_and_back(report: ProfileReport) -> None:
    assert ProfileReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_trace_is_what_the_format_asks_for(report: ProfileReport, tmp_path: Path) -> None:
    report.to_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == make_trace(report)
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {"process_name", "thread_name"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) + len(names) == len(trace["traceEvents"])
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
    assert [span["cat"] for span in spans].count("call") == 3
    assert [span["cat"] for span in spans].count("segment") == 6
    assert [span["cat"] for span in spans].count("plugin") == 3
    assert [span["cat"] for span in spans].count("layer") == 3 * len(report.layers)
    # Spans of one thread may not overlap unless one lies within the other: each in what it is part of.
    holder = {"segment": "call", "plugin": "call", "layer": "segment"}
    last: dict[str, dict[str, Any]] = {}
    slack = 0.002  # of rounding to nanoseconds
    for span in spans:
        before = last.get(span["cat"])
        assert before is None or before["ts"] + before["dur"] <= span["ts"] + slack
        last[span["cat"]] = span
        if span["cat"] in holder:
            outer = last[holder[span["cat"]]]
            assert outer["ts"] <= span["ts"] + slack
            assert span["ts"] + span["dur"] <= outer["ts"] + outer["dur"] + slack
    details = next(span["args"] for span in spans if span["args"].get("module") == "blocks.0.up")
    assert details["line"].startswith(f"{__file__}:")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(report: ProfileReport, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"profile.{suffix}"
    report.to_picture(path, depth=2)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert b"blocks.1" in data  # matplotlib leaves the words as comments beside their outlines
        assert b"cummax" in data
        assert b"blocks.1.up" not in data


def test_picture_of_another_kind(report: ProfileReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(tb.OptionError, match=r"profile.doc: .*Write a .png, .svg or .pdf"):
        report.to_picture(tmp_path / "profile.doc")
    with pytest.raises(tb.ModelFileError, match="Cannot write"):
        report.to_picture(tmp_path / "absent" / "profile.png")
    assert not list(tmp_path.glob("profile*"))


def test_picture_without_matplotlib(report: ProfileReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(tb.OptionError, match=r"trtbridge\[plot\]"):
        report.to_picture(tmp_path / "profile.png")


def test_arguments(fast: tb.EngineModule) -> None:
    with pytest.raises(tb.OptionError, match="iterations=0"):
        fast.profile((X,), {"scale": SCALE}, iterations=0)
    with pytest.raises(tb.InputError, match="missing scale"):
        fast.profile((X,))
    with pytest.raises(tb.InputError, match="batch from 1 to 8"):
        fast.profile((torch.randn(9, 16, 64),), {"scale": SCALE})
    assert fast.profile((torch.randn(1, 16, 64),), {"scale": SCALE}, iterations=1).inputs.startswith("x (1, 16, 64)")


def test_calls_are_as_before(fast: tb.EngineModule, report: ProfileReport) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        torch.testing.assert_close(fast(X, scale=SCALE), Net().eval()(X, SCALE), rtol=1e-4, atol=1e-5)


def test_half_precision_that_runs_widened() -> None:
    fast = tb.convert(
        nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval().half(), (X[0, :, :8].half(),), backend="onnxruntime"
    )
    report = fast.profile((X[0, :, :8].half(),), iterations=2)
    assert {layer.module for layer in report.layers if layer.kind in ("Gemm", "MatMul", "FusedGemm")} == {"0"}


def test_a_cnn_in_blocks_of_channels() -> None:
    """ONNX Runtime keeps channels in blocks between convolutions, under names of its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ).eval()
    x = torch.randn(1, 3, 16, 16)
    report = tb.convert(model, (x,), backend="onnxruntime").profile((x,), iterations=2)
    assert UNKNOWN not in {row.path for row in report.by_module()}
    first, second = (layer for layer in report.layers if layer.kind in ("Conv", "FusedConv"))
    assert (first.module, first.fused_with) == ("0", ("1", "2"))
    assert (second.module, second.fused_with) == ("3", ("4",))


LOOP = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[2,3] x) => (float[2,3] y) {
    n = Constant<value: tensor = int64 {5}>()
    yes = Constant<value: tensor = bool {1}>()
    z = Relu(x)
    y = Loop(n, yes, z) <body = body (int64 i, bool c, float[2,3] a) => (bool d, float[2,3] b) {
        d = Identity(c)
        e = Exp(a)
        b = Tanh(e)
    }>
}
"""


def test_a_loop_in_a_file(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(LOOP)
    for node in iterate_nodes(model.graph):
        node.name = f"/body/step/{node.op_type}" if node.op_type in ("Exp", "Tanh") else f"/body/{node.op_type}"
    onnx.save(model, tmp_path / "loop.onnx")
    fast = tb.convert(tmp_path / "loop.onnx", backend="onnxruntime")
    backend, x = OnnxRuntimeBackend(), torch.randn(2, 3)
    (engine,) = fast.program.engines
    profiler = backend.load_profiler(engine, fast.device)
    (result,) = profiler([x])
    torch.testing.assert_close(result, fast(x)["y"] if isinstance(fast(x), dict) else fast(x))
    (runs,) = profiler.finish()
    assert [run.layer.kind for run in runs].count("Exp") == 5
    loop = next(run for run in runs if run.layer.kind == "Loop")
    body = [run for run in runs if run.layer.kind in ("Exp", "Tanh", "Identity")]
    assert loop.time_us == max(0.0, loop.span_us - sum(run.span_us for run in body))
    report = fast.profile((x,), iterations=2)
    # The scopes in a file's names stand for modules.
    assert {row.path for row in report.by_module()} >= {"body", "body.step"}


def test_own_time_of_what_holds_others() -> None:
    def event(name: str, ts: int, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": "Op"}}

    events = [event("b", 12, 3), event("c", 15, 5), event("loop", 10, 20), event("inner", 16, 2), event("d", 30, 4)]
    runs = read_runs(events, {"b": Layer("b", "B", ("n",))}, 10)
    assert [(run.layer.name, run.time_us, run.start_us, run.span_us) for run in runs] == [
        ("loop", 12.0, 0.0, 20.0),
        ("b", 3.0, 2.0, 3.0),
        ("c", 3.0, 5.0, 5.0),
        ("inner", 2.0, 6.0, 2.0),
        ("d", 4.0, 20.0, 4.0),
    ]
    assert runs[1].layer.nodes == ("n",)
    assert runs[0].layer == Layer("loop", "Op")


def test_layers_that_nobody_knows_are_said_to_be_unknown() -> None:
    layers = (LayerTime("mystery", "", "segment0", 2.0),)
    report = ProfileReport(
        "Net", "tensorrt", "cuda:0", "x (1,)", 1, 4.0, 4.0, 4.0, (StepTime("segment0", 3.0),), layers
    )
    assert [row.path for row in report.by_module(1)] == [UNKNOWN]
    assert "(unknown)" in str(report)
    assert [(row.file, row.line) for row in report.by_line()] == [("", 0)]


def test_origins_are_kept_in_a_file(fast: tb.EngineModule, report: ProfileReport, tmp_path: Path) -> None:
    tb.save(fast, tmp_path / "net.trtb")
    loaded = tb.load(tmp_path / "net.trtb")
    for before, after in zip(fast.program.engines, loaded.program.engines, strict=True):
        assert read_nodes(after.info) == read_nodes(before.info)
    again = loaded.profile((X,), {"scale": SCALE}, iterations=1)
    assert [(layer.name, layer.origin) for layer in again.layers] == [(r.name, r.origin) for r in report.layers]


@pytest.mark.rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu() -> None:
    pytest.importorskip("tensorrt_rtx")
    fast = tb.convert(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), backend="tensorrt_rtx")
    with pytest.raises(tb.BackendError, match="run on a CUDA device"):
        fast.profile((torch.randn(2, 4),))


def test_a_failing_plugin_leaves_no_files(
    fast: tb.EngineModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ValueError("no such luck")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("trtbridge.bridge.profile.call_op", fail)
    with pytest.raises(ValueError, match="no such luck"):
        fast.profile((X,), {"scale": SCALE}, iterations=1)
    gc.collect()
    assert not list(tmp_path.glob("trtbridge-*"))
