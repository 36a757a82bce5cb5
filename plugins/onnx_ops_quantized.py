"""ONNX ops on quantized numbers. Products of 8-bit numbers are summed in float64, which is exact up to 2^53."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from .onnx_call import Implementation, NodeCall, NotHereError, Result, pad, saturate, spatial, window_pads


def mat_mul_integer(call: NodeCall) -> Result:
    """MatMulInteger: (A - a_zero) @ (B - b_zero) int32; a zero point may be one a row of A, or a column of B."""
    return _whole(_product(call.tensor(0), call.maybe(2), call.tensor(1), call.maybe(3)))


def q_linear_mat_mul(call: NodeCall) -> Result:
    """QLinearMatMul: both sides and the result scaled."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = (call.tensor(index) for index in range(8))
    if y_zero.dtype not in (torch.uint8, torch.int8):
        raise NotHereError
    product = _product(a, a_zero, b, b_zero)
    if a_scale.dim() == 1 and a_scale.numel() > 1:
        a_scale = a_scale.unsqueeze(-1)
    scale = (a_scale.float() * b_scale.float() / y_scale.float()).double()
    return saturate(torch.round(product * scale) + y_zero.double(), y_zero.dtype)


def conv_integer(call: NodeCall) -> Result:
    """ConvInteger: a convolution of (x - x_zero) with (w - w_zero), int32."""
    return _whole(_convolve(call, call.tensor(0), call.maybe(2), call.tensor(1), call.maybe(3)))


def q_linear_conv(call: NodeCall) -> Result:
    """QLinearConv: scaled on all sides, with an int32 bias of scale x_scale * w_scale."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (call.tensor(index) for index in range(8))
    if y_zero.dtype not in (torch.uint8, torch.int8):
        raise NotHereError
    result = _convolve(call, x, x_zero, w, w_zero)
    by_channel = [1, -1] + [1] * (x.dim() - 2)
    if call.has(8):
        result = result + call.tensor(8).double().reshape(by_channel)
    scale = (x_scale.float() * w_scale.float() / y_scale.float()).double()
    scale = scale.reshape(by_channel) if scale.numel() > 1 else scale
    return saturate(torch.round(result * scale) + y_zero.double(), y_zero.dtype)


def dynamic_quantize(call: NodeCall) -> Result:
    """DynamicQuantizeLinear: uint8 values, scale and zero point from the range of the input, widened to hold 0."""
    x = call.tensor(0)
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    y = (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)
    return y, scale, zero.to(torch.uint8)


def _product(
    a: torch.Tensor, a_zero: torch.Tensor | None, b: torch.Tensor, b_zero: torch.Tensor | None
) -> torch.Tensor:
    left, right = a.double(), b.double()
    if a_zero is not None:
        left = left - (a_zero.double().unsqueeze(-1) if a_zero.dim() == 1 and a_zero.numel() > 1 else a_zero.double())
    if b_zero is not None:
        right = right - b_zero.double()
    return torch.matmul(left, right)


def _convolve(
    call: NodeCall, x: torch.Tensor, x_zero: torch.Tensor | None, w: torch.Tensor, w_zero: torch.Tensor | None
) -> torch.Tensor:
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise NotHereError
    _, strides, dilations = spatial(call, rank)
    kernel = list(w.shape[2:])
    pads = window_pads(call, x.shape[2:], kernel, strides, dilations)
    wide = x.double() - (x_zero.double() if x_zero is not None else 0)  # so padding is the zero point
    weight = w.double()
    if w_zero is not None:
        weight = weight - w_zero.double().reshape([-1] + [1] * (w.dim() - 1))
    wide = pad(wide, pads)
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    return convolve(wide, weight, None, strides, 0, dilations, int(call.attribute("group", 1)))


def _whole(values: torch.Tensor) -> torch.Tensor:
    return torch.round(values).to(torch.int32)


OPS: Mapping[str, Implementation] = {
    "MatMulInteger": mat_mul_integer,
    "ConvInteger": conv_integer,
    "QLinearMatMul": q_linear_mat_mul,
    "QLinearConv": q_linear_conv,
    "DynamicQuantizeLinear": dynamic_quantize,
}
