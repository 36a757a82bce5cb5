"""Fold arithmetic on sizes that comes out the same for all sizes in their ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .fold_shapes import FoldShapes
from .patterns import View, axes, values
from .pipeline import Notes, Pass
from .surgery import element_type, is_standard, scopes

_T = onnx.TensorProto
_INTEGERS = (_T.INT64, _T.INT32)
_MOST_ENTRIES = 64
"""Longer vectors are no shapes."""


@dataclass(frozen=True)
class FoldRanges(Pass):
    """Fold arithmetic on sizes under the ranges of dynamic dimensions, such as ``Dim("n", min=2, max=128)``.

    ::

        y = Div(Add(n, 511), 512)       y = 1               where n is the size of a dimension named n, 2 to 128
        y = Min(n, 512)                 y = n
        y = Where(Less(n, 512), n, m)   y = n               Less itself becomes true

    Sizes are followed as intervals of integers through Shape and what exporters do to its result, over the ranges of
    all profiles together (`Notes.ranges`). A node whose result is one number is folded to it; Min, Max, Clip and Where
    become the operand that they always give back. Whoever reads the results sees the same numbers for all sizes that an
    engine is called with: calls with others are refused, or run the original (`out_of_range`). Where no ranges are
    known, as in a pipeline that is run by hand, nothing is rewritten.

    torch.export folds conditions, crops and maxima itself; this is for files of other exporters, and what it leaves:
    minima and quotients.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldShapes,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        if not notes.ranges:
            return 0
        found = _Intervals(notes)
        count = 0
        for scope in scopes(graph):
            view = View(scope)
            for node in scope.nodes:
                if is_standard(node) and len(node.outputs) == 1 and node.inputs:
                    found.read(node)
                    count += _fold(view, node, found, notes)
            view.close()
        return count


class _Span(NamedTuple):
    """The least and the largest that an integer, or a bool as 0 and 1, may be."""

    low: int
    high: int


class _Spans(NamedTuple):
    """What a scalar or a vector may be."""

    entries: tuple[_Span, ...]
    is_scalar: bool


