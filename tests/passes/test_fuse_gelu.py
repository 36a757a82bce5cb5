"""FuseGelu."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtbridge.passes.fuse_gelu import FuseGelu

X = np.linspace(-6, 6, 64, dtype=np.float32).reshape(2, 32)
CONSTANTS = """{t} half = {{0.5}}, {t} one = {{1}}, {t}[1] two = {{2}}, {t} three = {{3}},
{t} root2 = {{1.4142135}}, {t} inverse = {{0.70710677}}, {t} cube = {{0.044715}}, {t} tan = {{0.7978846}},
{t} cubed = {{0.0356774}}, {t} minus = {{-0.5}}"""
ERF = {
    "torch": "h = Mul(x, half)  d = Div(x, root2)  e = Erf(d)  a = Add(e, one)  g = Mul(h, a)",
    "half last": "d = Div(x, root2)  e = Erf(d)  a = Add(one, e)  h = Mul(x, a)  g = Mul(h, half)",
    "half on the gate": "d = Mul(inverse, x)  e = Erf(d)  a = Add(e, one)  h = Mul(a, half)  g = Mul(h, x)",
    "halved by two": "d = Mul(inverse, x)  e = Erf(d)  a = Add(e, one)  h = Mul(a, x)  g = Div(h, two)",
}
TANH = {
    "pow": "h = Mul(x, half)  p = Pow(x, three)  c = Mul(p, cube)  s = Add(x, c)  m = Mul(s, tan)  e = Tanh(m)  "
    "a = Add(e, one)  g = Mul(h, a)",
    "products": "q = Mul(x, x)  p = Mul(q, x)  c = Mul(cube, p)  s = Add(c, x)  m = Mul(tan, s)  e = Tanh(m)  "
    "a = Add(one, e)  h = Mul(x, a)  g = Mul(half, h)",
    "factored": "q = Mul(x, x)  c = Mul(cube, q)  s = Add(one, c)  n = Mul(x, tan)  m = Mul(n, s)  e = Tanh(m)  "
    "a = Add(one, e)  h = Mul(x, a)  g = Mul(half, h)",
    "left to right": "n = Mul(x, cube)  q = Mul(n, x)  r = Mul(q, x)  s = Add(x, r)  m = Mul(tan, s)  e = Tanh(m)  "
    "a = Add(one, e)  h = Mul(half, x)  g = Mul(h, a)",
}


def _model(tools, text, dtype="float", opset=20, outputs="", shape="N,32"):
    constants = CONSTANTS.format(t=dtype)
    return tools.model(
        f"g ({dtype}[{shape}] z) => ({dtype}[{shape}] y{outputs}) <{constants}> {{ x = Neg(z)  {text}  y = Neg(g) }}",
        opset,
    )


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


@pytest.mark.parametrize("name", [*ERF, *TANH])
@pytest.mark.parametrize("shape", ["N,32", "2,32"])
def test_fuses(tools, name, shape):
    model = _model(tools, {**ERF, **TANH}[name], shape=shape)
    result = tools.apply(FuseGelu(), model, rewrites=1, feeds={"z": X}, tolerance=1e-6)
    assert tools.ops(result) == ["Neg", "Gelu", "Neg"]
    approximate = [a.s for a in result.proto.graph.node[1].attribute]
    assert approximate == ([b"tanh"] if name in TANH else [])


NEAR_MISSES = {
    "another half": (ERF["torch"].replace("half", "tan"), None),
    "another root": (ERF["torch"].replace("root2", "three"), None),
    "another gate": (ERF["torch"].replace("one", "two"), None),
    "another tensor": (ERF["torch"].replace("h = Mul(x, half)", "h = Mul(z, half)"), None),
    "one over it": (ERF["torch"].replace("Div(x, root2)", "Div(root2, x)"), None),
    "divided by the gate": (ERF["torch"].replace("Mul(h, a)", "Div(h, a)"), None),
    "another cube": (TANH["pow"].replace("p, cube", "p, cubed"), None),
    "a square": (TANH["pow"].replace("three)", "two)"), None),
    "two and one swapped": (TANH["factored"].replace("Add(one, c)", "Add(x, c)"), None),
    "minus": (ERF["torch"].replace("half", "minus"), None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    text, reason = NEAR_MISSES[name]
    tools.apply(FuseGelu(), _model(tools, text), rewrites=0, refused=reason)


@pytest.mark.parametrize("inner", ["h", "d", "e", "a"])
def test_part_read_elsewhere_stays(tools, inner):
    model = _model(tools, ERF["torch"] + f"  w = Exp({inner})", outputs=", float[N,32] w")
    reason = None if inner == "h" else f"'{inner}' inside it is read elsewhere"
    tools.apply(FuseGelu(), model, rewrites=0, refused=reason)


def test_old_opset_stays(tools):
    tools.apply(FuseGelu(), _model(tools, ERF["torch"], opset=19), rewrites=0, refused="came with opset 20")


def test_two_in_a_row_and_in_a_branch(tools):
    model = tools.model(
        f"g (float[2,32] x, bool c) => (float[2,32] y) <{CONSTANTS.format(t='float')}> {{ {ERF['torch']}  "
        "y = If<then_branch = t () => (float[2,32] to) { h2 = Mul(g, half)  d2 = Div(g, root2)  e2 = Erf(d2)  "
        "a2 = Add(e2, one)  to = Mul(h2, a2) }, else_branch = f () => (float[2,32] eo) { eo = Neg(g) }>(c) }"
    )
    feeds = {"x": X, "c": np.array(True)}
    result = tools.apply(FuseGelu(), model, rewrites=2, feeds=feeds, tolerance=1e-6)
    assert tools.ops(result) == ["Gelu", "If"]


@pytest.mark.parametrize("dtype", [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
@pytest.mark.parametrize("form", [ERF["torch"], TANH["pow"]])
def test_builds(tools, rtx_refusal, dtype, form):
    result = tools.apply(FuseGelu(), _retyped(_model(tools, form, shape="2,32"), dtype), rewrites=1)
    assert "Gelu" in tools.ops(result)
    assert rtx_refusal(result.proto) is None
