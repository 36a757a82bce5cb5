"""convert("model.onnx"): shapes from the file, ranges by input name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions
from trtbridge.bridge.build import build_plan
from trtbridge.bridge.onnx_file import read_onnx
from trtbridge.bridge.partition import partition
from trtbridge.nodes import make_call
from trtbridge.passes.graft_nodes import graft
from trtbridge.passes.rewrite_to_plugin import RewriteToPlugin
from trtbridge.plugins.bounds import bound

WEIGHT = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


def _model(inputs: str = "float[N,16] x", outputs: str = "float[N,32] y", extra: str = "") -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ y = MatMul(x, w) {extra} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return model


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.rtx
def test_file_with_a_dynamic_batch(tmp_path: Path, external: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.onnx"
    onnx.save(_model(), path, save_as_external_data=external, location="data.bin", size_threshold=0)
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    fast = tb.convert(path, dynamic_shapes=shapes, backend="onnxruntime")
    x = torch.randn(3, 16)
    torch.testing.assert_close(fast(x), x @ torch.from_numpy(WEIGHT))
    torch.testing.assert_close(fast(x=x), fast(x))
    with pytest.raises(tb.InputError, match="batch from 1 to 8"):
        fast(torch.randn(9, 16))
    built = tb.convert(path, dynamic_shapes=shapes, backend="tensorrt_rtx")
    assert built.program.engines[0].inputs[0].ranges == ((1, 4, 8), (16, 16, 16))


def test_several_outputs_come_back_by_name(tmp_path: Path) -> None:
    onnx.save(_model(outputs="float[N,32] y, int64[2] s", extra="s = Shape(x)"), tmp_path / "m.onnx")
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": [tb.Dim("n", max=4), None]}, backend="onnxruntime")
    result = fast(torch.randn(3, 16))
    assert list(result) == ["y", "s"]
    assert result["s"].tolist() == [3, 16]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (None, ["x[0] (N)", "no range", "tb.Dim("]),
        ({"z": {0: 3}}, ["'z'", "['x']"]),
        ({"x": {0: tb.Dim("n", max=4), 1: tb.Dim("m", max=40)}}, ["dimension 1 of x", "fixed at 16"]),
        ({"x": {0: "n"}}, ["'n'", "dimension 0 of x"]),
    ],
)
def test_ranges_that_do_not_fit(tmp_path: Path, shapes: Any, words: list[str]) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.DynamicShapeError) as caught:
        tb.convert(tmp_path / "m.onnx", dynamic_shapes=shapes, backend="onnxruntime")
    for word in words:
        assert word in str(caught.value)


def test_names_that_the_file_has_for_other_dimensions(tmp_path: Path) -> None:
    """The user's names go to the dimensions that the user says, and to those that the file gives the same symbol."""
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[a,b] x, float[b] z) => (float[a,b] y) { y = Add(x, z) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    shapes = {"x": {0: tb.Dim("b", min=1, max=4), 1: tb.Dim("a", min=5, max=9)}}
    signature = read_onnx(tmp_path / "m.onnx", shapes).signature
    assert [spec.shape for spec in (*signature.inputs, *signature.outputs)] == [("b", "a"), ("a",), ("b", "a")]
    assert signature.bounds == {"b": (1, 4), "a": (5, 9)}


def test_a_number_fixes_a_dimension(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime")
    assert fast.program.signature.inputs[0].shape == (2, 16)
    assert fast(torch.ones(2, 16)).shape == (2, 32)


def test_arguments_beside_a_file_are_refused(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.InputError, match="leave args and kwargs out"):
        tb.convert(tmp_path / "m.onnx", (torch.ones(2, 16),), backend="onnxruntime")


def test_an_opset_beside_a_file_is_refused(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.OptionError, match="has its own opset"):
        tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime", opset=20)


def test_missing_external_data(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(tb.ModelFileError, match=r"m.onnx.*(?s:.)*data.bin"):
        tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime")


def test_an_exported_file_equals_the_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).eval()
    tb.export(module, (torch.ones(2, 8),), dynamic_shapes=({0: tb.Dim("n", max=4)},)).save(tmp_path / "m.onnx")
    (name,) = (value.name for value in onnx.load(tmp_path / "m.onnx").graph.input)
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={name: {0: tb.Dim("n", max=4)}}, backend="onnxruntime")
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), module(x))


