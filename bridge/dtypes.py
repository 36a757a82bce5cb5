"""Element types as onnx_ir, torch and the user's words name them."""

from __future__ import annotations

import onnx_ir as ir
import torch

from ..errors import InputError

_TO_TORCH = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.BOOL: torch.bool, ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16, ir.DataType.INT32: torch.int32, ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8, ir.DataType.UINT16: torch.uint16, ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64, ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2, ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}  # fmt: skip
_FROM_TORCH = {torch_type: ir_type for ir_type, torch_type in _TO_TORCH.items()}


def to_torch(dtype: ir.DataType) -> torch.dtype:
    """The torch dtype of an ONNX element type.

    Raises:
        InputError: torch has no such type.
    """
    try:
        return _TO_TORCH[ir.DataType(dtype)]
    except KeyError:
        raise InputError(f"torch has no dtype for ONNX tensors of type {ir.DataType(dtype).name}.") from None


def from_torch(dtype: torch.dtype) -> ir.DataType:
    """The ONNX element type of a torch dtype.

    Raises:
        InputError: ONNX has no such type.
    """
    try:
        return _FROM_TORCH[dtype]
    except KeyError:
        raise InputError(f"ONNX has no tensor type for {dtype}.") from None
