"""RepairRanks, RepairTypes, and what RemoveDeadNodes does for the parser: refused before, built after, same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtbridge.passes import RemoveDeadNodes, RepairRanks, RepairTypes

F = np.array([3.0, -1.0, 7.0, 7.0, 2.0], np.float32)
M = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
B = np.array([[True, False, False], [False, False, False], [True, True, True]])
POOL = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)

REPAIRED = {
    "argmax": (RepairRanks(), "g (float[5] x) => (int64[1] y) { y = ArgMax<axis = 0>(x) }", F),
    "argmax, no dims kept": (RepairRanks(), "g (float[5] x) => (int64 y) "
                             "{ y = ArgMax<axis = -1, keepdims = 0>(x) }", F),
    "argmin, default axis": (RepairRanks(), "g (float[5] x) => (int64[1] y) { y = ArgMin(x) }", F),
    "softmax": (RepairRanks(), "g (float[5] x) => (float[5] y) { y = Softmax(x) }", F),
    "log softmax": (RepairRanks(), "g (float[5] x) => (float[5] y) { y = LogSoftmax<axis = 0>(x) }", F),
    "matmul": (RepairRanks(), "g (float[5] x) => (float[2,3] y) { y = MatMul(x, m) }", F),
    "reduce a scalar": (RepairRanks(), "g (float[5] x) => (float y) <int64 i = {2}> "
                                       "{ s = Gather(x, i)  t = ReduceSum(s)  y = Neg(t) }", F),
    "reduce max of bools": (RepairTypes(), "g (bool[3,3] x) => (bool[3] y) <int64[1] a = {1}> "
                                           "{ y = ReduceMax<keepdims = 0>(x, a) }", B),
    "reduce min of bools": (RepairTypes(), "g (bool[3,3] x) => (bool[3,1] y) <int64[1] a = {1}> "
                                           "{ y = ReduceMin(x, a) }", B),
    "relu of ints": (RepairTypes(), "g (int32[3] x) => (int32[3] y) { y = Relu(x) }", np.array([1, -2, 0], np.int32)),
    "indices of a pool": (RemoveDeadNodes(), "g (float[1,1,4,4] x) => (float[1,1,2,2] y) "
                          "{ y, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) }", POOL),
    "mean of a norm": (RemoveDeadNodes(), "g (float[5] x) => (float[5] y) <float[5] s = {1, 2, 3, 4, 5}> "
                       "{ y, m = LayerNormalization(x, s) }", F),
}  # fmt: skip


def _build(tools, text):
    model = tools.model(text)
    if "MatMul" in text:
        model.graph.initializer.append(onnx.numpy_helper.from_array(M, "m"))
    return model


@pytest.mark.parametrize("name", REPAIRED)
def test_numbers_stay(tools, name):
    item, text, value = REPAIRED[name]
    result = tools.apply(item, _build(tools, text), rewrites=1, feeds={"x": value})
    assert [output.name for output in result.proto.graph.output] == ["y"]


@pytest.mark.parametrize("name", REPAIRED)
def test_rtx_builds_after_only(tools, rtx_refusal, name):
    item, text, _ = REPAIRED[name]
    model = _build(tools, text)
    assert rtx_refusal(model) is not None
    assert rtx_refusal(tools.apply(item, model, rewrites=1).proto) is None


@pytest.mark.parametrize(
    ("item", "text", "reason"),
    [
        (RepairRanks(), "g (float[2,5] x) => (int64[2,1] y) { y = ArgMax<axis = 1>(x) }", None),
        (RepairRanks(), "g (float[2,5] x) => (float[2,5] y) { y = Softmax(x) }", None),
        (RepairRanks(), "g (float[5] x, float[5,3] w) => (float[3] y) { y = MatMul(x, w) }", None),
        (RepairRanks(), "g (float[2,3,5] x, float[5] w) => (float[2,3] y) { y = MatMul(x, w) }", None),
        (RepairRanks(), "g (float[5] x) => (float[1] y) { y = ReduceSum(x) }", None),
        (
            RepairRanks(),
            "g (float[5] x) => (int64 y) { p = trtbridge.f(x)  y = ArgMax(p) }",
            "rank of its input",
        ),
        (RepairRanks(), "g (float[5] x) => (float y) { p = trtbridge.f(x)  y = MatMul(x, p) }", "second input is not"),
        (RepairTypes(), "g (float[5] x) => (float[5] y) { y = Relu(x) }", None),
        (RepairTypes(), "g (int32[5] x) => (int32 y) { y = ReduceMax<keepdims = 0>(x) }", None),
        (RepairTypes(), "g (int32[2,5] x, int32[5,2] w) => (int32[2,2] y) { y = MatMul(x, w) }", "2**24"),
    ],
)
def test_near_misses(tools, item, text, reason):
    tools.apply(item, tools.model(text), rewrites=0, refused=reason)


def test_dynamic_vector(tools):
    model = tools.model("g (float[N] x) => (float[N] y, int64 z) { y = Softmax(x)  z = ArgMax<keepdims = 0>(x) }")
    result = tools.apply(RepairRanks(), model, rewrites=2, feeds={"x": F})
    shapes = {value.name: value.type.tensor_type.shape for value in result.proto.graph.value_info}
    assert shapes["x_lifted"].dim[1].dim_param == "N"


def test_shared_weight_stays(tools):
    model = tools.model(
        "g (float[5] x) => (float[2,3] y, float[2,3] z) { y = MatMul(x, m)  n = Neg(x)  z = MatMul(n, m) }"
    )
    weights = tools.stand_in(model, "m", np.tile(M, (1, 1, 20)))
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_value = 60
    result = tools.apply(RepairRanks(), model, weights, rewrites=2, feeds={"x": F})
    assert result.weights["m"] is weights["m"]


def test_in_a_branch(tools):
    model = tools.model(
        """g (float[5] x, bool c) => (int64[1] y) {
        y = If<then_branch = t () => (int64[1] to) { to = ArgMax(x) },
               else_branch = e () => (int64[1] eo) { eo = ArgMin(x) }>(c)
        }"""
    )
    tools.apply(RepairRanks(), model, rewrites=2, feeds={"x": F, "c": np.array(True)})
