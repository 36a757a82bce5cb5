"""RewriteToPlugin, and nodes grafted as they are."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.parser
import pytest

from trtbridge.errors import PassError
from trtbridge.nodes import DOMAIN, ONNX_NODE_OP, REASON_KEY, decode_nodes
from trtbridge.passes import Pipeline
from trtbridge.passes.graft_nodes import graft
from trtbridge.passes.rewrite_to_plugin import Match, Refused, RewriteToPlugin

SILU = RewriteToPlugin("(x) => (y) { s = Sigmoid(x)  y = Mul(x, s) }", "aten::silu")


def _call(node: onnx.NodeProto) -> dict:
    attributes = {attribute.name: attribute.s.decode() for attribute in node.attribute}
    return {"op": attributes["op"], **json.loads(attributes["call"])}


def _plugins(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == DOMAIN]


@pytest.mark.parametrize("order", ["a, s", "s, a"])
@pytest.mark.parametrize("rows", ["2", "N"])
def test_rewrites(tools, order, rows):
    model = tools.model(f"g (float[{rows},4] x) => (float[{rows},4] z) {{ a = Neg(x)  s = Sigmoid(a)  y = Mul({order})  z = Neg(y) }}")  # fmt: skip # noqa: E501
    result = tools.apply(SILU, model, rewrites=1)
    assert tools.ops(result) == ["Neg", "aten_silu", "Neg"]
    (plugin,) = _plugins(result.proto)
    assert _call(plugin) == {"op": "aten::silu.default", "args": [{"tensor": 0}], "kwargs": {}}
    assert (list(plugin.input), list(plugin.output)) == (["a"], ["y"])
    kept = next(value for value in result.proto.graph.value_info if value.name == "y")
    assert kept == next(value for value in model.graph.value_info if value.name == "y")
    assert any(opset.domain == DOMAIN for opset in result.proto.opset_import)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("s = Sigmoid(x)  y = Mul(x, x)", "float[4] y", None),
        ("s = Sigmoid(a)  y = Mul(x, s)", "float[4] y", None),
        ("s = Sigmoid(x)  y = Add(x, s)", "float[4] y", None),
        ("s = Sigmoid(x)  y = Mul(x, s)  t = Neg(s)", "float[4] y, float[4] t", "'s' is read by"),
        ("s = Sigmoid(x)  y = Mul(x, s)", "float[4] y, float[4] s", "'s' is an output of the model"),
    ],
)
def test_near_misses(tools, body, outputs, reason):
    model = tools.model(f"g (float[4] x, float[4] a) => ({outputs}) {{ {body} }}")
    tools.apply(SILU, model, rewrites=0, refused=reason)


def test_all_matches_and_shared_weights(tools):
    model = tools.model("""g (float[2,4] x) => (float[2,4] z, float[2,4] r) <float[4] w = {1, 2, 3, 4}> {
        g1 = Mul(x, w)  y = Tanh(g1)  g2 = Mul(w, y)  z = Tanh(g2)  r = Mul(w, z) }""")
    item = RewriteToPlugin("(x, w) => (y) { g = Mul(x, w)  y = Tanh(g) }", "my::gate.out")
    result = tools.apply(item, model, rewrites=2)
    assert tools.ops(result) == ["my_gate_out", "my_gate_out", "Mul"]
    assert [sorted(plugin.input) for plugin in _plugins(result.proto)] == [["w", "x"], ["w", "y"]]
    assert _call(_plugins(result.proto)[0])["op"] == "my::gate.out"


def test_arguments_from_attributes_and_constants(tools):
    def arguments(match: Match):
        return [match["x"], match.number("eps")], {
            "axis": match.attribute("m", "axes", [0]),
            "scale": match.values("w"),
            "keep": match.attribute("m", "keepdims", 1) == 1,
            "limit": float("inf"),
        }

    item = RewriteToPlugin(
        "(x, w, eps) => (y) { m = ReduceMean(x)  a = Add(m, eps)  y = Mul(a, w) }", "my::op", arguments, opset=13
    )
    model = tools.model(
        """g (float[2,4] x) => (float[2,1] y) <float[2,1] w = {1, 2}, float e = {0.5}> {
        m = ReduceMean<axes = [1]>(x)  a = Add(m, e)  y = Mul(a, w) }""",
        opset=13,
    )
    result = tools.apply(item, model, rewrites=1)
    assert _call(_plugins(result.proto)[0]) == {
        "op": "my::op.default",
        "args": [{"tensor": 0}, 0.5],
        "kwargs": {"axis": [1], "scale": [[1.0], [2.0]], "keep": True, "limit": {"number": "inf"}},
    }
    dynamic = tools.model(
        """g (float[2,4] x, float e) => (float[2,1] y) <float[2,1] w = {1, 2}> {
        m = ReduceMean<axes = [1]>(x)  a = Add(m, e)  y = Mul(a, w) }""",
        opset=13,
    )
    tools.apply(item, dynamic, rewrites=0, refused="'e' is no constant")


def test_arguments_may_refuse(tools):
    def arguments(match: Match):
        if match.shape("x") != (4,):
            raise Refused("it is not of size 4")
        return [match["x"]]

    item = RewriteToPlugin("(x) => (y) { y = Neg(x) }", "aten::neg", arguments)
    tools.apply(item, tools.model("g (float[4] x) => (float[4] y) { y = Neg(x) }"), rewrites=1)
    model = tools.model("g (float[5] x) => (float[5] y) { y = Neg(x) }")
    tools.apply(item, model, rewrites=0, refused="not of size 4")


def test_attributes_in_the_pattern_must_be_equal(tools):
    item = RewriteToPlugin("(x) => (y) { y = Softmax<axis = 1>(x) }", "my::softmax")
    tools.apply(item, tools.model("g (float[2,4] x) => (float[2,4] y) { y = Softmax<axis = 1>(x) }"), rewrites=1)
    tools.apply(item, tools.model("g (float[2,4] x) => (float[2,4] y) { y = Softmax<axis = 0>(x) }"), rewrites=0)


def test_inputs_left_out(tools):
    item = RewriteToPlugin("(x, low) => (y) { y = Clip(x, low) }", "my::clip")
    tools.apply(item, tools.model("g (float[4] x, float l) => (float[4] y) { y = Clip(x, l) }"), rewrites=1)
    tools.apply(item, tools.model("g (float[4] x, float l) => (float[4] y) { y = Clip(x, l, l) }"), rewrites=0)


def test_several_outputs_and_a_reader_of_the_first_in_between(tools):
    item = RewriteToPlugin("(x) => (e, s) { e = Exp(x)  s = ReduceSum<keepdims = 0>(e) }", "my::both")
    model = tools.model("g (float[4] x) => (float[4] r, float s) { e = Exp(x)  r = Neg(e)  s = ReduceSum<keepdims = 0>(e) }")  # fmt: skip # noqa: E501
    result = tools.apply(item, model, rewrites=1)
    assert tools.ops(result) == ["my_both", "Neg"]
    (plugin,) = _plugins(result.proto)
    assert list(plugin.output) == ["e", "s"]


def test_a_node_between_two_members_is_no_match(tools):
    item = RewriteToPlugin("(x, n) => (e, y) { e = Exp(x)  y = Mul(e, n) }", "my::both")
    model = tools.model("g (float[4] x) => (float[4] y) { e = Exp(x)  n = Neg(e)  y = Mul(e, n) }")
    tools.apply(item, model, rewrites=0, refused="makes one of its inputs")


def test_bodies_are_left_alone(tools):
    model = tools.model("""g (float[4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] a) { s = Sigmoid(x)  a = Mul(x, s) },
                    else_branch = e () => (float[4] b) { b = Neg(x) }> }""")
    tools.apply(SILU, model, rewrites=0, refused="body of a condition or loop")


@pytest.mark.parametrize(
    ("pattern", "op", "words"),
    [
        ("(x) => (y) { y = Neg(x) }", "neg", "ns::op"),
        ("(x) => y = Neg(x)", "a::b", "is not ONNX text"),
        ("(x) => (z) { y = Neg(x) }", "a::b", r"returns \['z'\]"),
        ("(x, w) => (y) { y = Neg(x)  z = Neg(w) }", "a::b", "not all connected"),
    ],
)
def test_bad_patterns(pattern, op, words):
    with pytest.raises(PassError, match=words):
        RewriteToPlugin(pattern, op)


# Nodes as they are


def _model(text: str, names: bool = True) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}" if names else ""
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _inside(plugin: onnx.NodeProto) -> onnx.ModelProto:
    call = _call(plugin)
    assert call["op"] == ONNX_NODE_OP
    assert call["args"][1] == [{"tensor": index} for index in range(len(plugin.input))]
    return decode_nodes(call["args"][0])


def test_graft_keeps_names_types_and_metadata(tools):
    model = _model("g (float[N,3,3] x) => (float[N] z) { y = Det(x)  z = Neg(y) }")
    model.graph.node[0].metadata_props.add(key="trtbridge.origin", value="{}")
    before = model.SerializeToString()
    result = graft(model, {"Det_0": "the parser says no"})
    assert model.SerializeToString() == before
    assert tools.ops(result) == ["onnx_Det", "Neg"]
    (plugin,) = _plugins(result)
    assert (plugin.name, list(plugin.input), list(plugin.output)) == ("Det_0", ["x"], ["y"])
    assert {p.key: p.value for p in plugin.metadata_props} == {
        "trtbridge.origin": "{}",
        REASON_KEY: "the parser says no",
    }
    assert [value.name for value in result.graph.value_info] == ["y"]
    onnx.checker.check_model(result)
    assert Pipeline(()).run(result, {}).proto.graph.node[0].domain == DOMAIN


def test_small_constants_go_into_the_text_and_stand_ins_do_not(tools):
    model = _model("g (float[4,8] x) => (float[4,k] v, int64[4,k] i) <int64[1] k = {3}> { v, i = TopK(x, k) }")
    (plugin,) = _plugins(graft(model, {"TopK_0": ""}))
    assert list(plugin.input) == ["x"]
    (constant,) = _inside(plugin).graph.initializer
    assert onnx.numpy_helper.to_array(constant).tolist() == [3]
    weights = _model("g (float[4,300] x) => (float[4,300] y) { y = PRelu(x, w) }")
    tools.stand_in(weights, "w", np.ones(300, np.float32))
    (plugin,) = _plugins(graft(weights, {"PRelu_0": ""}))
    assert list(plugin.input) == ["x", "w"]


def test_a_body_brings_what_it_captures():
    model = _model("""g (float[4] x, float[4] w, bool c) => (float[4] y) { n = Neg(w)
        y = If (c) <then_branch = t () => (float[4] a) { a = Mul(x, n) },
                    else_branch = e () => (float[4] b) { b = Identity(x) }> }""")
    inner = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g.node[0]
    inner.name = "deep"
    for names in ({"If_1": "no"}, {"deep": "no"}):
        (plugin,) = _plugins(graft(model, names))
        assert list(plugin.input) == ["c", "x", "n"]
        assert [value.name for value in _inside(plugin).graph.input] == ["c", "x", "n"]


def test_sequences_stay_inside_of_one_plugin(tools):
    model = _model("""g (float[4,2] x) => (float[4,2] z) <int64 two = {2}> {
        a = Neg(x)  s = SplitToSequence<axis = 0>(a, two)  y = ConcatFromSequence<axis = 0>(s)  z = Neg(y) }""")
    result = graft(model, {"SplitToSequence_1": "no sequences"})
    assert tools.ops(result) == ["Neg", "onnx_SplitToSequence_ConcatFromSequence", "Neg"]
    (plugin,) = _plugins(result)
    assert (list(plugin.input), list(plugin.output)) == (["a"], ["y"])
    assert [node.op_type for node in _inside(plugin).graph.node] == ["SplitToSequence", "ConcatFromSequence"]


def test_nodes_between_the_members_come_along(tools):
    model = _model("""g (float[4,2] x) => (float[n,2] y, float[2] w) <int64 two = {2}, int64 one = {1}> {
        s = SplitToSequence<axis = 0>(x, two)  e = SequenceAt(s, one)  n = Neg(e)
        t = SequenceInsert(s, n)  y = ConcatFromSequence<axis = 0>(t)  w = ReduceMax<keepdims = 0>(e) }""")
    result = graft(model, {"SequenceInsert_3": "no"})
    assert len(result.graph.node) == 2
    (plugin,) = _plugins(result)
    assert sorted(plugin.output) == ["e", "y"]
    assert "Neg" in [node.op_type for node in _inside(plugin).graph.node]


def test_a_tensor_of_unknown_rank_does_not_leave(tools):
    model = _model("g (float[4,4] x, int64[n] axes) => (float[4,4] z) { y = ReduceSum(x, axes)  z = Add(y, x) }")
    result = graft(model, {"ReduceSum_0": "axes are no constant"})
    assert tools.ops(result) == ["onnx_ReduceSum_Add"]


def test_order_is_kept_runnable(tools):
    model = _model("""g (float[4] x) => (float[4] y, float[4] z) {
        a = Exp(x)  b = Neg(x)  c = Tanh(b)  y = Add(a, c)  z = Mul(y, a) }""")
    result = graft(model, {"Exp_0": "1", "Tanh_2": "2", "Add_3": "3"})
    onnx.checker.check_model(result)
    assert [node.name for node in result.graph.node] == ["Exp_0", "Neg_1", "Tanh_2", "Add_3", "Mul_4"]
    assert [node.metadata_props[-1].value for node in _plugins(result)] == ["1", "2", "3"]


def test_what_cannot_be_grafted():
    model = _model("g (float[4] x) => (float[4] y) { y = Neg(x) }")
    with pytest.raises(PassError, match=r"no nodes named \['Abs_7'\]"):
        graft(model, {"Abs_7": ""})
    with pytest.raises(PassError, match="cannot become one again"):
        graft(graft(model, {"Neg_0": ""}), {"Neg_0": ""})
    sequences = _model("g (seq(float[4]) s) => (float[m] y) { y = ConcatFromSequence<axis = 0>(s) }")
    with pytest.raises(PassError, match=r"'s' is no tensor.*model's inputs or outputs"):
        graft(sequences, {"ConcatFromSequence_0": ""})