class _Intervals:
    """What is known of tensors that are made of sizes. Nodes must come in topological order."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        # Tensors are kept beside what is known, so that no id() can be given away again.
        self._known: dict[int, tuple[gs.Tensor, _Spans]] = {}

    def get(self, tensor: gs.Tensor) -> _Spans | None:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        constant = values(tensor, self._notes) if tensor.name else None
        if constant is None or constant.dtype.kind not in "ib" or constant.ndim > 1 or constant.size > _MOST_ENTRIES:
            return None
        numbers = [int(number) for number in constant.reshape(-1)]
        return _Spans(tuple(_Span(number, number) for number in numbers), constant.ndim == 0)

    def note(self, tensor: gs.Tensor, spans: _Spans) -> None:
        self._known[id(tensor)] = (tensor, spans)

    def read(self, node: gs.Node) -> None:
        spans = self._evaluate(node)
        element = element_type(node.outputs[0])
        if spans is None or element not in (*_INTEGERS, _T.BOOL):
            return
        limits = np.iinfo(np.int32 if element == _T.INT32 else np.int64)
        if all(limits.min <= span.low and span.high <= limits.max for span in spans.entries):  # else it may overflow
            self.note(node.outputs[0], spans)

    def _evaluate(self, node: gs.Node) -> _Spans | None:
        if node.op == "Shape":
            return self._shape(node)
        if not any(id(tensor) in self._known for tensor in node.inputs):
            return None
        parts = [self.get(tensor) for tensor in node.inputs]
        if any(part is None for part in parts):
            return None
        data, *others = (part for part in parts if part is not None)
        match node.op:
            case "Identity":
                return data
            case "Cast" if node.attrs.get("to") in _INTEGERS:
                return data
            case "Squeeze" if len(data.entries) == 1:
                return _Spans(data.entries, True)
            case "Unsqueeze" if data.is_scalar and axes(node, self._notes) in ((0,), (-1,)):
                return _Spans(data.entries, False)
            case "Gather" if not data.is_scalar and others[0].entries:
                length = len(data.entries)
                at = [span.low for span in others[0].entries if span.low == span.high and -length <= span.low < length]
                if len(at) != len(others[0].entries):
                    return None
                return _Spans(tuple(data.entries[index] for index in at), others[0].is_scalar)
            case "Concat" if not any(part.is_scalar for part in (data, *others)):
                return _Spans(tuple(entry for part in (data, *others) for entry in part.entries), False)
            case "Where" if len(data.entries) == 1 and data.entries[0].low == data.entries[0].high:
                alike = _alike(*others) and (data.is_scalar or _alike(data, others[0]))
                return others[0 if data.entries[0].low else 1] if alike else None
            case "Not":
                return _Spans(tuple(_Span(1 - span.high, 1 - span.low) for span in data.entries), data.is_scalar)
        rule = _RULES.get(node.op)
        if rule is None or len(others) != 1 or (node.op == "Mod" and node.attrs.get("fmod", 0)):
            return None
        return _pairwise(rule, data, others[0])

    def _shape(self, node: gs.Node) -> _Spans | None:
        shape = node.inputs[0].shape
        if shape is None:
            return None
        spans = []
        for size in shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))]:
            if isinstance(size, (int, np.integer)) and size > 0:
                spans.append(_Span(int(size), int(size)))
            else:  # Some exporters write 0 for "unknown".
                spans.append(_Span(*self._notes.ranges.get(str(size), (0, np.iinfo(np.int64).max))))
        return _Spans(tuple(spans), False)


def _alike(left: _Spans, right: _Spans) -> bool:
    return (len(left.entries), left.is_scalar) == (len(right.entries), right.is_scalar)


def _pairwise(rule: Callable[[_Span, _Span], _Span | None], left: _Spans, right: _Spans) -> _Spans | None:
    """A rule on two vectors of one length, or on one and a number."""
    length = max(len(left.entries), len(right.entries))
    if min(len(left.entries), len(right.entries)) not in (1, length):
        return None
    spread = (side.entries * (length if len(side.entries) == 1 else 1) for side in (left, right))
    made = [rule(one, other) for one, other in zip(*spread, strict=True)]
    known = tuple(span for span in made if span is not None)
    return _Spans(known, left.is_scalar and right.is_scalar) if len(known) == len(made) else None


def _corners(function: Callable[[int, int], int]) -> Callable[[_Span, _Span], _Span]:
    """For what is monotonous in each operand."""

    def rule(left: _Span, right: _Span) -> _Span:
        found = [function(one, other) for one in left for other in right]
        return _Span(min(found), max(found))

    return rule


def _quotient(left: _Span, right: _Span) -> _Span | None:
    """Of numbers that are not negative, where rounding down and towards zero are the same."""
    if left.low < 0 or right.low < 1:
        return None
    return _Span(left.low // right.high, left.high // right.low)


def _remainder(left: _Span, right: _Span) -> _Span | None:
    if left.low < 0 or right.low < 1:
        return None
    return left if left.high < right.low else _Span(0, min(left.high, right.high - 1))


def _less(left: _Span, right: _Span) -> _Span:
    return _Span(int(left.high < right.low), int(left.low < right.high))


def _less_or_equal(left: _Span, right: _Span) -> _Span:
    return _Span(int(left.high <= right.low), int(left.low <= right.high))


def _equal(left: _Span, right: _Span) -> _Span:
    same = left.low == left.high == right.low == right.high
    return _Span(int(same), int(left.low <= right.high and right.low <= left.high))


_RULES: Mapping[str, Callable[[_Span, _Span], _Span | None]] = {
    "Add": _corners(lambda a, b: a + b), "Sub": _corners(lambda a, b: a - b), "Mul": _corners(lambda a, b: a * b),
    "Min": _corners(min), "Max": _corners(max), "Div": _quotient, "Mod": _remainder,
    "Less": _less, "LessOrEqual": _less_or_equal, "Equal": _equal,
    "Greater": lambda a, b: _less(b, a), "GreaterOrEqual": lambda a, b: _less_or_equal(b, a),
    "And": _corners(min), "Or": _corners(max),
}  # fmt: skip


def _fold(view: View, node: gs.Node, found: _Intervals, notes: Notes) -> bool:
    """Fold a node to a constant or to one of its operands."""
    spans = found.get(node.outputs[0])
    if spans is None or node.op in ("Shape", "Identity"):
        return False
    source: gs.Tensor | None = None
    element = element_type(node.outputs[0])
    if spans.entries and all(span.low == span.high for span in spans.entries):
        numbers = np.array([span.low for span in spans.entries]).astype(onnx.helper.tensor_dtype_to_np_dtype(element))
        numbers = numbers.reshape(()) if spans.is_scalar else numbers
        source = notes.constant(numbers, f"{node.outputs[0].name}_folded")
        found.note(source, spans)  # What reads it is looked at next.
    elif node.op in ("Min", "Max", "Where"):
        source = _operand(node, found)
    if source is None:
        return False
    view.bypass(node, source)
    return True


def _operand(node: gs.Node, found: _Intervals) -> gs.Tensor | None:
    """The operand that a Min, Max or Where always gives back, if the result has its shape."""
    parts = [found.get(tensor) for tensor in node.inputs]
    if len(node.inputs) < 2 or any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if node.op == "Where":
        return node.inputs[1 if known[0].entries[0].low else 2]  # read() has looked at the shapes
    if len(known) != 2 or not _alike(*known):
        return None
    pairs = list(zip(known[0].entries, known[1].entries, strict=True))
    below = all(one.high <= other.low for one, other in pairs)
    above = all(one.low >= other.high for one, other in pairs)
    if node.op == "Max":
        below, above = above, below
    return node.inputs[0] if below else node.inputs[1] if above else None
