"""ONNX ops on numbers: bits, whole numbers of all widths, running sums, matrices, spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .onnx_call import SIGNED, WIDER, Implementation, NodeCall, NotHereError, Result, compute_type

# Bits


def bitwise(call: NodeCall) -> Result:
    """BitwiseAnd, BitwiseOr, BitwiseXor and BitwiseNot, on the signed type of the same bits."""
    dtype = call.tensor(0).dtype
    bits = SIGNED.get(dtype, dtype)
    operands = [call.tensor(index).view(bits) for index in range(len(call.inputs))]
    return _BITWISE[call.op](*operands).view(dtype)


_BITWISE: Mapping[str, Callable[..., torch.Tensor]] = {
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "BitwiseNot": torch.bitwise_not,
}


def bit_shift(call: NodeCall) -> Result:
    """BitShift. A shift by less than 0, or by all bits or more, shifts all out; a signed number's sign stays."""
    x, shift = call.tensor(0), call.tensor(1)
    dtype = x.dtype
    bits = 8 * dtype.itemsize
    if dtype == torch.uint64:
        x, shift = x.view(torch.int64), shift.view(torch.int64)
    else:
        x, shift = x.to(torch.int64), shift.to(torch.int64)
    inside = (shift >= 0) & (shift < bits)
    step = torch.where(inside, shift, torch.zeros_like(shift))
    if call.attribute("direction") == "LEFT":
        moved = torch.bitwise_left_shift(x, step)
    else:
        # Of a signed number the sign moves in from the left; it is masked out.
        moved = torch.bitwise_right_shift(x, step)
        if dtype == torch.uint64:
            low = torch.bitwise_left_shift(torch.ones_like(step), (64 - step).clamp(max=62)) - 1
            low = torch.where(step == 1, torch.full_like(low, (1 << 63) - 1), low)
            moved = torch.where(step == 0, x, moved & low)
    stays = dtype.is_signed and call.attribute("direction") == "RIGHT"
    moved = torch.where(inside, moved, -(x < 0).to(torch.int64) if stays else torch.zeros_like(moved))
    if dtype == torch.uint64:
        return moved.view(dtype)
    return (moved & ((1 << bits) - 1)).to(dtype)


def bit_cast(call: NodeCall) -> Result:
    """BitCast: the same bits as another type of the same width."""
    target = _FROM_ONNX.get(int(call.attribute("to")))
    if target is None or target == torch.bool or target.itemsize != call.tensor(0).dtype.itemsize:
        raise NotHereError
    return call.tensor(0).contiguous().view(target)


_FROM_ONNX: Mapping[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
}  # fmt: skip


def onnx_dtype(element: int) -> torch.dtype:
    """The torch type of an ONNX element type.

    Raises:
        NotHereError: there is none.
    """
    if element not in _FROM_ONNX:
        raise NotHereError
    return _FROM_ONNX[element]


# Arithmetic of whole numbers


def arithmetic(call: NodeCall) -> Result:
    """Add, Sub, Mul, Div, Min, Max and comparisons of whole numbers of all widths; results wrap around."""
    tensors = [call.tensor(index) for index in range(len(call.inputs))]
    dtype = tensors[0].dtype
    if dtype.is_floating_point or dtype == torch.bool:
        raise NotHereError
    if dtype == torch.uint64:
        if call.op not in ("Add", "Sub", "Mul", "Equal"):
            raise NotHereError  # order and division differ from those of the signed type
        tensors = [tensor.view(torch.int64) for tensor in tensors]
    else:
        tensors = [tensor.to(WIDER.get(dtype, dtype)) for tensor in tensors]
    compute = _ARITHMETIC[call.op]
    result = tensors[0]
    if len(tensors) == 1 and call.op in ("Min", "Max", "Sum"):
        return tensors[0].to(dtype)
    if len(tensors) == 1:
        result = compute(result)
    for other in tensors[1:]:
        result = compute(result, other)
    if result.dtype == torch.bool:
        return result
    if dtype == torch.uint64:
        return result.view(dtype)
    if dtype in WIDER:
        return (result & ((1 << (8 * dtype.itemsize)) - 1)).to(dtype)
    return result


_ARITHMETIC: Mapping[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul,
    "Div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "Min": torch.minimum, "Max": torch.maximum, "Sum": torch.add,
    "Equal": torch.eq, "Less": torch.lt, "Greater": torch.gt, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge,
    "Neg": torch.neg, "Abs": torch.abs, "Sign": torch.sign,
}  # fmt: skip


def mod(call: NodeCall) -> Result:
    """Mod: with the sign of the divisor, or of the dividend where ``fmod`` is set."""
    x, y = call.tensor(0), call.tensor(1)
    if x.dtype == torch.uint64:
        raise NotHereError
    dtype = x.dtype
    wide = WIDER.get(dtype, dtype)
    compute = torch.fmod if call.attribute("fmod", 0) else torch.remainder
    return compute(x.to(wide), y.to(wide)).to(dtype)


def mat_mul(call: NodeCall) -> Result:
    """MatMul of whole numbers, exact modulo 2^32 (or 2^64)."""
    a, b = call.tensor(0), call.tensor(1)
    if a.dtype.is_floating_point:
        return torch.matmul(a, b)
    dtype = a.dtype
    if dtype == torch.uint64:
        return multiply_whole(a.view(torch.int64), b.view(torch.int64)).view(dtype)
    return multiply_whole(a.long(), b.long()).to(SIGNED.get(dtype, dtype)).view(dtype)


