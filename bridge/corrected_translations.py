"""What torch.onnx translates wrongly or fails over, put right: a plugin would cost more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18
from onnxscript.function_libs.torch_lib.ops import core

from .dtypes import from_torch

op: Any = opset18  # its types know no Python numbers, which the exporter makes constants of


CONV3D, RSUB = torch.ops.aten.conv3d.default, torch.ops.aten.rsub.Scalar
CORRECTED = frozenset({CONV3D, RSUB})
"""The ops of `corrected_translations`, at most."""


def corrected_translations(program: torch.export.ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of the ``custom_translation_table`` for a program."""
    found: dict[Callable[..., Any], Callable[..., Any]] = {CONV3D: _conv3d, RSUB: _rsub}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.target is RSUB and isinstance(value, torch.Tensor) and value.is_complex():
            found.pop(RSUB, None)  # the exporter's way is right for complex numbers, for which the table has no place
    return found


def restore_output_types(graph: ir.Graph, program: torch.export.ExportedProgram) -> None:
    """Give results torch's dtypes, in place: the exporter leaves sums and maxima of half precision in float32.

    Args:
        graph: made of the program.
        program: its results have the dtypes that are right.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    for index, (value, name) in enumerate(zip(graph.outputs, program.graph_signature.user_outputs, strict=True)):
        expected = values.get(str(name))
        if not isinstance(expected, torch.Tensor) or expected.is_complex() or value.dtype == from_torch(expected.dtype):
            continue
        maker = value.producer()
        cast = ir.node("Cast", [value], {"to": from_torch(expected.dtype)})
        cast.metadata_props.update({} if maker is None else maker.metadata_props)
        cast.outputs[0].type = ir.TensorType(from_torch(expected.dtype))
        cast.outputs[0].shape = value.shape
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


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


def _rsub(self: Any, other: Any, alpha: Any = 1) -> Any:
    """The exporter makes it a `sub` that begins with a number, and knows no overload for that (torch 2.13)."""
    if self.dtype.is_integer() and (_is_float(other) or _is_float(alpha)):
        self = op.Cast(self, to=from_torch(torch.get_default_dtype()))
    taken = self if alpha == 1 else op.Mul(self, op.CastLike(alpha, self))
    return op.Sub(op.CastLike(other, self), taken)


def _is_float(number: Any) -> bool:
    """Of a Python number, or one that the graph computes from sizes."""
    dtype = getattr(number, "dtype", None)
    return isinstance(number, float) if dtype is None else bool(dtype.is_floating_point())
