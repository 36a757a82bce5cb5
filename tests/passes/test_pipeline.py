"""The pipeline: order, checks around passes, stand-ins, provenance, reports, time."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from trtbridge.errors import PassError
from trtbridge.passes import (
    DEFAULT,
    FoldConstants,
    NarrowTypes,
    Notes,
    Pass,
    Pipeline,
    RemoveDeadNodes,
    RemoveNoOps,
    RepairRanks,
    numbers,
)  # fmt: skip

CHAIN = "g (float[N,4] x) => (float[N,4] y) { a = Relu(x)  b = Identity(a)  y = Exp(b) }"
X = {"x": np.ones((3, 4), np.float32)}


@dataclass(frozen=True)
class Break(Pass):
    """A pass that breaks a rule, by name."""

    how: str
    changes_io: ClassVar[bool] = False

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        first = graph.nodes[0]
        match self.how:
            case "raise":
                raise ZeroDivisionError("oops")
            case "order":
                graph.nodes.reverse()
            case "duplicate":
                graph.nodes[1].outputs[0].name = first.outputs[0].name
            case "dangling":
                graph.nodes.remove(first)
            case "links":
                list.clear(first.outputs[0].inputs)
            case "domain":
                first.domain = "somewhere"
            case "output name":
                graph.outputs[0].name = "other"
            case "input shape":
                graph.inputs[0].shape = [2, 4]
            case "output dtype":
                graph.outputs[0].dtype = np.float64
            case "lose output":
                graph.outputs = []
            case "op":
                first.op = "NoSuchOp"
            case "numbers":
                first.op = "Abs" if first.op == "Relu" else "Relu"
        return 1


def test_order_is_checked():
    with pytest.raises(PassError, match=r"RemoveNoOps must come after FoldConstants"):
        Pipeline((RemoveNoOps(), FoldConstants()))
    with pytest.raises(PassError, match="is no pass"):
        Pipeline((FoldConstants,))
    Pipeline((RemoveNoOps(), RepairRanks()))


def test_pipelines_are_immutable():
    shorter = DEFAULT.without(NarrowTypes)
    assert len(shorter) == len(DEFAULT) - 1
    assert NarrowTypes not in [type(item) for item in shorter]
    longer = shorter.insert(NarrowTypes(), after=FoldConstants)
    assert list(longer) == list(DEFAULT)
    assert list(shorter.insert(NarrowTypes(), before=RemoveNoOps)) == list(DEFAULT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.passes = ()


def test_unknown_places_are_refused():
    with pytest.raises(PassError, match=r"no pass 'NarrowTypes'; its passes: FoldConstants"):
        Pipeline((FoldConstants(),)).without(NarrowTypes)
    with pytest.raises(PassError, match="no pass"):
        Pipeline().insert(FoldConstants(), after=NarrowTypes)
    with pytest.raises(PassError, match="either after= or before="):
        DEFAULT.insert(Break("raise"))
    with pytest.raises(PassError, match="must come after"):
        DEFAULT.insert(FoldConstants(), after=RemoveNoOps)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "Break failed with ZeroDivisionError: oops"),
        ("order", "Break broke the graph: tensor 'b' is read by Exp"),
        ("duplicate", "Break broke the graph: two tensors are named 'a'"),
        ("dangling", "Break broke the graph: tensor 'a' is read by Identity"),
        ("links", "its links say otherwise"),
        ("domain", "Break broke the graph: .* no opset of domain 'somewhere'"),
        ("output name", r"Break broke the graph: the model's outputs are \['other'\], they were \['y'\]"),
        ("input shape", r"Break broke the graph: input 'x' has shape \(2, 4\), it had \('N', 4\)"),
        ("output dtype", "Break broke the graph: output 'y' is double, it was float"),
        ("lose output", "outputs are"),
        ("op", "Break left a model that onnx.checker refuses: .*NoSuchOp"),
    ],
)
def test_a_broken_pass_is_named(tools, how, message):
    model = tools.model(CHAIN)
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(PassError, match=message):
        Pipeline((RemoveDeadNodes(), Break(how), RemoveDeadNodes())).run(model, {})
    assert model.SerializeToString(deterministic=True) == before


def test_changed_numbers_are_named(tools):
    pipeline = Pipeline((FoldConstants(), Break("numbers"), RemoveDeadNodes()))
    with pytest.raises(PassError, match=r"Break changed the model's numbers: output 'y' changed by up to 1\.72"):
        pipeline.run(tools.model(CHAIN), {}, check={"x": -np.ones((3, 4), np.float32)})
    with pytest.raises(PassError, match="Break left a model that ONNX Runtime cannot run"):
        Pipeline((Break("op"),)).run(tools.model(CHAIN), {}, check=X)


def test_difference_allows_short_types_their_rounding():
    def changed(dtype: type, by: float, tolerance: float) -> bool:
        old = np.ones(2, dtype)
        return numbers.difference({"y": old}, {"y": (old + by).astype(dtype)}, tolerance) is not None

    assert not changed(np.float16, 1e-3, 1e-4)
    assert changed(np.float16, 1e-3, 0.0)
    assert changed(np.float32, 1e-3, 1e-4)
    nan, inf = np.array([np.nan], np.float32), np.array([np.inf], np.float32)
    assert numbers.difference({"y": nan}, {"y": nan}, 0.0) is None
    assert "infinite or NaN" in (numbers.difference({"y": nan}, {"y": inf}, 0.0) or "")
    assert "elements" in (numbers.difference({"y": [nan]}, {"y": [nan, nan]}, 0.0) or "")


def test_what_cannot_be_compared_is_reported(tools, caplog):
    model = tools.model("g (float[2] x) => (float[2] y) { y = trtbridge.f(x) }")
    with caplog.at_level(logging.WARNING, "trtbridge.passes"):
        report = DEFAULT.run(model, {}, check={"x": np.ones(2, np.float32)}).report
    assert report.comparison == "not compared: ONNX Runtime cannot run trtbridge::f"
    assert "cannot run trtbridge::f" in caplog.text
    random = tools.model("g (float[2] x) => (float[2] y) { y = RandomNormalLike(x) }")
    assert "other numbers in every run" in DEFAULT.run(random, {}, check=X).report.comparison
    assert DEFAULT.run(model, {}).report.comparison == "not compared (not asked for)"


def test_broken_models_are_refused_before_any_pass(tools):
    model = tools.model(CHAIN)
    del model.graph.node[0]
    with pytest.raises(PassError, match="not valid, before any pass: tensor 'a'"):
        DEFAULT.run(model, {})
    model = tools.model("g (float[2,300] x) => (float[2,300] y) { y = Add(x, w) }")
    tools.stand_in(model, "w", np.ones(300, np.float32))
    with pytest.raises(PassError, match="'w' is a stand-in"):
        DEFAULT.run(model, {})


def test_weights_are_never_read(tools):
    model = tools.model(
        "g (float[N,500] x) => (float[N,500] y) <float one = {1}> "
        "{ n = Mul(x, one)  t = MatMul(n, w)  u = Add(t, b)  i = Identity(u)  v = Gemm(i, w, b)  y = Relu(v) }"
    )
    weights = {}
    for name, shape in (("w", (500, 500)), ("b", (500,)), ("unused", (500,))):
        tools.stand_in(model, name, np.zeros(shape, np.float32))
        weights[name] = tools.Unreadable(name, ir.DataType.FLOAT, shape)
    result = DEFAULT.run(model, weights)
    assert tools.ops(result) == ["MatMul", "Add", "Gemm", "Relu"]
    assert {name: result.weights[name] is weights[name] for name in result.weights} == {"w": True, "b": True}
    assert all(not tensor.raw_data for tensor in result.proto.graph.initializer)


def test_numbers_with_stand_ins(tools):
    model = tools.model(
        "g (float[N,40] x) => (float[N,40] y) { t = MatMul(x, w)  i = Identity(t)  y = Cast<to = 1>(i) }"
    )
    weights = tools.stand_in(model, "w", np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32))
    report = DEFAULT.run(model, weights, check={"x": np.ones((2, 40))}, tolerance=0).report
    assert report.comparison.startswith("compared")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "int4", "uint4",
                                   "float4_e2m1fn"])  # fmt: skip
def test_types_that_numpy_lacks_survive(tools, dtype):
    values = np.arange(6).astype(getattr(ml_dtypes, dtype)).reshape(2, 3)
    small = onnx.numpy_helper.from_array(values, "small")
    model = tools.model("g (float[2,3] x) => (float[2,3] y) { y = Relu(x)  z = trtbridge.f(small, big) }")
    model.graph.initializer.append(small)
    weights = tools.stand_in(model, "big", np.tile(values, (1, 900)))
    result = DEFAULT.run(model, weights)
    assert result.proto.graph.initializer[0] == small
    assert result.weights["big"] is weights["big"]


def test_nothing_is_lost_on_the_way(tools):
    model = tools.model(
        """g (float[N,"2*M"] x, bool c) => (float[N,"2*M"] y) <float[2] unused = {1, 2}, float k = {3}> {
        p, q = trtbridge.op<axes = [1, 2], ratio = 0.5, mode = "a", names = ["b", "c"], none : ints = []>(x, "", k)
        y = If<then_branch = t () => (float to) <float inner = {2}> { to = Mul(x, inner) },
               else_branch = e () => (float eo) { eo = Mul(x, k) }>(c)
        }"""
    )
    model.metadata_props.add(key="model", value="m")
    model.producer_name, model.doc_string, model.model_version = "me", "about", 7
    graph = model.graph
    graph.doc_string = "graph"
    graph.metadata_props.add(key="graph", value="g")
    graph.input[0].doc_string = "first"
    del graph.initializer[0]
    graph.value_info.append(
        onnx.helper.make_tensor_value_info("p", onnx.TensorProto.BFLOAT16, ["N", None, "2*M + 1", 3])
    )
    graph.value_info[-1].metadata_props.add(key="v", value="1")
    graph.node[0].metadata_props.add(key="trtbridge.origin", value="{}")
    graph.node[0].doc_string = "a node"
    odd = graph.node[0].attribute.add(name="raw", type=onnx.AttributeProto.STRING)
    odd.s = b"\xff\xfe"
    graph.node[0].attribute.add(name="t", type=onnx.AttributeProto.TYPE_PROTO).tp.tensor_type.elem_type = 1
    function = onnx.helper.make_function(
        "local", "F", ["a"], ["b"], [onnx.helper.make_node("Relu", ["a"], ["b"])], [onnx.helper.make_opsetid("", 20)]
    )
    function.node[0].metadata_props.add(key="f", value="1")
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    result = DEFAULT.run(model, {})
    for field in ("opset_import", "metadata_props", "functions", "producer_name", "doc_string", "ir_version"):
        assert getattr(result.proto, field) == getattr(model, field), field
    for field in ("name", "doc_string", "metadata_props", "input", "output", "node", "initializer"):
        assert getattr(result.proto.graph, field) == getattr(graph, field), field
    infos = {value.name: value for value in result.proto.graph.value_info}
    assert infos == {value.name: value for value in graph.value_info}


def test_an_empty_pipeline_gives_back_the_same(tools):
    model = tools.model(CHAIN)
    assert Pipeline().run(model, {}).proto == model


def _with_origins(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        node.metadata_props.add(key="trtbridge.origin", value=f"from {node.output[0]}")
    return model


def test_provenance_is_kept_and_inherited(tools):
    model = _with_origins(tools.model(
        "g (float[5] x) => (int64 y, float[5] z) <float[5] k = {1, 2, 3, 4, 5}> "
        "{ a = Relu(x)  i = Identity(a)  y = ArgMax<keepdims = 0>(i)  s = Sqrt(k)  z = Mul(i, s) }"
    ))  # fmt: skip
    result = DEFAULT.run(model, {})
    origins = {node.output[0]: [entry.value for entry in node.metadata_props] for node in result.proto.graph.node}
    assert tools.ops(result) == ["Relu", "Unsqueeze", "ArgMax", "Squeeze", "Mul"]
    # The Unsqueeze and the Squeeze are new, and stand for the ArgMax.
    assert list(origins.values()) == [["from a"], ["from y"], ["from y"], ["from y"], ["from z"]]


def test_large_results_leave_the_proto(tools):
    model = tools.model("g (float[30,30] x) => (float[30,30] y) <int64[2] s = {30, 30}, float two = {2}> "
                        "{ c = Expand(two, s)  y = Mul(x, c) }")  # fmt: skip
    result = DEFAULT.run(model, {}, check={"x": np.ones((30, 30), np.float32)})
    assert list(result.weights) == ["c"]
    np.testing.assert_array_equal(result.weights["c"].numpy(), np.full((30, 30), 2, np.float32))
    tensor = result.proto.graph.initializer[0]
    assert tensor.data_location == onnx.TensorProto.EXTERNAL
    assert tensor.external_data[0].value == "trtbridge-weights"
    # And the result can be run through again.
    assert DEFAULT.run(result.proto, result.weights).report.rewrites == 0


def test_report(tools, caplog, tmp_path):
    model = tools.model(
        "g (float[2] x) => (float[2] y, float[2] z) { a = Relu(x)  b = Identity(a)  y = Exp(b)  z = Identity(x) }"
    )
    with caplog.at_level(logging.DEBUG, "trtbridge.passes"):
        result = DEFAULT.run(model, {}, dump_dir=tmp_path / "dumps")
    report = {item.name: item for item in result.report.passes}["RemoveNoOps"]
    assert (report.rewrites, report.nodes_before, report.nodes_after) == (1, 4, 3)
    assert report.refusals[0].node.startswith("Identity")
    assert result.report.rewrites == 1
    assert "RemoveNoOps: 1 rewrites, 4 -> 3 nodes" in str(result.report)
    assert "keeps the name of an output" in str(result.report)
    levels = {record.levelno for record in caplog.records}
    assert levels == {logging.DEBUG, logging.INFO}
    assert {"00_model.onnx", "01_FoldConstants.onnx", "01_FoldConstants.diff"} <= {
        path.name for path in (tmp_path / "dumps").iterdir()
    }


def test_default_on_everything_at_once(tools):
    model = tools.model(
        "g (double[N,5] x) => (double[N] y, int64 i) <int64 one = {1}, int64[1] m = {-1}, int64[1] big = {99}> "
        "{ s = Shape(x)  d = Gather(s, one)  u = Unsqueeze(d, z)  t = Concat<axis = 0>(m, u)  r = Reshape(x, t) "
        "  c = Cast<to = 11>(r)  q = ReduceSum<keepdims = 0>(c, o)  y = Identity(q)  i = ArgMax<keepdims = 0>(q) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "z"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "o"))
    feeds = {"x": np.arange(15, dtype=np.float64).reshape(3, 5)}
    result = DEFAULT.run(model, {}, check=feeds, tolerance=1e-6)
    assert tools.ops(result) == ["ReduceSum", "Unsqueeze", "ArgMax", "Squeeze"]
    assert DEFAULT.run(result.proto, result.weights).report.rewrites == 0


def _large(nodes: int) -> onnx.ModelProto:
    """A chain with shape arithmetic, no-ops, a shared scalar and dead nodes."""
    made = []
    tensor = "x"
    for index in range(nodes // 5):
        made += [
            onnx.helper.make_node("Mul", [tensor, "one"], [f"a{index}"], name=f"n{index}a"),
            onnx.helper.make_node("Add", [f"a{index}", "half"], [f"b{index}"], name=f"n{index}b"),
            onnx.helper.make_node("Add", ["half", "half"], [f"c{index}"], name=f"n{index}c"),
            onnx.helper.make_node("Sub", [f"b{index}", f"c{index}"], [f"d{index}"], name=f"n{index}d"),
            onnx.helper.make_node("Exp", [f"d{index}"], [f"e{index}"], name=f"n{index}e"),
        ]
        tensor = f"d{index}"
    graph = onnx.helper.make_graph(
        made,
        "large",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 4])],
        [onnx.helper.make_tensor_value_info(tensor, 1, ["N", 4])],
        [
            onnx.numpy_helper.from_array(np.array(value, np.float32), name)
            for name, value in (("one", 1), ("half", 0.5))
        ],
        value_info=[
            onnx.helper.make_tensor_value_info(f"{k}{i}", 1, ["N", 4]) for i in range(nodes // 5) for k in "abe"
        ],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_time_is_linear_in_the_number_of_nodes():
    def seconds(nodes: int) -> float:
        model = _large(nodes)
        start = time.process_time()  # what others do on this machine does not count
        result = DEFAULT.run(model, {})
        assert result.report.passes[0].rewrites == nodes // 5
        return time.process_time() - start

    seconds(500)
    small = min(seconds(1000) for _ in range(3))
    large = min(seconds(10_000) for _ in range(2))
    assert large < 30 * small, (small, large)