def multiply_whole(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of int64 tensors, modulo 2^64. On CUDA, where cuBLAS has none, by 16-bit digits in float64.

    The product of two digits is below 2^32, so sums of up to 2^21 of them are exact in float64.
    """
    return torch.matmul(a, b) if a.device.type == "cpu" else multiply_by_digits(a, b)


def multiply_by_digits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`multiply_whole` with floating-point products only."""
    digits = [[(x >> (16 * place)) & 0xFFFF for place in range(4)] for x in (a, b)]
    total: Any = 0
    for i in range(4):
        for j in range(4 - i):
            product = torch.matmul(digits[0][i].double(), digits[1][j].double()).to(torch.int64)
            total = total + (product << (16 * (i + j)))
    return total  # type: ignore[no-any-return]


# Running sums


def cumulative(call: NodeCall) -> Result:
    """CumSum and CumProd, along an axis that may be computed."""
    x = call.tensor(0)
    axis = call.ints(1)[0] % max(x.dim(), 1)
    reverse, exclusive = call.attribute("reverse", 0), call.attribute("exclusive", 0)
    is_sum = call.op == "CumSum"
    dtype = x.dtype
    work = compute_type(WIDER.get(dtype, dtype), x.device)
    if dtype == torch.uint64:
        x, work = x.view(torch.int64), torch.int64
    values = x.to(work)
    if reverse:
        values = values.flip(axis)
    if exclusive:
        neutral = (torch.zeros_like if is_sum else torch.ones_like)(values.narrow(axis, 0, 1))
        values = torch.cat((neutral, values.narrow(axis, 0, x.shape[axis] - 1)), axis)
    result = torch.cumsum(values, axis, dtype=work) if is_sum else torch.cumprod(values, axis, dtype=work)
    if reverse:
        result = result.flip(axis)
    return result.view(dtype) if dtype == torch.uint64 else result.to(dtype)


# Matrices and spectra


def det(call: NodeCall) -> Result:
    """Det of the last two axes."""
    x = call.tensor(0)
    result: torch.Tensor = torch.linalg.det(x.to(compute_type(x.dtype, x.device)))
    return result.to(x.dtype)


def dft(call: NodeCall) -> Result:
    """DFT of a tensor whose last axis holds a real number or a complex pair."""
    x = call.tensor(0)
    axis = call.integer(2, -2) if call.opset >= 20 else int(call.attribute("axis", 1))
    axis %= x.dim()
    inverse, onesided = bool(call.attribute("inverse", 0)), bool(call.attribute("onesided", 0))
    whole = 2 * (x.shape[axis] - 1) if inverse and onesided else x.shape[axis]
    length = call.integer(1, -1) if call.has(1) else whole
    signal = _signal(x)
    if inverse and onesided:
        real: torch.Tensor = torch.fft.irfft(_complex(signal), n=length, dim=axis)
        return real.unsqueeze(-1).to(x.dtype)
    if onesided and not signal.is_complex():
        spectrum = torch.fft.rfft(signal, n=length, dim=axis)
    else:
        spectrum = (torch.fft.ifft if inverse else torch.fft.fft)(signal, n=length, dim=axis)
        if onesided:
            spectrum = spectrum.narrow(axis, 0, length // 2 + 1)
    return torch.view_as_real(spectrum.resolve_conj()).to(x.dtype)


def stft(call: NodeCall) -> Result:
    """STFT of (batch, length, 1 or 2) to (batch, frames, bins, 2)."""
    x = call.tensor(0)
    step = call.ints(1)[0]
    window = call.maybe(2)
    length = call.integer(3, window.shape[0] if window is not None else x.shape[1])
    signal = _signal(x)
    frames = signal.unfold(1, length, step)
    if window is not None:
        frames = frames * window.to(frames.real.dtype if frames.is_complex() else frames.dtype)
    if not call.attribute("onesided", 1):
        spectrum = torch.fft.fft(frames, dim=-1)
    elif frames.is_complex():
        spectrum = torch.fft.fft(frames, dim=-1)[..., : length // 2 + 1]
    else:
        spectrum = torch.fft.rfft(frames, dim=-1)
    return torch.view_as_real(spectrum.resolve_conj()).to(x.dtype)


def window(call: NodeCall) -> Result:
    """HannWindow, HammingWindow and BlackmanWindow."""
    size, dtype = call.ints(0)[0], onnx_dtype(call.attribute("output_datatype", 1))
    periodic = bool(call.attribute("periodic", 1))
    turn = 2 * math.pi / (size if periodic else size - 1) if periodic or size != 1 else 0.0
    angle = torch.arange(size, dtype=torch.float64, device=call.device) * turn
    weights = {
        "HannWindow": (0.5, -0.5, 0.0), "HammingWindow": (25 / 46, -21 / 46, 0.0), "BlackmanWindow": (0.42, -0.5, 0.08),
    }[call.op]  # fmt: skip
    return (weights[0] + weights[1] * torch.cos(angle) + weights[2] * torch.cos(2 * angle)).to(dtype)


def _signal(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(compute_type(x.dtype, x.device))
    return wide.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(wide.contiguous())


def _complex(signal: torch.Tensor) -> torch.Tensor:
    return signal if signal.is_complex() else torch.complex(signal, torch.zeros_like(signal))


OPS: Mapping[str, Implementation] = {
    **dict.fromkeys(_BITWISE, bitwise),
    **dict.fromkeys(_ARITHMETIC, arithmetic),
    "BitShift": bit_shift,
    "BitCast": bit_cast,
    "Mod": mod,
    "MatMul": mat_mul,
    "CumSum": cumulative,
    "CumProd": cumulative,
    "Det": det,
    "DFT": dft,
    "STFT": stft,
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), window),
}
