"""Deformable convolution: the reference against loops and F.conv2d, the op's registration, and a converted model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.errors import InputError
from trtbridge.plugins import deformable_convolution as module
from trtbridge.plugins.deformable_convolution import deform_conv2d


def arguments(
    n: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
    spread: float = 2.0,
) -> dict[str, Any]:
    """Random arguments, with offsets that also lead outside of the image."""
    out = [
        (a + 2 * p - d * (k - 1) - 1) // s + 1
        for a, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    taps = offset_groups * kernel[0] * kernel[1]
    return {
        "input": torch.randn(n, channels, *size),
        "weight": torch.randn(out_channels, channels // groups, *kernel),
        "offset": torch.randn(n, 2 * taps, *out) * spread,
        "mask": torch.rand(n, taps, *out),
        "bias": torch.randn(out_channels),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
    }


def at(plane: torch.Tensor, y: float, x: float) -> float:
    """A plane's value at a point, interpolated, zero outside."""
    total = 0.0
    for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            total += float(plane[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def with_loops(call: dict[str, Any]) -> torch.Tensor:
    """The definition, number by number, in Python's float64."""
    image, weight, offset, mask = call["input"], call["weight"], call["offset"], call["mask"]
    out_channels, per_group, kernel_h, kernel_w = weight.shape
    n, _, out_h, out_w = offset.shape
    result = torch.empty(n, out_channels, out_h, out_w, dtype=torch.float64)
    per_offset_group = image.shape[1] // call["offset_groups"]
    for b, o, i, j in itertools.product(range(n), range(out_channels), range(out_h), range(out_w)):
        total = float(call["bias"][o])
        for c, ky, kx in itertools.product(range(per_group), range(kernel_h), range(kernel_w)):
            channel = o // (out_channels // call["groups"]) * per_group + c
            tap = channel // per_offset_group * kernel_h * kernel_w + ky * kernel_w + kx
            y = i * call["stride"][0] - call["padding"][0] + ky * call["dilation"][0] + float(offset[b, 2 * tap, i, j])
            x = j * call["stride"][1] - call["padding"][1] + kx * call["dilation"][1]
            x += float(offset[b, 2 * tap + 1, i, j])
            total += float(weight[o, c, ky, kx]) * float(mask[b, tap, i, j]) * at(image[b, channel], y, x)
        result[b, o, i, j] = total
    return result


@pytest.mark.parametrize(
    "case",
    [
        {"n": 1, "channels": 1, "out_channels": 1, "size": (1, 1), "kernel": (1, 1)},
        {"n": 2, "channels": 2, "out_channels": 3, "size": (4, 7), "kernel": (3, 3), "padding": (1, 1)},
        {
            "n": 1, "channels": 12, "out_channels": 4, "size": (7, 5), "kernel": (3, 2), "stride": (2, 1),
            "padding": (2, 0), "dilation": (1, 2), "groups": 2, "offset_groups": 3,
        },
    ],
)  # fmt: skip
def test_it_agrees_with_the_definition(case: dict[str, Any]) -> None:
    call = arguments(**case)
    torch.testing.assert_close(deform_conv2d(**call).double(), with_loops(call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_without_offsets_it_is_a_convolution(groups: int) -> None:
    call = arguments(2, 6, 9, (13, 11), (3, 5), (2, 1), (1, 2), (1, 2), groups, 2, spread=0.0)
    expected = F.conv2d(call["input"], call["weight"], call["bias"], (2, 1), (1, 2), (1, 2), groups)
    torch.testing.assert_close(deform_conv2d(**call | {"mask": None}), expected, rtol=1e-4, atol=1e-4)
    plain = {name: call[name] for name in ("input", "weight", "offset", "stride", "padding", "dilation", "groups")}
    no_bias = expected - call["bias"][:, None, None]
    torch.testing.assert_close(deform_conv2d(**plain, offset_groups=2), no_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_rounded_at_the_end(dtype: torch.dtype) -> None:
    call = arguments(2, 6, 4, (9, 8), (3, 3), padding=(1, 1), groups=2)
    half = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in half.items()}
    got = deform_conv2d(**half)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), deform_conv2d(**exact), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_far_and_invalid_offsets_read_zeros() -> None:
    call = arguments(1, 2, 3, (4, 4), (3, 3))
    call["input"][:, :, 0, 0] = math.inf  # what is not asked for must not leak in
    bias = call["bias"][:, None, None].expand(3, 2, 2)[None]
    for invalid in (math.nan, math.inf, 1e30, -1e30):
        call["offset"] = torch.full_like(call["offset"], invalid)
        torch.testing.assert_close(deform_conv2d(**call), bias)


def test_empty() -> None:
    call = arguments(0, 4, 6, (5, 5), (3, 3))
    assert deform_conv2d(**call).shape == (0, 6, 3, 3)
    call = arguments(2, 4, 6, (2, 5), (3, 3))
    assert deform_conv2d(**call).shape == (2, 6, 0, 3)


def test_one_number_stands_for_both_directions() -> None:
    call = arguments(1, 2, 3, (8, 8), (3, 3), (2, 2), (1, 1))
    expected = deform_conv2d(**call)
    op = torch.ops.trtbridge.deform_conv2d
    got = op(*(call[name] for name in ("input", "weight", "offset", "mask", "bias")), 2, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_registration() -> None:
    """Schema and fake kernel say what the op does, on dynamic shapes too."""
    utils = ("test_schema", "test_faketensor")
    op = torch.ops.trtbridge.deform_conv2d.default
    call = arguments(2, 4, 6, (9, 7), (3, 2), (2, 1), (1, 0), (1, 2), 2, 2)
    torch.library.opcheck(op, (), call, test_utils=utils)
    torch.library.opcheck(op, (), call | {"mask": None, "bias": None}, test_utils=utils)
    assert module.OP == "trtbridge::deform_conv2d"


def test_wrong_arguments_are_named() -> None:
    call = arguments(2, 4, 6, (5, 5), (3, 3))
    for change, words in (
        ({"offset": call["offset"][:, 1:]}, "offset has shape"),
        ({"mask": call["mask"][:, :, 1:]}, "mask has shape"),
        ({"bias": call["bias"][1:]}, "bias has shape"),
        ({"weight": call["weight"].half()}, r"weight is torch\.float16"),
        ({"groups": 3}, "groups is 3"),
        ({"offset_groups": 0}, "offset_groups is 0"),
        ({"stride": (0, 1)}, "must be positive"),
    ):
        with pytest.raises(InputError, match=words):
            deform_conv2d(**call | change)


class Net(torch.nn.Module):
    """A deformable convolution with offsets and masks of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = torch.nn.Conv2d(3, 27, 3, stride=2, padding=1)
        self.weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3))
        self.bias = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        offset, mask = self.offsets(x).split([18, 9], 1)
        args = (x, self.weight, offset, mask.sigmoid(), self.bias, [2, 2], [1, 1])
        return torch.ops.trtbridge.deform_conv2d(*args).relu()


def test_converted() -> None:
    model = Net().eval()
    batch = tb.Dim("batch", min=1, opt=2, max=4)
    fast = tb.convert(model, (torch.randn(2, 3, 9, 11),), dynamic_shapes=({0: batch},), backend="onnxruntime")
    for n in (2, 1, 4):
        x = torch.randn(n, 3, 9, 11)
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-4)
