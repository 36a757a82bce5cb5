"""Translations in place of those of torch.onnx that are wrong: a plugin would cost more than the right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops import core

op: Any = opset18  # its types know no Python numbers, which the exporter makes constants of


def corrected_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of the ``custom_translation_table``."""
    return {torch.ops.aten.conv3d.default: _conv3d}


def _conv3d(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """Without a bias torchlib makes one of zeros, of shape (channels, 2) (seen up to onnxscript 0.7.2)."""
    if bias is None:
        bias = op.Expand(op.CastLike(0.0, input), op.Shape(weight, start=0, end=1))
    return core.aten_conv3d(input, weight, bias, stride, padding, dilation, groups)
