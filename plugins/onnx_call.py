"""One ONNX node with its tensors, as the torch implementations of ONNX ops take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional


class NotHereError(Exception):
    """An implementation does not cover this form of the op: it is left to ONNX Runtime."""


@dataclass(frozen=True)
class NodeCall:
    """A call of one ONNX op.

    Attributes:
        op: the op type.
        opset: version of its domain's opset in the model.
        attributes: by name; texts are str, tensors are numpy arrays. Those left at their default are missing.
        inputs: by position, None for one that is left out; on one device. They may be fake tensors.
        values: by position, the values of inputs that are constants of the model, None for others.
        outputs: how many outputs the node has.
        device: where results go.
    """

    op: str
    opset: int
    attributes: Mapping[str, Any]
    inputs: tuple[torch.Tensor | None, ...]
    values: tuple[np.ndarray | None, ...]
    outputs: int
    device: torch.device

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def tensor(self, index: int) -> torch.Tensor:
        """An input that must be there."""
        found = self.inputs[index]
        assert found is not None, f"{self.op} lacks input {index}"
        return found

    def maybe(self, index: int) -> torch.Tensor | None:
        """An optional input."""
        return self.inputs[index] if index < len(self.inputs) else None

    def ints(self, index: int) -> list[int]:
        """The whole numbers in an input; one that is no constant of the model is read from the device, which waits."""
        value = self.values[index]
        if value is not None:
            return [int(number) for number in value.reshape(-1)]
        return [_whole(number) for number in self.tensor(index).reshape(-1).tolist()]

    def floats(self, index: int) -> list[float]:
        """The numbers in an input; read from the device where it is no constant of the model."""
        value = self.values[index]
        if value is not None:
            return [float(number) for number in value.reshape(-1)]
        return [float(number) for number in self.tensor(index).reshape(-1).tolist()]

    def integer(self, index: int, default: int) -> int:
        """An optional whole number among the inputs."""
        return self.ints(index)[0] if self.has(index) else default

    def number(self, index: int, default: float) -> float:
        """An optional number among the inputs."""
        return self.floats(index)[0] if self.has(index) else default

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def axis(self, rank: int, default: int = 0, name: str = "axis") -> int:
        """An axis given as an attribute, counted from the front."""
        return int(self.attribute(name, default)) % max(rank, 1)


def _whole(number: Any) -> int:
    # While tracing it may be a symbol, which int() would fix at a number.
    return number if isinstance(number, torch.SymInt) else int(number)  # type: ignore[return-value]


Result = torch.Tensor | Sequence[torch.Tensor]
Implementation = Callable[[NodeCall], Result]
"""Runs a node. It may return more outputs than the node has; raises `NotHereError` for forms that it does not cover."""

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64}
"""Signed types that hold all values of types in which torch computes little."""

SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Types of the same bits, in which torch computes."""


def compute_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which to compute for a floating type: float32 for the short ones, where kernels are missing."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def saturate(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, clamped into the range of an integer type."""
    info = torch.iinfo(dtype)
    return values.clamp(info.min, info.max).to(dtype)


def spatial(call: NodeCall, rank: int) -> tuple[list[int], list[int], list[int]]:
    """kernel_shape, strides and dilations of a window op over `rank` axes."""
    ones = [1] * rank
    kernel = list(call.attribute("kernel_shape", ones))
    return kernel, list(call.attribute("strides", ones)), list(call.attribute("dilations", ones))


def window_pads(
    call: NodeCall, sizes: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[Any, Any]]:
    """(begin, end) padding of each spatial axis, from ``pads`` or ``auto_pad`` as the ONNX standard says."""
    mode = call.attribute("auto_pad", "NOTSET")
    rank = len(sizes)
    if mode in ("NOTSET", "VALID"):
        pads = call.attribute("pads", [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
        return [(pads[axis], pads[axis + rank]) for axis in range(rank)]
    found = []
    for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        steps = (size + stride - 1) // stride
        total = max((steps - 1) * stride + dilation * (window - 1) + 1 - size, 0)
        small = total // 2
        found.append((small, total - small) if mode == "SAME_UPPER" else (total - small, small))
    return found


def torch_pads(pads: Sequence[tuple[Any, Any]]) -> list[Any]:
    """Pads of the last axes in the order of torch.nn.functional.pad."""
    return [part for pair in reversed(pads) for part in pair]


def pad(x: torch.Tensor, pads: Sequence[tuple[Any, Any]], value: float = 0.0) -> torch.Tensor:
    """Pad the last axes; pads may be symbolic sizes, which torch.nn.functional.pad does not take."""
    if all(isinstance(part, int) for pair in pads for part in pair):
        return functional.pad(x, torch_pads(pads), value=value) if any(map(any, pads)) else x
    for axis, (begin, end) in enumerate(pads, start=x.dim() - len(pads)):
        parts = [x]
        for size, place in ((begin, 0), (end, 2)):
            if not isinstance(size, int) or size:
                shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
                parts.insert(place, x.new_full(shape, value))
        x = torch.cat(parts, axis)
    return x
