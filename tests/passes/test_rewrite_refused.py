"""Refused nodes in other ops: the same numbers as ONNX Runtime gives for the node itself, or a reason why not."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from trtbridge.passes import Pipeline, PipelineResult
from trtbridge.passes.numbers import run
from trtbridge.passes.refused_fragment import MOST_BYTES, MOST_NODES
from trtbridge.passes.refused_rules import RULES
from trtbridge.passes.rewrite_refused import RewriteRefused, original_name

ONE = RewriteRefused(frozenset({"n"}))
_T = onnx.TensorProto


def _feeds(model: onnx.ModelProto, ranges: dict[str, tuple[int, int]] | None = None) -> dict[str, np.ndarray]:
    """Random inputs; a dim with a name is 3, integers are from `ranges`, by name."""
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else 3 for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if dtype.kind == "f":
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            feeds[value.name] = rng.random(shape) > 0.5
        else:
            low, high = (ranges or {}).get(value.name, (-1000, 1000))
            feeds[value.name] = rng.integers(low, high, shape, dtype, endpoint=True)
    return feeds


# Graph, opset, tolerance (0: bit for bit), ranges of integer inputs.
CASES: dict[str, tuple[str, int, float, dict[str, tuple[int, int]]]] = {
    "Col2Im, dynamic batch": (
        """g (float[batch,18,25] x) => (float[batch,2,5,5] y) <int64[2] size = {5,5}, int64[2] block = {3,3}>
        { [n] y = Col2Im <pads = [1,1,1,1]> (x, size, block) }""", 18, 1e-6, {}),
    "Col2Im, strides and dilations": (
        """g (float[2,12,12] x) => (float[2,2,9,8] y) <int64[2] size = {9,8}, int64[2] block = {2,3}>
        { [n] y = Col2Im <strides = [2,3], dilations = [2,1], pads = [0,1,0,0]> (x, size, block) }""", 18, 1e-6, {}),
    "Col2Im, one axis": (
        """g (float[1,6,4] x) => (float[1,2,9] y) <int64[1] size = {9}, int64[1] block = {3}>
        { [n] y = Col2Im <strides = [2]> (x, size, block) }""", 20, 1e-6, {}),
    "MaxPool, dilated": (
        """g (float[batch,2,9,8] x) => (float[batch,2,4,3] y)
        { [n] y = MaxPool <kernel_shape = [3,2], dilations = [2,3], strides = [2,2], pads = [1,0,1,1]> (x) }""",
        12, 0, {}),
    "MaxPool, dilated, float16": (
        """g (float16[1,2,9] x) => (float16[1,2,5] y)
        { [n] y = MaxPool <kernel_shape = [3], dilations = [2]> (x) }""", 12, 0, {}),
    "MaxPool and its indices": (
        """g (float[2,3,7,6] x) => (float[2,3,4,3] y, int64[2,3,4,3] i)
        { [n] y, i = MaxPool <kernel_shape = [3,2], strides = [2,2], pads = [1,0,1,0]> (x) }""", 12, 0, {}),
    "MaxPool and its indices, in three axes": (
        """g (float[1,2,4,5,6] x) => (float[1,2,2,2,3] y, int64[1,2,2,2,3] i)
        { [n] y, i = MaxPool <kernel_shape = [2,2,2], strides = [2,2,2]> (x) }""", 12, 0, {}),
    "AveragePool, dilated": (
        """g (float[2,2,9,8] x) => (float[2,2,5,4] y)
        { [n] y = AveragePool <kernel_shape = [3,2], dilations = [2,4]> (x) }""", 19, 1e-6, {}),
    "AveragePool, dilated, padded": (
        """g (float[batch,2,9] x) => (float[batch,2,5] y)
        { [n] y = AveragePool <kernel_shape = [3], dilations = [2], strides = [2], pads = [2,2]> (x) }""",
        19, 1e-6, {}),
    "AveragePool, dilated, padding counts": (
        """g (float[2,2,9] x) => (float[2,2,5] y)
        { [n] y = AveragePool <kernel_shape = [3], dilations = [2], strides = [2], pads = [2,2],
                               count_include_pad = 1> (x) }""", 19, 1e-6, {}),
    "AveragePool, one window that is larger than the input": (
        """g (float[batch,2,7,9] x) => (float[batch,2,1,2] y)
        { [n] y = AveragePool <kernel_shape = [64,8], strides = [64,8], ceil_mode = 1, count_include_pad = 1> (x) }""",
        19, 1e-6, {}),
    "LpPool of p = 3": (
        """g (float[2,2,8,8] x) => (float[2,2,4,4] y)
        { [n] y = LpPool <kernel_shape = [2,2], strides = [2,2], p = 3> (x) }""", 18, 1e-5, {}),
    "DFT, opset 17, real input": (
        """g (float[batch,10,1] x) => (float[batch,10,2] y) { [n] y = DFT <axis = 1> (x) }""", 17, 1e-5, {}),
    "DFT of one side": (
        """g (float[2,3,10,1] x) => (float[2,3,6,2] y) <int64 axis = {2}, int64 length = {10}>
        { [n] y = DFT <onesided = 1> (x, length, axis) }""", 20, 1e-5, {}),
    "DFT, inverse, along another axis": (
        """g (float[7,3,2] x) => (float[7,3,2] y) <int64 axis = {0}>
        { [n] y = DFT <inverse = 1> (x, , axis) }""", 20, 1e-5, {}),
    "DFT, padded": (
        """g (float[3,7,2] x) => (float[3,12,2] y) <int64 axis = {1}, int64 length = {12}>
        { [n] y = DFT (x, length, axis) }""", 20, 1e-5, {}),
    "DFT, cut": (
        """g (float[3,7,2] x) => (float[3,4,2] y) <int64 axis = {1}, int64 length = {4}>
        { [n] y = DFT (x, length, axis) }""", 20, 1e-5, {}),
    "DFT from one side to real numbers": (
        """g (float[3,6,2] x) => (float[3,10,1] y) <int64 axis = {1}, int64 length = {10}>
        { [n] y = DFT <inverse = 1, onesided = 1> (x, length, axis) }""", 20, 1e-5, {}),
    "Resize, antialiased, smaller": (
        """g (float[batch,2,9,11] x) => (float[batch,2,5,4] y) <int64[2] sizes = {5,4}>
        { [n] y = Resize <mode = "linear", antialias = 1, axes = [2,3]> (x, , , sizes) }""", 18, 1e-5, {}),
    "Resize, antialiased, cubic, outside excluded": (
        """g (float[1,2,13,16] x) => (float[1,2,6,7] y) <int64[2] sizes = {6,7}>
        { [n] y = Resize <mode = "cubic", antialias = 1, axes = [2,3], exclude_outside = 1, cubic_coeff_a = -0.5>
              (x, , , sizes) }""", 18, 1e-5, {}),
    "Resize, antialiased, larger": (
        """g (float[1,2,5,4] x) => (float[1,2,10,6] y) <float[4] scales = {1.0,1.0,2.0,1.5}>
        { [n] y = Resize <mode = "linear", antialias = 1> (x, , scales) }""", 18, 1e-5, {}),
    "BitwiseNot": ("g (int64[5,6] x) => (int64[5,6] y) { [n] y = BitwiseNot (x) }", 18, 0,
                   {"x": (-(1 << 63), (1 << 63) - 1)}),
    **{f"{op} of {kind}": (
        f"g ({kind}[40,6] x, {kind}[6] z) => ({kind}[40,6] y) {{ [n] y = {op} (x, z) }}", 18, 0,
        dict.fromkeys("xz", (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)))
       for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor") for kind, bits in (("int32", 32), ("int64", 64))},
    "BitwiseAnd with low bits": (
        "g (int32[40] x) => (int32[40] y) <int32 m = {15}> { [n] y = BitwiseAnd (x, m) }", 18, 0, {}),
    "BitShift to the left": (
        """g (int64[40] x) => (int64[40] y) <uint64 k = {5}>
        { u = Cast <to = 13> (x) [n] v = BitShift <direction = "LEFT"> (u, k) y = Cast <to = 7> (v) }""", 20, 0,
        {"x": (-(1 << 63), (1 << 63) - 1)}),
    "BitShift to the right, as torch.onnx writes it": (
        """g (int32[40] x) => (int32[40] y) <uint32 k = {3}, uint32 ones = {3758096384}, int32 zero = {0}>
        { below = Less (x, zero) u = Cast <to = 12> (x) [n] v = BitShift <direction = "RIGHT"> (u, k)
          w = BitwiseOr (v, ones) a = Cast <to = 6> (w) b = Cast <to = 6> (v) y = Where (below, a, b) }""", 20, 0,
        {"x": (-(1 << 31), (1 << 31) - 1)}),
    **{f"ScatterElements, {kind}": (
        f"""g (float[4,6] x, int64[9,6] i, float[9,6] u) => (float[4,6] y)
        {{ [n] y = ScatterElements <reduction = "{kind}"> (x, i, u) }}""", 18, 1e-5, {"i": (-4, 3)})
       for kind in ("add", "mul", "max", "min")},
    "ScatterElements of int32, last axis": (
        """g (int32[2,3,5] x, int32[2,3,4] i, int32[2,3,4] u) => (int32[2,3,5] y)
        { [n] y = ScatterElements <reduction = "add", axis = -1> (x, i, u) }""", 18, 0,
        {"i": (0, 4), "u": (-(1 << 30), 1 << 30), "x": (-(1 << 30), 1 << 30)}),
    **{f"ScatterND, {kind}": (
        f"""g (float[4,3,5] x, int64[7,2] i, float[7,5] u) => (float[4,3,5] y)
        {{ [n] y = ScatterND <reduction = "{kind}"> (x, i, u) }}""", 18, 1e-5, {"i": (-3, 2)})
       for kind in ("add", "mul", "max", "min")},
    "NonZero and ScatterND of one value": (
        """g (float[batch,5] x, bool[batch,5] m) => (float[batch,5] y)
        <int64[1] flat = {-1}, float value = {-2.5}, int64[1] zero = {0}>
        { [n] i = NonZero (m) j = Transpose <perm = [1,0]> (i) r = Reshape (m, flat) c = Cast <to = 7> (r)
          k = ReduceSum <keepdims = 1> (c, zero) u = Expand (value, k) y = ScatterND (x, j, u) }""", 20, 0, {}),
    "NonZero and ScatterND of a row": (
        """g (float[4,5,2] x, bool[4,5] m, float[2] row) => (float[4,5,2] y)
        <int64[1] flat = {-1}, int64[1] zero = {0}, int64[1] two = {2}>
        { [n] i = NonZero (m) j = Transpose <perm = [1,0]> (i) r = Reshape (m, flat) c = Cast <to = 7> (r)
          k = ReduceSum <keepdims = 1> (c, zero) s = Concat <axis = 0> (k, two) u = Expand (row, s)
          y = ScatterND (x, j, u) }""", 20, 0, {}),
    "Compress": (
        """g (float[3,batch] x) => (float[2,batch] y) <bool[3] c = {1,0,1}>
        { [n] y = Compress <axis = 0> (x, c) }""", 11, 0, {}),
    "Compress of all axes": (
        "g (float[3,2] x) => (float[2] y) <bool[4] c = {0,1,0,1}> { [n] y = Compress (x, c) }", 11, 0, {}),
    "Einsum with capitals": (
        """g (float[2,3,4] x, float[2,4,5] z) => (float[2,3,5] y)
        { [n] y = Einsum <equation = "bQk,bkD->bQD"> (x, z) }""", 12, 1e-5, {}),
    "LayerNormalization with its mean": (
        """g (float[k,4,6] x, float[6] s, float[6] b) => (float[k,4,6] y, float[k,4,1] m, float[k,4,1] d)
        { [n] y, m, d = LayerNormalization (x, s, b) }""", 17, 1e-5, {}),
    "SoftmaxCrossEntropyLoss": (
        """g (float[4,7] x, int64[4] t) => (float l) { [n] l = SoftmaxCrossEntropyLoss <reduction = "mean"> (x, t) }""",
        13, 1e-5, {"t": (0, 6)}),
    "NegativeLogLikelihoodLoss with weights": (
        """g (float[4,7,3] x, int64[4,3] t, float[7] w) => (float l)
        { [n] l = NegativeLogLikelihoodLoss <reduction = "mean", ignore_index = 2> (x, t, w) }""",
        13, 1e-5, {"t": (0, 6)}),
    "SoftmaxCrossEntropyLoss of a later opset": (
        """g (float[4,7] x, int64[4] t) => (float l) { [n] l = SoftmaxCrossEntropyLoss <reduction = "mean"> (x, t) }""",
        20, 1e-5, {"t": (0, 6)}),
    "NegativeLogLikelihoodLoss of a later opset": (
        """g (float[4,7,3] x, int64[4,3] t, float[7] w) => (float l)
        { [n] l = NegativeLogLikelihoodLoss <reduction = "mean", ignore_index = 2> (x, t, w) }""",
        22, 1e-5, {"t": (0, 6)}),
    "LayerNormalization with its mean, of a later opset": (
        """g (float[k,4,6] x, float[6] s, float[6] b) => (float[k,4,6] y, float[k,4,1] m, float[k,4,1] d)
        { [n] y, m, d = LayerNormalization (x, s, b) }""", 22, 1e-5, {}),
    "CenterCropPad of a later opset": (
        "g (float[7,4] x) => (float[5,6] y) <int64[2] s = {5,6}> { [n] y = CenterCropPad (x, s) }", 22, 0, {}),
    "CenterCropPad": (
        "g (float[7,4] x) => (float[5,6] y) <int64[2] s = {5,6}> { [n] y = CenterCropPad (x, s) }", 18, 0, {}),
    "Attention, causal": (
        """g (float[2,3,4,8] q, float[2,3,6,8] k, float[2,3,6,8] v) => (float[2,3,4,8] y)
        { [n] y = Attention <is_causal = 1> (q, k, v) }""", 23, 1e-5, {}),
    "Attention, grouped, with a mask": (
        """g (float[2,4,5,8] q, float[2,2,6,8] k, float[2,2,6,8] v, float[5,6] m) => (float[2,4,5,8] y)
        { [n] y = Attention (q, k, v, m) }""", 23, 1e-5, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_in_other_ops(tools: SimpleNamespace, case: str) -> None:
    body, opset, tolerance, ranges = CASES[case]
    model = tools.model(body, opset)
    before = [value.name for value in model.graph.output]
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model, ranges), tolerance=tolerance)
    assert "n" not in {node.name for node in result.proto.graph.node}
    assert [value.name for value in result.proto.graph.output] == before
    new = [node for node in result.proto.graph.node if original_name(node.name) != node.name]
    assert new
    assert len({node.name for node in new}) == len(new), "new nodes have names of their own"
    assert all(original_name(node.name) in {n.name for n in model.graph.node} for node in new)
    described = {value.name for value in [*result.proto.graph.value_info, *result.proto.graph.output]}
    assert {name for node in new for name in node.output if name} <= described, "types of new tensors are known"


NEAR_MISSES: dict[str, tuple[str, int, str]] = {
    "no rule": ("g (float[4] x) => (float[4] y) { [n] y = Relu (x) }", 20, "no rule"),
    "image size is an input": (
        """g (float[1,18,25] x, int64[2] size) => (float[a,b,c,d] y) <int64[2] block = {3,3}>
        { [n] y = Col2Im <pads = [1,1,1,1]> (x, size, block) }""", 18, "no small constant"),
    "pooled axis without fixed size": (
        """g (float[1,2,h] x) => (float[1,2,k] y) { [n] y = MaxPool <kernel_shape = [3], dilations = [2]> (x) }""",
        12, "not fixed"),
    "indices by columns": (
        """g (float[1,1,4,4] x) => (float[1,1,2,2] y, int64[1,1,2,2] i)
        { [n] y, i = MaxPool <kernel_shape = [2,2], strides = [2,2], storage_order = 1> (x) }""", 12, "column-major"),
    "indices, batch without fixed size": (
        """g (float[batch,1,4] x) => (float[batch,1,2] y, int64[batch,1,2] i)
        { [n] y, i = MaxPool <kernel_shape = [2], strides = [2]> (x) }""", 12, "not fixed"),
    "DFT too long": (
        "g (float[1,2048,1] x) => (float[1,2048,2] y) { [n] y = DFT <axis = 1> (x) }", 17, "too large a matrix"),
    "Resize without antialias": (
        """g (float[1,1,4] x) => (float[1,1,2] y) <int64[3] sizes = {1,1,2}>
        { [n] y = Resize <mode = "linear"> (x, , , sizes) }""", 18, "only antialiasing"),
    "int16 bits": ("g (int16[4] x) => (int16[4] y) { [n] y = BitwiseNot (x) }", 18, "no exact form for int16"),
    "int32 sums": ("g (int32[4] x) => (int32[4] y) { [n] y = Add (x, x) }", 18, "not about integers of 8 bits"),
    "shift of unsigned numbers": (
        """g (uint32[4] x) => (uint32[4] y) <uint32 k = {1}> { [n] y = BitShift <direction = "LEFT"> (x, k) }""",
        20, "no cast of a signed number"),
    "shift to the right with zeros coming in": (
        """g (int64[4] x) => (int64[4] y) <uint64 k = {5}>
        { u = Cast <to = 13> (x) [n] v = BitShift <direction = "RIGHT"> (u, k) y = Cast <to = 7> (v) }""",
        20, "not a signed number shifted"),
    "overwriting": (
        "g (float[4,6] x, int64[2,6] i, float[2,6] u) => (float[4,6] y) { [n] y = ScatterElements (x, i, u) }",
        18, "in an order that matters"),
    "indices for a part": (
        """g (float[4,6] x, int64[2,5] i, float[2,5] u) => (float[4,6] y)
        { [n] y = ScatterElements <reduction = "add"> (x, i, u) }""", 18, "a part of the other axes"),
    "too many indices": (
        """g (float[5000] x, int64[5000] i, float[5000] u) => (float[5000] y)
        { [n] y = ScatterElements <reduction = "add"> (x, i, u) }""", 18, "too much work"),
    "places that are read": (
        "g (bool[4,5] m) => (int64[2,k] i) { [n] i = NonZero (m) }", 20, "depends on values"),
    "values that differ": (
        """g (float[4,5] x, bool[4,5] m, float[k] u) => (float[4,5] y)
        { [n] i = NonZero (m) j = Transpose <perm = [1,0]> (i) y = ScatterND (x, j, u) }""", 20, "from place to place"),
    "condition is an input": (
        "g (float[3] x, bool[3] c) => (float[k] y) { [n] y = Compress <axis = 0> (x, c) }", 11, "no small constant"),
    "small letters": (
        """g (float[2,3] x) => (float[3,2] y) { [n] y = Einsum <equation = "ab->ba"> (x) }""", 12,
        "small ones already"),
    "ceil_mode with padding that counts": (
        """g (float[1,1,8] x) => (float[1,1,4] y)
        { [n] y = AveragePool <kernel_shape = [3], strides = [2], dilations = [1], ceil_mode = 1, pads = [1,1],
                               count_include_pad = 1> (x) }""", 19, "count padding differently"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_what_has_no_exact_form_stays(tools: SimpleNamespace, case: str) -> None:
    body, opset, reason = NEAR_MISSES[case]
    model = tools.model(body, opset)
    result = tools.apply(ONE, model, rewrites=0, refused=reason)
    assert tools.ops(result) == tools.ops(model)


def test_only_named_nodes_are_rewritten(tools: SimpleNamespace) -> None:
    model = tools.model("g (int32[4] x) => (int32[4] y) { [m] z = BitwiseNot (x) [n] y = BitwiseNot (z) }", 18)
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model))
    assert tools.ops(result) == ["BitwiseNot", "Sub"]


def test_nodes_in_a_branch(tools: SimpleNamespace) -> None:
    model = tools.model(
        """g (bool c, int32[4] x) => (int32[4] y)
        { y = If (c) <then_branch = a () => (int32[4] p) { [n] p = BitwiseNot (x) },
                      else_branch = b () => (int32[4] q) { q = Identity (x) }> }""",
        18,
    )
    for condition in (True, False):
        feeds = {**_feeds(model), "c": np.asarray(condition)}
        tools.apply(ONE, model, rewrites=1, feeds=feeds)


def test_new_nodes_keep_where_the_old_one_came_from(tools: SimpleNamespace) -> None:
    model = tools.model(CASES["Col2Im, dynamic batch"][0], 18)
    model.graph.node[0].metadata_props.add(key="origin", value="line 7")
    result = tools.apply(ONE, model, rewrites=1)
    assert len(result.proto.graph.node) > 1
    for node in result.proto.graph.node:
        assert [(entry.key, entry.value) for entry in node.metadata_props] == [("origin", "line 7")]


def test_a_weight_is_neither_read_nor_copied(tools: SimpleNamespace) -> None:
    model = tools.model(
        """g (float[batch,40] x, bool[batch,40] m) => (float[batch,40] z)
        <int64[1] flat = {-1}, float value = {0.0}, int64[1] zero = {0}, float[batch,40] y>
        { y = Add (x, w) [n] i = NonZero (m) j = Transpose <perm = [1,0]> (i) r = Reshape (m, flat)
          c = Cast <to = 7> (r) k = ReduceSum <keepdims = 1> (c, zero) u = Expand (value, k)
          z = ScatterND (y, j, u) }""",
        20,
    )
    weights = tools.stand_in(model, "w", np.ones((40,), np.float32))
    weights["w"] = tools.Unreadable("w", weights["w"].dtype, (40,))
    result = tools.apply(ONE, model, weights, rewrites=1)
    assert result.weights["w"] is weights["w"]


def test_limits_hold_for_every_case(tools: SimpleNamespace) -> None:
    """What a rewrite adds stays small."""
    for body, opset, _, _ in CASES.values():
        model = tools.model(body, opset)
        result = Pipeline((ONE,)).run(model, {})
        new = [node for node in result.proto.graph.node if original_name(node.name) != node.name]
        assert len(new) <= (256 if {"Attention"} & set(tools.ops(model)) else MOST_NODES)
        assert sum(weight.nbytes for weight in result.weights.values()) <= MOST_BYTES


# Plugin nodes of torch ops.


def _plugin(op: str, inputs: dict[str, tuple[int, list[Any]]], outputs: list[tuple[int, list[Any]]], args: list[Any],
            **kwargs: Any) -> onnx.ModelProto:  # fmt: skip
    """A model of one plugin node, as the exporter makes it."""
    call = json.dumps({"args": args, "kwargs": kwargs, "outputs": len(outputs)})
    names = [f"y{index}" for index in range(len(outputs))]
    node = onnx.helper.make_node("call", list(inputs), names, "n", domain="trtbridge", op=op, call=call)
    graph = onnx.helper.make_graph(
        [node], "g",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, *each) for name, each in zip(names, outputs, strict=True)],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("trtbridge", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)


def _rewritten(model: onnx.ModelProto, refused: str = "") -> PipelineResult:
    result = Pipeline((ONE,)).run(model, {})
    (report,) = result.report.passes
    assert [refusal.reason for refusal in report.refusals if refused not in refusal.reason] == []
    assert report.rewrites == (not refused), report
    assert bool(report.refusals) == bool(refused)
    return result


def _values(result: PipelineResult, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(run(result.proto, result.weights, feeds).values())


X = {"tensor": 0}


@pytest.mark.parametrize("sizes", [(7,), (7, 8), (5, 7, 8)])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_adaptive_pooling(kind: str, sizes: tuple[int, ...]) -> None:
    count = len(sizes)
    wanted = [3, 8, 2][:count]
    x = torch.randn(2, 3, *sizes).relu()  # with ties
    outputs = [(_T.FLOAT, ["b", 3, *wanted])] + [(_T.INT64, ["b", 3, *wanted])] * (kind == "max")
    model = _plugin(f"aten::adaptive_{kind}_pool{count}d.default", {"x": (_T.FLOAT, ["b", 3, *sizes])}, outputs,
                    [X, wanted])  # fmt: skip
    found = _values(_rewritten(model), x=x.numpy())
    if kind == "max":
        pool = getattr(torch.nn.functional, f"adaptive_max_pool{count}d")
        values, indices = pool(x, wanted, return_indices=True)
        assert np.array_equal(found[0], values.numpy())
        assert np.array_equal(found[1], indices.numpy())
    else:
        expected = getattr(torch.nn.functional, f"adaptive_avg_pool{count}d")(x, wanted)
        np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("bins", "low", "high"), [(8, 0, 7), (5, -3, 13), (3, 0, 1)])
def test_histc_of_integers(bins: int, low: int, high: int) -> None:
    x = np.random.default_rng(0).integers(low - 2, high + 3, 200).astype(np.int32)
    model = _plugin("aten::histc.default", {"x": (_T.INT32, ["k"])}, [(_T.INT32, [bins])], [X, bins, low, high])
    (found,) = _values(_rewritten(model), x=x)
    assert found.dtype == np.int32
    inside = x[(x >= low) & (x <= high)].astype(np.int64)
    at = np.minimum((inside - low) * bins // (high - low), bins - 1)
    assert np.array_equal(found, np.bincount(at, minlength=bins))


@pytest.mark.parametrize("rows", [3, 12])
def test_grouped_mm(rows: int) -> None:
    """Rows of a group by its matrix, by the few and by the many; rows behind the last group are zero."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, 6)).astype(np.float32), rng.standard_normal((4, 6, 5)).astype(np.float32)
    ends = np.array([0, rows // 2, rows // 2, rows - 1], np.int32)
    model = _plugin("transformers::grouped_mm_fallback.default",
                    {"x": (_T.FLOAT, [rows, 6]), "w": (_T.FLOAT, [4, 6, 5]), "o": (_T.INT32, [4])},
                    [(_T.FLOAT, [rows, 5])], [X, {"tensor": 1}, {"tensor": 2}])  # fmt: skip
    (found,) = _values(_rewritten(model), x=x, w=w, o=ends)
    expected = np.zeros((rows, 5), np.float32)
    for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected[start:end] = x[start:end] @ w[group]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_grouped_mm_of_much_work_stays() -> None:
    model = _plugin("transformers::grouped_mm_fallback.default",
                    {"x": (_T.FLOAT, [8192, 2048]), "w": (_T.FLOAT, [64, 2048, 1024]), "o": (_T.INT32, [64])},
                    [(_T.FLOAT, [8192, 1024])], [X, {"tensor": 1}, {"tensor": 2}])  # fmt: skip
    _rewritten(model, refused="too much work")


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
@pytest.mark.parametrize("lead", [(2,), (2, 3), (2, 1, 3)])
def test_attention_of_any_rank(mask: str, lead: tuple[int, ...]) -> None:
    q, k, v = torch.randn(*lead, 4, 8), torch.randn(*lead, 6, 8), torch.randn(*lead, 6, 8)
    given = None
    if mask == "bool":
        given = torch.rand(4, 6) > 0.5
        given[1] = False  # this row sees nothing
    elif mask == "float":
        given = torch.randn(4, 6)
        given[2, :3] = -math.inf
    inputs = {name: (_T.FLOAT, list(t.shape)) for name, t in zip("qkv", (q, k, v), strict=True)}
    feeds = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()}
    args: list[Any] = [X, {"tensor": 1}, {"tensor": 2}]
    if given is not None:
        inputs["m"] = (_T.BOOL if mask == "bool" else _T.FLOAT, [4, 6])
        feeds["m"] = given.numpy()
        args.append({"tensor": 3})
    causal = mask == "causal"
    model = _plugin("aten::scaled_dot_product_attention.default", inputs, [(_T.FLOAT, list(q.shape))], args,
                    **({"is_causal": True} if causal else {}))  # fmt: skip
    (found,) = _values(_rewritten(model), **feeds)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, given, is_causal=causal)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("right", [False, True])
