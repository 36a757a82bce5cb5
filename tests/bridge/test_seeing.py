"""inspect(), stats() and annotate(), and the names of TensorRT's layers."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends.layers import Layer, nodes_in_metadata, nodes_in_name
from trtbridge.bridge.backends.rtx_plan import read_plan
from trtbridge.bridge.backends.trt_layers import match_layers, read_inspection
from trtbridge.bridge.graph_facts import NodeFacts
from trtbridge.bridge.inspection import InspectReport
from trtbridge.bridge.model import Origin
from trtbridge.bridge.plan import PluginCall
from trtbridge.bridge.profile import find_origin


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.tied = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.cummax(self.tied(torch.tanh(self.tied(x))), -1).values
        return (x * 2).half()


X = torch.randn(2, 4, 34)


@pytest.fixture(scope="module")
def fast() -> tb.EngineModule:
    return tb.convert(Net().eval(), (X,), backend="onnxruntime")


# inspect()


def test_fields(fast: tb.EngineModule) -> None:
    report = fast.inspect()
    assert isinstance(report, InspectReport)
    first, plugin, last = report.steps
    assert report.engines == (first, last)
    assert isinstance(plugin, PluginCall)
    assert first.weights is not None
    assert first.weights.bytes_by_dtype["float"] >= 4 * (32 * 32 + 4 * 4 * 3)
    assert first.weights.shared >= 1
    assert first.weights.shared_bytes >= 4 * 32 * 32
    assert sum(first.dtypes.values()) == len(first.nodes)
    assert last.dtypes == {"float": 1, "float16": 1}
    assert first.layers is not None
    assert set(first.nodes) == {name for layer in first.layers.layers for name in layer.nodes}
    (fusion,) = [fusion for fusion in first.fusions if "Conv" in fusion.ops]
    assert fusion.ops == ("Conv", "BatchNormalization", "Relu")
    assert report.memory_bytes is None  # ONNX Runtime does not tell


def test_text(fast: tb.EngineModule) -> None:
    text = str(fast.inspect())
    for words in (
        "Net on onnxruntime",
        "input x: (2, 4, 34) float",
        "  segment0: engine of ",
        "nodes: 2 (1 float, 1 float16)",
        "read by several nodes",
        "1 x Conv + BatchNormalization + Relu as ",
        "plugin aten::cummax.default between engines",
        "because torch.onnx has no translation",
        "output output_0",
    ):
        assert words in text
    quick = fast.inspect(fusions=False)
    assert "Conv + BatchNormalization" not in str(quick)
    assert all(engine.layers is None for engine in quick.engines)


@pytest.mark.rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's inspector is asked instead")
def test_rtx_engines_tell_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    fast = tb.convert(Net().eval(), (X,), backend="tensorrt_rtx", plugin_host="segments")
    tb.save(fast, tmp_path / "net.trtb")
    report = tb.load(tmp_path / "net.trtb").inspect()
    assert report == fast.inspect()
    first = report.engines[0]
    assert first.layers is not None
    assert "bytes" in first.layers.source
    assert any({"Conv", "Relu"} <= set(fusion.ops) for fusion in first.fusions)
    named = {name for layer in first.layers.layers for name in layer.nodes}
    assert named <= set(first.nodes)
    assert len(named) >= len(first.nodes) - 2
    assert first.layers.memory_bytes is not None
    assert 0 < first.layers.memory_bytes < 1 << 28
    assert "memory for activations and scratch: " in str(report)
    # What the profiler of a GPU would say: the same names, with the compiler's numbers behind them.
    names = [f"{layer.name}_myl0_{index}" for index, layer in enumerate(first.layers.layers)]
    matched = match_layers(names, first.layers.layers, first.nodes)
    assert [layer.nodes for layer in matched] == [layer.nodes for layer in first.layers.layers]


def test_bytes_that_do_not_tell() -> None:
    assert read_plan(b"", {}) is None
    assert read_plan(b"ptrt" * 1000, {}) is None
    assert read_plan(b"header {\n  version = 9\nmain {\n", {}) is None
    inner = b'header {\n  version = 4\n  accelerators={*}\n}\nmain {\n  add={ name="a" layers="[ONNX Layer: a]" }\n}\n'
    assert read_plan(inner, {"a": 1}) is None
    outer = inner.replace(b"{*}", b"{sm80 }").replace(
        b"version = 4\n", b"version = 5\n  region = { name=devmem size=96 }\n"
    )
    found = read_plan(inner + b"\0\0" + outer + b"\0", {"a": 1})
    assert found is not None
    assert found.layers == (Layer("a", "add", ("a",)),)
    assert found.memory_bytes == 96


# Names of TensorRT's layers


NODES = {name: index for index, name in enumerate(("conv", "bn", "/a/relu", "mul", "node_add", "fc_1", "fc_2"))}


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("conv", ("conv",)),
        ("conv + /a/relu", ("conv", "/a/relu")),
        ("conv + bn + PWN(/a/relu, mul)", ("conv", "bn", "/a/relu", "mul")),
        ("PWN(PWN(/a/relu), mul)", ("/a/relu", "mul")),
        ("[Fused: conv + bn]", ("conv", "bn")),
        ("fc_1 || fc_2", ("fc_1", "fc_2")),
        ("fc_2+fc_1", ("fc_2", "fc_1")),
        ("Reformatting CopyNode for Input Tensor 0 to conv + /a/relu", ("conv", "/a/relu")),
        ("Reformatting CopyNode for Output Tensor 1 to mul", ("mul",)),
        ("{ForeignNode[bn...node_add]}", ("bn", "/a/relu", "mul", "node_add")),
        ("{ForeignNode[6.bias...node_add]}", ("node_add",)),
        ("conv_myl0_12", ("conv",)),
        ("__myl_AddReshTran_myl0_3", ()),
        ("conv_3", ()),
        ("", ()),
    ],
)
def test_names_lead_to_nodes(name: str, nodes: tuple[str, ...]) -> None:
    assert nodes_in_name(name, NODES) == nodes


def test_metadata_leads_to_nodes() -> None:
    text = "[ONNX Layer: conv]\x1f[ONNX Layer: /a/relu]\x1e[ONNX Layer: gone][ONNX Layer: conv]"
    assert nodes_in_metadata(text, NODES) == ("conv", "/a/relu")


def test_inspector_in_detail_and_in_names() -> None:
    detailed = {
        "Layers": [
            {
                "Name": "__myl_Fc_myl0_0",
                "LayerType": "kgen",
                "Metadata": "[ONNX Layer: fc_1]\x1e[ONNX Layer: node_add]",
            },
            {"Name": "conv + /a/relu", "LayerType": "CaskConvolution", "Metadata": ""},
        ],
        "Bindings": ["x"],
    }
    assert read_inspection(json.dumps(detailed), NODES) == (
        Layer("__myl_Fc_myl0_0", "kgen", ("fc_1", "node_add")),
        Layer("conv + /a/relu", "CaskConvolution", ("conv", "/a/relu")),
    )
    assert read_inspection('{"Layers": ["conv + bn"]}', NODES) == (Layer("conv + bn", "", ("conv", "bn")),)
    assert read_inspection("no JSON", NODES) == ()


def test_one_name_for_several_kernels() -> None:
    known = [Layer("__myl_Add", "f", ("conv",)), Layer("fc_1", "g", ("fc_1",)), Layer("__myl_Add", "f", ("mul",))]
    found = match_layers(["__myl_Add", "fc_1", "__myl_Add", "other", "fc_2"], known, NODES)
    assert [(layer.name, layer.nodes) for layer in found] == [
        ("__myl_Add", ("conv",)),
        ("fc_1", ("fc_1",)),
        ("__myl_Add #2", ("mul",)),
        ("other", ()),
        ("fc_2", ("fc_2",)),
    ]


def test_fused_nodes_count_where_the_product_is() -> None:
    nodes = {
        "t": NodeFacts("Transpose", Origin("m.py", 1, module="a.up")),
        "m": NodeFacts("MatMul", Origin("m.py", 2, module="a.up")),
        "g": NodeFacts("Gelu", Origin("m.py", 3, module="a")),
    }
    assert find_origin(("t", "m", "g"), nodes) == (nodes["m"].origin, ("a",))
    assert find_origin(("t", "g"), nodes) == (nodes["g"].origin, ("a.up",))
    assert find_origin(("gone",), nodes) == (None, ())


# stats()


def test_stats(fast: tb.EngineModule) -> None:
    before = fast.stats()
    fast(X)
    with pytest.raises(tb.InputError):
        fast(X[:1])
    after = fast.stats()
    assert after.calls == before.calls + 1
    assert (after.engines, after.plugin_calls) == (2, 1)
    assert after.engine_bytes == fast.program.size_bytes
    assert after.weights_bytes is not None
    assert 4096 <= after.weights_bytes <= after.engine_bytes
    assert after.peak_memory_bytes is not None
    assert after.peak_memory_bytes > 50 << 20  # torch alone is larger
    assert dataclasses.is_dataclass(after)
    assert f"calls: {after.calls}" in str(after)
    assert "peak memory: " in str(after)


def test_calls_of_several_threads_are_all_counted(fast: tb.EngineModule) -> None:
    before = fast.stats().calls
    threads = [threading.Thread(target=lambda: [fast(X) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fast.stats().calls == before + 80


# annotate()


def _ranges(fast: tb.EngineModule, annotated: bool) -> list[tuple[str, float, float]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        if annotated:
            with tb.annotate():
                fast(X)
        else:
            fast(X)
    events = [event for event in profiler.events() or [] if event.name.startswith("trtbridge: ")]
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def test_ranges_in_the_trace_of_torch(fast: tb.EngineModule) -> None:
    found = sorted(_ranges(fast, True), key=lambda one: (one[1], -one[2]))
    names = ["Net", "segment0", "plugin aten::cummax.default", "segment1"]
    assert [name for name, _, _ in found] == [f"trtbridge: {name}" for name in names]
    call, *steps = found
    for (_, start, end), following in zip(steps, [*steps[1:], None], strict=True):
        assert call[1] <= start <= end <= call[2]
        assert following is None or end <= following[1]


def test_no_ranges_unless_asked(fast: tb.EngineModule) -> None:
    assert _ranges(fast, False) == []
    with pytest.raises(ZeroDivisionError), tb.annotate():
        raise ZeroDivisionError
    assert _ranges(fast, False) == []


def test_results_are_the_same_with_ranges(fast: tb.EngineModule) -> None:
    expected = fast(X)
    with tb.annotate():
        assert torch.equal(fast(X), expected)
