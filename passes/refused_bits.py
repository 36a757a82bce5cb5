"""Rules for operations on the bits of integers, by arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from . import refused_bytes
from .refused_fragment import CannotRewriteError, Fragment, need, need_type
from .surgery import element_type, is_standard

_T = onnx.TensorProto
_SIGNED = (_T.INT32, _T.INT64)
_SHIFTED: dict[int, tuple[int, int]] = {_T.UINT8: (8, _T.INT8), _T.UINT32: (32, _T.INT32), _T.UINT64: (64, _T.INT64)}
"""Bits of the types that BitShift takes, and the signed type of as many."""
_DIGIT = 16
_OTHER = "what is made of the shifted bits is not a signed number shifted"


def invert(f: Fragment) -> None:
    """BitwiseNot of a signed integer: -1 - x, which never overflows."""
    if f.element(0) in refused_bytes.SMALL:
        refused_bytes.invert(f)
        return
    element = need_type(f, 0, _SIGNED)
    f.result(f.op("Sub", f.scalar(-1, element), f.input(0)))


def binary(f: Fragment) -> None:
    """BitwiseAnd, BitwiseOr, BitwiseXor of signed integers: a table of 16 x 16 for each hexadecimal digit.

    A digit of x in two's complement is floor(x / 16^i) mod 16, also where x is negative. A mask of the lowest bits is
    a remainder.
    """
    if f.element(0) == f.element(1) and f.element(0) in refused_bytes.SMALL:
        refused_bytes.bits(f)
        return
    element = need_type(f, 0, _SIGNED)
    need(f.element(1) == element, "its inputs have several types")
    for index in (0, 1):
        try:
            values = f.values(index)
        except CannotRewriteError:
            continue
        mask = int(values.reshape(-1)[0]) if values.size == 1 else 0
        if (
            f.node.op == "BitwiseAnd"
            and values.ndim == 0
            and mask > 0
            and mask & (mask + 1) == 0
            and mask + 1 < 1 << 31
        ):
            f.result(f.op("Mod", f.input(1 - index), f.scalar(mask + 1, element)))
            return
    digits = 8 if element == _T.INT32 else 16
    powers = [_DIGIT**i for i in range(digits)]
    one, two = (_digits(f, f.input(index), element, f.rank(index), powers) for index in (0, 1))
    place = f.op("Add", f.op("Mul", one, f.const(_DIGIT, np.int64)), two)
    table = refused_bytes.TABLES[f.node.op](np.arange(_DIGIT)[:, None], np.arange(_DIGIT)[None, :]).reshape(-1)
    found = f.op("Gather", f.const(table, np.int64), place, axis=0)
    rank = max(f.rank(0), f.rank(1))
    # The highest digit stands for -8..7, so that nothing overflows; int64 is added up in two halves, because ONNX
    # Runtime's ReduceSum of int64 is exact to 53 bits only.
    low = f.slice(found, rank, 0, 7)
    parts = [f.reduce("ReduceSum", f.op("Mul", low, f.const(powers[:7], np.int64)), [rank])]
    if digits == 16:
        parts.append(f.op("Mul", _place(f, found, rank, 7), f.const(powers[7], np.int64)))
        high = f.op("Mul", f.slice(found, rank, 8, 15), f.const(powers[:7], np.int64))
        parts.append(f.op("Mul", f.reduce("ReduceSum", high, [rank]), f.const(powers[8], np.int64)))
    top = _place(f, found, rank, digits - 1)
    top = f.op("Sub", top, f.op("Mul", f.cast(f.op("Less", f.const(7), top), _T.INT64), f.const(_DIGIT)))
    total = f.op("Mul", top, f.const(powers[-1], np.int64))
    for part in parts:
        total = f.op("Add", total, part)
    f.result(total if element == _T.INT64 else f.cast(total, element))


def _place(f: Fragment, digits: str, axis: int, index: int) -> str:
    return f.op("Gather", digits, f.const(index, np.int64), axis=axis)


def _digits(f: Fragment, x: str, element: int, rank: int, powers: list[int]) -> str:
    """The hexadecimal digits of x in two's complement, the lowest first, in a new last axis; int64."""
    wide = x if element == _T.INT64 else f.cast(x, _T.INT64)
    wide = f.unsqueeze(wide, [rank])
    scale = f.const(powers, np.int64)
    # Division rounds towards zero: of x less its remainder, which is never negative, it is exact.
    rest = f.op("Mod", wide, scale)
    return f.op("Mod", f.op("Div", f.op("Sub", wide, rest), scale), f.const(_DIGIT, np.int64))


