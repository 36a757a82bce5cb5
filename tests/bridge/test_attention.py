"""convert(attention=...): the form that each attention gets, what it costs in numbers, and what is remembered."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge import attention_judge
from trtbridge.bridge.attention import AttentionReport, make_attention
from trtbridge.bridge.attention_judge import DECOMPOSED, FUSED, MOST_VERDICTS, Verdict, keep_verdict, read_verdicts
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.cli import app
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import export
from trtbridge.bridge.model import OnnxModel, origin_of
from trtbridge.bridge.options import Options
from trtbridge.bridge.planner import Planner
from trtbridge.bridge.stages import Stages
from trtbridge.errors import BackendError, OptionError

sys.path.insert(0, str(Path(__file__).parent))

import attention_forms as forms
from attention_forms import FORMS

DYNAMIC = {0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=2, opt=10, max=32)}


def _planner(
    model: Any, args: tuple[Any, ...] = (), backend: str = "onnxruntime", shapes: Any = None, **options: Any
) -> Planner:
    chosen = Options.make({"attention": "auto", **options})
    return make_planner(model, args, None, shapes, get_backend(backend), chosen)


def _ops(planner: Planner) -> Counter[str]:
    return Counter(node.op_type for segment in planner.plan().segments for node in segment.proto.graph.node)


def _shapes(form: forms.Form) -> Any:
    length = DYNAMIC[1]
    return {"x": DYNAMIC} | ({"masks": ({0: DYNAMIC[0], 2: length, 3: length},)} if form.mask else {})


def _half(args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.half() if t.is_floating_point() else t for t in args)


# Every form, as one node


STATIC = ("sdpa bool", "sdpa grouped", "alibi")  # where the graph is written otherwise than with dynamic shapes


@pytest.mark.parametrize(
    ("name", "dynamic", "precision"),
    [*((name, True, None) for name in FORMS), *((name, False, "fp16") for name in STATIC)],
)
def test_every_form_becomes_one_node_and_computes_the_same(name, dynamic, precision, assert_same):
    form = FORMS[name]
    module, args = form.module(), form.example()
    shapes = _shapes(form) if dynamic else None
    options = {"attention": "fused", "precision": precision}
    fast = tb.convert(module, args, dynamic_shapes=shapes, backend="onnxruntime", **options)
    report = AttentionReport.from_json(fast.program.info["attention"])
    assert (report.fused, report.decomposed, report.missed) == (1, 0, {})
    (group,) = report.groups
    assert group.kind.startswith("float16 (" if precision else "float (")
    assert ("causal" in group.kind, "mask" in group.kind) == (form.kind == "causal", form.kind == "mask")
    assert fast.program.info["opset"] == 23
    tolerance = 3e-3 if precision else 1e-5
    calls = [args, form.example(3, 7)] if dynamic else [args]
    with torch.no_grad():
        for call in calls:
            assert_same(fast(*call), module(*call), rtol=tolerance, atol=tolerance)


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("sdpa bool", True), ("sdpa grouped", True), ("gpt2", True), ("eager", True), ("alibi", False), ("sdpa", False)],
)
def test_tensorrt_rtx_builds_every_kind_in_halves_as_one_node(name, dynamic):
    pytest.importorskip("tensorrt_rtx")
    form = FORMS[name]
    module, args = form.module().half(), _half(form.example())
    planner = _planner(module, args, "tensorrt_rtx", _shapes(form) if dynamic else None)
    program = planner.build()
    assert _ops(planner)["Attention"] == 1
    assert _ops(planner)["Softmax"] == 0
    assert not program.plugin_calls
    (group,) = planner.attention_report.groups
    assert (group.form, group.count) == (FUSED, 1)
    assert "not measured" in group.reason


@pytest.mark.rtx
def test_tensorrt_rtx_gets_one_node_in_a_mixed_model_and_parts_in_float32():
    pytest.importorskip("tensorrt_rtx")
    form = FORMS["eager"]
    mixed = _planner(form.module(), form.example(), "tensorrt_rtx", precision="fp16")
    mixed.build()
    assert (_ops(mixed)["Attention"], _ops(mixed)["Softmax"]) == (1, 0)
    full = _planner(form.module(), form.example(), "tensorrt_rtx")
    assert (_ops(full)["Attention"], _ops(full)["Softmax"]) == (0, 1)
    assert "16 bits" in full.attention_report.note
    assert full.opset == 20


def test_modes_decide():
    form = FORMS["sdpa"]
    module, args = form.module().half(), _half(form.example())
    model = export(module, args)

    def plan(backend: str, **options: Any) -> Planner:
        chosen = Options.make(options)
        attention = make_attention(chosen, get_backend(backend))
        return Planner(model, get_backend(backend), chosen, Stages(), attention=attention)

    counts = {mode: _ops(plan("onnxruntime", attention=mode))["Attention"] for mode in ("fused", "decomposed", None)}
    assert counts == {"fused": 1, "decomposed": 0, None: 0}
    assert plan("onnxruntime", attention=None).attention_report is None
    planner = plan("onnxruntime", attention="auto")  # ONNX Runtime is left to itself
    assert (_ops(planner)["Attention"], planner.opset) == (0, 20)
    assert "ONNX Runtime" in planner.attention_report.note
    with pytest.raises(OptionError, match="attention='fast'"):
        Options.make({"attention": "fast"})


def test_a_model_that_comes_with_nodes_keeps_them_or_not():
    form = FORMS["sdpa bool"]
    module, args = form.module(), form.example()
    assert _ops(_planner(module, args, opset=23, attention=None))["Attention"] == 1
    planner = _planner(module, args, opset=23, attention="decomposed")
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == (0, 1)
    assert planner.opset == 23


class Two(nn.Module):
    """Two attentions of different head sizes: TensorRT has a kernel for one of them."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first = nn.functional.scaled_dot_product_attention(q, k, v)
        q, k, v = (t.reshape(t.shape[0], 8, t.shape[2], 8) for t in (q, k, v))
        second = nn.functional.scaled_dot_product_attention(q, k, v)
        return first + second.reshape(first.shape)


