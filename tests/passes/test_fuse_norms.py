"""FuseLayerNorm, FuseRmsNorm and FuseGroupNorm."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from trtbridge.passes.exchange import make_stand_in
from trtbridge.passes.fuse_group_norm import FuseGroupNorm
from trtbridge.passes.fuse_layer_norm import FuseLayerNorm
from trtbridge.passes.fuse_rms_norm import FuseRmsNorm

RANDOM = np.random.default_rng(0)
X = (RANDOM.standard_normal((2, 3, 8)) * 3 + 1).astype(np.float32)
HEAD = """g ({t}[{shape}] z{more}) => ({t}[{shape}] y) <{t}[8] w = {{1, 2, 3, 4, 5, 6, 7, 8}},
{t}[8] b = {{8, 7, 6, 5, 4, 3, 2, 1}}, {t} eps = {{0.00001}}, {t} two = {{2}}, {t} one = {{1}}, {t} mh = {{-0.5}},
{t} three = {{3}}, int64[1] ax = {{-1}}, int64[1] ax1 = {{1}}, int64[2] ax12 = {{1, 2}},
{t}[1,8] w2 = {{1, 2, 3, 4, 5, 6, 7, 8}}> """


def _model(tools, text, opset=23, t="float", shape="N,3,8", more="", x="x = Neg(z)"):
    return tools.model(HEAD.format(t=t, shape=shape, more=more) + f"{{ {x}  {text}  y = Neg(o) }}", opset)


def _retyped(model, element):
    """The same model with another type for float."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for info in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = element
    return model


CENTRE = "m = ReduceMean(x, ax)  d = Sub(x, m)  "
LAYER = {
    "pow, div": CENTRE + "s = Pow(d, two)  v = ReduceMean(s, ax)  e = Add(v, eps)  r = Sqrt(e)  n = Div(d, r)  "
    "a = Mul(n, w)  o = Add(a, b)",
    "mul, reciprocal": CENTRE + "s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  r = Sqrt(e)  "
    "i = Reciprocal(r)  n = Mul(d, i)  a = Mul(w, n)  o = Add(b, a)",
    "one over": CENTRE + "s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  r = Sqrt(e)  i = Div(one, r)  "
    "n = Mul(i, d)  a = Mul(w, n)  o = Add(b, a)",
    "power": CENTRE + "s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  i = Pow(e, mh)  n = Mul(i, d)  "
    "a = Mul(w, n)  o = Add(b, a)",
    "scale first": CENTRE + "s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  r = Sqrt(e)  c = Mul(w, d)  "
    "a = Div(c, r)  o = Add(b, a)",
    "twice": CENTRE + "m2 = ReduceMean(x, ax)  d2 = Sub(x, m2)  s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  "
    "r = Sqrt(e)  c = Mul(d2, w)  a = Div(c, r)  o = Add(b, a)",
    "dropped dimension": CENTRE + "s = Mul(d, d)  f = ReduceMean<keepdims = 0>(s, ax)  v = Unsqueeze(f, ax)  "
    "e = Add(eps, v)  r = Sqrt(e)  n = Div(d, r)  a = Mul(w, n)  o = Add(b, a)",
}
PLAIN = CENTRE + "s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  r = Sqrt(e)  o = Div(d, r)"


@pytest.mark.parametrize("shape", ["N,3,8", "2,3,8"])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(tools, name, shape):
    model = _model(tools, LAYER[name], shape=shape, opset=18)
    result = tools.apply(FuseLayerNorm(), model, rewrites=1, feeds={"z": X}, tolerance=2e-6)
    assert tools.ops(result) == ["Neg", "LayerNormalization", "Neg"]
    assert list(result.proto.graph.node[1].input) == ["x", "w", "b"]


@pytest.mark.parametrize(
    ("text", "ops", "inputs"),
    [
        (PLAIN, [], ["x", "unit_scale"]),
        (PLAIN.replace("o =", "n =") + "  o = Mul(n, w)", [], ["x", "w"]),
        (PLAIN.replace("o =", "n =") + "  o = Add(n, b)", [], ["x", "unit_scale", "b"]),
        (PLAIN.replace("o =", "n =") + "  o = Mul(n, three)", ["Mul"], ["x", "unit_scale"]),
        (PLAIN.replace("o =", "n =") + "  k = Mul(n, w2)  o = Add(k, b)", ["Mul", "Add"], ["x", "unit_scale"]),
        (PLAIN.replace("ax)", "ax12)"), [], ["x", "unit_scale"]),
    ],
)
def test_layer_norm_without_scale_or_bias(tools, text, ops, inputs):
    model = _model(tools, text, opset=18)
    result = tools.apply(FuseLayerNorm(), model, rewrites=1, feeds={"z": X}, tolerance=2e-6)
    assert tools.ops(result) == ["Neg", "LayerNormalization", *ops, "Neg"]
    assert list(result.proto.graph.node[1].input) == inputs


