"""Graphs that TensorRT-RTX computes wrongly get another form, which gives the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from rtx_graphs import parsed, run

from trtbridge.bridge.backends.rtx_faults import avoid_faults, original_name

X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)

FAULTY = {
    "top-k": "v, i = TopK(x, k)",
    "top-k by another axis": "v, i = TopK<axis = 0>(x, k)",
    "indices alone": "w, i = TopK<axis = 1, largest = 0>(x, k) v = Gather<axis = 0>(w, zero)",
    "argmax of the first axis": "i = ArgMax(x) v = Neg(x)",
    "argmin without the axis": "i = ArgMin<axis = -1, keepdims = 0>(x) v = Neg(x)",
    "a result read by slices": (
        "v = Neg(x) a = Slice(v, zero, k, one) b = Slice(v, k, five, one) i = Concat<axis = 1>(a, b)"
    ),
    "a result in another shape": "v = Neg(x) i = Reshape<allowzero = 1>(v, shape)",
    "a result moved twice": "v = Neg(x) a = Transpose(v) i = Reshape(a, shape)",
    "a result that is split": "v = Neg(x) a, b = Split<axis = 1>(v, parts) i = Concat<axis = 1>(a, b)",
}
ROTATION = "{halves} t = Concat<axis = -1>(c, a) p = Mul(x, x) q = Mul(t, x) s = Add(p, q) v = ReduceSum(s) i = Neg(s)"
HALVES = "a = Slice(x, zero, k, one) b = Slice(x, k, five, one) c = Neg(b)"
FAULTY |= {
    "a rotation that is summed": ROTATION.replace("{halves}", HALVES),
    "by Split, then a softmax": (
        "a, b = Split<axis = 1>(x, parts) c = Neg(b) t = Concat<axis = 1>(c, a) s = Add(x, t) r = Reshape(s, long) "
        "v = Softmax(r) i = Neg(a)"
    ),
    "constants times transposed tokens": (
        "y = Reshape(x, tokens) t = Transpose<perm = [0, 2, 1]>(y) v = MatMul(queries, t) i = Neg(y)"
    ),
    "tokens that are read across": (
        "y = Reshape(x, tokens) s = Softmax(y) p = MatMul(s, five_by_two) q = Add(p, bias) r = Erf(q) "
        "t = Transpose<perm = [0, 2, 1]>(r) v = Neg(t) i = Exp(r)"
    ),
    "tokens times tokens across": (
        "y = Reshape(x, tokens) s = Softmax(y) p = MatMul(s, five_by_two) t = Transpose<perm = [0, 2, 1]>(p) "
        "v = MatMul(p, t) i = Neg(s)"
    ),
    "tokens across as a result": (
        "y = Reshape(x, tokens) s = Softmax(y) w = Transpose(two_by_five) p = MatMul(s, w) "
        "v = Transpose<perm = [0, 2, 1]>(p) "
        "i = MatMul(v, s)"
    ),
    "a result that is a product's, too": (
        "y = Reshape(x, tokens) s = Softmax(y) p = MatMul(s, five_by_two) v = Transpose<perm = [0, 2, 1]>(p) "
        "i = MatMul(p, v)"
    ),
    "a convolution of one position": (
        "y = Reshape(x, image) v = Conv(y, filter, bias) i = Conv<kernel_shape = [1, 1]>(y, filter)"
    ),
}
FINE = {
    "no result": "n = Neg(x) a = Slice(n, zero, k, one) v = Exp(a) i = Neg(n)",
    "another result by more than moves": "v = Neg(x) a = Slice(v, zero, k, one) i = Exp(a)",
    "an input": "v = Slice(x, zero, k, one) i = Neg(x)",
    "a rotation that is not summed": HALVES + " t = Concat<axis = -1>(c, a) v = Add(x, t) i = MatMul(t, five_by_two)",
    "what is joined is read by pieces alone": (
        "n = Neg(x) a = Slice(n, zero, k, one) b = Slice(n, k, five, one) c = Neg(b) t = Concat<axis = 1>(c, a) "
        "v = ReduceSum(t) i = Neg(t)"
    ),
    "pieces of two tensors": (
        "n = Exp(x) a = Slice(n, zero, k, one) b = Slice(x, k, five, one) c = Neg(b) t = Concat<axis = 1>(c, a) "
        "u = Add(t, n) v = ReduceSum(u) i = Neg(x)"
    ),
    "a convolution over one position": "y = Reshape(x, column) v = Conv(y, w15) i = Neg(x)",
    "a convolution with a stride": "y = Reshape(x, image) v = Conv<strides = [2, 1]>(y, filter, bias) i = Neg(x)",
    "one matrix times tokens": "t = Transpose<perm = [1, 0]>(x) v = MatMul(two_by_five, t) i = Neg(x)",
    "constants times tokens as they are": "y = Reshape(x, turned) v = MatMul(queries, y) i = Neg(y)",
    "tokens turned another way": (
        "y = Reshape(x, turned) t = Transpose<perm = [1, 0, 2]>(y) u = Reshape(t, turned) v = MatMul(queries, u) "
        "i = Neg(y)"
    ),
    "tokens across ahead of attention": (
        "y = Reshape(x, tokens) p = MatMul(y, five_by_two) t = Transpose<perm = [0, 2, 1]>(p) v = Softmax(t) i = Neg(y)"
    ),
    "tokens times tokens across, ahead of attention": (
        "y = Reshape(x, tokens) p = MatMul(y, five_by_two) t = Transpose<perm = [0, 2, 1]>(p) v = MatMul(p, t) "
        "i = Softmax(y)"
    ),
    "tokens times heads across": (
        "y = Reshape(x, tokens) s = Softmax(y) t = Transpose<perm = [0, 2, 1]>(s) v = MatMul(s, t) i = Neg(s)"
    ),
    "heads across": (
        "y = Reshape(x, tokens) s = Softmax(y) p = MatMul(s, five_by_two) r = Reshape(p, tokens2) "
        "t = Transpose<perm = [0, 2, 1]>(r) v = Neg(t) i = Neg(s)"
    ),
    "a norm across": ("y = Reshape(x, tokens) s = Softmax(y) t = Transpose<perm = [0, 2, 1]>(s) v = Neg(t) i = Neg(s)"),
    "eight axes": "u = Reshape(x, long) w, j = TopK(u, one) v = Neg(w) i = Neg(j)",
}


def model(body: str) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[3,5] x) => (v, i)
    <int64[1] k = {{2}}, int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] five = {{5}}, int64[2] parts = {{2, 3}},
    int64[8] long = {{1, 1, 1, 1, 1, 1, 3, 5}}, int64[2] shape = {{3, 5}}, int64[4] image = {{1, 1, 3, 5}},
    int64[4] column = {{1, 15, 1, 1}}, float[2,1,1,1] filter = {{2, -3}}, float[2] bias = {{1, 0.5}},
    float[1,15,1,1] w15 = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6}},
    int64[3] tokens = {{1, 3, 5}}, int64[3] tokens2 = {{1, 2, 3}}, int64[3] turned = {{1, 5, 3}},
    float[2,5] two_by_five = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1}},
    float[2,2,5] queries = {{1, -2, 3, 4, 5, 6, 7, -8, 9, 1, 3, 2, 1, 5, 4, 2, -2, 1, 0, 1}},
    float[5,2] five_by_two = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1}}> {{ {body} }}"""
    return parsed(text)


