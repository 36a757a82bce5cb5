"""RemoveNoOps."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes import RemoveNoOps

X = np.array([[1.5, -0.0, 3.0, np.inf], [-2.0, 0.0, 7.0, 8.0]], np.float32)

NO_OPS = {
    "identity": "n = Identity(a)",
    "cast": "n = Cast<to = 1>(a)",
    "cast like": "n = CastLike(a, x)",
    "dropout": "n = Dropout(a)",
    "dropout in inference mode": "n = Dropout(a, ratio, no)",
    "reshape to the same shape": "n = Reshape(a, s24)",
    "reshape by zeros": "n = Reshape(a, s0m)",
    "transpose": "n = Transpose<perm = [0, 1]>(a)",
    "concat of one": "n = Concat<axis = 0>(a)",
    "sum of one": "n = Sum(a)",
    "max of one": "n = Max(a)",
    "slice of all": "n = Slice(a, zero, big, axis)",
    "slice up to the size": "n = Slice(a, zero, four, axis)",
    "pad by nothing": "n = Pad(a, pads)",
    "expand to the same shape": "n = Expand(a, s24)",
    "expand by ones": "n = Expand(a, ones)",
    "tile once": "n = Tile(a, ones)",
    "squeeze of nothing": "n = Squeeze(a)",
    "add minus zero": "n = Add(a, mzero)",
    "subtract zero": "n = Sub(a, fzero)",
    "times one": "n = Mul(fone, a)",
    "divide by one": "n = Div(a, fone)",
    "power of one": "n = Pow(a, fone)",
}
NEAR_MISSES = {
    "cast to another type": ("n = Cast<to = 10>(a)", None),
    "dropout with a mask": ("n, mask = Dropout(a)", "its mask may be read"),
    "transpose": ("n = Transpose(a)", None),
    "reshape": ("n = Reshape(a, s42)", None),
    "slice of a part": ("n = Slice(a, zero, one, axis)", None),
    "slice from behind": ("n = Slice(a, one, four, axis)", None),
    "pad": ("n = Pad(a, pads1)", None),
    "expand": ("n = Expand(a, s124)", None),
    "tile": ("n = Tile(a, s24)", None),
    "add zero": ("n = Add(a, fzero)", "turns -0.0 into +0.0"),
    "subtract from zero": ("n = Sub(fzero, a)", None),
    "one by it": ("n = Div(fone, a)", None),
    "times one of higher rank": ("n = Mul(a, fone3)", None),
}
HEAD = """g (float[2,4] x) => (%s y) <float ratio = {0.5}, bool no = {0}, int64[2] s24 = {2, 4}, int64[2] s42 = {4, 2},
int64[2] s0m = {0, -1}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] big = {9223372036854775807},
int64[1] four = {4}, int64[1] axis = {1}, int64[4] pads = {0, 0, 0, 0}, int64[4] pads1 = {0, 0, 0, 1},
int64[2] ones = {1, 1}, int64[3] s124 = {1, 2, 4}, float[1] fone = {1}, float[1,1,1] fone3 = {1}, float fzero = {0},
float mzero = {-0.0}> """


@pytest.mark.parametrize("name", NO_OPS)
def test_removes(tools, name):
    model = tools.model(f"{HEAD % 'float[2,4]'} {{ a = Neg(x)  {NO_OPS[name]}  y = Neg(n) }}")
    result = tools.apply(RemoveNoOps(), model, rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Neg", "Neg"]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    text, reason = NEAR_MISSES[name]
    model = tools.model(f"{HEAD % 'float'} {{ a = Neg(x)  {text}  y = ReduceSum<keepdims = 0>(n) }}")
    if "float16" in text or "to = 10" in text:
        model.graph.output[0].type.tensor_type.elem_type = 10
    tools.apply(RemoveNoOps(), model, rewrites=0, refused=reason)


@pytest.mark.parametrize(
    ("text", "rewrites", "reason"),
    [
        ("n = Reshape(a, s0m)", 1, None),
        ("n = Reshape(a, sm4)", 1, None),
        ("n = Reshape(a, s24)", 1, None),  # Only N = 2 can run.
        ("n = Slice(a, zero, four, axis0)", 0, "dimension 0 is dynamic"),
        ("n = Slice(a, zero, four, axis)", 1, None),
        ("n = Expand(a, s24)", 0, "may be expanded"),
        ("n = Expand(a, s14)", 1, None),
        ("n = Squeeze(a)", 0, None),
    ],
)
def test_dynamic_shapes(tools, text, rewrites, reason):
    model = tools.model(
        "g (float[N,4] x) => (float y) <int64[2] s0m = {0, -1}, int64[2] sm4 = {-1, 4}, int64[2] s24 = {2, 4}, "
        "int64[2] s14 = {1, 4}, int64[1] zero = {0}, int64[1] four = {4}, int64[1] axis = {1}, int64[1] axis0 = {0}> "
        f"{{ a = Neg(x)  {text}  y = ReduceMax<keepdims = 0>(n) }}"
    )
    tools.apply(RemoveNoOps(), model, rewrites=rewrites, refused=reason, feeds={"x": X})


def test_two_dynamic_dimensions_may_be_regrouped(tools):
    model = tools.model(
        "g (float[N,M] x, int64[2] s) => (float[A,B] y) { a = Neg(x)  n = Reshape(a, s)  y = Neg(n) }",
    )
    tools.apply(RemoveNoOps(), model, rewrites=0, refused="more than one dimension is dynamic")


def test_squeeze_and_unsqueeze_undo_each_other(tools):
    model = tools.model(
        "g (float[2,1,4] x) => (float[2,1,4] y, float[2,4] z) <int64[1] axis = {1}, int64[1] other = {0}> "
        "{ a = Squeeze(x, axis)  b = Unsqueeze(a, axis)  y = Neg(b)  c = Unsqueeze(a, other)  z = Squeeze(c, other) }"
    )
    # b is x; z is a, which must keep the name of an output.
    result = tools.apply(RemoveNoOps(), model, rewrites=2, feeds={"x": X.reshape(2, 1, 4)})
    assert tools.ops(result) == ["Squeeze", "Neg", "Unsqueeze"]


def test_output_keeps_its_name(tools):
    model = tools.model("g (float[2,4] x) => (float[2,4] y) { a = Neg(x)  b = Exp(a)  y = Identity(a) }")
    result = tools.apply(RemoveNoOps(), model, rewrites=1, feeds={"x": X})
    assert [list(node.output) for node in result.proto.graph.node] == [["y"], ["b"]]
    assert list(result.proto.graph.node[1].input) == ["y"]


def test_input_to_output_stays(tools):
    model = tools.model("g (float[2,4] x) => (float[2,4] y, float[2,4] z) { y = Identity(x)  z = Cast<to = 1>(x) }")
    result = tools.apply(RemoveNoOps(), model, rewrites=1, refused="keeps the name of an output", feeds={"x": X})
    assert tools.ops(result) == ["Identity", "Identity"]


def test_two_outputs_of_one_tensor_stay(tools):
    model = tools.model("g (float[2,4] x) => (float[2,4] y, float[2,4] z) { y = Neg(x)  z = Identity(y) }")
    tools.apply(RemoveNoOps(), model, rewrites=0, refused="another output", feeds={"x": X})


def test_plugin_keeps_its_output(tools):
    model = tools.model("g (float[2] x) => (float[2] y, float[2] z) "
                        "{ p = trtbridge.f(x)  y = Identity(p)  q = Identity(p)  z = trtbridge.g(q) }")  # fmt: skip
    result = tools.apply(RemoveNoOps(), model, rewrites=1, refused="plugin's")
    assert [list(node.output) for node in result.proto.graph.node] == [["p"], ["y"], ["z"]]


def test_subgraph_reads_the_source(tools):
    model = tools.model(
        """g (float[2] x, bool c) => (float[2] y) {
        a = Neg(x)  i = Identity(a)
        y = If<then_branch = t () => (float[2] to) { to = Exp(i) },
               else_branch = e () => (float[2] eo) { eo = Identity(i) }>(c)
        }"""
    )
    feeds = {"x": np.ones(2, np.float32), "c": np.array(False)}
    # The Identity in the branch stays: what it reads is not made there.
    result = tools.apply(RemoveNoOps(), model, rewrites=1, refused="keeps the name", feeds=feeds)
    branches = {attribute.name: attribute.g for attribute in result.proto.graph.node[-1].attribute}
    assert list(branches["then_branch"].node[0].input) == ["a"]
    assert list(branches["else_branch"].node[0].input) == ["a"]


def test_shared_constant_keeps_its_other_reader(tools):
    model = tools.model(
        "g (float[2,4] x) => (float[2,4] y, float[2,4] z) <float one = {1}> "
        "{ a = Neg(x)  m = Mul(a, one)  y = Neg(m)  z = Sub(x, one) }"
    )
    result = tools.apply(RemoveNoOps(), model, rewrites=1, feeds={"x": X})
    assert tools.initializer(result, "one") == 1