def test_bucketize_and_searchsorted(right: bool) -> None:
    x = torch.tensor([[-1.0, 0.0, 0.5, math.nan, math.inf], [2.0, -math.inf, 0.25, 0.5, 1.0]])
    bounds = torch.tensor([0.0, 0.5, 0.5, 1.0])
    model = _plugin("aten::bucketize.Tensor", {"x": (_T.FLOAT, ["k", 5]), "b": (_T.FLOAT, [4])},
                    [(_T.INT64, ["k", 5])], [X, {"tensor": 1}], right=right)  # fmt: skip
    (found,) = _values(_rewritten(model), x=x.numpy(), b=bounds.numpy())
    assert np.array_equal(found, torch.bucketize(x, bounds, right=right).numpy())
    rows = torch.stack([bounds, bounds - 0.25])
    model = _plugin("aten::searchsorted.Tensor", {"b": (_T.FLOAT, [2, 4]), "x": (_T.FLOAT, [2, 5])},
                    [(_T.INT32, [2, 5])], [X, {"tensor": 1}], right=right, out_int32=True)  # fmt: skip
    (found,) = _values(_rewritten(model), b=rows.numpy(), x=x.numpy())
    assert found.dtype == np.int32
    assert np.array_equal(found, torch.searchsorted(rows, x, right=right).numpy())