def test_layer_norm_with_axes_as_attributes(tools):
    text = LAYER["pow, div"].replace("ReduceMean(x, ax)", "ReduceMean<axes = [2]>(x)")
    text = text.replace("ReduceMean(s, ax)", "ReduceMean<axes = [-1]>(s)")
    result = tools.apply(FuseLayerNorm(), _model(tools, text, 17), rewrites=1, feeds={"z": X}, tolerance=2e-6)
    assert tools.ops(result) == ["Neg", "LayerNormalization", "Neg"]


def test_origin_is_kept(tools):
    model = _model(tools, LAYER["pow, div"])
    for node in model.graph.node:
        node.metadata_props.add(key="trtbridge.origin", value=node.output[0])
    result = tools.apply(FuseLayerNorm(), model, rewrites=1)
    fused = result.proto.graph.node[1]
    assert (list(fused.output), fused.metadata_props[0].value) == (["o"], "o")


def test_in_a_branch(tools):
    model = _model(tools, "k = Mul(x, two)  o = If<then_branch = f () => (float[A,B,C] to) { "
                   + LAYER["pow, div"].replace("o = Add", "to = Add")
                   + " }, else_branch = g () => (float[A,B,C] eo) { eo = Neg(k) }>(c)", more=", bool c")  # fmt: skip
    feeds = {"z": X, "c": np.array(True)}
    result = tools.apply(FuseLayerNorm(), model, rewrites=1, feeds=feeds, tolerance=2e-6)
    branch = next(a.g for a in result.proto.graph.node[-2].attribute if a.name == "then_branch")
    assert [node.op_type for node in branch.node] == ["LayerNormalization"]


def test_parts_outside_the_branch_stay(tools):
    # The root is made outside, where both branches may read it.
    text = PLAIN.replace("o = Div(d, r)", "o = If<then_branch = f () => (float[A,B,C] to) { to = Div(d, r) }, "
                         "else_branch = g () => (float[A,B,C] eo) { eo = Mul(d, r) }>(c)")  # fmt: skip
    tools.apply(FuseLayerNorm(), _model(tools, text, more=", bool c"), rewrites=0)


def test_computed_scale(tools):
    text = "k = Exp(q)  " + PLAIN.replace("o =", "n =") + "  o = Mul(n, k)"
    model = _model(tools, text, more=", float[8] q")
    result = tools.apply(FuseLayerNorm(), model, rewrites=1, feeds={"z": X, "q": X[0, 0]}, tolerance=2e-6)
    assert tools.ops(result) == ["Neg", "Exp", "LayerNormalization", "Neg"]


LAYER_MISSES = {
    "another axis": (PLAIN.replace("ax)", "ax1)"), "not over the last ones"),
    "two axes differ": (PLAIN.replace("(s, ax)", "(s, ax12)"), None),
    "not the mean": (PLAIN.replace("Sub(x, m)", "Sub(m, x)"), None),
    "cube": (PLAIN.replace("Mul(d, d)", "Pow(d, three)"), None),
    "another numerator": (PLAIN.replace("Div(d, r)", "Div(x, r)"), None),
    "no root": (PLAIN.replace("Div(d, r)", "Div(d, e)"), None),
    "read inside": (PLAIN.replace("o =", "n =") + "  o = Add(n, v)", "'v' inside it is read elsewhere"),
}


@pytest.mark.parametrize("name", LAYER_MISSES)
def test_layer_norm_left(tools, name):
    text, reason = LAYER_MISSES[name]
    tools.apply(FuseLayerNorm(), _model(tools, text), rewrites=0, refused=reason)


def test_layer_norm_left_by_type_size_and_opset(tools):
    tools.apply(FuseLayerNorm(), _model(tools, PLAIN, t="double"), rewrites=0, refused="in double")
    tools.apply(FuseLayerNorm(), _model(tools, PLAIN, shape="2,3,L"), rewrites=0, refused="dynamic size")
    text = PLAIN.replace("(x, ax)", "<axes = [2]>(x)").replace("(s, ax)", "<axes = [2]>(s)")
    tools.apply(FuseLayerNorm(), _model(tools, text, opset=16), rewrites=0, refused="came with opset 17")


