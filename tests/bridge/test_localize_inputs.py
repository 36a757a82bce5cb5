"""What localize takes: files, other versions of a module, plugins, random calls, graphs in other forms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch
from localize_nets import Net, run_repro, spoiled
from torch import nn

import trtbridge as tb
from trtbridge.bridge import localize_stage
from trtbridge.bridge.model import OnnxModel
from trtbridge.nodes import OP_ATTRIBUTE

pytestmark = pytest.mark.usefixtures("export_once")


def test_an_onnx_file_is_compared_by_the_names_of_its_tensors(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, tmp_path: Path
) -> None:
    graph.save(tmp_path / "right.onnx")
    spoiled(graph).save(tmp_path / "wrong.onnx")
    report = tb.localize(tmp_path / "right.onnx", tmp_path / "wrong.onnx")
    assert report.suspect is not None
    assert report.suspect.op_type == "Sigmoid"
    assert report.source == "right.onnx in ONNX Runtime"
    assert not tb.localize(tmp_path / "right.onnx", None, (x,), backend="onnxruntime").found
    of_module = tb.localize(net, tmp_path / "wrong.onnx", {"x": x})
    assert of_module.suspect is not None
    assert of_module.suspect.origin.code == "return self.head(torch.tanh(x))"


def test_another_version_of_the_module_is_aligned(net: nn.Module, x: torch.Tensor) -> None:
    other = Net(approximate="tanh", more=True).eval()
    other.load_state_dict(net.state_dict())
    report = tb.localize(net, tb.export(other, (x,)), (x,))
    assert report.suspect is not None, str(report)
    assert report.suspect.op_type == "Gelu"
    assert "nn.functional.gelu(" in report.suspect.origin.code


class Smooth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        z = torch.ops.tests_localize.smooth(y)
        return torch.cat([y, z], 1)


def _smooth(name: str, share: float) -> None:
    @torch.library.custom_op(f"tests_localize::{name}", mutates_args=())
    def smooth(x: torch.Tensor) -> torch.Tensor:
        return x * share + x.mean() * (1 - share)

    smooth.register_fake(torch.empty_like)


def test_a_plugin_whose_kernel_is_off(x: torch.Tensor, tmp_path: Path) -> None:
    for name, share in (("smooth", 0.5), ("smooth_off", 0.45)):
        if not hasattr(torch.ops.tests_localize, name):
            _smooth(name, share)
    model = Smooth()
    graph = tb.export(model, (x,))
    assert not tb.localize(model, graph, (x,)).found
    plugin = next(node for node in graph.proto.graph.node if node.domain == "trtbridge")
    for attribute in plugin.attribute:
        if attribute.name == OP_ATTRIBUTE:
            attribute.s = b"tests_localize::smooth_off.default"
    report = tb.localize(model, graph, (x,), repro=tmp_path)
    assert report.suspect is not None
    assert report.suspect.op_type.startswith("trtbridge::")
    assert report.suspect.origin.code == "z = torch.ops.tests_localize.smooth(y)"
    code = (tmp_path / "run.py").read_text()
    assert "trtbridge.bridge.repro" in code
    own = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_localize_inputs\n"
    own += "for n, s in (('smooth', 0.5), ('smooth_off', 0.45)): test_localize_inputs._smooth(n, s)\n"
    (tmp_path / "run.py").write_text(code.replace("import os, sys\n", f"import os, sys\n{own}"))
    done = run_repro(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "relative error" in done.stdout


def test_random_calls_do_not_hide_what_follows(x: torch.Tensor) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + torch.rand_like(x)
            return torch.tanh(x)

    graph = tb.export(Noisy(), (x,))
    right = tb.localize(Noisy(), graph, (x,))
    assert not right.found, str(right)
    assert any("draws random numbers" in note for note in right.stage.notes)
    report = tb.localize(Noisy(), spoiled(graph), (x,))
    assert report.suspect is not None
    assert report.suspect.op_type == "Sigmoid"


def test_indices_of_equal_values_are_no_error() -> None:
    class Top(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = torch.topk(torch.relu(x), 6)
            return torch.tanh(values), indices

    x = torch.randn(6, 8)
    graph = tb.export(Top(), (x,))
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    # The last of equal values instead of the first: turned round before, counted from the end behind.
    text = """<ir_version: 10, opset_import: ["": 20]> g (float[6, 8] v, int64[1] k) => (float[6, 6] a, int64[6, 6] b) {
        one = Constant<value = int64[1] {-1}>() axis = Constant<value = int64[1] {1}>()
        start = Constant<value = int64[1] {-1}>() end = Constant<value = int64[1] {-9}>()
        turned = Slice(v, start, end, axis, one) a, i = TopK(turned, k) seven = Constant<value = int64[1] {7}>()
        b = Sub(seven, i)
    }"""
    nodes = list(onnx.parser.parse_model(text).graph.node)
    top = next(node for node in proto.graph.node if node.op_type == "TopK")
    names = {"v": top.input[0], "k": top.input[1], "a": top.output[0], "b": top.output[1]}
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        node.metadata_props.extend(top.metadata_props)
    index = list(proto.graph.node).index(top)
    rest = [onnx.NodeProto.FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend([*rest[:index], *nodes, *rest[index + 1 :]])
    report = tb.localize(Top(), dataclasses.replace(graph, proto=proto), (x,))
    assert not report.found, str(report)
    assert max(report.stage.output_errors.values()) > 0.05, "the indices are others"


def test_a_transpose_that_moved_is_no_error() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x.transpose(0, 1))
            return torch.tanh(y) * 2

    graph = tb.export(Square(), (torch.randn(4, 4),))
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    transpose, relu = (next(n for n in proto.graph.node if n.op_type == op) for op in ("Transpose", "Relu"))
    # x -> Transpose -> Relu becomes x -> Relu -> Transpose, each keeping its origin and the name of what it makes.
    middle, last = transpose.output[0], relu.output[0]
    relu.input[0], transpose.input[0] = transpose.input[0], middle
    relu.output[0], transpose.output[0] = middle, last
    nodes = [relu, transpose, *(n for n in proto.graph.node if n.op_type not in ("Transpose", "Relu"))]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    moved = dataclasses.replace(graph, proto=proto)
    x = torch.randn(4, 4)
    report = tb.localize(Square(), moved, (x,))
    assert not report.found, str(report)
    assert any(layer.wrong for layer in report.layers), "a value in another form is seen, and not blamed"


def test_few_values_are_held_at_a_time(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = spoiled(graph)
    at_once = tb.localize(net, wrong, (x,))
    monkeypatch.setattr(localize_stage, "CHUNK_BYTES", 1)
    one_by_one = tb.localize(net, wrong, (x,))
    assert at_once.to_json() == one_by_one.to_json()


def test_a_graph_that_cannot_run_is_localized_all_the_same(net: nn.Module, graph: OnnxModel, x: torch.Tensor) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    node = next(node for node in proto.graph.node if node.op_type == "Tanh")
    node.op_type = "Concat"
    node.attribute.append(onnx.helper.make_attribute("axis", 5))
    report = tb.localize(net, dataclasses.replace(graph, proto=proto), (x,))
    assert report.suspect is not None
    assert report.suspect.node == node.name
    assert "ONNX Runtime cannot run it" in report.suspect.words
    assert any("cannot be run as a whole" in note for note in report.stage.notes)


def test_what_a_conversion_has_learned_is_known_again(x: torch.Tensor, caplog: pytest.LogCaptureFixture) -> None:
    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(torch.relu(x), 1)[0] * 2

    converted = tb.convert(Largest(), (x,), backend="onnxruntime", passes=tb.Pipeline(()))
    (call,) = converted.program.info["learned"]["calls"]
    report = tb.localize(Largest(), converted, (x,), check_export=False)
    assert not report.found, str(report)
    assert any(layer.origin.call == call for layer in report.layers)
    assert "give them as passes=" not in caplog.text, "it had none"
    with_one = tb.convert(Largest(), (x,), backend="onnxruntime", passes=tb.Pipeline(tb.DEFAULT.passes[:1]))
    tb.localize(Largest(), with_one, (x,))
    assert f"converted with the passes {type(tb.DEFAULT.passes[0]).__name__}: give them as passes=" in caplog.text