def shift(f: Fragment) -> None:
    """BitShift by a constant of what is a signed number before and after: a product, or a quotient rounded down.

    ONNX shifts unsigned numbers alone, so torch.onnx casts, and where it shifts to the right it fills in a negative
    number's bits. To the left a product wraps around as the shift does. 8 bits are shifted in int32.
    """
    need(f.element(0) in _SHIFTED, "it shifts another type")
    bits, signed = _SHIFTED[f.element(0)]
    amounts = f.values(1)
    fits = amounts.size == 1 and 0 <= int(amounts.reshape(-1)[0]) < bits - 1
    need(fits, "it shifts by another number of bits")
    amount = int(amounts.reshape(-1)[0])
    is_left = f.attr("direction") == "LEFT"
    before = f.node.inputs[0].inputs
    is_signed = len(before) == 1 and is_standard(before[0], "Cast") and element_type(before[0].inputs[0]) == signed
    if bits == 8 and not is_signed:
        power = f.const(np.full(amounts.shape, 1 << amount, np.int32))
        number = f.op("Mul" if is_left else "Div", f.cast(f.input(0), _T.INT32), power)
        f.result(f.cast(refused_bytes.wrapped(f, number, _T.UINT8), _T.UINT8))
        return
    need(is_signed, "what it shifts is no cast of a signed number")
    source = before[0].inputs[0]
    if is_left:
        readers = f.node.outputs[0].outputs
        need(bool(readers) and all(_is_cast(node, signed) for node in readers), "it stays unsigned")
        need(len(readers) == 1, "it is read twice")
        f.node = readers[0]
    else:
        f.node = _sign_filling(f, source, signed, (1 << bits) - (1 << (bits - amount)))
    x = f.cast(f.use(source), _T.INT32) if bits == 8 else f.use(source)
    dtype = np.int32 if bits == 8 else onnx.helper.tensor_dtype_to_np_dtype(signed)
    # Of the rank that the amount has, so that the result keeps its rank.
    power = f.const(np.full(amounts.shape, 1 << amount, dtype))
    if is_left:
        number = f.op("Mul", x, power)
        f.result(f.cast(refused_bytes.wrapped(f, number, signed), signed) if bits == 8 else number)
        return
    number = f.op("Div", f.op("Sub", x, f.op("Mod", x, power)), power)
    f.result(f.cast(number, signed) if bits == 8 else number)


def _is_cast(node: gs.Node, element: int) -> bool:
    return is_standard(node, "Cast") and int(node.attrs["to"]) == element


def _sign_filling(f: Fragment, source: gs.Tensor, signed: int, ones: int) -> gs.Node:
    """The Where(x < 0, signed(shifted | ones), signed(shifted)) that all readers of a shifted number lead to."""
    found: list[gs.Node] = []
    filled = 0
    for reader in f.node.outputs[0].outputs:
        shifted = f.node.outputs[0]
        following = reader.outputs[0].outputs
        if _is_cast(reader, _T.INT64) and len(following) == 1 and is_standard(following[0], "BitwiseOr"):
            shifted, reader = reader.outputs[0], following[0]  # unsigned numbers became int64 ones
        if is_standard(reader, "BitwiseOr"):
            (mask,) = (t for t in reader.inputs if t is not shifted)
            need(isinstance(mask, gs.Constant) and int(f.read_constant(mask).reshape(-1)[0]) == ones, _OTHER)
            need(len(reader.outputs[0].outputs) == 1, _OTHER)
            reader = reader.outputs[0].outputs[0]
            filled += 1
        need(_is_cast(reader, signed) and len(reader.outputs[0].outputs) == 1, _OTHER)
        found.append(reader.outputs[0].outputs[0])
    need(len(found) == 2 and found[0] is found[1] and filled == 1 and is_standard(found[0], "Where"), _OTHER)
    where = found[0]
    condition = where.inputs[0].inputs
    need(len(condition) == 1 and is_standard(condition[0], "Less"), _OTHER)
    compared = condition[0].inputs[0]
    if signed == _T.INT8 and compared.inputs and _is_cast(compared.inputs[0], _T.INT32):
        compared = compared.inputs[0].inputs[0]  # The comparison of 8 bits was refused, too.
    need(compared is source, _OTHER)
    zero = condition[0].inputs[1]
    need(isinstance(zero, gs.Constant) and not f.read_constant(zero).any(), _OTHER)
    negative = where.inputs[1].inputs[0].inputs[0].inputs
    need(bool(negative) and is_standard(negative[0], "BitwiseOr"), _OTHER)
    return where
