"""Sizes that depend on data: right shapes, bounds for the engines behind them, and errors where a bound is exceeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trtbridge as tb


class Select(torch.nn.Module):
    """Data-dependent sizes in the middle and at the end."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        chosen = x[x.sum(1) > 0]
        return {
            "rows": chosen.relu() @ torch.ones(6, 2),
            "where": torch.nonzero(x > 1),
            "unique": torch.unique(x.round()),
        }


DYNAMIC = {"x": {0: tb.Dim("n", min=1, opt=4, max=8)}}


@pytest.mark.parametrize("n", [1, 5, 8])
def test_sizes_come_from_the_data(n: int, assert_same: Callable[..., None]) -> None:
    fast = tb.convert(Select(), (torch.randn(4, 6),), dynamic_shapes=DYNAMIC, backend="onnxruntime")
    for shift in (0.0, -10.0, 10.0):  # some, none, all
        x = torch.randn(n, 6) + shift
        assert_same(fast(x), Select()(x))


@pytest.mark.rtx
def test_known_bounds_are_the_ranges_of_the_engines_behind() -> None:
    pytest.importorskip("tensorrt_rtx")
    fast = tb.convert(
        Select(), (torch.randn(4, 6),), dynamic_shapes=DYNAMIC, backend="tensorrt_rtx", plugin_host="segments"
    )
    behind = [
        spec
        for engine in fast.program.engines
        for spec in engine.inputs
        if any(str(s).startswith("u") for s in spec.shape)
    ]
    assert behind
    assert {spec.ranges[0][2] for spec in behind if spec.ranges[0]} == {8}
    assert {call.op for call in fast.program.plugin_calls} >= {"aten::index.Tensor", "aten::nonzero.default"}


@pytest.mark.rtx
def test_unknown_bounds_are_asked_for() -> None:
    pytest.importorskip("tensorrt_rtx")
    args = (torch.randn(3, 2),)
    with pytest.raises(tb.DynamicShapeError, match=r"depend on data[\s\S]*max_data_size"):
        tb.convert(_positives(), args, backend="tensorrt_rtx", plugin_host="segments")
    for bound in ({"max_data_size": 10}, {"output_shapes": {0: {0: tb.Dim("total", max=10)}}}):
        built = tb.convert(_positives(), args, backend="tensorrt_rtx", plugin_host="segments", **bound)  # type: ignore[arg-type]
        (engine,) = built.program.engines
        assert [spec.ranges for spec in engine.inputs] == [((0, 5, 10),)]


def test_an_exceeded_bound_is_named(assert_same: Callable[..., None]) -> None:
    x = torch.randn(4, 6)
    shapes: Any = {0: {0: tb.Dim("found", max=5)}}
    fast = tb.convert(_positives(), (x,), backend="onnxruntime", output_shapes=shapes)
    assert fast.program.signature.outputs[0].shape == ("found",)
    few = torch.full((4, 6), -1.0)
    few[0, :3] = 1.0
    assert_same(fast(few), _positives()(few))
    with pytest.raises(tb.ExecutionError, match=r"24 elements in dimension 0.*5 at most.*max_data_size"):
        fast(few.abs())


def _positives() -> torch.nn.Module:
    class Positive(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_tests.positive(x) * 2

    return Positive()


@torch.library.custom_op("trtbridge_tests::positive", mutates_args=())
def _positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@_positive.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"nothing": {0: tb.Dim("m", max=5)}}, "names 'nothing'; the results are"),
        ({0: {3: tb.Dim("m", max=5)}}, "no dimension 3"),
        ({1: {1: tb.Dim("m", max=5)}}, "does not depend on data"),
        ({0: {0: tb.Dim("n", max=5)}}, "is an input's Dim"),
        ({0: {0: 5}}, "must be a dict such as"),
    ],
)
def test_bad_output_shapes_are_named(shapes: Any, words: str) -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x[x > 0], x * 2

    with pytest.raises(tb.OptionError, match=words):
        tb.convert(Both(), (torch.randn(4, 6),), dynamic_shapes=DYNAMIC, backend="onnxruntime", output_shapes=shapes)


