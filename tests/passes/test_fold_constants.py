"""FoldConstants."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trtbridge.passes import FoldConstants

X24 = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}


def test_folds_arithmetic_on_constants(tools):
    model = tools.model(
        "g (float[2,4] x) => (float[2,4] y) <float[1] two = {2}> "
        "{ s = Sqrt(two)  t = Mul(s, s)  c = Constant<value_float = 3.0>()  u = Add(x, t)  y = Mul(u, c) }"
    )
    result = tools.apply(FoldConstants(), model, rewrites=3, feeds=X24, tolerance=1e-6)
    assert tools.ops(result) == ["Add", "Mul"]
    np.testing.assert_allclose(tools.initializer(result, "t"), [2.0], rtol=1e-6)
    assert tools.initializer(result, "c") == 3.0


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = int64[2] {1, 2}", np.array([1, 2])),
        ("value_ints = [3, 4]", np.array([3, 4])),
        ("value_int = 5", np.array(5)),
        ("value_floats = [1.5, 2.0]", np.array([1.5, 2.0], np.float32)),
    ],
)
def test_constant_nodes_become_initializers(tools, attribute, expected):
    dtype = "float" if expected.dtype == np.float32 else "int64"
    model = tools.model(
        f"g ({dtype}[2] x) => ({dtype}[2] y) {{ c = Constant<{attribute}>()  y = Add(x, c) }}",
    )
    result = tools.apply(FoldConstants(), model, rewrites=1, feeds={"x": np.ones(2, expected.dtype)})
    value = tools.initializer(result, "c")
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)


def test_static_shape_folds(tools):
    model = tools.model(
        "g (float[2,4] x) => (float[4,2] y) <int64 i = {1}, int64[1] a = {0}, int64[1] m = {-1}> "
        "{ s = Shape(x)  d = Gather(s, i)  u = Unsqueeze(d, a)  t = Concat<axis = 0>(u, m)  y = Reshape(x, t) }"
    )
    result = tools.apply(FoldConstants(), model, rewrites=4, feeds=X24)
    assert tools.ops(result) == ["Reshape"]
    assert tools.initializer(result, "t").tolist() == [4, -1]


def test_static_part_of_a_dynamic_shape_folds(tools):
    model = tools.model(
        "g (float[N,3,4] x) => (int64[2] y, int64[1] z, int64[3] w, int64[1] v) "
        "<int64[1] one = {1}, int64[1] big = {9}, int64[1] zero = {0}, int64[2] s5 = {5, 6}> "
        "{ s = Shape(x)  p = Slice(s, one, big)  y = Add(p, s5)  q = Slice(s, zero, one)  z = Add(q, one) "
        "  r = Concat<axis = 0>(q, s5)  w = Identity(r)  e = Shape<start = -1>(x)  v = Add(e, one) }"
    )
    # p and e are fixed, and y and v with them; q has the dynamic size.
    result = tools.apply(FoldConstants(), model, rewrites=4, feeds={"x": np.zeros((5, 3, 4), np.float32)})
    assert sorted(tools.ops(result)) == sorted(["Identity", "Identity", "Shape", "Slice", "Add", "Concat", "Identity"])


def test_dynamic_shape_stays(tools):
    model = tools.model(
        "g (float[N,4] x) => (int64 y) <int64 i = {0}> { s = Shape(x)  y = Gather(s, i) }",
    )
    result = tools.apply(FoldConstants(), model, rewrites=0, feeds=X24)
    assert tools.ops(result) == ["Shape", "Gather"]


def test_size_and_cast_of_shape(tools):
    model = tools.model(
        "g (float[2,N] x, float[3,4] w) => (float[2,N] y, float z) <int64 i = {0}> "
        "{ s = Shape(x)  d = Gather(s, i)  f = Cast<to = 1>(d)  y = Mul(x, f)  n = Size(w)  z = Cast<to = 1>(n) }"
    )
    feeds = {"x": np.ones((2, 5), np.float32), "w": np.ones((3, 4), np.float32)}
    result = tools.apply(FoldConstants(), model, rewrites=4, feeds=feeds)
    assert tools.initializer(result, "f") == 2.0


def test_large_results_are_refused(tools):
    model = tools.model(
        "g (float[1000] x) => (float[1000,1000] y, float[1000,1000] z, float[1000,1000] w) "
        "<int64[2] s = {1000, 1000}, float[1] one = {1}> "
        "{ e = Expand(one, s)  y = Add(x, e)  c = ConstantOfShape(s)  z = Add(x, c)  t = Tile(one2, s)  w = Add(x, t) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1), np.float32), "one2"))
    result = tools.apply(FoldConstants(), model, rewrites=0, refused="would have 4,000,000 bytes")
    assert len(result.report.passes[0].refusals) == 3
    result = tools.apply(FoldConstants(size_limit_bytes=1 << 23), model, rewrites=3)
    assert set(result.weights) == {"e", "c", "t"}


def test_product_of_small_constants_is_predicted(tools):
    model = tools.model("g (float[900,900] x) => (float[900,900] y) { m = MatMul(a, b)  y = Add(x, m) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((900, 1), np.float32), "a"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 900), np.float32), "b"))
    tools.apply(FoldConstants(), model, rewrites=0, refused="would have 3,240,000 bytes")


def test_large_weights_are_not_copied(tools):
    model = tools.model("g (float[4,600] x) => (float[4,500] y) { t = Neg(w)  y = MatMul(x, t) }")
    weight = tools.Unreadable("w", ir.DataType.FLOAT, (600, 500))
    tools.stand_in(model, "w", np.zeros((600, 500), np.float32))
    tools.apply(FoldConstants(), model, {"w": weight}, rewrites=0, refused="copy 1,200,000 bytes of weights")


def test_transposes_of_weights_stay(tools):
    model = tools.model("g (float[4,60] x) => (float[4,50] y) { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }")
    weight = tools.Unreadable("w", ir.DataType.FLOAT, (50, 60))
    tools.stand_in(model, "w", np.zeros((50, 60), np.float32))
    tools.apply(FoldConstants(), model, {"w": weight}, rewrites=0, refused="it would copy a weight")


def test_small_weights_fold_and_results_leave_the_proto(tools):
    model = tools.model("g (float[2,40] x) => (float[2,20] y) { t = Neg(w)  y = MatMul(x, t) }")
    values = np.arange(800, dtype=np.float32).reshape(40, 20)
    weights = tools.stand_in(model, "w", values)
    result = tools.apply(FoldConstants(), model, weights, rewrites=1, feeds={"x": np.ones((2, 40), np.float32)})
    assert list(result.weights) == ["t"]
    np.testing.assert_array_equal(result.weights["t"].numpy(), -values)
    assert not result.proto.graph.initializer[0].raw_data


def test_shared_weight_stays_for_its_other_reader(tools):
    model = tools.model(
        "g (float[2,2] x) => (float[2,2] y, float[2,2] z) <float[2,2] w = {1,2,3,4}> "
        "{ t = Transpose(w)  y = MatMul(x, t)  z = MatMul(x, w) }"
    )
    result = tools.apply(FoldConstants(), model, rewrites=1, feeds={"x": np.eye(2, dtype=np.float32)})
    assert tools.initializer(result, "w").tolist() == [[1, 2], [3, 4]]
    assert tools.initializer(result, "t").tolist() == [[1, 3], [2, 4]]


def test_random_quantization_and_plugin_nodes_stay(tools):
    model = tools.model(
        "g (float[2] x) => (float[2] y) <float[2] c = {1, 2}, float s = {0.5}, int8 zp = {0}, int8[2] q = {4, 5}> "
        "{ r = RandomNormalLike(c)  d = DequantizeLinear(q, s, zp)  p = trtbridge.f(c)  a = Add(x, r)  b = Add(a, d) "
        "  y = Add(b, p) }"
    )
    assert len(tools.ops(tools.apply(FoldConstants(), model, rewrites=0))) == 6


def test_folded_output_keeps_its_name(tools):
    model = tools.model(
        "g (float[2] x) => (float[2] y, float[1] z, float[1] w) <float[1] two = {2}> "
        "{ y = Relu(x)  z = Sqrt(two)  w = Constant<value = float[1] {1}>() }"
    )
    result = tools.apply(FoldConstants(), model, rewrites=1, feeds={"x": np.ones(2, np.float32)}, tolerance=1e-6)
    assert tools.ops(result) == ["Relu", "Identity", "Constant"]
    assert [value.name for value in result.proto.graph.output] == ["y", "z", "w"]


def test_bfloat16_folds_by_the_reference(tools):
    model = tools.model(
        "g (bfloat16[2] x) => (bfloat16[2] y) <float[2] c = {1.5, 2}> "
        "{ b = Cast<to = 16>(c)  d = Add(b, b)  y = Mul(x, d) }"
    )
    result = tools.apply(FoldConstants(), model, rewrites=2)
    assert tools.initializer(result, "d").dtype == ml_dtypes.bfloat16
    assert tools.initializer(result, "d").tolist() == [3.0, 4.0]


def test_what_cannot_be_computed_is_refused(tools):
    model = tools.model("g (float[2] x) => (float[2] y) <float[2] c = {1, 2}> { i = Acosh(c)  y = Add(x, i) }")
    model.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(Exception, match="NoSuchOp"):
        onnx.checker.check_model(model)
    tools.apply(FoldConstants(), model, rewrites=0, refused="cannot be computed")


IF = """g (float[2] x) => (float[2] y) <bool c = {%d}, float[2] k = {5, 6}> {
    a = Relu(x)
    y = If<then_branch = t () => (float[2] to) { b = Add(a, k)  to = Neg(b) },
           else_branch = e () => (float[2] eo) { b = Mul(a, k)  eo = Exp(b) }>(c)
}"""


@pytest.mark.parametrize(("condition", "ops"), [(1, ["Relu", "Add", "Neg"]), (0, ["Relu", "Mul", "Exp"])])
def test_if_on_a_constant_is_inlined(tools, condition, ops):
    result = tools.apply(FoldConstants(), tools.model(IF % condition), rewrites=1, feeds={"x": np.ones(2, np.float32)})
    assert tools.ops(result) == ops
    assert result.proto.graph.node[-1].output == ["y"]


def test_inlined_branch_takes_names_that_nobody_has(tools):
    model = tools.model(
        """g (float[2] x, bool d) => (float[2] y, float[2] z) <bool c = {1}> {
        y = If<then_branch = t () => (float[2] o) <float[2] k = {1, 2}> { b = Add(x, k)  o = Neg(b) },
               else_branch = e () => (float[2] o) { o = Exp(x) }>(c)
        z = If<then_branch = t2 () => (float[2] o) <float[2] k = {3, 4}> { b = Mul(x, k)  o = Neg(b) },
               else_branch = e2 () => (float[2] o) { o = Exp(x) }>(d)
        }"""
    )
    feeds = {"x": np.ones(2, np.float32), "d": np.array(True)}
    result = tools.apply(FoldConstants(), model, rewrites=1, feeds=feeds)
    assert tools.ops(result) == ["Add", "Neg", "If"]


def test_if_whose_branch_gives_back_outer_tensors(tools):
    model = tools.model(
        """g (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {
        y, z = If<then_branch = t () => (float[2] o, float[2] o2) { o = Identity(x)  o2 = Identity(o) },
                  else_branch = e () => (float[2] p, float[2] p2) { p = Exp(x)  p2 = Neg(p) }>(c)
        }"""
    )
    tools.apply(FoldConstants(), model, rewrites=1, feeds={"x": np.ones(2, np.float32)})


def test_if_on_an_input_stays_and_folds_inside(tools):
    model = tools.model(
        """g (float[2] x, bool c) => (float[2] y) <float[2] k = {4, 9}> {
        y = If<then_branch = t () => (float[2] to) { r = Sqrt(k)  to = Add(x, r) },
               else_branch = e () => (float[2] eo) { r = Sqrt(k)  eo = Mul(x, r) }>(c)
        }"""
    )
    feeds = {"x": np.ones(2, np.float32), "c": np.array(True)}
    result = tools.apply(FoldConstants(), model, rewrites=2, feeds=feeds, tolerance=1e-6)
    branches = [attribute.g for attribute in result.proto.graph.node[0].attribute]
    assert [[node.op_type for node in branch.node] for branch in branches] == [["Add"], ["Mul"]]


def test_cast_like_of_a_constant(tools):
    model = tools.model("g (float16[2] x) => (float16[2] y) <float k = {3}> { c = CastLike(k, x)  y = Mul(x, c) }")
    # It becomes a Cast, which folds.
    result = tools.apply(FoldConstants(), model, rewrites=2, feeds={"x": np.ones(2, np.float16)})
    assert tools.initializer(result, "c") == np.float16(3)