@pytest.mark.parametrize("norm", [None, "ortho", "forward"])
@pytest.mark.parametrize("name", ["fft", "ifft", "fft2", "ifft2", "fftn", "ifftn"])
def test_fourier_transforms(name: str, norm: str | None) -> None:
    x = torch.randn(3, 5, 6)
    z = torch.randn(3, 5, 6, dtype=torch.complex64)
    real = _plugin(f"aten::fft_{name}.default", {"x": (_T.FLOAT, [3, 5, 6])}, [(_T.FLOAT, [3, 5, 6, 2])], [X],
                   **({"norm": norm} if norm else {}))  # fmt: skip
    pairs = _plugin(f"aten::fft_{name}.default", {"x": (_T.FLOAT, [3, 5, 6, 2])}, [(_T.FLOAT, [3, 5, 6, 2])],
                    [{"complex": 0}], **({"norm": norm} if norm else {}))  # fmt: skip
    for model, value, fed in ((real, x, x.numpy()), (pairs, z, torch.view_as_real(z).numpy())):
        (found,) = _values(_rewritten(model), x=fed)
        expected = torch.view_as_real(getattr(torch.fft, name)(value, norm=norm).resolve_conj()).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_extremes_and_running_products() -> None:
    x = torch.randn(3, 4, 5)
    inputs = {"x": (_T.FLOAT, ["k", 4, 5])}
    (found,) = _values(_rewritten(_plugin("aten::amax.default", inputs, [(_T.FLOAT, [])], [X])), x=x.numpy())
    assert found == x.amax().numpy()
    model = _plugin("aten::aminmax.default", inputs, [(_T.FLOAT, ["k", 1, 5])] * 2, [X], dim=1, keepdim=True)
    least, most = _values(_rewritten(model), x=x.numpy())
    assert np.array_equal(least, x.amin(1, True).numpy())
    assert np.array_equal(most, x.amax(1, True).numpy())
    model = _plugin("aten::cumprod.default", inputs, [(_T.FLOAT, ["k", 4, 5])], [X, -1])
    (found,) = _values(_rewritten(model), x=x.numpy())
    np.testing.assert_allclose(found, x.cumprod(-1).numpy(), rtol=1e-5)


