"""Rules for operations on integers of 8 bits, in int32.

TensorRT casts uint8 at inputs and results and has it nowhere else. It computes in int8, but takes its constants for
quantized numbers, which only DequantizeLinear may read, and lacks Mod and operations on its bits.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .refused_fragment import Fragment, need
from .surgery import element_type, is_standard, nbytes, set_input

_T = onnx.TensorProto
_VALUES = 256
_MOST_BYTES = 1 << 16
SMALL = (_T.UINT8, _T.INT8)
_UNSIGNED = (_T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64)
TABLES = {"BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor}

WRAPPING = ("Add", "Div", "Mul", "Sub")
"""What may leave the range of 8 bits, and wraps around there; of quotients just -128 / -1 does."""

OPS = (
    *WRAPPING, "Clip", "Concat", "Equal", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Pad", "ReduceMax", "ReduceMin", "Reshape", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
"""What int32 does to numbers of 8 bits as uint8 and int8 do, but for the wrapping."""


def through_int32(f: Fragment) -> None:
    """An op on uint8 or int8 computed in int32, where no sum, difference or product of two such numbers overflows."""
    node = f.node
    small = [element_type(tensor) in SMALL for tensor in node.inputs]
    need(any(small), "it is not about integers of 8 bits")
    inputs = []
    for index, is_small in enumerate(small):
        name = f.input(index) if f.has(index) and not is_small else ""
        inputs.append(_wide(f, index) if is_small else name)
    if node.op == "Mod" and node.attrs.get("fmod", 0):
        # The remainder of a quotient that is rounded towards zero, as Div rounds.
        made = f.op("Sub", inputs[0], f.op("Mul", f.op("Div", *inputs), inputs[1]))
    else:
        made = f.op(node.op, *inputs, outputs=len(node.outputs), **node.attrs)
    for index, tensor in enumerate(node.outputs):
        result = made if index == 0 else f"{made}.{index}"
        element = element_type(tensor)
        if element in SMALL:
            if node.op in WRAPPING and (element, node.op) != (_T.UINT8, "Div"):
                result = wrapped(f, result, element)
            result = f.cast(result, element)
        f.result(result, index)


def _wide(f: Fragment, index: int) -> str:
    """An input of 8 bits in int32. A constant becomes one: a cast of it would be refused as what reads it now is."""
    tensor = f.node.inputs[index]
    if isinstance(tensor, gs.Constant) and nbytes(tensor) <= _MOST_BYTES:
        return f.const(f.read_constant(tensor), np.int32)
    return f.cast(f.input(index), _T.INT32)


def wrapped(f: Fragment, number: str, element: int) -> str:
    """The lowest 8 bits of an int32 as a number of a type; Mod has the sign of the divisor."""
    values = f.scalar(_VALUES, _T.INT32)
    if element == _T.UINT8:
        return f.op("Mod", number, values)
    half = f.scalar(_VALUES // 2, _T.INT32)
    return f.op("Sub", f.op("Mod", f.op("Add", number, half), values), half)


def bits(f: Fragment) -> None:
    """BitwiseAnd, BitwiseOr, BitwiseXor of 8 bits: a table of 16 x 16 for each of the two hexadecimal digits."""
    element = f.element(0)
    # In two's complement a negative number has the bits of itself plus 256.
    wide = [_wide(f, index) for index in (0, 1)]
    wide = [wrapped(f, each, _T.UINT8) for each in wide] if element == _T.INT8 else wide
    digit = f.scalar(16, _T.INT32)
    table = f.const(TABLES[f.node.op](np.arange(16)[:, None], np.arange(16)[None, :]).reshape(-1), np.int32)
    found = []
    for part in ("Mod", "Div"):
        one, two = (f.op(part, number, digit) for number in wide)
        found.append(f.op("Gather", table, f.op("Add", f.op("Mul", one, digit), two), axis=0))
    result = f.op("Add", found[0], f.op("Mul", found[1], digit))
    f.result(f.cast(wrapped(f, result, element) if element == _T.INT8 else result, element))


def invert(f: Fragment) -> None:
    """BitwiseNot of 8 bits: 255 - x of uint8, -1 - x of int8."""
    element = f.element(0)
    ones = f.scalar(_VALUES - 1 if element == _T.UINT8 else -1, _T.INT32)
    f.result(f.cast(f.op("Sub", ones, f.cast(f.input(0), _T.INT32)), element))


def join(nodes: list[gs.Node], mark: str) -> None:
    """Let casts of what these rules have made read the int32 number itself, so that no 8 bits stand in between.

    Args:
        nodes: of one scope.
        mark: what the names of new nodes have in them. Their casts to 8 bits change no number; those of a model may.
    """
    for node in nodes:
        maker = node.inputs[0].inputs[0] if is_standard(node, "Cast") and node.inputs[0].inputs else None
        if maker is None or not is_standard(maker, "Cast") or mark not in maker.name:
            continue
        source, middle = maker.inputs[0], int(maker.attrs["to"])
        # What an unsigned type makes of a negative number is up to the type that it comes from.
        keeps = middle == _T.UINT8 or (middle == _T.INT8 and int(node.attrs["to"]) not in _UNSIGNED)
        if element_type(source) == _T.INT32 and keeps:
            set_input(node, 0, source)
