"""Nodes on uint8 in int32: the rules of refused_bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from trtbridge.passes.refused_bytes import OPS
from trtbridge.passes.rewrite_refused import RewriteRefused

ONE = RewriteRefused(frozenset({"n"}))
PAIR = "g (uint8[5,6] x, uint8[5,6] w) => (uint8[5,6] y)"
CASES = {
    "Add": f"{PAIR} {{ [n] y = Add (x, w) }}",
    "Sub": f"{PAIR} {{ [n] y = Sub (x, w) }}",
    "Mul": f"{PAIR} {{ [n] y = Mul (x, w) }}",
    "Div": f"{PAIR} {{ [n] y = Div (x, w) }}",
    "Mod": f"{PAIR} {{ [n] y = Mod (x, w) }}",
    "Max": f"{PAIR} {{ [n] y = Max (x, w) }}",
    "Clip": f"{PAIR} <uint8 low = {{10}}, uint8 high = {{100}}> {{ [n] y = Clip (x, low, high) }}",
    "Clip from above": f"{PAIR} <uint8 high = {{100}}> {{ [n] y = Clip (x, , high) }}",
    "BitwiseAnd": f"{PAIR} {{ [n] y = BitwiseAnd (x, w) }}",
    "BitwiseAnd with low bits": f"{PAIR} <uint8 m = {{255}}> {{ [n] y = BitwiseAnd (x, m) }}",
    "BitwiseOr": f"{PAIR} {{ [n] y = BitwiseOr (x, w) }}",
    "BitwiseXor": f"{PAIR} {{ [n] y = BitwiseXor (x, w) }}",
    "BitwiseNot": f"{PAIR} {{ [n] y = BitwiseNot (x) }}",
    "Less": "g (uint8[5,6] x, uint8[5,6] w) => (bool[5,6] y) { [n] y = Less (x, w) }",
    "Where": f"{PAIR} {{ c = Less (x, w) [n] y = Where (c, x, w) }}",
    "Transpose": "g (uint8[5,6] x) => (uint8[6,5] y) { [n] y = Transpose (x) }",
    "Split": "g (uint8[5,6] x) => (uint8[5,3] y, uint8[5,3] z) { [n] y, z = Split <axis = 1, num_outputs = 2> (x) }",
    "Gather": "g (uint8[5,6] x, int64[3] i) => (uint8[3,6] y) { [n] y = Gather (x, i) }",
    "Pad": "g (uint8[5,6] x) => (uint8[7,6] y) <int64[4] p = {1,0,1,0}, uint8 v = {9}> { [n] y = Pad (x, p, v) }",
    "ReduceMax": "g (uint8[5,6] x) => (uint8[5,1] y) <int64[1] a = {1}> { [n] y = ReduceMax (x, a) }",
}


def _feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All of uint8, but no zero in w, by which some divide."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        low, high = {"x": (0, 255), "w": (1, 255), "i": (-5, 4)}[value.name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        feeds[value.name] = rng.integers(low, high, shape, dtype, endpoint=True)
    return feeds


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_in_int32(tools: SimpleNamespace, rtx_refusal: Callable[..., str | None], case: str) -> None:
    model = tools.model(CASES[case], 18)
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model))
    assert "n" not in {node.name for node in result.proto.graph.node}
    if case != "Where":  # whose condition is a node on uint8, too
        assert rtx_refusal(model) is not None
        assert rtx_refusal(result.proto) is None


def test_no_uint8_stands_between_rewritten_nodes(tools: SimpleNamespace) -> None:
    """TensorRT has uint8 at inputs and results alone."""
    model = tools.model(
        """g (uint8[5,6] x, uint8[5,6] w) => (uint8[6,5] y, float[5,6] z)
        { [a] s = Add (x, w) [b] m = Mul (s, w) [c] y = Transpose (m) z = Cast <to = 1> (s) }""",
        18,
    )
    item = RewriteRefused(frozenset({"a", "b", "c"}))
    result = tools.apply(item, model, rewrites=3, feeds=_feeds(model))
    values = result.proto.graph.value_info
    small = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    assert not small & {name for node in result.proto.graph.node for name in node.input}


def test_casts_of_the_model_stay(tools: SimpleNamespace) -> None:
    """They may change a number: what the rules write does not."""
    model = tools.model(
        """g (int32[4] x, uint8[4] w) => (int32[4] y, uint8[4] z)
        { u = Cast <to = 2> (x) y = Cast <to = 6> (u) [n] z = Add (u, w) }""",
        18,
    )
    feeds = {"x": np.array([0, 255, 256, -1], np.int32), "w": np.array([1, 1, 1, 1], np.uint8)}
    tools.apply(ONE, model, rewrites=1, feeds=feeds)


@pytest.mark.parametrize("op", ["Add", "Max"])
def test_other_types_stay(tools: SimpleNamespace, op: str) -> None:
    model = tools.model(f"g (int8[4] x) => (int8[4] y) {{ [n] y = {op} (x, x) }}", 18)
    tools.apply(ONE, model, rewrites=0, refused="not about uint8")
    assert op in OPS