def test_every_rule_is_for_an_op_that_exists() -> None:
    for name in RULES:
        if "::" in name:
            assert name.startswith("transformers::") or name.split("::")[0] == "aten"
            if name.startswith("aten::"):
                op, overload = name.removeprefix("aten::").rsplit(".", 1)
                assert overload in getattr(torch.ops.aten, op).overloads()
        else:
            assert onnx.defs.has(name)


def test_a_cumprod_node_of_an_onnx_file() -> None:
    """ONNX Runtime has no CumProd of this opset everywhere, so numpy says what is right."""
    if not onnx.defs.has("CumProd"):
        pytest.skip("this ONNX has no CumProd")
    version = onnx.defs.get_schema("CumProd").since_version
    x = np.random.default_rng(0).integers(-3, 4, (4, 7)).astype(np.int32)
    for exclusive in (0, 1):
        for reverse in (0, 1):
            graph = onnx.helper.make_graph(
                [onnx.helper.make_node("CumProd", ["x", "a"], ["y"], "n", exclusive=exclusive, reverse=reverse)], "g",
                [onnx.helper.make_tensor_value_info("x", _T.INT32, ["k", 7])],
                [onnx.helper.make_tensor_value_info("y", _T.INT32, ["k", 7])],
                [numpy_helper.from_array(np.asarray(1), "a")],
            )  # fmt: skip
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)], ir_version=10)
            result = _rewritten(model)
            result.proto.opset_import[0].version = 20
            (found,) = _values(result, x=x)
            ordered = x[:, ::-1] if reverse else x
            expected = np.cumprod(ordered, 1)
            if exclusive:
                expected = np.concatenate([np.ones_like(expected[:, :1]), expected[:, :-1]], 1)
            assert np.array_equal(found, expected[:, ::-1] if reverse else expected)
