"""MergeReshapes."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes.merge_reshapes import MergeReshapes

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
HEAD = """g (float[%s] x) => (float[%s] y) <int64[2] s2 = {6, 20}, int64[3] s3 = {2, 12, -1}, int64[2] sm = {0, -1},
int64[4] back = {2, 3, 4, 5}, int64[4] back0 = {-1, 3, 4, 5}, int64[1] a1 = {1}, int64[1] a0 = {0}, float two = {2},
int64[1] flat = {-1}> """

MERGES = {
    "reshape, reshape": ("a = Reshape(x, s2)  b = Reshape(a, s3)", 1, ["Reshape"]),
    "flatten, unsqueeze": ("a = Flatten(x)  b = Unsqueeze(a, a1)", 1, ["Reshape"]),
    "unsqueeze, unsqueeze": ("a = Unsqueeze(x, a1)  b = Unsqueeze(a, a0)", 1, ["Unsqueeze"]),
    "unsqueeze, squeeze, flatten": ("a = Unsqueeze(x, a1)  c = Squeeze(a, a1)  b = Flatten(c)", 1, ["Flatten"]),
    "reshape and back": ("a = Reshape(x, sm)  b = Reshape(a, back)", 1, []),
    "around": ("a = Reshape(x, sm)  c = Relu(a)  d = Mul(two, c)  b = Reshape(d, back)", 1, ["Relu", "Mul"]),
    "around a gate": ("a = Flatten(x)  c = Sigmoid(a)  d = Mul(a, c)  b = Reshape(d, back)", 1, ["Sigmoid", "Mul"]),
}


@pytest.mark.parametrize("name", MERGES)
def test_merges(tools, name):
    text, rewrites, ops = MERGES[name]
    model = tools.model(f"{HEAD % ('2,3,4,5', 'A')} {{ {text}  n = Neg(b)  y = Reshape(n, flat) }}")
    assert tools.ops(tools.apply(MergeReshapes(), model, rewrites=rewrites, feeds={"x": X})) == [*ops, "Neg", "Reshape"]


@pytest.mark.parametrize(
    ("text", "rewrites", "reason"),
    [
        ("a = Reshape(x, sm)  b = Reshape(a, back0)", 1, None),
        ("a = Flatten(x)  b = Unsqueeze(a, a1)", 1, None),
        ("a = Flatten(x)  c = Relu(a)  b = Reshape(c, back0)", 0, None),  # Nothing says that -1 is N again.
    ],
)
def test_one_dynamic_size(tools, text, rewrites, reason):
    model = tools.model(f"{HEAD % ('N,3,4,5', 'A,B,C,D')} {{ {text}  y = Neg(b) }}")
    if "Unsqueeze" in text:
        del model.graph.output[0].type.tensor_type.shape.dim[3]
    tools.apply(MergeReshapes(), model, rewrites=rewrites, refused=reason, feeds={"x": X})


def test_symbols_are_copied(tools):
    model = tools.model(
        "g (float[N,M,4,5] x) => (float[N,M,20] y) <int64[1] a2 = {2}, int64[4] s = {0, 0, 1, 20}> "
        "{ a = Reshape(x, s)  b = Squeeze(a, a2)  y = Neg(b) }"
    )
    result = tools.apply(MergeReshapes(), model, rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Reshape", "Neg"]
    assert tools.initializer(result, "b_shape").tolist() == [0, 0, 20]


NEAR_MISSES = {
    "computed shape": ("a = Flatten(x)  b = Reshape(a, c)", "cannot be written as a constant"),
    "vector between": ("a = Reshape(x, p)  d = Add(a, vector)  b = Reshape(d, back)", None),
    "read between": ("a = Flatten(x)  d = Relu(a)  e = Softmax(d)  b = Reshape(d, back)", None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    text, reason = NEAR_MISSES[name]
    text = text.replace("p)", "s2)") if name == "vector between" else text
    text = text.replace("vector", "row") if name == "vector between" else text
    model = tools.model(
        f"g (float[2,3,4,5] x, int64[4] c) => (float[2,3,4,5] y) <int64[4] back = {{2, 3, 4, 5}}, "
        f"int64[2] s2 = {{24, 5}}, float[5] row = {{1, 2, 3, 4, 5}}> {{ {text}  y = Neg(b) }}"
    )
    reason = "shape of its own" if name == "vector between" else reason
    if name == "computed shape":
        for info in list(model.graph.value_info):
            if info.name == "b":
                model.graph.value_info.remove(info)
    tools.apply(MergeReshapes(), model, rewrites=0, refused=reason)


def test_constant_that_raises_the_rank(tools):
    model = tools.model(
        "g (float[4] x) => (float[4] y) <int64[2] s = {2, 2}, int64[1] f = {4}, float[1,1] one = {3}> "
        "{ a = Reshape(x, s)  b = Mul(a, one)  y = Reshape(b, f) }"
    )
    tools.apply(MergeReshapes(), model, rewrites=0, refused="shape of its own")


def test_output_keeps_its_name(tools):
    model = tools.model("g (float[2,3] x) => (float[6] z, float[2,3] y) <int64[1] f = {6}, int64[2] s = {2, 3}> "
                        "{ z = Reshape(x, f)  y = Reshape(z, s) }")  # fmt: skip
    result = tools.apply(MergeReshapes(), model, rewrites=1, feeds={"x": X[0, 0, :3, :2].reshape(2, 3)})
    assert tools.ops(result) == ["Reshape", "Identity"]


@pytest.mark.parametrize("opset", [11, 13, 20])
@pytest.mark.parametrize("op", ["Unsqueeze", "Squeeze"])
def test_every_pair_of_axes(tools, op, opset):
    pairs = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (-1,)]
    for first in pairs:
        for second in pairs:
            shape = "1,1,1,1,1" if op == "Squeeze" else "N,5"
            if opset < 13:
                body = f"a = {op}<axes = {list(first)}>(x)  b = {op}<axes = {list(second)}>(a)"
                constants = ""
            else:
                body = f"a = {op}(x, f)  b = {op}(a, s)"
                one, two = ", ".join(map(str, first)), ", ".join(map(str, second))
                constants = f"<int64[{len(first)}] f = {{{one}}}, int64[{len(second)}] s = {{{two}}}>"
            model = tools.model(f"g (float[{shape}] x) => (float[A] y) {constants} {{ {body}  c = Neg(b)  "
                                "d = Shape(c)  y = Cast<to = 1>(d) }", opset)  # fmt: skip
            feed = X[0, 0, 0, :1].reshape((1,) * 5) if op == "Squeeze" else X[0, 0]
            result = tools.apply(MergeReshapes(), model, rewrites=1, feeds={"x": feed})
            assert tools.ops(result) == [op, "Neg", "Shape", "Cast"]


def test_old_opset(tools):
    model = tools.model("g (float[2,3,4,5] x) => (float[2,1,60] y) <int64[2] s = {2, -1}> "
                        "{ a = Reshape(x, s)  y = Unsqueeze<axes = [1]>(a) }", opset=11)  # fmt: skip
    result = tools.apply(MergeReshapes(), model, rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Reshape"]
