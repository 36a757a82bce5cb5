"""FuseSilu."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes.fuse_silu import FuseSilu

X = np.linspace(-6, 6, 64, dtype=np.float32).reshape(2, 32)
FORMS = {
    "silu": ("s = Sigmoid(x)  g = Mul(x, s)", None),
    "silu, gate first": ("s = Sigmoid(x)  g = Mul(s, x)", None),
    "quick gelu": ("q = Mul(x, a)  s = Sigmoid(q)  g = Mul(x, s)", 1.702),
    "quick gelu, constant first": ("q = Mul(a, x)  s = Sigmoid(q)  g = Mul(s, x)", 1.702),
}


def _model(tools, text, opset=24, outputs="", shape="N,32"):
    return tools.model(
        f"g (float[{shape}] z) => (float[{shape}] y{outputs}) <float a = {{1.702}}> "
        f"{{ x = Neg(z)  {text}  y = Neg(g) }}",
        opset,
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", ["N,32", "2,32"])
def test_fuses(tools, name, shape):
    text, alpha = FORMS[name]
    result = tools.apply(FuseSilu(), _model(tools, text, shape=shape), rewrites=1, feeds={"z": X}, tolerance=1e-6)
    assert tools.ops(result) == ["Neg", "Swish", "Neg"]
    found = [a.f for a in result.proto.graph.node[1].attribute]
    assert found == ([] if alpha is None else [pytest.approx(alpha)])


@pytest.mark.parametrize(
    "text",
    [
        "s = Sigmoid(z)  g = Mul(x, s)",  # a gate of something else
        "s = Sigmoid(x)  g = Add(x, s)",
        "q = Add(x, a)  s = Sigmoid(q)  g = Mul(x, s)",
        "q = Mul(x, x)  s = Sigmoid(q)  g = Mul(x, s)",
        "s = Tanh(x)  g = Mul(x, s)",
    ],
)
def test_leaves(tools, text):
    tools.apply(FuseSilu(), _model(tools, text), rewrites=0)


@pytest.mark.parametrize("inner", ["q", "s"])
def test_part_read_elsewhere_stays(tools, inner):
    model = _model(tools, FORMS["quick gelu"][0] + f"  w = Exp({inner})", outputs=", float[N,32] w")
    tools.apply(FuseSilu(), model, rewrites=0, refused=f"'{inner}' inside it is read elsewhere")


def test_other_opsets_and_types_stay(tools):
    model = _model(tools, FORMS["silu"][0], opset=23)
    tools.apply(FuseSilu(), model, rewrites=0, refused="came with opset 24")
    double = tools.model("g (double[4] x) => (double[4] y) { s = Sigmoid(x)  y = Mul(x, s) }", 24)
    tools.apply(FuseSilu(), double, rewrites=0)


def test_in_a_branch(tools):
    model = tools.model(
        "g (float[2,32] x, bool c) => (float[2,32] y) { s = Sigmoid(x)  g = Mul(x, s)  "
        "y = If<then_branch = t () => (float[2,32] to) { s2 = Sigmoid(g)  to = Mul(g, s2) }, "
        "else_branch = f () => (float[2,32] eo) { eo = Neg(g) }>(c) }",
        24,
    )
    feeds = {"x": X, "c": np.array(True)}
    result = tools.apply(FuseSilu(), model, rewrites=2, feeds=feeds, tolerance=1e-6)
    assert tools.ops(result) == ["Swish", "If"]


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_builds(tools, rtx_refusal, dtype):
    text = f"g ({dtype}[2,32] x) => ({dtype}[2,32] y) {{ s = Sigmoid(x)  y = Mul(x, s) }}"
    result = tools.apply(FuseSilu(), tools.model(text, 24), rewrites=1)
    assert tools.ops(result) == ["Swish"]
    assert rtx_refusal(result.proto) is None
