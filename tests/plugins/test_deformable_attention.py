"""Deformable attention: the reference against grid_sample, the op's registration, and the op in a converted model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.errors import InputError
from trtbridge.plugins import deformable_attention as module
from trtbridge.plugins.deformable_attention import deformable_attention

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def arguments(n: int, q: int, heads: int, dim: int, points: int, levels: list[tuple[int, int]]) -> Arguments:
    """Random arguments; a third of the points lie outside of the image."""
    shapes = torch.tensor(levels)
    sizes = shapes.prod(1)
    value = torch.randn(n, int(sizes.sum()), heads, dim)
    locations = torch.rand(n, q, heads, len(levels), points, 2) * 1.4 - 0.2
    weights = torch.rand(n, q, heads, len(levels) * points).softmax(-1).view(n, q, heads, len(levels), points)
    return value, shapes, sizes.cumsum(0) - sizes, locations, weights


def with_grid_sample(value: torch.Tensor, levels: list[tuple[int, int]], *rest: torch.Tensor) -> torch.Tensor:
    """The textbook form: one grid_sample a level."""
    locations, weights = rest
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    total = value.new_zeros(n * heads, dim, queries)
    for level, part in enumerate(value.split([h * w for h, w in levels], dim=1)):
        images = part.permute(0, 2, 3, 1).reshape(n * heads, dim, *levels[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total += (samples * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return total.view(n, heads * dim, queries).transpose(1, 2)


CASES: list[tuple[int, int, int, int, int, list[tuple[int, int]]]] = [
    (1, 1, 1, 1, 1, [(1, 1)]),
    (2, 7, 3, 33, 4, [(5, 7), (3, 3), (1, 2)]),
    (1, 33, 8, 32, 4, [(12, 17), (6, 9), (3, 5), (2, 3)]),
]


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_grid_sample(case: Any) -> None:
    value, shapes, starts, locations, weights = arguments(*case)
    expected = with_grid_sample(value, case[-1], locations, weights)
    got = deformable_attention(value, shapes, starts, locations, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_rounded_at_the_end(dtype: torch.dtype) -> None:
    value, shapes, starts, locations, weights = arguments(*CASES[1])
    value, locations, weights = value.to(dtype), locations.to(dtype), weights.to(dtype)
    expected = with_grid_sample(value.double(), CASES[1][-1], locations.double(), weights.double())
    got = deformable_attention(value, shapes, starts, locations, weights)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_far_and_invalid_points_count_as_zero() -> None:
    value, shapes, starts, locations, weights = arguments(*CASES[1])
    value[:, 0] = math.inf  # what is not asked for must not leak in
    for invalid in (math.nan, math.inf, -math.inf, 1e30):
        assert not deformable_attention(value, shapes, starts, torch.full_like(locations, invalid), weights).any()


def test_empty() -> None:
    value, shapes, starts, locations, weights = arguments(2, 5, 2, 4, 3, [(3, 3)])
    assert deformable_attention(value, shapes, starts, locations[:, :0], weights[:, :0]).shape == (2, 0, 8)
    assert deformable_attention(value[:0], shapes, starts, locations[:0], weights[:0]).shape == (0, 5, 8)
    assert not deformable_attention(value[:, :0], shapes * 0, starts, locations, weights).any()


def test_int32_shapes() -> None:
    value, shapes, starts, locations, weights = arguments(*CASES[1])
    expected = deformable_attention(value, shapes, starts, locations, weights)
    got = deformable_attention(value, shapes.int(), starts.int(), locations, weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_registration() -> None:
    """Schema and fake kernel say what the op does."""
    utils = ("test_schema", "test_faketensor")
    for dtype in (torch.float32, torch.float16):
        value, shapes, starts, locations, weights = arguments(*CASES[1])
        call = (value.to(dtype), shapes, starts, locations.to(dtype), weights)
        torch.library.opcheck(torch.ops.trtbridge.deformable_attention.default, call, test_utils=utils)
    assert module.OP == "trtbridge::deformable_attention"


def test_wrong_arguments_are_named() -> None:
    value, shapes, starts, locations, weights = arguments(*CASES[1])
    with pytest.raises(InputError, match="value has shape"):
        deformable_attention(value[0], shapes, starts, locations, weights)
    with pytest.raises(InputError, match="sampling_locations has shape"):
        deformable_attention(value, shapes, starts, locations[:, 1:], weights)
    with pytest.raises(InputError, match=r"spatial_shapes is torch\.float32"):
        deformable_attention(value, shapes.float(), starts, locations, weights)
    with pytest.raises(InputError, match=r"value is torch\.int64"):
        deformable_attention(value.long(), shapes, starts, locations, weights)


class Attention(torch.nn.Module):
    """The attention module around the op."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.where, self.weights = torch.nn.Linear(8, 2 * 2 * 3 * 2), torch.nn.Linear(8, 2 * 2 * 3)
        self.register_buffer("shapes", torch.tensor([(4, 5), (2, 3)]))
        self.register_buffer("starts", torch.tensor([0, 20]))

    def forward(self, queries: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        n, q = queries.shape[:2]
        out = torch.ops.trtbridge.deformable_attention(
            self.values(pixels).view(n, -1, 2, 4),
            self.shapes,
            self.starts,
            self.where(queries).sigmoid().view(n, q, 2, 2, 3, 2),
            self.weights(queries).view(n, q, 2, 6).softmax(-1).view(n, q, 2, 2, 3),
        )
        return self.out(out)


def test_converted() -> None:
    model = Attention().eval()
    example = (torch.randn(2, 5, 8), torch.randn(2, 26, 8))
    queries = tb.Dim("queries", min=1, opt=5, max=50)
    fast = tb.convert(model, example, dynamic_shapes=({1: queries}, None), backend="onnxruntime")
    for q in (5, 1, 50):
        call = (torch.randn(2, q, 8), torch.randn(2, 26, 8))
        torch.testing.assert_close(fast(*call), model(*call).detach(), rtol=1e-4, atol=1e-5)
