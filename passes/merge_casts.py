"""Make one Cast of several where no value can tell the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .narrow_types import NarrowTypes
from .patterns import View, sweep
from .pipeline import Notes, Pass
from .surgery import element_type, gs_type, set_input, type_name

_T = onnx.TensorProto
_INTEGERS: dict[int, tuple[int, int]] = {
    _T.BOOL: (0, 1), _T.UINT8: (8, 0), _T.UINT16: (16, 0), _T.UINT32: (32, 0), _T.UINT64: (64, 0),
    _T.INT8: (7, 1), _T.INT16: (15, 1), _T.INT32: (31, 1), _T.INT64: (63, 1),
}  # fmt: skip
"""Bits of magnitude and of sign."""
_FLOATS: dict[int, tuple[int, int]] = {_T.FLOAT16: (11, 5), _T.BFLOAT16: (8, 8), _T.FLOAT: (24, 8), _T.DOUBLE: (53, 11)}
"""Bits of the significand, the hidden one included, and of the exponent (IEEE 754)."""

_MOVES = frozenset({"Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Ops that move the elements of their first input about, and take any type that a Cast takes."""
_MOVABLE = frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.INT32, _T.INT64})
"""Types for which TensorRT has all of these moves."""


@dataclass(frozen=True)
class MergeCasts(Pass):
    """Merge two Casts into one, or none, where the first loses nothing. Exact.

    ::

        x -> Cast(float) -> Cast(bfloat16)              x -> Cast(bfloat16)       where x is float16
        x -> Cast(float) -> Cast(float16)               x                         where x is float16
        x -> Cast(float) -> Transpose -> Cast(float16)  x -> Transpose            where x is float16

    The first Cast must be to a type that has every value of the source: float16 to float is, float to float16 is not,
    nor is int32 to float. Integers pass through wider integers, and through floats with enough digits. Between the two
    may stand ops that only move elements and work for the second Cast alone, if the types at both ends are the same.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants, NarrowTypes)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sweep(graph, lambda view, node: _step(view, node, notes))


def loses_nothing(source: int, target: int) -> bool:
    """Whether a Cast between two ONNX element types keeps every value; False for types it does not know."""
    if source == target:
        return True
    if source in _INTEGERS and target in _INTEGERS:
        # Whatever is not 0 becomes true, so bool holds no other type.
        (bits, sign), (more_bits, more_sign) = _INTEGERS[source], _INTEGERS[target]
        return target != _T.BOOL and (source == _T.BOOL or (bits <= more_bits and sign <= more_sign))
    if source in _INTEGERS and target in _FLOATS:
        bits = max(_INTEGERS[source][0], 1)
        # The digits must suffice, and the exponent: float16 ends at 65504, beyond all integers of 11 bits.
        return bits <= _FLOATS[target][0]
    if source in _FLOATS and target in _FLOATS:
        return all(less <= more for less, more in zip(_FLOATS[source], _FLOATS[target], strict=True))
    return False


def _target(node: gs.Node) -> int:
    return int(node.attrs.get("to", 0))


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    # A Cast to a float of 8 bits may saturate, one from float64 to string and back prints: neither is in the tables.
    if node.op != "Cast" or _target(node) not in _INTEGERS | _FLOATS:
        return False
    members, edges = view.region(node, _MOVES, _target(node))
    (leaf,) = edges  # Moves have one operand, so they make a chain.
    first = view.maker(leaf.tensor, "Cast")
    if first is None:
        view.bar(_target(node), members)
        return False
    source, middle, target = element_type(first.inputs[0]), _target(first), _target(node)
    if source not in _INTEGERS | _FLOATS or middle not in _INTEGERS | _FLOATS:
        return False
    if not loses_nothing(source, middle):
        if source == target:
            notes.refused(node, f"{type_name(middle)} does not hold every {type_name(source)}, so the pair rounds")
        return False
    if members and (source != target or source not in _MOVABLE):
        view.bar(_target(node), members)
        return False
    set_input(leaf.node, 0, first.inputs[0])
    for member in members:
        member.outputs[0].dtype = gs_type(source)
    if source == target:
        view.bypass(node, node.inputs[0])
    view.retire(first)
    return True
