"""MergeTransposes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trtbridge.passes.exchange import make_stand_in
from trtbridge.passes.merge_transposes import MergeTransposes

X = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
NHWC, NCHW = "Transpose<perm = [0, 2, 3, 1]>", "Transpose<perm = [0, 3, 1, 2]>"


def test_two_become_one(tools):
    model = tools.model(
        f"g (float[2,3,4,5] x) => (float[5,2,3,4] y) {{ a = {NHWC}(x)  y = Transpose<perm=[2,0,3,1]>(a) }}"
    )
    result = tools.apply(MergeTransposes(), model, rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Transpose"]
    (node,) = result.proto.graph.node
    assert list(node.attribute[0].ints) == [3, 0, 1, 2]


def test_default_permutation_reverses(tools):
    model = tools.model("g (float[2,3,4,5] x) => (float[2,3,4,5] y) { a = Transpose(x)  b = Transpose(a)  y = Neg(b) }")
    assert tools.ops(tools.apply(MergeTransposes(), model, rewrites=1, feeds={"x": X})) == ["Neg"]


def test_four_become_none(tools):
    model = tools.model(
        f"g (float[2,3,4,5] x) => (float[2,3,4,5] y) "
        f"{{ a = {NHWC}(x)  b = {NHWC}(a)  c = {NCHW}(b)  d = {NCHW}(c)  y = Neg(d) }}"
    )
    assert tools.ops(tools.apply(MergeTransposes(), model, rewrites=3, feeds={"x": X})) == ["Neg"]


def test_output_keeps_its_name(tools):
    model = tools.model(f"g (float[2,3,4,5] x) => (float[2,3,4,5] y) {{ a = {NHWC}(x)  y = {NCHW}(a) }}")
    assert tools.ops(tools.apply(MergeTransposes(), model, rewrites=1, feeds={"x": X})) == ["Identity"]


def test_first_stays_for_others(tools):
    model = tools.model(
        f"g (float[2,3,4,5] x) => (float[2,4,5,3] z, float[2,3,4,5] y) {{ z = {NHWC}(x)  b = {NCHW}(z)  y = Neg(b) }}"
    )
    result = tools.apply(MergeTransposes(), model, rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Transpose", "Neg"]


AROUND = {
    "unary": f"a = {NHWC}(x)  b = Relu(a)  c = Exp(b)  t = {NCHW}(c)",
    "gate": f"a = {NHWC}(x)  b = Sigmoid(a)  c = Mul(a, b)  t = {NCHW}(c)",
    "scalar": f"a = {NHWC}(x)  b = Mul(a, two)  t = {NCHW}(b)",
    "bias": f"a = {NHWC}(x)  b = Add(bias, a)  t = {NCHW}(b)",
    "plane": f"a = {NHWC}(x)  b = Sub(a, plane)  t = {NCHW}(b)",
    "two": f"a = {NHWC}(x)  b = {NHWC}(x2)  c = Add(a, b)  t = {NCHW}(c)",
    "clip": f"a = {NHWC}(x)  b = Clip(a, zero, six)  t = {NCHW}(b)",
    "where": f"a = {NHWC}(x)  b = {NHWC}(x2)  m = Less(a, two)  c = Where(m, b, bias)  t = {NCHW}(c)",
    "to half": f"a = {NHWC}(x)  b = Cast<to = 10>(a)  c = {NCHW}(b)  t = Cast<to = 1>(c)",
    "concat": f"a = {NHWC}(x)  b = {NHWC}(x2)  c = Concat<axis = -1>(a, b, a)  t = {NCHW}(c)",
    "concat with a constant": f"a = {NHWC}(x)  c = Concat<axis = 1>(a, row)  t = {NCHW}(c)",
}
HEAD = """g (float[%s,3,4,5] x, float[%s,3,4,5] x2) => (float y) <float two = {2}, float zero = {0}, float six = {6},
float[3] bias = {1, 2, 3}, float[4,1,3] plane = {1,2,3,4,5,6,7,8,9,10,11,12},
float[2,1,5,3] row = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30}> """


@pytest.mark.parametrize("batch", ["2", "N"])
@pytest.mark.parametrize("name", AROUND)
def test_around_elementwise_ops(tools, name, batch):
    # A weighted sum, so that an element in the wrong place is seen.
    tail = "w = CumSum(t, axis)  w2 = Mul(w, t)  y = ReduceSum<keepdims = 0>(w2)"
    model = tools.model(
        HEAD.replace("two = {2}", "two = {2}, int64 axis = {3}", 1) % (batch, batch) + f"{{ {AROUND[name]}  {tail} }}"
    )
    result = tools.apply(MergeTransposes(), model, rewrites=1, feeds={"x": X, "x2": X[::-1].copy()})
    assert "Transpose" not in tools.ops(result)


NEAR_MISSES = {
    "another permutation": (f"a = {NHWC}(x)  b = Relu(a)  t = {NHWC}(b)", "without the Transpose"),
    "one side is not transposed": (f"a = {NHWC}(x)  b = Add(a, z)  t = {NCHW}(b)", "'z' flows in without"),
    "read elsewhere": (f"a = {NHWC}(x)  b = Relu(a)  t = {NCHW}(b)  u = ReduceSum<keepdims = 0>(b)", None),
    "another op between": (f"a = {NHWC}(x)  b = Softmax(a)  t = {NCHW}(b)", None),
    "rank grows": (f"a = {NHWC}(x)  b = Add(a, high)  c = Squeeze(b, axis0)  t = {NCHW}(c)", None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    text, reason = NEAR_MISSES[name]
    outputs = "float[A,B,C,D] t, float u" if "u =" in text else "float[A,B,C,D] t"
    model = tools.model(
        f"g (float[2,3,4,5] x, float[2,4,5,3] z) => ({outputs}) "
        f"<float[1,1,1,1,1] high = {{1}}, int64[1] axis0 = {{0}}> {{ {text} }}"
    )
    tools.apply(MergeTransposes(), model, rewrites=0, refused=reason)


@pytest.mark.parametrize("sizes", ["2,3,4,5", "B,3,S,5", "B,H,S,5", "3,3,3,3"])
@pytest.mark.parametrize("group", ["front", "back"])
def test_between_reshapes(tools, sizes, group):
    numbers = [
        int(size) if size.isdigit() else number for size, number in zip(sizes.split(","), (2, 3, 4, 5), strict=True)
    ]
    a, b, c, d = sizes.split(",")
    one, three = (f"P,{c},{d}", f"{a},{b},{d},{c}") if group == "front" else (f"{a},{b},P", f"{b},{a},{c},{d}")
    perm = "[0, 2, 1]" if group == "front" else "[1, 0, 2]"
    model = tools.model(
        f"g (float[{sizes}] x, int64[3] s, int64[4] t) => (float[{three}] y) "
        f"{{ p = Reshape(x, s)  q = Transpose<perm = {perm}>(p)  r = Reshape(q, t)  y = Neg(r) }}"
    )
    del model.graph.value_info[:]
    for name, shape in (("p", one), ("r", three)):
        dims = [int(size) if size.isdigit() else size for size in shape.split(",")]
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, 1, dims))
    x = np.arange(np.prod(numbers), dtype=np.float32).reshape(numbers)
    a, b, c, d = numbers
    s = [a * b, c, d] if group == "front" else [a, b, c * d]
    t = [a, b, d, c] if group == "front" else [b, a, c, d]
    feeds = {"x": x, "s": np.array(s), "t": np.array(t)}
    result = tools.apply(MergeTransposes(), model, rewrites=1, feeds=feeds)
    assert tools.ops(result) == ["Transpose", "Neg"]


@pytest.mark.parametrize(
    "text",
    [
        "p = Reshape(x, s)  q = Transpose<perm = [0, 2, 1]>(p)  r = Reshape(q, other)",  # Other heads.
        "p = Reshape(x, two)  q = Transpose<perm = [1, 0]>(p)  r = Reshape(q, t)",  # Two groups.
        "p = Reshape(x, s)  q = Transpose<perm = [2, 0, 1]>(p)  r = Reshape(q, t)",
    ],
)
def test_other_groups_stay(tools, text):
    model = tools.model(
        "g (float[2,3,4,5] x) => (float[A,B,C,D] y) <int64[3] s = {6, 4, 5}, int64[4] t = {2, 3, 5, 4}, "
        f"int64[4] other = {{3, 2, 5, 4}}, int64[2] two = {{6, 20}}> {{ {text}  y = Neg(r) }}"
    )
    tools.apply(MergeTransposes(), model, rewrites=0, feeds={"x": X})


def test_constant_of_higher_rank_stays(tools):
    model = tools.model(
        "g (float[2,3] x) => (float[3,1,2] t) <float[1,1,1] high = {1}> "
        "{ a = Transpose<perm = [1, 0]>(x)  b = Add(a, high)  t = Transpose<perm = [1, 0, 2]>(b) }"
    )
    tools.apply(MergeTransposes(), model, rewrites=0, refused="without the Transpose")


def test_shared_weight_is_not_copied(tools):
    model = tools.model(
        "g (float[2,512] x, float[512,2] q) => (float[2,512] y, float[512,2] v) "
        "{ a = Transpose<perm = [1, 0]>(x)  b = Add(a, w)  t = Transpose<perm = [1, 0]>(b)  y = Neg(t)  v = Mul(w, q) }"
    )
    values = np.random.default_rng(1).standard_normal((512, 2)).astype(np.float32)
    weights = tools.stand_in(model, "w", values)
    tools.apply(MergeTransposes(), model, weights, rewrites=0, refused="would make a copy")


def test_weight_of_its_own_is_transposed(tools):
    model = tools.model(
        "g (float[2,512] x) => (float[2,512] y) "
        "{ a = Transpose<perm = [1, 0]>(x)  b = Add(a, w)  t = Transpose<perm = [1, 0]>(b)  y = Neg(t) }"
    )
    values = np.random.default_rng(1).standard_normal((512, 2)).astype(np.float32)
    weights = tools.stand_in(model, "w", values)
    feeds = {"x": np.ones((2, 512), np.float32)}
    result = tools.apply(MergeTransposes(), model, weights, rewrites=1, feeds=feeds)
    assert tools.ops(result) == ["Add", "Neg"]
    assert list(result.weights) == ["w_transposed"]
    np.testing.assert_array_equal(result.weights["w_transposed"].numpy(), values.T)


def test_large_weight_is_not_read(tools):

    model = tools.model(
        "g (float[256,512] x) => (float[256,512] y) "
        "{ a = Transpose<perm = [1, 0]>(x)  b = Add(a, w)  t = Transpose<perm = [1, 0]>(b)  y = Neg(t) }"
    )
    weight = tools.Unreadable("w", ir.DataType.FLOAT, [512, 256])
    model.graph.initializer.append(make_stand_in("w", weight))
    tools.apply(MergeTransposes(), model, {"w": weight}, rewrites=0, refused="has 524,288 bytes")


def test_subgraph_reads_what_lies_between(tools):
    model = tools.model(
        f"""g (float[2,3,4,5] x, bool c) => (float[2,3,4,5] y, float[2,4,5,3] z) {{
        a = {NHWC}(x)  b = Relu(a)  y = {NCHW}(b)
        z = If<then_branch = t () => (float[2,4,5,3] to) {{ to = Exp(b) }},
               else_branch = e () => (float[2,4,5,3] eo) {{ d = {NCHW}(b)  eo = {NHWC}(d) }}>(c)
        }}"""
    )
    feeds = {"x": X, "c": np.array(False)}
    result = tools.apply(MergeTransposes(), model, rewrites=1, feeds=feeds)
    assert tools.ops(result) == ["Transpose", "Relu", "Transpose", "If"]


def test_long_chain(tools):
    steps = "  ".join(f"a{i + 1} = {NHWC if i % 2 == 0 else NCHW}(a{i})" for i in range(2000))
    model = tools.model(f"g (float[2,3,4,5] a0) => (float[2,3,4,5] y) {{ {steps}  y = Neg(a2000) }}")
    result = tools.apply(MergeTransposes(), model, rewrites=1000, feeds={"a0": X})
    assert tools.ops(result) == ["Neg"]