@pytest.mark.rtx
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_what_the_builder_refuses_stays_in_parts_node_by_node(opset, mode):
    """Both as parts that are fused, and as nodes that the export wrote."""
    pytest.importorskip("tensorrt_rtx")
    args = tuple(torch.randn(2, 4, 6, 16).half() for _ in range(3))
    planner = _planner(Two().eval(), args, "tensorrt_rtx", opset=opset, attention=mode)
    program = planner.build()
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == (1, 1)
    assert not program.plugin_calls
    if opset == 20:
        taken, refused = sorted(planner.attention_report.groups, key=lambda group: group.form, reverse=True)
        assert "(2, 4, 6, 16)" in taken.kind
        assert "(2, 8, 6, 8)" in refused.kind
        assert "does not take the node" in refused.reason
        assert planner.attention_report.missed == {}
    (segment,) = planner.plan().segments
    nodes = {node.op_type: node for node in segment.proto.graph.node}
    for op, marker in (("Attention", "first ="), ("Softmax", "second =")):
        line = Path(__file__).read_text().splitlines()[origin_of(nodes[op]).line - 1]
        assert marker in line or op == "Softmax", line


@pytest.mark.rtx
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_what_the_whole_build_refuses_stays_in_parts(precision, monkeypatch):
    """A judge that is wrong about a block: its parts are as they were written, neither plugins nor float32."""
    pytest.importorskip("tensorrt_rtx")
    dtype = torch.float32 if precision else torch.float16
    args = tuple(torch.randn(2, 4, 6, 16, dtype=dtype) for _ in range(3))
    planner = _planner(Two().eval(), args, "tensorrt_rtx", precision=precision)
    monkeypatch.setattr(planner.attention.judge, "judge", lambda pair, measures: Verdict(FUSED, "surely"))
    assert _ops(planner)["Attention"] == 2
    program = planner.build()
    assert not program.plugin_calls
    assert _ops(planner)["Softmax"] >= 1
    assert planner.attention.refused
    assert not planner.refused.half
    report = planner.attention_report
    assert (report.fused, report.decomposed) == (_ops(planner)["Attention"], _ops(planner)["Softmax"])
    assert report.missed == {}
    assert planner.opset == (20 if _ops(planner)["Attention"] == 0 else 23)


REFUSED = {
    "mask and causal": (["q", "k", "v", "m"], {"is_causal": 1}, 16, 16),
    "other sizes of heads": (["q", "k", "v"], {}, 16, 32),
    "softcap": (["q", "k", "v"], {"softcap": 5.0}, 16, 16),
    "small heads": (["q", "k", "v"], {}, 8, 8),
}


def _file(path: Path, nodes: list[onnx.NodeProto], sizes: tuple[int, int], element: int) -> Path:
    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, element, shape)

    first, second = sizes
    inputs = [value(name, 2, 4, 6, first if name != "v" else second) for name in "qkvabc"]
    inputs.append(value("m", 1, 1, 6, 6))
    read = {name for node in nodes for name in node.input}
    inputs = [each for each in inputs if each.name in read]
    outputs = [value(node.output[0], 2, 4, 6, second) for node in nodes]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    imports = [onnx.helper.make_opsetid("", 23)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=11), path)
    return path