# Sizes that depend on data, and nodes that become plugins


def _write(path: Path, graph: str, opset: int = 20) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]> {graph}'), path / "m.onnx")
    return path / "m.onnx"


def test_data_dependent_sizes_have_names_and_bounds(tmp_path: Path) -> None:
    path = _write(tmp_path, """g (float[N,4] x, bool[6] c) => (float[m] v, float[k] w, int64[r] a) <int64 one = {1}> {
        p = NonZero(x)  t = Transpose(p)  v = GatherND(x, t)
        q = Compress(x, c)  w = Sqrt(q)
        i = Cast<to = 7>(q)  e = ReduceMax<keepdims = 0>(i)  a = Range(one, e, one) }""")  # fmt: skip
    model = read_onnx(path, {"x": {0: tb.Dim("batch", min=1, max=8)}})
    shapes = {spec.name: spec.shape for spec in model.signature.outputs}
    assert shapes == {"v": ("m",), "w": ("k",), "a": ("r",)}
    assert model.data_dims == {"m": (0, 16, 32), "k": (0, 16, 32)}  # nothing bounds a Range
    assert model.signature.outputs[0].ranges == ((0, 16, 32),)
    inner = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
             for value in model.proto.graph.value_info}  # fmt: skip
    assert (inner["p"], inner["t"], inner["q"]) == ([2, "m"], ["m", 2], ["k"])


def test_sizes_without_a_name_in_the_file_are_named_by_their_node(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        """g (float[3,4] x, float[1,5,4] b, float[1,2,5] s) => (float[z] y) <int64[1] most = {3}> {
        u = Unique(x)  y = Neg(u)  p = NonZero(x)  n = NonMaxSuppression(b, s, most)  d = Shape(p)  h = Shape(n) }""",
    )
    model = read_onnx(path)
    names = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
             for value in model.proto.graph.value_info}  # fmt: skip
    assert names["p"] == [2, "NonZero_2_count"]
    assert names["n"] == ["NonMaxSuppression_3_count", 3]
    assert model.data_dims == {"z": (0, 6, 12), "NonZero_2_count": (0, 6, 12), "NonMaxSuppression_3_count": (0, 3, 6)}


NMS = """g (float[1,B,4] boxes, float[1,2,B] scores) => (float[n,4] found, int64[n] kind)
    <int64[1] most = {4}, float[1] iou = {0.5}, float[1] low = {0.3}, int64 c1 = {1}, int64 c2 = {2},
     int64[1] zero = {0}> {
    s = NonMaxSuppression(boxes, scores, most, iou, low)
    kind = Gather<axis = 1>(s, c1)  where = Gather<axis = 1>(s, c2)
    flat = Squeeze(boxes, zero)  found = Gather<axis = 0>(flat, where) }"""


@pytest.mark.rtx
def test_detection_head(tmp_path: Path) -> None:
    """NonMaxSuppression in the middle: TensorRT lacks it, and what follows has a data-dependent size."""
    pytest.importorskip("tensorrt_rtx")
    path = _write(tmp_path, NMS)
    dim = tb.Dim("boxes", min=1, opt=10, max=40)
    shapes = {"boxes": {1: dim}, "scores": {2: dim}}
    whole = tb.convert(path, dynamic_shapes=shapes, backend="onnxruntime")
    model = read_onnx(path, shapes)
    assert model.data_dims == {"n": (0, 4, 8)}
    names = {node.op_type: node.name for node in model.proto.graph.node}
    parted = dataclasses.replace(model, proto=graft(model.proto, {names["NonMaxSuppression"]: "TensorRT has none"}))
    plan = partition(parted)
    assert [call.op for call in plan.plugin_calls] == ["trtbridge::onnx_node.default"]
    program = build_plan(plan, get_backend("onnxruntime"), BuildOptions())
    mine = tb.EngineModule(program, torch.device("cpu"))
    for count in (1, 10, 33):
        corner = torch.rand(1, count, 2) * 4
        inputs = torch.cat((corner, corner + 1), -1), torch.rand(1, 2, count)
        wanted, found = whole(*inputs), mine(*inputs)
        assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in wanted.items()}
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor)
    built = tb.convert(path, dynamic_shapes=shapes, backend="tensorrt_rtx", plugin_host="segments")
    assert [call.op for call in built.program.plugin_calls] == ["trtbridge::onnx_node.default"]
    assert (0, 4, 8) in {spec.ranges[0] for engine in built.program.engines for spec in engine.inputs}