class Fill(torch.nn.Module):
    """Writes to a view whose size depends on data."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        size = n.max().item()
        torch._check(size >= 0)
        torch._check(size <= 16)
        filled = torch.cummax(x, 0).values.clone()
        filled[:size] = torch.cummax(x, 0).values[:size] * 2
        return filled + 1


@pytest.mark.rtx
def test_sizes_without_a_name_have_the_bound_that_is_stated() -> None:
    pytest.importorskip("tensorrt_rtx")
    args = (torch.randn(16, 4), torch.tensor([3, 5]))
    with pytest.raises(tb.DynamicShapeError, match=r"\(\?, 1\) int64"):
        tb.convert(Fill(), args, backend="tensorrt_rtx")
    program = tb.convert(Fill(), args, backend="tensorrt_rtx", max_data_size=16).program
    assert program.engines
    # The view stays in the graph: as a plugin it would be a copy, what is written to it lost, and the sum "wrong".
    assert "aten::add.Tensor" not in {call.op for call in program.plugin_calls}


@pytest.mark.rtx
def test_products_of_bounds_that_no_size_can_be() -> None:
    """TensorRT-RTX cuts 2048**3 to 32 bits, to nothing, and refuses 2**31 in a way that no node is to blame for."""
    pytest.importorskip("tensorrt_rtx")

    class Volume(torch.nn.Module):
        def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            a, b, c = sizes.tolist()
            for size in (a, b, c):
                torch._check(size >= 0)
            return torch.hypot(x[:1].expand(a * b * c, 16), x[:1]) + 1

    args = (torch.randn(8, 16), torch.tensor([2, 2, 2]))
    with pytest.raises(tb.DynamicShapeError, match=r"(?s)sizes up to 2147483647.*State smaller bounds"):
        tb.convert(Volume(), args, backend="tensorrt_rtx", plugin_host="segments", max_data_size=2048)
    assert tb.convert(Volume(), args, backend="tensorrt_rtx", plugin_host="segments", max_data_size=64)


class Grids(torch.nn.Module):
    """Positions in several grids, whose sizes are values, for rows that they add up to (MiniMax-M3's pictures)."""

    def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        a, b = sizes.tolist()
        positions = torch.cat([torch.arange(a), torch.arange(b)]).unsqueeze(1)
        return torch.cummax(x * positions, 0).values * positions


@pytest.mark.rtx
def test_sizes_that_add_up_to_a_known_one(convert_both: Callable[..., Any]) -> None:
    """With half of the bound for each the builder refuses the product: twice 6 is not 13."""
    x = torch.randn(13, 4)
    calls = [((x, torch.tensor([5, 8])), {}), ((x, torch.tensor([11, 2])), {})]
    _, built = convert_both(Grids(), calls)
    assert sorted({call.op for call in built.program.plugin_calls}) == ["aten::arange.default", "aten::cummax.default"]
    _, behind_sizes, behind_cummax = built.program.engines
    assert [spec.ranges[0] for spec in behind_sizes.inputs] == [(0, 5, 13), (0, 8, 13), (13, 13, 13)]
    assert {spec.shape[0] for spec in behind_cummax.inputs} == {13}, "what is asserted is known"


@pytest.mark.rtx
def test_sizes_that_are_not_tied_do_not_hang_on_the_example() -> None:
    """Else another example would make another engine."""
    pytest.importorskip("tensorrt_rtx")
    options: Any = {"backend": "tensorrt_rtx", "plugin_host": "segments", "max_data_size": 10}
    for x in (torch.ones(3, 2), -torch.ones(3, 2)):
        (engine,) = tb.convert(_positives(), (x,), **options).program.engines
        assert [spec.ranges for spec in engine.inputs] == [((0, 5, 10),)]
