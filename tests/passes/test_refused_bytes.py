"""Nodes on uint8 and int8 in int32: the rules of refused_bytes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import trtbridge as tb
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


SIGNED = "g (int8[5,6] x, int8[5,6] w) => (int8[5,6] y)"
SIGNED_CASES = {name: text.replace("uint8", "int8").replace("{255}", "{127}") for name, text in CASES.items()} | {
    "Add of a constant": f"{SIGNED} <int8 c = {{100}}> {{ [n] y = Add (x, c) }}",
    "Sub of a constant": f"{SIGNED} <int8 c = {{100}}> {{ [n] y = Sub (c, x) }}",
    "Mul by a constant": f"{SIGNED} <int8 c = {{-3}}> {{ [n] y = Mul (x, c) }}",
    "Div by -1": f"{SIGNED} <int8 c = {{-1}}> {{ [n] y = Div (x, c) }}",
    "Mod as fmod": f"{SIGNED} {{ [n] y = Mod <fmod = 1> (x, w) }}",
    "Greater than a constant": "g (int8[5,6] x) => (bool[5,6] y) <int8 c = {-3}> { [n] y = Greater (x, c) }",
    "Concat with a constant": "g (int8[2] x) => (int8[4] y) <int8[2] c = {-1,9}> { [n] y = Concat <axis = 0> (x, c) }",
    "Gather from a constant": "g (int64[3] i) => (int8[3] y) <int8[5] c = {-1,9,-128,127,0}> { [n] y = Gather (c, i) }",
}
BUILT = {"Add", "Sub", "Mul", "Div", "Max", "Clip", "Less", "Where", "Transpose", "Split", "Gather",
         "ReduceMax"}  # fmt: skip
"""What TensorRT-RTX 1.6.1 and 1.7.1 build in int8 as long as no constant is among the inputs."""


def _feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All of uint8 or int8, but no zero in w, by which some divide."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        limits = np.iinfo(dtype)
        low, high = (-5, 4) if value.name == "i" else (limits.min, limits.max)
        feeds[value.name] = rng.integers(low, high, shape, dtype, endpoint=True)
        if value.name == "w":
            feeds["w"][feeds["w"] == 0] = 1
        elif value.name == "x":
            feeds["x"].flat[:2] = (low, high)
    return feeds


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_in_int32(tools: SimpleNamespace, rtx_refusal: Callable[..., str | None], case: str) -> None:
    model = tools.model(CASES[case], 18)
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model))
    assert "n" not in {node.name for node in result.proto.graph.node}
    if case != "Where":  # whose condition is a node on uint8, too
        assert rtx_refusal(model) is not None
        assert rtx_refusal(result.proto) is None


@pytest.mark.parametrize("case", SIGNED_CASES)
def test_the_same_numbers_of_int8(tools: SimpleNamespace, rtx_refusal: Callable[..., str | None], case: str) -> None:
    model = tools.model(SIGNED_CASES[case], 18)
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model))
    assert "n" not in {node.name for node in result.proto.graph.node}
    assert (rtx_refusal(model) is None) == (case in BUILT)
    assert rtx_refusal(result.proto) is None


SHIFTS = {
    "uint8 to the left": """g (uint8[5,6] x) => (uint8[5,6] y) <uint8 k = {3}>
        { [n] y = BitShift <direction = "LEFT"> (x, k) }""",
    "uint8 to the right": """g (uint8[5,6] x) => (uint8[5,6] y) <uint8 k = {3}>
        { [n] y = BitShift <direction = "RIGHT"> (x, k) }""",
    "int8 to the left": """g (int8[5,6] x) => (int8[5,6] y) <uint8 k = {3}>
        { u = Cast <to = 2> (x) [n] v = BitShift <direction = "LEFT"> (u, k) y = Cast <to = 3> (v) }""",
    "int8 to the right, as torch.onnx writes it": """g (int8[5,6] x) => (int8[5,6] y)
        <uint8 k = {2}, uint8 ones = {192}, int8 zero = {0}>
        { below = Less (x, zero) u = Cast <to = 2> (x) [n] v = BitShift <direction = "RIGHT"> (u, k)
          o = BitwiseOr (v, ones) p = Cast <to = 3> (o) q = Cast <to = 3> (v) y = Where (below, p, q) }""",
}


@pytest.mark.parametrize("case", SHIFTS)
def test_shifts_of_8_bits(tools: SimpleNamespace, rtx_refusal: Callable[..., str | None], case: str) -> None:
    model = tools.model(SHIFTS[case], 18)
    result = tools.apply(ONE, model, rewrites=1, feeds=_feeds(model))
    assert "BitShift" not in tools.ops(result)
    assert rtx_refusal(model) is not None
    if "torch" not in case:  # there a comparison with an int8 constant is left
        assert rtx_refusal(result.proto) is None


def test_a_module_in_int8_is_one_engine() -> None:
    """Whatever it does with constants, bits and remainders, none of it becomes a plugin."""

    class Codes(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            low, high = x & 15, x >> 4
            packed = torch.where(w > 3, low << 4, ~high) + 7
            return packed, packed.clamp(-5, 5), x // 3, torch.fmod(x, w) - packed % w

    args = tuple(torch.arange(-60, 60, dtype=torch.int8).reshape(4, 30) | 1 for _ in range(2))
    made = tb.convert(Codes().eval(), args, backend="tensorrt_rtx")
    assert (len(made.program.engines), len(made.program.plugin_calls)) == (1, 0)
    assert {item["name"] for item in made.program.info["passes"] if item["rewrites"]} >= {"RewriteRefused"}


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


def test_a_cast_of_a_negative_number_to_an_unsigned_type_stays(tools: SimpleNamespace) -> None:
    model = tools.model(
        """g (int8[4] x, int8[4] w) => (uint8[4] y, float[4] z)
        { [n] s = Sub (x, w) y = Cast <to = 2> (s) z = Cast <to = 1> (s) }""",
        18,
    )
    feeds = {"x": np.array([0, 127, -128, 5], np.int8), "w": np.array([1, -1, 1, 1], np.int8)}
    result = tools.apply(ONE, model, rewrites=1, feeds=feeds)
    cast = next(node for node in result.proto.graph.node if list(node.output) == ["y"])
    types = {value.name: value.type.tensor_type.elem_type for value in result.proto.graph.value_info}
    assert types[cast.input[0]] == onnx.TensorProto.INT8


@pytest.mark.parametrize("op", ["Add", "Max"])
def test_other_types_stay(tools: SimpleNamespace, op: str) -> None:
    model = tools.model(f"g (int32[4] x) => (int32[4] y) {{ [n] y = {op} (x, x) }}", 18)
    tools.apply(ONE, model, rewrites=0, refused="not about integers of 8 bits")
    assert op in OPS