def test_shared_weights_stay_shared_and_unread(tools):
    two = "m = ReduceMean(x, ax)  d = Sub(x, m)  s = Mul(d, d)  v = ReduceMean(s, ax)  e = Add(eps, v)  r = Sqrt(e)  " \
          "n = Div(d, r)  a = Mul(n, w)  o = Add(a, w)"  # fmt: skip
    model = tools.model(
        f"g (float[2,512] x) => (float[2,512] o, float[2,512] q) <float eps = {{0.1}}, int64[1] ax = {{-1}}> "
        f"{{ {two}  q = Mul(x, w) }}"
    )
    weight = tools.Unreadable("w", ir.DataType.FLOAT, [512])
    model.graph.initializer.append(make_stand_in("w", weight))
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    result = tools.apply(FuseLayerNorm(), model, {"w": weight}, rewrites=1)
    assert [list(node.input) for node in result.proto.graph.node] == [["x", "w", "w"], ["x", "w"]]
    assert list(result.weights) == ["w"]


def test_half_overflows_no_more(tools):
    # 300 ** 2 is beyond float16: written out the result is 0, as one op it is right.
    values = np.linspace(-600, 600, 48).reshape(2, 3, 8)
    model = _retyped(_model(tools, PLAIN), onnx.TensorProto.FLOAT16)
    fused = tools.apply(FuseLayerNorm(), model, rewrites=1).proto
    actual = onnxruntime.InferenceSession(fused.SerializeToString()).run(None, {"z": values.astype(np.float16)})[0]
    centred = values - values.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(actual, expected, atol=5e-3)


RMS = {
    "reciprocal": "s = Pow(x, two)  v = ReduceMean(s, ax)  e = Add(v, eps)  r = Sqrt(e)  i = Reciprocal(r)  "
    "n = Mul(x, i)  o = Mul(w, n)",
    "div": "s = Mul(x, x)  v = ReduceMean(s, ax)  e = Add(v, eps)  r = Sqrt(e)  n = Div(x, r)  o = Mul(n, w)",
    "scale first": "s = Mul(x, x)  v = ReduceMean(s, ax)  e = Add(v, eps)  r = Sqrt(e)  c = Mul(x, w)  o = Div(c, r)",
}


@pytest.mark.parametrize("shape", ["N,3,8", "2,3,8"])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(tools, name, shape):
    model = _model(tools, RMS[name], shape=shape)
    result = tools.apply(FuseRmsNorm(), model, rewrites=1, feeds={"z": X}, tolerance=2e-6)
    assert tools.ops(result) == ["Neg", "RMSNormalization", "Neg"]
    assert list(result.proto.graph.node[1].input) == ["x", "w"]


@pytest.mark.parametrize(("scale", "ops", "scales"), [("w", [], "w"), ("w2", ["Cast", "Mul"], "unit_scale")])
def test_rms_norm_between_casts(tools, scale, ops, scales):
    text = "h = Cast<to = 1>(x)  s = Pow(h, ftwo)  v = ReduceMean(s, ax)  e = Add(v, feps)  r = Sqrt(e)  " \
           f"i = Reciprocal(r)  n = Mul(h, i)  c = Cast<to = 10>(n)  o = Mul(c, {scale})"  # fmt: skip
    model = tools.model(
        "g (float16[N,3,8] x) => (float16[N,3,8] o) <float ftwo = {2}, float feps = {0.00001}, int64[1] ax = {-1}, "
        f"float16[8] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float16[1,8] w2 = {{1, 2, 3, 4, 5, 6, 7, 8}}> {{ {text} }}",
        23,
    )
    result = tools.apply(FuseRmsNorm(), model, rewrites=1, feeds={"x": X.astype(np.float16)}, tolerance=2e-3)
    before = ["Cast"] if ops else []
    assert tools.ops(result) == [*before, "RMSNormalization", *ops]
    assert result.proto.graph.node[len(before)].input[1] == scales


RMS_MISSES = {
    "layer norm": (LAYER["pow, div"], None),
    "another axis": (RMS["div"].replace("s, ax)", "s, ax1)"), "not over the last ones"),
    "another numerator": (RMS["div"].replace("Div(x, r)", "Div(z, r)"), None),
    "cube": (RMS["div"].replace("Mul(x, x)", "Mul(x, z)"), None),
    "read inside": (RMS["div"].replace("o =", "k =") + "  o = Mul(k, r)", "'r' inside it is read elsewhere"),
}


