"""Rules for operations on uint8, which TensorRT casts at inputs and results and has nowhere else: the same in int32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .refused_fragment import Fragment, need
from .surgery import element_type, is_standard, set_input

_T = onnx.TensorProto
_VALUES = 256
TABLES = {"BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor}

WRAPPING = ("Add", "Mul", "Sub")
"""What may leave the range of uint8, and wraps around there."""

OPS = (
    *WRAPPING, "Clip", "Concat", "Div", "Equal", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Pad", "ReduceMax", "ReduceMin", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
"""What int32 does to numbers from 0 to 255 as uint8 does, but for the wrapping."""


def through_int32(f: Fragment) -> None:
    """An op on uint8 computed in int32, where no sum, difference or product of two such numbers overflows."""
    node = f.node
    small = [element_type(tensor) == _T.UINT8 for tensor in node.inputs]
    need(any(small), "it is not about uint8")
    inputs = []
    for index, is_small in enumerate(small):
        name = f.input(index) if f.has(index) else ""
        inputs.append(f.cast(name, _T.INT32) if is_small and name else name)
    made = f.op(node.op, *inputs, outputs=len(node.outputs), **node.attrs)
    for index, tensor in enumerate(node.outputs):
        result = made if index == 0 else f"{made}.{index}"
        if element_type(tensor) == _T.UINT8:
            if node.op in WRAPPING:
                result = f.op("Mod", result, f.scalar(_VALUES, _T.INT32))  # has the sign of the divisor
            result = f.cast(result, _T.UINT8)
        f.result(result, index)


def bits(f: Fragment) -> None:
    """BitwiseAnd, BitwiseOr, BitwiseXor of uint8: a table of 16 x 16 for each of the two hexadecimal digits."""
    wide = [f.cast(f.input(index), _T.INT32) for index in (0, 1)]
    digit = f.scalar(16, _T.INT32)
    table = f.const(TABLES[f.node.op](np.arange(16)[:, None], np.arange(16)[None, :]).reshape(-1), np.int32)
    found = []
    for part in ("Mod", "Div"):
        one, two = (f.op(part, number, digit) for number in wide)
        found.append(f.op("Gather", table, f.op("Add", f.op("Mul", one, digit), two), axis=0))
    f.result(f.cast(f.op("Add", found[0], f.op("Mul", found[1], digit)), _T.UINT8))


def invert(f: Fragment) -> None:
    """BitwiseNot of uint8: 255 - x."""
    f.result(f.cast(f.op("Sub", f.scalar(_VALUES - 1, _T.INT32), f.cast(f.input(0), _T.INT32)), _T.UINT8))


def join(nodes: list[gs.Node], mark: str) -> None:
    """Let casts of what these rules have made read the int32 number itself, so that no uint8 stands in between.

    Args:
        nodes: of one scope.
        mark: what the names of new nodes have in them. Their casts to uint8 change no number; those of a model may.
    """
    for node in nodes:
        maker = node.inputs[0].inputs[0] if is_standard(node, "Cast") and node.inputs[0].inputs else None
        if maker is None or not is_standard(maker, "Cast") or mark not in maker.name:
            continue
        source = maker.inputs[0]
        if element_type(source) == _T.INT32 and int(maker.attrs["to"]) == _T.UINT8:
            set_input(node, 0, source)
