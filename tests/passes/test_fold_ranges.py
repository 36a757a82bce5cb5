"""FoldRanges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

import trtbridge as tb
from trtbridge.passes import FoldRanges, FoldShapes, Pipeline, PipelineResult, RemoveDeadNodes

RANGES = {"n": (2, 128), "m": (200, 300)}
BOUNDS = (
    "<int64[1] one = {1}, int64[1] size = {512}, int64[1] less = {511}, int64[1] hundred = {100}, int64 zero = {0}, "
    "int64 high = {512}, int64[1] minus = {-1}, int64[1] nought = {0}>"
)
N = "n = Shape <start = 0, end = 1> (x)  m = Shape <start = 0, end = 1> (w)"


def _run(model: onnx.ModelProto, rewrites: int, ranges: dict[str, tuple[int, int]] | None = None) -> PipelineResult:
    """Twice is once, and the numbers stay at both ends of the ranges."""
    given = RANGES if ranges is None else ranges
    result = None
    for end in (0, 1):
        feeds = {
            value.name: np.zeros([given.get(d.dim_param, (5, 5))[end] if d.dim_param else d.dim_value
                                  for d in value.type.tensor_type.shape.dim], np.float32)
            for value in model.graph.input
        }  # fmt: skip
        result = Pipeline((FoldRanges(),)).run(model, {}, check=feeds, tolerance=0, ranges=given)
        assert result.report.passes[0].rewrites == rewrites, onnx.printer.to_text(result.proto)
        assert result.report.comparison.startswith("compared")
    assert result is not None
    assert Pipeline((FoldRanges(),)).run(result.proto, result.weights, ranges=given).report.rewrites == 0
    return result


def _model(tools: SimpleNamespace, body: str, result: str = "int64[1]") -> onnx.ModelProto:
    model: onnx.ModelProto = tools.model(f"g (float[n,4] x, float[m] w) => ({result} y) {BOUNDS} {{ {N}  {body} }}", 20)
    return model


CONSTANTS = {
    "a quotient": ("a = Add (n, less)  b = Div (a, size)  y = Mul (b, minus)", [-1], 2),
    "a remainder": ("a = Mul (n, nought)  b = Mod (a, size)  y = Sub (b, one)", [-1], 3),
    "all of a vector": ("a = Concat <axis = 0> (n, m)  b = Div (a, size)  y = Add (b, one)", [1, 1], 2),
    "a number": ("q = Squeeze (n)  a = Min (q, zero)  b = Unsqueeze (a, nought)  y = Cast <to = 7> (b)", [0], 3),
}


@pytest.mark.parametrize("case", CONSTANTS)
def test_what_is_one_number_becomes_it(tools: SimpleNamespace, case: str) -> None:
    body, wanted, rewrites = CONSTANTS[case]
    result = _run(_model(tools, body, f"int64[{len(wanted)}]"), rewrites)
    node = result.proto.graph.node[-1]
    assert node.op_type == "Identity", "an output keeps its name"
    (constant,) = (t for t in result.proto.graph.initializer if t.name == node.input[0])
    assert onnx.numpy_helper.to_array(constant).tolist() == wanted


OPERANDS = {
    "Min": "a = Min (n, size)  y = Add (a, m)",
    "Min the other way": "a = Min (size, n)  y = Add (a, m)",
    "Max": "a = Max (n, one)  y = Add (a, m)",
    "Max of two sizes": "a = Max (m, n)  y = Add (a, n)",
    "Where": "c = Less (n, size)  a = Where (c, n, m)  y = Add (a, m)",
    "Where not": "c = Greater (n, size)  d = Or (c, c)  a = Where (d, m, n)  y = Add (a, m)",
}


@pytest.mark.parametrize("case", OPERANDS)
def test_what_gives_back_an_operand_becomes_it(tools: SimpleNamespace, case: str) -> None:
    rewrites = OPERANDS[case].count(" = ") - 1
    result = _run(_model(tools, OPERANDS[case]), rewrites)
    cleaned = Pipeline((RemoveDeadNodes(),)).run(result.proto, result.weights)
    assert tools.ops(cleaned) == ["Shape", "Shape", "Add"]


NEAR_MISSES = {
    "a bound inside": "y = Min (n, hundred)",
    "ranges that meet": "a = Mul (n, hundred)  y = Max (a, m)",
    "a quotient of two values": "y = Div (n, hundred)",
    "a negative numerator": "a = Sub (n, m)  y = Div (a, size)",
    "another shape": "q = Squeeze (n)  y = Min (q, size)",
    "something that depends on data": "a = Cast <to = 7> (w)  b = ReduceMax (a, nought)  y = Min (b, n)",
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_leaves(tools: SimpleNamespace, case: str) -> None:
    _run(_model(tools, NEAR_MISSES[case]), 0)


def test_the_other_shape_is_known_by_its_range_alone(tools: SimpleNamespace) -> None:
    """A scalar and a vector of one: the result is the vector."""
    model = _model(tools, "q = Squeeze (n)  a = Max (q, one)  y = Add (a, one)")
    _run(model, 0)


def test_without_ranges_nothing_is_known(tools: SimpleNamespace) -> None:
    model = _model(tools, OPERANDS["Min"])
    tools.apply(FoldRanges(), model, rewrites=0)
    assert Pipeline((FoldRanges(),)).run(model, {}, ranges={"k": (1, 2)}).report.rewrites == 0


def test_numbers_that_may_overflow_are_left(tools: SimpleNamespace) -> None:
    _run(_model(tools, "y = Min (n, size)"), 0, {"m": (200, 300), "n": (2, 2**62)} | {"n": (2, 600)})
    body = "a = Cast <to = 6> (n)  b = Mul (a, a)  c = Cast <to = 7> (b)  y = Max (c, one)"
    model = _model(tools, body)
    wide = {"n": (2, 1 << 20), "m": (200, 300)}
    assert Pipeline((FoldRanges(),)).run(model, {}, ranges=wide).report.rewrites == 0
    assert Pipeline((FoldRanges(),)).run(model, {}, ranges=RANGES).report.rewrites == 1


class Windows(torch.nn.Module):
    """x: (n, 4) times the number of windows of 256 rows it lies in, and plus that of rows in the first."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.shape[0]
        return x * ((rows + 255) // 256), x + min(rows, 256)


@pytest.mark.parametrize("profiles", [[(2, 8, 128)], [(2, 8, 64), (64, 100, 128)], [(2, 8, 128), (150, 160, 300)]])
def test_a_module_over_all_its_profiles(profiles: Sequence[tuple[int, int, int]]) -> None:
    """One profile beyond 256 is enough for the arithmetic to stay."""
    shapes = {"x": {0: tb.Dim("n", profiles=profiles)}}
    passes = tb.DEFAULT.insert(FoldRanges(), after=FoldShapes)
    module, x = Windows(), torch.randn(8, 4)
    fast = tb.convert(module, (x,), dynamic_shapes=shapes, backend="onnxruntime", passes=passes, check_passes=True)
    rewrites = {row["name"]: row["rewrites"] for row in fast.program.info["passes"]}["FoldRanges"]
    assert (rewrites > 0) == (profiles[-1][2] <= 256)
    for rows in {size for low, _, high in profiles for size in (low, high)}:
        x = torch.randn(rows, 4)
        for mine, wanted in zip(fast(x), module(x), strict=True):
            torch.testing.assert_close(mine, wanted)
    with pytest.raises(tb.OutOfRangeError):
        fast(torch.randn(profiles[-1][2] + 1, 4))


def test_a_file_whose_own_names_mean_something_else(tools: SimpleNamespace, tmp_path: Path) -> None:
    """The file calls its second dimension "n", the user the first."""
    model = tools.model(
        "g (float[k,n] x) => (int64[1] y) <int64[1] c = {100}> { s = Shape <start = 1, end = 2> (x) y = Min (s, c) }",
        20,
    )
    onnx.save(model, tmp_path / "m.onnx")
    shapes = {"x": {0: tb.Dim("n", min=1, opt=2, max=8), 1: tb.Dim("k", min=1, opt=20, max=400)}}
    passes = tb.DEFAULT.insert(FoldRanges(), after=FoldShapes)
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes=shapes, backend="onnxruntime", passes=passes)
    for columns in (7, 300):
        (found,) = torch.utils._pytree.tree_leaves(fast(torch.zeros(2, columns)))
        assert found.tolist() == [min(columns, 100)]