@pytest.mark.rtx
@pytest.mark.parametrize("mode", ["auto", None])
@pytest.mark.parametrize("name", REFUSED)
def test_nodes_of_a_file_that_are_refused_become_parts_and_no_plugins(name, mode, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    inputs, attributes, first, second = REFUSED[name]
    nodes = [onnx.helper.make_node("Attention", inputs, ["y"], "refused", **attributes)]
    if first == second == 16:
        nodes.append(onnx.helper.make_node("Attention", ["a", "b", "c", "m"], ["z"], "taken"))
    path = _file(tmp_path / "model.onnx", nodes, (first, second), onnx.TensorProto.FLOAT16)
    planner = _planner(str(path), (), "tensorrt_rtx", attention=mode)
    program = planner.build()
    assert not program.plugin_calls
    (segment,) = planner.plan().segments
    left = [node.name for node in segment.proto.graph.node if node.op_type == "Attention"]
    # Without a look at each block one that fails in the builder, which names none, takes the others along.
    assert left == (["taken"] if len(nodes) == 2 and (mode == "auto" or name != "small heads") else [])


@pytest.mark.rtx
def test_nodes_of_a_file_in_float32_become_parts(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    node = onnx.helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], "node")
    planner = _planner(
        str(_file(tmp_path / "model.onnx", [node], (16, 16), onnx.TensorProto.FLOAT)), (), "tensorrt_rtx"
    )
    program = planner.build()
    assert not program.plugin_calls
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == (0, 1)


# Measuring


class FakeClock:
    """Says what it is told, and counts."""

    def __init__(self, *times: float) -> None:
        self.times, self.engines = list(times), []

    def __call__(self, backend: Any, engines: Any) -> list[float]:
        self.engines.append(engines)
        return self.times


class Layers(nn.Module):
    """Two alike and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([forms.Attention(kind) for kind in (forms.plain, forms.plain, forms.causal)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def layers() -> OnnxModel:
    torch.manual_seed(0)
    return export(Layers().half().eval(), (torch.randn(2, 10, 64).half(),))


def _timed(model: OnnxModel, clock: Any, folder: Path) -> Planner:
    """A planner whose clock says what it is told."""
    backend, options = get_backend("tensorrt_rtx"), Options.make({"cache_dir": folder, "attention": "auto"})
    attention = make_attention(options, backend)
    assert attention is not None
    attention.judge.clock, attention.judge.place = clock, "a GPU of the tests"
    return Planner(model, backend, options, Stages(), attention=attention)


@pytest.mark.rtx
def test_each_kind_is_timed_once_and_the_faster_form_is_taken(layers, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    clock = FakeClock(0.02, 0.01)
    planner = _timed(layers, clock, tmp_path)
    assert _ops(planner)["Attention"] == 0
    assert len(clock.engines) == 2  # two kinds in three layers
    assert all(len(engines) == 2 for engines in clock.engines)
    groups = planner.attention_report.groups
    assert sorted((g.count, g.form, g.fused_ms, g.decomposed_ms) for g in groups) == [
        (1, DECOMPOSED, 0.02, 0.01),
        (2, DECOMPOSED, 0.02, 0.01),
    ]
    assert planner.opset == 20  # nothing needs the newer one

    never = FakeClock()  # what is in the cache is not measured again
    again = _timed(layers, never, tmp_path)
    assert again.attention_report is None
    assert _ops(again)["Attention"] == 0
    assert never.engines == []
    assert again.attention_report == planner.attention_report

    faster = FakeClock(0.01, 0.02)
    fresh = _timed(layers, faster, tmp_path / "other")
    assert _ops(fresh)["Attention"] == 3
    assert fresh.build().plugin_calls == ()
    assert [group.form for group in fresh.attention_report.groups] == [FUSED, FUSED]

    other = _timed(layers, FakeClock(0.01, 0.02), tmp_path)
    other.attention.judge.place = "another GPU"
    assert _ops(other)["Attention"] == 3


@pytest.mark.rtx
def test_a_clock_that_fails_leaves_the_rule_and_no_verdict(layers, tmp_path):
    pytest.importorskip("tensorrt_rtx")

    def broken(backend: Any, engines: Any) -> list[float]:
        raise BackendError("the GPU is busy")

    planner = _timed(layers, broken, tmp_path)
    assert _ops(planner)["Attention"] == 3
    assert all("the GPU is busy" in group.reason for group in planner.attention_report.groups)
    assert read_verdicts(tmp_path / "attention.json") == {}


@pytest.mark.rtx
def test_explain_asks_no_clock(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    form = FORMS["sdpa"]
    found = tb.explain(form.module().half(), _half(form.example()), backend="tensorrt_rtx", attention="auto")
    assert "attention auto: 1 blocks as one node, 0 in parts" in found.passes
    assert found.converts


# What is kept on disk


def _entry(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_verdicts_come_back_and_the_oldest_go(tmp_path):
    path = tmp_path / "attention.json"
    measured = Verdict(FUSED, "measured", 0.5, 1.5)
    keep_verdict(path, "first", Verdict(DECOMPOSED, "refused"))
    keep_verdict(path, "second", measured)
    assert read_verdicts(path) == {"first": Verdict(DECOMPOSED, "refused"), "second": measured}
    data = _entry(path)
    data["verdicts"] = {f"key{number}": data["verdicts"]["second"] for number in range(MOST_VERDICTS)}
    path.write_text(json.dumps(data))
    keep_verdict(path, "last", measured)
    kept = list(read_verdicts(path))
    assert (len(kept), kept[0], kept[-1]) == (MOST_VERDICTS, "key1", "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["attention.json"]  # nothing half-written lies about


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "verdicts": {}}',
        '{"format": 1}',
        '{"format": 1, "verdicts": {"a": {"form": "fused"}}}',
        '{"format": 1, "verdicts": {"a": {"form": "other", "reason": ""}}}',
        '{"format": 1, "verdicts": {"a": {"form": "fused", "reason": "", "fused_ms": "fast"}}}',
        '{"format": 1, "verdicts": {"a": {"form": "fused", "reason": "", "fused_ms": -1.0}}}',
        '{"format": 1, "verdicts": {"a": {"form": "fused", "reason": "", "colour": 1}}}',
    ],
)
def test_a_damaged_file_is_written_anew(tmp_path, text):
    path = tmp_path / "attention.json"
    path.write_text(text)
    assert read_verdicts(path) == {}
    keep_verdict(path, "key", Verdict(FUSED, "measured", 1.0, 2.0))
    assert list(read_verdicts(path)) == ["key"]


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, caplog):
    keep_verdict(tmp_path / "missing" / "attention.json", "key", Verdict(FUSED, "measured", 1.0, 2.0))
    keep_verdict(None, "key", Verdict(FUSED, "measured", 1.0, 2.0))
    assert "is not kept" in caplog.text


def test_the_clock_times_every_engine_on_the_same_numbers(monkeypatch):
    """What leads to the clock's inputs, on the CPU: shapes at the sizes tuned for, one tensor for one name."""
    form = FORMS["sdpa float"]
    planner = _planner(form.module().half(), _half(form.example()), shapes=_shapes(form), attention="fused")
    seen = []
    judge = planner.attention.judge
    original = judge.judge
    monkeypatch.setattr(judge, "judge", lambda pair, measures: seen.append(pair) or original(pair, measures))
    planner.plan()
    (pair,) = seen
    backend, values, results = get_backend("onnxruntime"), {}, []
    for segment in (pair.fused, pair.decomposed):
        engine = backend.build(segment, planner.options.build)
        inputs = [attention_judge._example(spec, values, torch.device("cpu")) for spec in engine.inputs]
        results += backend.load(engine, torch.device("cpu")).new_context()(inputs)
    assert results[0].shape[:2] == (2, 10)
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)