def test_weights_of_a_grafted_node_reach_the_plugin(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    model = read_onnx(tmp_path / "m.onnx", {"x": {0: 3}})
    plan = partition(dataclasses.replace(model, proto=graft(model.proto, {"MatMul_0": "asked for"})))
    assert not plan.segments
    program = build_plan(plan, get_backend("onnxruntime"), BuildOptions())
    x = torch.randn(3, 16)
    torch.testing.assert_close(tb.EngineModule(program, torch.device("cpu"))(x), x @ torch.from_numpy(WEIGHT))


def test_a_users_rewrite_runs(tmp_path: Path) -> None:
    path = _write(tmp_path, "g (float[N,8] x) => (float[N,8] z) { s = Sigmoid(x)  y = Mul(s, x)  z = Neg(y) }")
    silu = RewriteToPlugin("(x) => (y) { s = Sigmoid(x)  y = Mul(x, s) }", "aten::silu")
    passes = tb.DEFAULT.insert(silu, after=type(list(tb.DEFAULT)[-1]))
    fast = tb.convert(path, dynamic_shapes={"x": {0: tb.Dim("n", max=4)}}, backend="onnxruntime", passes=passes)
    assert [call.op for call in fast.program.plugin_calls] == ["aten::silu.default"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), -torch.nn.functional.silu(x))


T0, T1, T2 = ({"tensor": index} for index in range(3))


@pytest.mark.parametrize(
    ("op", "args", "shapes", "wanted"),
    [
        ("aten::nonzero.default", [T0], [("n", 3)], "3*n"),
        ("aten::masked_select.default", [T0, T1], [("n", 1), (4,)], "4*n"),
        ("aten::index.Tensor", [T0, [None, T1]], [("n", 5), (5,)], 5),
        ("aten::index.Tensor", [T0, [T1, T2]], [(9, 9), ("2*n",), (4,)], "Max(4, 2*n)"),
        ("aten::_unique2.default", [T0, True, True, True], [(2, "n + 1")], "2*(n + 1)"),
        ("aten::unique_dim.default", [T0, -1], [(2, "n")], "n"),
        ("torchvision::nms.default", [T0, T1, 0.5], [("n", 4), ("n",)], "n"),
        ("trtbridge::batched_nms.default", [T0, T1, T2, 0.5, 7], [("n", 4)], "Min(n, 7)"),
        ("aten::repeat_interleave.Tensor", [T0], [(4,)], None),
        ("aten::nonzero.default", [T0], [(None, 3)], None),
        ("aten::nonzero.default", [T0], [None], None),
        ("aten::nonzero.default", [T0], [(0, "n")], 0),
    ],
)
def test_bounds_of_torch_ops(op: str, args: list[Any], shapes: list[Any], wanted: Any) -> None:
    assert bound(op, make_call(args), shapes) == wanted


def test_bounds_of_grafted_nodes(tmp_path: Path) -> None:
    model = read_onnx(_write(tmp_path, NMS), {"boxes": {1: tb.Dim("b", max=9)}, "scores": {2: tb.Dim("b", max=9)}})
    grafted = graft(model.proto, {"NonMaxSuppression_0": ""})
    (plugin,) = (node for node in grafted.graph.node if node.domain == "trtbridge")
    call = {attribute.name: attribute.s.decode() for attribute in plugin.attribute}
    assert bound(call["op"], call["call"], [(1, "b", 4), (1, 2, "b")]) == "2*(Min(b, 4))"
