"""Make one Reshape of several, and none where they undo each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .fold_shapes import constant_shape
from .merge_transposes import BROADCASTING, UNARY
from .patterns import Edge, View, axes, same_shape, sweep
from .pipeline import Notes, Pass
from .surgery import become, rank, set_input

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Merge consecutive Reshapes, and drop pairs that undo each other around elementwise ops. Exact.

    ::

        x -> Reshape | Flatten | Squeeze | Unsqueeze -> any of these -> y        x -> Reshape -> y, or y is x
        x -> Unsqueeze(1) -> Unsqueeze(0) -> y                                   x -> Unsqueeze(0, 2) -> y
        x -> Reshape -> Relu -> Mul(two) -> Reshape -> y                         x -> Relu -> Mul(two) -> y

    The third form needs y to have the shape of x. The merged Reshape has a constant shape: the sizes of y, with one
    -1 for a dynamic one. Of further dynamic ones each must stand where x has a dimension with the same symbol, which
    a 0 copies. Where that does not hold, as with most shapes computed while running, the pair stays. Tensors without
    elements, of which a -1 says nothing, are not meant.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sweep(graph, lambda view, node: _step(view, node, notes))


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    if node.op not in _RESHAPES or notes.opset < 5:  # Until opset 5 the shape was an attribute.
        return False
    result = node.outputs[0]
    before = view.maker(node.inputs[0], *_RESHAPES)
    if before is None:
        return _around(view, node, notes)
    source = before.inputs[0]
    if same_shape(source, result):
        view.bypass(node, source)
    else:
        merged = _same_kind(before, node, notes)
        shape = constant_shape(source, result.shape) if merged is None else None
        if merged is not None:
            _write_axes(node, source, merged, notes)
        elif shape is not None:
            become(node, "Reshape", [source, notes.constant(shape, f"{result.name}_shape")])
        else:
            notes.refused(node, f"the shape {_shown(result)} cannot be written as a constant for {_shown(source)}")
            return False
    view.retire(before)
    return True


def _write_axes(node: gs.Node, source: gs.Tensor, merged: tuple[int, ...], notes: Notes) -> None:
    """Let a Squeeze or Unsqueeze read `source` with these axes, an input from opset 13 on."""
    if notes.opset < 13:
        become(node, node.op, [source])
        node.attrs["axes"] = list(merged)
    else:
        constant = notes.constant(np.array(merged, np.int64), f"{node.outputs[0].name}_axes")
        become(node, node.op, [source, constant])


def _same_kind(before: gs.Node, node: gs.Node, notes: Notes) -> tuple[int, ...] | None:
    """The axes of one Squeeze for two, or one Unsqueeze for two: they say the same of every shape."""
    first, second = axes(before, notes), axes(node, notes)
    if before.op != node.op or node.op == "Reshape" or not first or not second or min(*first, *second) < 0:
        return None
    # An Unsqueeze counts axes in its result, a Squeeze in its input; what is between is counted the other way.
    outer, inner = (second, first) if node.op == "Unsqueeze" else (first, second)
    places = [axis for axis in range(max(outer) + max(inner) + 2) if axis not in outer]
    return tuple(sorted((*outer, *(places[axis] for axis in inner))))


def _around(view: View, end: gs.Node, notes: Notes) -> bool:
    """Drop a Reshape and the one that it undoes on the other side of elementwise ops."""
    ops = UNARY | BROADCASTING | {"Clip"} if notes.opset >= 7 else UNARY
    members, edges = view.region(end, ops, None)
    if not members or not _moves(view, end, members, edges, notes):
        view.bar(None, members)
        return False
    return True


def _moves(view: View, end: gs.Node, members: list[gs.Node], edges: list[Edge], notes: Notes) -> bool:
    befores = {id(before): before for edge in edges if (before := view.maker(edge.tensor, *_RESHAPES)) is not None}
    if len(befores) != 1:
        return False
    ((_, before),) = befores.items()
    source = before.inputs[0]
    if not same_shape(source, end.outputs[0]):
        return False
    least = min(rank(source) or 0, rank(before.outputs[0]) or 0)
    for edge in edges:
        tensor = edge.tensor
        if tensor is before.outputs[0]:
            continue
        if not isinstance(tensor, gs.Constant) or len(tensor.shape) > least or any(size != 1 for size in tensor.shape):
            notes.refused(end, f"{tensor.name!r} has a shape of its own, so it would broadcast otherwise")
            return False
    if any(all(isinstance(tensor, gs.Constant) for tensor in node.inputs) for node in members):
        return False
    for edge in edges:
        if edge.tensor is before.outputs[0]:
            set_input(edge.node, edge.position, source)
    for node in members:
        node.outputs[0].shape = list(source.shape)
    view.bypass(end, end.inputs[0])
    view.retire(before)
    return True


def _shown(tensor: gs.Tensor) -> str:
    return "of unknown rank" if tensor.shape is None else f"({', '.join(map(str, tensor.shape))})"