# Reports, and the command line


def test_the_report_survives_json_and_prints():
    form = FORMS["sdpa causal"]
    fast = tb.convert(form.module(), form.example(), backend="onnxruntime", attention="fused")
    report = AttentionReport.from_json(json.loads(json.dumps(fast.program.info["attention"])))
    assert "1 blocks as one node, 0 in parts" in report.summary
    assert "1 fused: float (2, 4, 10, 16), causal: asked for" in str(report)


def test_the_report_names_near_misses():
    class Capped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(torch.tanh(q @ k.transpose(-1, -2) / 30) * 30, -1) @ v

    args = tuple(torch.randn(2, 4, 6, 16) for _ in range(3))
    planner = _planner(Capped().eval(), args, attention="fused")
    planner.plan()
    report = planner.attention_report
    assert report.fused == 0
    (reason,) = report.missed.values()
    assert "tanh" in reason
    assert "not recognized: 1" in str(report)


def test_the_command_line_takes_the_form(tmp_path, monkeypatch):
    source = "import torch\n\n\ndef make():\n"
    source += "    class A(torch.nn.Module):\n        def forward(self, q, k, v):\n"
    source += "            return torch.nn.functional.scaled_dot_product_attention(q, k, v)\n\n"
    source += "    return A(), tuple(torch.randn(2, 4, 6, 16) for _ in range(3))\n"
    (tmp_path / "attending.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    command = ["convert", "attending.py:make", "--backend", "onnxruntime", "-o", "made.trtb", "--attention"]
    done = CliRunner().invoke(app, [*command, "fused"])
    assert done.exit_code == 0, done.output
    assert "attention fused: 1 blocks as one node" in done.output
    done = CliRunner().invoke(app, [*command, "as-written", "--force"])
    assert done.exit_code == 0, done.output
    assert "attention" not in done.output.replace("attending", "")
    assert CliRunner().invoke(app, [*command, "quick", "--force"]).exit_code != 0