@pytest.mark.parametrize("name", FAULTY)
def test_same_numbers_in_another_form(name: str) -> None:
    before = model(FAULTY[name])
    kept = before.SerializeToString()
    after = avoid_faults(before)
    assert before.SerializeToString() == kept
    onnx.checker.check_model(after, full_check=True)
    for ours, theirs in zip(run(after, {"x": X}), run(before, {"x": X}), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim) for v in onnx.shape_inference.infer_shapes(after).graph.value_info
    }
    outputs = {value.name for value in after.graph.output}
    for node in after.graph.node:
        if node.op_type in ("TopK", "ArgMax", "ArgMin"):
            assert ranks[node.input[0]] == 3
        if node.op_type in ("Slice", "Split", "Reshape", "Transpose"):
            assert node.input[0] not in outputs
    # What a rotation was written with, and nobody reads any more, is gone; the others keep their names and order.
    names = {node.name for node in before.graph.node}
    kept_names = [node.name for node in after.graph.node if node.name in names]
    assert {original_name(node.name) for node in after.graph.node} == set(kept_names)
    assert [node.name for node in before.graph.node if node.name in kept_names] == kept_names
    assert {n.op_type for n in before.graph.node if n.name not in kept_names} <= {"Slice", "Split", "Neg", "Transpose"}


ACROSS = (
    "constants times transposed tokens", "tokens that are read across", "tokens times tokens across",
    "tokens across as a result", "a result that is a product's, too",
)  # fmt: skip


@pytest.mark.parametrize("name", ACROSS)
def test_tokens_across_have_one_more_axis(name: str) -> None:
    turns = [node for node in avoid_faults(model(FAULTY[name])).graph.node if node.op_type == "Transpose"]
    orders = [list(attribute.ints) for node in turns for attribute in node.attribute]
    assert [0, 1, 3, 2] in orders
    assert [0, 2, 1] not in orders


@pytest.mark.parametrize("name", FINE)
def test_the_rest_is_left_alone(name: str) -> None:
    proto = model(FINE[name])
    assert avoid_faults(proto) is proto


def test_builds() -> None:
    """TensorRT-RTX takes the other form, and an origin is still found for what it refuses."""
    pytest.importorskip("tensorrt_rtx")
    import torch

    import trtbridge as tb

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            weights, experts = torch.topk(self.gate(x).softmax(-1), 2)
            first = torch.argmax(x)  # of one dimension, which the parser takes with one more
            return weights / weights.sum(-1, keepdim=True), experts, first

    converted = tb.convert(Router().eval(), (torch.randn(6, 8),), backend="tensorrt_rtx")
    assert len(converted.program.engines) == 1
