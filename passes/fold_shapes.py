"""Fold shapes that follow from the symbols of dynamic dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .patterns import View, same_size, sweep, values
from .pipeline import Notes, Pass
from .surgery import is_standard, output_ids, scopes, set_input

Size = int | str | None
"""An entry of a shape: fixed, a symbol, or not known."""


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Give Reshape and Expand constant shapes where symbols of dynamic dimensions say enough.

    ::

        x (batch, seq, 64)                                               Reshape(x, [0, 0, 4, 16])
        Reshape(x, Concat(Shape(mask)[0], Shape(mask)[1], 4, 16))            where mask is (batch, seq)

    Two dimensions with the same symbol have the same size; so says the ONNX standard (IR, "Static tensor shapes").
    A dimension of a Reshape that stands where its input has the same symbol becomes 0, which copies it; one that is
    left may be -1. In an Expand, dimensions that the input has already become 1. What the shape arithmetic says of a
    result's shape is written down where it was not known. The arithmetic itself goes where nobody else reads it.

    FoldConstants folds what is fixed; this is for the rest. Exact, but for tensors without elements, of which a -1 says
    nothing.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        vectors = _Vectors(notes)
        for scope in scopes(graph):
            outputs = output_ids(scope)
            for node in scope.nodes:
                if is_standard(node):
                    vectors.read(node)
                    if node.outputs and id(node.outputs[0]) not in outputs:  # Those keep the shape that was declared.
                        _describe(node, vectors)
        return sweep(graph, lambda view, node: _step(view, node, vectors, notes))


class _Vector(NamedTuple):
    """A scalar or one-dimensional tensor of integers."""

    entries: tuple[Size, ...]
    is_scalar: bool


class _Vectors:
    """What is known of tensors that hold sizes. Nodes must come in topological order."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        # Tensors are kept beside what is known, so that no id() can be given away again.
        self._known: dict[int, tuple[gs.Tensor, _Vector]] = {}

    def get(self, tensor: gs.Tensor) -> _Vector | None:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        constant = values(tensor, self._notes)
        if constant is None or constant.dtype.kind != "i" or constant.ndim > 1:
            return None
        return _Vector(tuple(int(value) for value in constant.reshape(-1)), constant.ndim == 0)

    def read(self, node: gs.Node) -> None:
        if len(node.outputs) == 1 and (found := self._evaluate(node)) is not None:
            self._known[id(node.outputs[0])] = (node.outputs[0], found)

    def _evaluate(self, node: gs.Node) -> _Vector | None:
        if node.op == "Shape":
            shape = node.inputs[0].shape
            if shape is None:
                return None
            sizes = tuple(_size(size) for size in shape)
            return _Vector(sizes[slice(node.attrs.get("start", 0), node.attrs.get("end"))], False)
        if not any(id(tensor) in self._known for tensor in node.inputs):
            return None
        data = self.get(node.inputs[0])
        if data is None:
            return None
        match node.op:
            case "Identity":
                return data
            case "Cast" if node.attrs.get("to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                return data
            case "Squeeze" if len(data.entries) == 1 and not data.is_scalar:
                return _Vector(data.entries, True)
            case "Unsqueeze" if data.is_scalar:
                return _Vector(data.entries, False)
            case "Gather" if not data.is_scalar and node.attrs.get("axis", 0) in (0, -1):
                index = values(node.inputs[1], self._notes)
                if index is None or index.ndim > 1 or not np.all(np.abs(index + 0.5) < len(data.entries) + 0.4):
                    return None
                return _Vector(tuple(data.entries[int(at)] for at in index.reshape(-1)), index.ndim == 0)
            case "Slice" if not data.is_scalar and self._notes.opset >= 10:
                window = self._window(node)
                return None if window is None else _Vector(data.entries[window], False)
            case "Concat":
                parts = [self.get(tensor) for tensor in node.inputs]
                if all(part is not None and not part.is_scalar for part in parts):
                    return _Vector(tuple(entry for part in parts if part is not None for entry in part.entries), False)
        return None

    def _window(self, node: gs.Node) -> slice | None:
        """What a Slice of a vector takes; None where that is not constant."""
        bounds: list[int] = []
        for position, default in ((1, None), (2, None), (3, 0), (4, 1)):
            tensor = node.inputs[position] if len(node.inputs) > position else None
            constant = values(tensor, self._notes) if tensor is not None and tensor.name else None
            if constant is not None and constant.size == 1:
                bounds.append(int(constant.reshape(-1)[0]))
            elif default is not None and (tensor is None or not tensor.name):
                bounds.append(default)
            else:
                return None
        start, end, _, step = bounds
        return slice(start, end, step) if step > 0 else None


def _size(size: object) -> Size:
    """An entry of a shape. Some exporters write 0 for "unknown"."""
    if isinstance(size, str):
        return size or None
    return int(size) if isinstance(size, (int, np.integer)) and size > 0 else None


def _described(tensor: gs.Tensor) -> list[Size] | None:
    return None if tensor.shape is None else [_size(size) for size in tensor.shape]


def _describe(node: gs.Node, vectors: _Vectors) -> None:
    """Write down what a node's shape input, or its permutation, says of the shape of its result."""
    result = node.outputs[0] if node.outputs else None
    if not isinstance(result, gs.Variable) or not node.inputs:
        return
    source = _described(node.inputs[0])
    found: list[Size] | None = None
    if node.op == "Reshape" and len(node.inputs) > 1:
        asked = vectors.get(node.inputs[1])
        found = None if asked is None else _reshaped(source, asked.entries, bool(node.attrs.get("allowzero")))
    elif node.op == "Transpose" and source is not None:
        order = node.attrs.get("perm") or list(range(len(source)))[::-1]
        found = [source[axis] for axis in order]
    if found is None:
        return
    known = _described(result)
    joined = _joined(known, found)
    if joined != known:
        result.shape = joined


def _joined(known: list[Size] | None, more: list[Size] | None) -> list[Size] | None:
    """What is known, and where that is nothing what else says."""
    if known is None or more is None or len(known) != len(more):
        return more if known is None else known
    return [new if old is None else old for old, new in zip(known, more, strict=True)]


def _reshaped(source: list[Size] | None, asked: Sequence[Size], allow_zero: bool) -> list[Size] | None:
    """The shape after a Reshape, as far as it follows."""
    found: list[Size] = []
    for axis, entry in enumerate(asked):
        if entry == 0 and (allow_zero or source is None or axis >= len(source)):
            return None
        if entry == 0 and source is not None:
            found.append(source[axis])
        else:
            found.append(None if entry == -1 else entry)
    if -1 in asked and source is not None:
        # The -1 is what is left of the source when all that is the same on both sides has gone.
        rest, others = list(source), [size for size, entry in zip(found, asked, strict=True) if entry != -1]
        for size in [size for size in others if isinstance(size, str)]:
            if size not in rest:
                return found
            rest.remove(size)
            others.remove(size)
        symbols = [size for size in rest if not isinstance(size, int)]
        up = math.prod(size for size in rest if isinstance(size, int))
        down = math.prod(size for size in others if isinstance(size, int))
        at = list(asked).index(-1)
        if None in others or None in rest or not down or up % down:
            return found
        if not symbols:
            found[at] = up // down
        elif len(symbols) == 1 and up == down:
            found[at] = symbols[0]
    return found


def _step(view: View, node: gs.Node, vectors: _Vectors, notes: Notes) -> bool:
    if node.op not in ("Reshape", "Expand") or len(node.inputs) < 2 or isinstance(node.inputs[1], gs.Constant):
        return False
    source, result, asked = node.inputs[0], node.outputs[0], vectors.get(node.inputs[1])
    if asked is None:
        return False
    if node.op == "Expand":
        shape = _expansion(source, asked.entries)
        if shape is None:
            return False  # It makes something that its input has not, which no constant says.
    else:
        # With allowzero a 0 makes an empty tensor, without it copies a size that only the numbers tell.
        sizes = _reshaped(_described(source), asked.entries, bool(node.attrs.get("allowzero")))
        shape = None if 0 in asked.entries else constant_shape(source, _joined(sizes, _described(result)))
        if shape is None:
            notes.refused(node, "its shape does not follow from the symbols of its input")
            return False
        node.attrs.pop("allowzero", None)
    arithmetic = node.inputs[1]
    set_input(node, 1, notes.constant(shape, f"{result.name}_shape"))
    pending = [arithmetic]
    while pending:
        maker = view.maker(pending.pop())
        if maker is not None and not view.is_dead(maker):
            view.retire(maker)
            pending.extend(tensor for tensor in maker.inputs if view.is_dead(maker))
    return True


def _expansion(source: gs.Tensor, asked: Sequence[Size]) -> np.ndarray | None:
    """The second input of an Expand as a constant; None where it is none."""
    shape = _described(source)
    if shape is None:
        return None
    lead = len(asked) - len(shape)
    found: list[int] = []
    for axis, entry in enumerate(asked):
        own = shape[axis - lead] if axis >= lead else None
        if isinstance(entry, int) and entry > 0:
            found.append(entry)
        elif axis >= lead and same_size(own, entry):
            found.append(1)
        else:
            return None
    return np.array(found, np.int64)


def constant_shape(source: gs.Tensor, sizes: Sequence[object] | None) -> np.ndarray | None:
    """The second input of the Reshape from a tensor to these sizes; None where no constant does it."""
    if sizes is None:
        return None
    asked: list[int] = []
    inferred = False
    for axis, size in enumerate(map(_size, sizes)):
        if isinstance(size, int):
            asked.append(size)
        elif source.shape is not None and axis < len(source.shape) and same_size(source.shape[axis], size):
            asked.append(0)
        elif not inferred:
            asked.append(-1)
            inferred = True
        else:
            return None
    return np.array(asked, np.int64)
