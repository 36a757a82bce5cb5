"""tb.explain: of each plugin the op, the line, whose words, what it costs, and how to avoid it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.avoid_plugins import INSTEAD
from trtbridge.bridge.explain import Explanation


class Net(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.function(self.layer(x)))


def _explain(function: Callable[..., torch.Tensor], **options: object) -> Explanation:
    return tb.explain(Net(function), (torch.randn(4, 8),), backend="onnxruntime", **options)


def test_a_plugin_is_told_with_line_words_cost_and_a_way_around() -> None:
    found = _explain(lambda x: torch.hypot(x, x + 1))
    (note,) = found.plugins
    assert note.op == "aten::hypot.default"
    assert note.place == "between segments"
    assert note.origin.file == __file__
    assert note.origin.code == "return self.layer(self.function(self.layer(x)))"
    assert "no translation" in note.reason
    assert note.cost.segments_added == 1
    assert note.cost.milliseconds is not None
    assert note.cost.milliseconds > 0
    assert note.cost.device == "cpu"
    assert note.ways == ("torch.sqrt(x * x + y * y)",)
    text = str(found)
    assert "costs 1 segment more; " in text
    assert "ms a call on cpu" in text
    assert "instead: torch.sqrt(x * x + y * y)" in text


def test_of_two_plugins_at_the_same_depth_neither_alone_divides_the_model() -> None:
    found = _explain(lambda x: torch.hypot(x, x + 1) + torch.hypot(x, x - 1))
    assert [note.cost.segments_added for note in found.plugins] == [0, 0]


def test_plugins_in_a_row_each_divide_it() -> None:
    found = _explain(lambda x: torch.hypot(torch.relu(torch.hypot(x, x + 1)), x))
    assert [note.cost.segments_added for note in found.plugins] == [1, 1]


def test_a_plugin_at_the_end_adds_no_segment() -> None:
    class End(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.hypot(torch.relu(x), x)

    (note,) = tb.explain(End(), (torch.randn(4, 8),), backend="onnxruntime").plugins
    assert note.cost.segments_added == 0


def test_random_numbers_can_come_from_outside() -> None:
    (note,) = _explain(lambda x: x + torch.randn_like(x)).plugins
    assert "as an input" in note.ways[0]


@pytest.mark.rtx
def test_nothing_is_measured_where_the_plugin_would_not_run() -> None:
    pytest.importorskip("tensorrt_rtx")
    found = tb.explain(Net(lambda x: torch.hypot(x, x + 1)), (torch.randn(4, 8),), backend="tensorrt_rtx")
    (note,) = found.plugins
    assert note.cost.milliseconds is None
    assert "on a GPU" in note.cost.not_measured
    assert "time not measured" in str(found)


@pytest.mark.rtx
def test_a_file_brings_no_example(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[8] x) => (float[n] y) { y = Unique<sorted = 1>(x) }'
    )
    onnx.save(model, tmp_path / "unique.onnx")
    found = tb.explain(tmp_path / "unique.onnx", backend="tensorrt_rtx")
    (note,) = found.plugins
    assert found.converts
    assert "no example" in note.cost.not_measured


def test_without_plugins_there_is_nothing_to_tell() -> None:
    found = _explain(torch.relu)
    assert found.plugins == ()
    assert "costs" not in str(found)


SORTED = torch.tensor([-1.0, 0.0, 0.5, 2.0])
BEFORE = torch.ones(8, 8).tril().bool()
MASK = torch.arange(32).view(4, 8) % 3 == 0
WHOLE = torch.tensor([0.0, 3, 3, 1, 2, 3])
INF = float("inf")
SAME = {
    "aten::hypot": (lambda x: torch.hypot(x, x + 1), lambda x: torch.sqrt(x * x + (x + 1) * (x + 1))),
    "aten::bucketize": (lambda x: torch.bucketize(x, SORTED), lambda x: (x.unsqueeze(-1) > SORTED).sum(-1)),
    "aten::searchsorted": (lambda x: torch.searchsorted(SORTED, x), lambda x: (x.unsqueeze(-1) > SORTED).sum(-1)),
    "aten::cummax": (
        lambda x: torch.cummax(x, 1).values,
        lambda x: x.unsqueeze(-2).masked_fill(~BEFORE, -INF).max(-1).values,
    ),
    "aten::cummin": (
        lambda x: torch.cummin(x, 1).values,
        lambda x: x.unsqueeze(-2).masked_fill(~BEFORE, INF).min(-1).values,
    ),
    "aten::kthvalue": (
        lambda x: torch.kthvalue(x, 3).values,
        lambda x: torch.topk(x, 3, largest=False).values[..., -1],
    ),
    "aten::histc": (
        lambda x: torch.histc(WHOLE, 4, 0, 3),
        lambda x: (WHOLE.unsqueeze(-1) == torch.arange(4)).sum(0).float(),
    ),
    "aten::masked_scatter": (
        lambda x: x.masked_scatter(MASK, 2 * x),
        lambda x: torch.where(MASK, (2 * x).flatten()[(MASK.flatten().cumsum(0) - 1).clamp(min=0)].view(MASK.shape), x),
    ),
}
ADVICE = {"aten::nonzero", "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa"}
"""These say what to do otherwise, not what computes the same."""


def test_every_replacement_is_tried_below() -> None:
    assert set(INSTEAD) == set(SAME) | ADVICE


@pytest.mark.rtx
@pytest.mark.parametrize("op", sorted(SAME))
def test_a_replacement_computes_the_same_and_is_no_plugin(op: str) -> None:
    original, other = SAME[op]
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(other(x), original(x))

    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return other(x) + 0 * x.sum()

    pytest.importorskip("tensorrt_rtx")
    found = tb.explain(Other(), (x,), backend="tensorrt_rtx")
    assert found.converts
    assert found.plugins == ()


@pytest.mark.rtx
def test_sizes_that_come_often_may_have_a_profile_of_their_own() -> None:
    pytest.importorskip("tensorrt_rtx")

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.relu() + y

    def tips(dims: dict[int, tb.Dim] | None, backend: str = "tensorrt_rtx") -> tuple[str, ...]:
        args = torch.ones(4, 6), torch.ones(4, 6)
        shapes = None if dims is None else {"x": dims, "y": dims}
        found = tb.explain(Net(), args, dynamic_shapes=shapes, backend=backend)
        assert str(found).count("  tip: ") == len(found.tips)
        return found.tips

    batch = tb.Dim("batch", min=1, opt=8, max=32)
    (tip,) = tips({0: batch, 1: tb.Dim("length", min=2, opt=6, max=6)})
    assert 'tb.Dim("batch", profiles=[(8, 8, 8), (1, 8, 32)])' in tip
    assert 'tb.Dim("length", profiles=[(6, 6, 6), (2, 6, 6)])' in tip
    assert tips({0: tb.Dim("batch", profiles=[(8, 8, 8), (1, 8, 32)])}) == tips(None) == ()
    assert tips({0: batch}, "onnxruntime") == (), "of others it is not known"