@pytest.mark.parametrize("name", RMS_MISSES)
def test_rms_norm_left(tools, name):
    text, reason = RMS_MISSES[name]
    tools.apply(FuseRmsNorm(), _model(tools, text), rewrites=0, refused=reason)


def test_rms_norm_of_an_old_opset_stays(tools):
    tools.apply(FuseRmsNorm(), _model(tools, RMS["div"], 22), rewrites=0, refused="came with opset 23")


G = (RANDOM.standard_normal((2, 8, 4, 5)) * 3 + 1).astype(np.float32)


def _group(tools, text, opset=21, shape="2,8,4,5", back="0, 8, 4, 5", t="float"):
    return tools.model(
        f"g ({t}[{shape}] x) => ({t}[{shape}] y) <int64[3] s = {{0, 4, -1}}, int64[4] back = {{{back}}}, "
        f"{t}[4] ones = {{1, 1, 1, 1}}, {t}[4] zeros = {{0, 0, 0, 0}}, {t}[4] own = {{1, 2, 1, 1}}, "
        f"{t}[8,1,1] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, {t}[1,8,1,1] b = {{8, 7, 6, 5, 4, 3, 2, 1}}, "
        f"{t}[5] row = {{1, 2, 3, 4, 5}}> {{ {text}  y = Neg(o) }}",
        opset,
    )


GROUP = "a = Reshape(x, s)  n = InstanceNormalization<epsilon = 0.001>(a, ones, zeros)  r = Reshape(n, back)  "


@pytest.mark.parametrize("shape", ["2,8,4,5", "N,8,4,5"])
@pytest.mark.parametrize(
    ("tail", "ops", "inputs"),
    [
        ("m = Mul(r, w)  o = Add(m, b)", [], ["x", "w_flat", "b_flat"]),
        ("o = Identity(r)", ["Identity"], ["x", "unit_scale", "no_bias"]),
        ("o = Mul(w, r)", [], ["x", "w_flat", "no_bias"]),
        ("o = Mul(r, row)", ["Mul"], ["x", "unit_scale", "no_bias"]),
    ],
)
def test_group_norm(tools, shape, tail, ops, inputs):
    model = _group(tools, GROUP + tail, shape=shape)
    if shape.startswith("N"):
        # Shape inference names what a 0 copies, so the batch is one size all through.
        assert any(info.name == "r" for info in model.graph.value_info)
    result = tools.apply(FuseGroupNorm(), model, rewrites=1, feeds={"x": G}, tolerance=2e-6)
    assert tools.ops(result) == ["GroupNormalization", *ops, "Neg"]
    assert list(result.proto.graph.node[0].input) == inputs


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (GROUP.replace("ones", "own") + "o = Identity(r)", {}, "scale or bias of its own"),
        (GROUP + "o = Identity(r)", {"opset": 20}, "came with opset 21"),
        (GROUP + "t = Reshape(r, s)  u = Add(t, a)  o = Reshape(u, back)", {}, "'a' inside it is read elsewhere"),
        (GROUP + "o = Identity(r)", {"t": "double"}, "float64"),
    ],
)
def test_group_norm_left(tools, text, options, reason):
    tools.apply(FuseGroupNorm(), _group(tools, text, **options), rewrites=0, refused=reason)


def test_other_groups_stay(tools):
    model = tools.model(
        "g (float[2,6,4] x) => (float[2,6,4] y) <int64[3] s = {2, 4, 6}, int64[3] back = {2, 6, 4}, "
        "float[4] ones = {1, 1, 1, 1}, float[4] zeros = {0, 0, 0, 0}> "
        "{ a = Reshape(x, s)  n = InstanceNormalization(a, ones, zeros)  y = Reshape(n, back) }", 21,
    )  # fmt: skip
    tools.apply(FuseGroupNorm(), model, rewrites=0, refused="not made of whole channels")


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_builds(tools, rtx_refusal, dtype):
    for item, model in (
        (FuseLayerNorm(), _model(tools, LAYER["pow, div"], shape="2,3,8")),
        (FuseRmsNorm(), _model(tools, RMS["div"], shape="2,3,8")),
        (FuseGroupNorm(), _group(tools, GROUP + "m = Mul(r, w)  o = Add(m, b)")),
    ):
        result = tools.apply(item, _retyped(model, dtype), rewrites=1)
        assert rtx_refusal(result.proto) is None, item
