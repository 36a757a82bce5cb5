"""NarrowTypes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from trtbridge.passes import NarrowTypes


def test_float64_becomes_float32(tools):
    model = tools.model(
        "g (double[N,2] x) => (double[N,2] y, float[N,2] z) <double[2] c = {1.5, 2}> "
        "{ k = Constant<value = double {0.1}>()  a = Mul(x, c)  y = Add(a, k)  z = Cast<to = 1>(y) }"
    )
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 2))}
    # x, c, a, k, y, and k's attribute.
    result = tools.apply(NarrowTypes(), model, rewrites=6, feeds=feeds, tolerance=1e-6)
    graph = result.proto.graph
    assert tools.types(graph.input) == [1]
    assert tools.types(graph.output) == [1, 1]
    assert set(tools.types(graph.value_info)) == {1}
    assert graph.initializer[0].data_type == 1
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


@pytest.mark.parametrize(
    ("name", "number", "target"),
    [("int16", 5, TensorProto.INT32), ("uint16", 4, TensorProto.INT32), ("uint32", 12, TensorProto.INT64),
     ("uint64", 13, TensorProto.INT64)],
)  # fmt: skip
def test_integers(tools, name, number, target):
    model = tools.model(
        f"g (float[2] x) => (int64[2] y) <{name}[2] c = {{1, 2}}> "
        f"{{ a = Cast<to = {number}>(x)  b = Add(a, c)  y = Cast<to = 7>(b) }}"
    )
    result = tools.apply(NarrowTypes(), model, rewrites=4, feeds={"x": np.array([3.7, 5.0], np.float32)})
    assert result.proto.graph.node[0].attribute[0].i == target
    assert result.proto.graph.initializer[0].data_type == target


def test_types_in_attributes(tools):
    model = tools.model(
        "g (int64[1] n, float[2,2] m) => (double[N] y, double[2,2] e, double[2] r) "
        "{ y = ConstantOfShape<value = double[1] {2}>(n)  e = EyeLike<dtype = 11>(m) "
        "  r = RandomNormal<dtype = 11, shape = [2]>() }"
    )
    result = tools.apply(NarrowTypes(), model, rewrites=6)
    assert tools.types(result.proto.graph.output) == [1, 1, 1]


def test_int8_uint8_and_float16_stay(tools):
    model = tools.model(
        "g (uint8[2] x, int8[2] q, float16[2] h) => (uint8[2] y, int8[2] r, float16[2] i) "
        "{ y = Identity(x)  r = Identity(q)  i = Relu(h) }"
    )
    tools.apply(NarrowTypes(), model, rewrites=0)


def test_constant_out_of_range_ends_it_for_its_type(tools):
    model = tools.model(
        "g (double[2] x, int16[2] i) => (double[2] y, int16[2] j) <double c = {1e300}, int16[2] k = {1, 2}> "
        "{ y = Mul(x, c)  j = Add(i, k) }"
    )
    result = tools.apply(NarrowTypes(), model, rewrites=3, refused="does not fit float")
    assert tools.types(result.proto.graph.output) == [TensorProto.DOUBLE, TensorProto.INT32]


def test_infinity_fits(tools):
    model = tools.model("g (double[2] x) => (double[2] y) { y = Max(x, c) }")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-np.inf), "c"))
    tools.apply(NarrowTypes(), model, rewrites=3, feeds={"x": np.ones(2)})


def test_weights_are_narrowed_beside_the_proto(tools):
    model = tools.model("g (double[2,300] x) => (double[2,300] y, double[2,300] z) { y = Add(x, w)  z = Mul(x, w) }")
    weights = tools.stand_in(model, "w", np.ones(300))
    result = tools.apply(NarrowTypes(), model, weights, rewrites=4, feeds={"x": np.ones((2, 300))})
    assert result.weights["w"].numpy().dtype == np.float32
    assert weights["w"].numpy().dtype == np.float64
    assert result.proto.graph.initializer[0].data_type == 1


def test_plugin_keeps_its_types_between_casts(tools):
    model = tools.model(
        "g (double[2] x) => (double[2] y) <double[2] k = {1, 2}> "
        "{ a = Neg(x)  p = trtbridge.f<n = 1>(a, k)  b = Neg(p)  y = Add(a, b) }"
    )
    _annotate(model, "p", TensorProto.DOUBLE, 2)
    model = onnx.shape_inference.infer_shapes(model)
    result = tools.apply(NarrowTypes(), model, rewrites=6)
    assert tools.ops(result) == ["Neg", "Cast", "f", "Cast", "Neg", "Add"]
    types = {value.name: value.type.tensor_type.elem_type for value in result.proto.graph.value_info}
    assert (types["p"], types["a"], types["b"]) == (TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT)
    # Only the plugin reads k.
    assert result.proto.graph.initializer[0].data_type == TensorProto.DOUBLE
    assert [a.name for a in result.proto.graph.node[2].attribute] == ["n"]


def test_tensors_between_plugins_and_casts_stay(tools):
    model = tools.model(
        "g (float[2] x) => (float[2] y) "
        "{ d = Cast<to = 11>(x)  p = trtbridge.f(d)  q = trtbridge.g(p)  y = Cast<to = 1>(q) }"
    )
    _annotate(model, "p", TensorProto.DOUBLE, 2)
    _annotate(model, "q", TensorProto.DOUBLE, 2)
    tools.apply(NarrowTypes(), model, rewrites=0)


def test_plugin_in_a_branch(tools):
    model = tools.model(
        """g (double[2] x, bool c) => (double[2] y) {
        y = If<then_branch = t () => (double[2] to) { to = trtbridge.f(x) },
               else_branch = e () => (double[2] eo) { eo = Exp(x) }>(c)
        }"""
    )
    result = tools.apply(NarrowTypes(), model, rewrites=5)
    then = next(a.g for a in result.proto.graph.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in then.node] == ["Cast", "f", "Cast"]
    assert then.output[0].name == then.node[-1].output[0]


def test_ops_that_need_the_type_keep_it(tools):
    model = tools.model(
        "g (uint32[2] x, uint32[2] s) => (uint32[2] y) "
        '{ a = Add(x, s)  b = BitShift<direction = "LEFT">(a, s)  y = Add(b, s) }'
    )
    feeds = {"x": np.array([1, 2], np.uint32), "s": np.array([3, 4], np.uint32)}
    result = tools.apply(NarrowTypes(), model, rewrites=7, feeds=feeds)
    assert tools.ops(result) == ["Add", "Cast", "Cast", "BitShift", "Cast", "Add"]


def test_subgraph_captures(tools):
    model = tools.model(
        """g (double[2] x, bool c) => (double[2] y) <double[2] k = {1, 2}> {
        y = If<then_branch = t () => (double[2] to) { to = Add(x, k) },
               else_branch = e () => (double[2] eo) <double[2] m = {3, 4}> { eo = Mul(x, m) }>(c)
        }"""
    )
    feeds = {"x": np.ones(2), "c": np.array(False)}
    tools.apply(NarrowTypes(), model, rewrites=6, feeds=feeds)


def test_rtx_takes_int16_after(tools, rtx_refusal):
    model = tools.model(
        "g (int16[4] x) => (float[4] y) <int16[4] c = {1, 2, 3, 4}> { a = Add(x, c)  y = Cast<to = 1>(a) }"
    )
    assert rtx_refusal(model) is not None
    result = tools.apply(NarrowTypes(), model, rewrites=3, feeds={"x": np.arange(4, dtype=np.int16)})
    assert rtx_refusal(result.proto) is None


def _annotate(model: onnx.ModelProto, name: str, element: int, size: int) -> None:
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, element, [size]))
