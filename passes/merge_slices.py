"""Make one Slice of several, and none where pieces are put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .patterns import View, sweep, values
from .pipeline import Notes, Pass
from .surgery import become, rank, sizes

_END = int(np.iinfo(np.int64).max)
_FAR = int(np.iinfo(np.int32).max)
"""Exporters write any number from here on for "to the end"."""


@dataclass(frozen=True)
class MergeSlices(Pass):
    """Merge consecutive Slices, and pieces of one tensor that a Concat puts together in order. Exact.

    ::

        x[:, 2:8] -> [..., ::2]                          x[:, 2:8, ::2]           one Slice
        Concat(x[:, :4], x[:, 4:8], y, axis=1)           Concat(x[:, :8], y)
        Concat(x[:, :4], x[:, 4:], axis=1)               x
        a, b = Split(x); Concat(a, b)                    x

    Bounds must be constants. Along one axis, Slices merge where its size is fixed, or where all bounds count from the
    front with step 1. Pieces may be of a dynamic size as long as their bounds rise (0, 4, 8, end): a bound beyond the
    end then cuts both forms alike. Opset 10 and later, where bounds are inputs.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        if notes.opset < 10:
            return 0
        return sweep(graph, lambda view, node: _step(view, node, notes))


class _Cut(NamedTuple):
    """What a Slice takes along one axis."""

    start: int
    end: int
    step: int


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    match node.op:
        case "Slice":
            return _merge_pair(view, node, notes)
        case "Concat" if len(node.inputs) > 1:
            return _merge_pieces(view, node, notes)
    return False


def _cuts(node: gs.Node, notes: Notes) -> dict[int, _Cut] | None:
    """What a Slice takes along each axis that it names; None where that is not constant."""
    known = rank(node.inputs[0])
    parts = [values(tensor, notes) if tensor.name else None for tensor in node.inputs[1:5]]
    if any(part is None and tensor.name for part, tensor in zip(parts, node.inputs[1:5], strict=True)):
        return None
    starts, ends, axes, steps = (*parts, None, None)[:4]
    if starts is None or ends is None:
        return None
    given = range(starts.size) if axes is None else axes.reshape(-1).tolist()
    if known is None and any(axis < 0 for axis in given):
        return None
    numbers = [1] * starts.size if steps is None else steps.reshape(-1).tolist()
    found = {
        int(axis) % known if known else int(axis): _Cut(int(start), int(end), int(step))
        for axis, start, end, step in zip(given, starts.reshape(-1), ends.reshape(-1), numbers, strict=True)
    }
    return found if len(found) == starts.size else None


def _write(node: gs.Node, source: gs.Tensor, cuts: dict[int, _Cut], notes: Notes) -> None:
    """Turn a node into the Slice of `source` with these bounds; its output stays."""
    ordered = sorted(cuts.items())
    columns = [
        [cut.start for _, cut in ordered],
        [cut.end for _, cut in ordered],
        [axis for axis, _ in ordered],
        [cut.step for _, cut in ordered],
    ]
    if columns[3] == [1] * len(ordered):
        columns.pop()
    base = node.outputs[0].name
    names = ("starts", "ends", "axes", "steps")[: len(columns)]
    constants = [
        notes.constant(np.array(column, np.int64), f"{base}_{name}")
        for name, column in zip(names, columns, strict=True)
    ]
    become(node, "Slice", [source, *constants])


def _merge_pair(view: View, node: gs.Node, notes: Notes) -> bool:
    before = view.maker(node.inputs[0], "Slice")
    if before is None:
        return False
    source = before.inputs[0]
    first, second = _cuts(before, notes), _cuts(node, notes)
    if first is None or second is None:
        return False
    shape = sizes(source)
    merged = dict(first)
    for axis, cut in second.items():
        if axis not in first:
            merged[axis] = cut
            continue
        both = _compose(first[axis], cut, shape[axis] if shape is not None else None)
        if both is None:
            notes.refused(node, f"axis {axis} is dynamic, and its bounds do not all count from the front by 1")
            return False
        merged[axis] = both
    _write(node, source, merged, notes)
    view.retire(before)
    return True


def _compose(first: _Cut, second: _Cut, size: int | None) -> _Cut | None:
    """Two Slices along one axis as one. They follow Python, but for a zero step, which is not valid."""
    if size is not None:
        taken = range(size)[slice(*_python(first))][slice(*_python(second))]
        # Going backwards to the first element ends before it, which only a number below every start can say.
        end = taken.stop if taken.stop >= 0 else -_END
        return _Cut(max(taken.start, 0), end, taken.step) if len(taken) else _Cut(0, 0, 1)
    if first.step != 1 or second.step != 1 or min(first.start, first.end, second.start, second.end) < 0:
        return None
    return _Cut(first.start + second.start, min(first.end, first.start + second.end, _END), 1)


def _python(cut: _Cut) -> tuple[int, int | None, int]:
    """The same for Python, where a very negative end of a backward walk is None."""
    return cut.start, (None if cut.step < 0 and cut.end <= -_FAR else cut.end), cut.step


class _Piece(NamedTuple):
    """A part of a tensor along the axis of a Concat."""

    source: gs.Tensor
    start: int
    end: int


def _merge_pieces(view: View, node: gs.Node, notes: Notes) -> bool:
    known = rank(node.outputs[0]) or rank(node.inputs[0])
    if node.attrs["axis"] < 0 and known is None:
        return False
    axis = node.attrs["axis"] % known if known else node.attrs["axis"]
    inputs = list(node.inputs)
    merged: list[gs.Tensor] = []
    makers: dict[int, gs.Node] = {}
    alone: _Piece | None = None
    position = 0
    while position < len(inputs):
        run, last = _run(view, inputs, position, axis, notes)
        whole = run is not None and _is_whole(run, axis)
        if run is not None and not whole and len(inputs) == last - position:
            alone = run
        elif run is not None and not whole and not view.only_for(inputs[position], {id(node)}):
            notes.refused(node, f"{inputs[position].name!r}, which could hold the next pieces too, has other readers")
            run = None
        if run is None:
            merged.extend(inputs[position:last])
        else:
            makers.update((id(tensor.inputs[0]), tensor.inputs[0]) for tensor in inputs[position:last])
            merged.append(run.source if whole else inputs[position])
            if not whole and alone is None:
                _grow(inputs[position], run, axis, notes)
        position = last
    if len(merged) == len(inputs):
        return False
    if alone is not None:
        _write(node, alone.source, {axis: _Cut(alone.start, alone.end, 1)}, notes)
    elif len(merged) == 1:
        view.bypass(node, merged[0])
    else:
        attributes = dict(node.attrs)
        become(node, "Concat", merged)
        node.attrs.update(attributes)
    view.retire(*makers.values())
    return True


def _grow(tensor: gs.Tensor, piece: _Piece, axis: int, notes: Notes) -> None:
    """Let the Slice that makes the first piece of a run take all of the run."""
    _write(tensor.inputs[0], piece.source, {axis: _Cut(piece.start, piece.end, 1)}, notes)
    if tensor.shape is not None:
        tensor.shape = list(tensor.shape)
        known = 0 <= piece.start <= piece.end < _FAR
        size = sizes(piece.source)
        fixed = size is not None and size[axis] is not None
        tensor.shape[axis] = piece.end - piece.start if fixed and known else None


def _run(view: View, inputs: list[gs.Tensor], position: int, axis: int, notes: Notes) -> tuple[_Piece | None, int]:
    """The pieces from `position` on that make one: that one, or None, and the position after the last of them."""
    split = view.maker(inputs[position], "Split")
    if split is not None:
        last = position + len(split.outputs)
        same = len(split.outputs) > 1 and all(
            given is made for given, made in zip(inputs[position:last], split.outputs, strict=False)
        )
        known = rank(split.inputs[0])
        along = split.attrs.get("axis", 0)
        if same and last <= len(inputs) and (along % known if known else along) == axis:
            return _Piece(split.inputs[0], 0, _END), last
        return None, position + 1
    bounds: list[int] = []
    source: gs.Tensor | None = None
    last = position
    while last < len(inputs):
        piece = _piece(view, inputs[last], axis, notes)
        if piece is None or (bounds and (piece.source is not source or piece.start != bounds[-1])):
            break
        source = piece.source
        bounds += [piece.end] if bounds else [piece.start, piece.end]
        last += 1
    if source is None or last - position < 2 or not _rise(bounds):
        return None, max(last, position + 1)
    return _Piece(source, bounds[0], bounds[-1]), last


def _piece(view: View, tensor: gs.Tensor, axis: int, notes: Notes) -> _Piece | None:
    """What a Slice along one axis, by step 1, takes."""
    node = view.maker(tensor, "Slice")
    cuts = _cuts(node, notes) if node is not None else None
    if node is None or cuts is None or list(cuts) != [axis] or cuts[axis].step != 1:
        return None
    cut = cuts[axis]
    shape = sizes(node.inputs[0])
    size = shape[axis] if shape is not None else None
    if size is not None:
        start, end, _ = slice(cut.start, cut.end).indices(size)
        return _Piece(node.inputs[0], start, end)
    return _Piece(node.inputs[0], cut.start, _END if cut.end >= _FAR else cut.end)


def _rise(bounds: list[int]) -> bool:
    """Whether bounds are in order whatever the size is, so that neighbours meet even where the end cuts them."""
    if min(bounds) >= 0:
        return bounds == sorted(bounds)
    inner = bounds[1:] if bounds[0] == 0 else bounds
    inner = inner[:-1] if inner[-1] == _END else inner
    return all(bound < 0 for bound in inner) and inner == sorted(inner)


def _is_whole(piece: _Piece, axis: int) -> bool:
    shape = sizes(piece.source)
    return piece.start == 0 and (piece.end >= _FAR or (shape is not None and piece.end == shape[axis]))
