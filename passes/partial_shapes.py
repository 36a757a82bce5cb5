"""Follow shapes through a graph's shape arithmetic, dimension by dimension."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .pipeline import Notes
from .surgery import is_standard, nbytes, sizes

_Partial = tuple[np.ndarray, np.ndarray]
"""Values, and which of them are known."""

_MOST_ELEMENTS = 64
"""Shape arithmetic is on short vectors; anything longer is data."""


class PartialShapes:
    """Values of int tensors that are made from shapes, known in part.

    ``Shape`` of a ``(batch, 3, 224, 224)`` tensor is ``[?, 3, 224, 224]``; taking its last two is ``[224, 224]``.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        # Tensors are kept beside their values, so that no id() can be given away again.
        self._known: dict[int, tuple[gs.Tensor, _Partial]] = {}

    def value(self, node: gs.Node) -> np.ndarray | None:
        """The value of a node's only output where all of it is known. Nodes must come in topological order."""
        if not is_standard(node) or len(node.outputs) != 1:
            return None
        partial = self._evaluate(node)
        if partial is None:
            return None
        self._known[id(node.outputs[0])] = (node.outputs[0], partial)
        return partial[0] if partial[1].all() else None

    def _evaluate(self, node: gs.Node) -> _Partial | None:
        if node.op in ("Shape", "Size"):
            return _shape(node)
        if not node.inputs or not any(id(tensor) in self._known for tensor in node.inputs):
            return None
        parts = [self._part(tensor) for tensor in node.inputs]
        data = parts[0]
        if data is None:
            return None
        values, known = data
        match node.op:
            case "Identity":
                return data
            case "Cast" if node.attrs.get("to") in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                dtype = np.int64 if node.attrs["to"] == onnx.TensorProto.INT64 else np.int32
                fits = np.abs(values) <= np.iinfo(dtype).max
                return values.astype(dtype), known & fits
            case "Unsqueeze" | "Squeeze" if values.size == 1:
                shape = (1,) if node.op == "Unsqueeze" and values.ndim == 0 else ()
                # A scalar becomes (1,) or back; anything of higher rank is no shape arithmetic.
                if (node.op == "Unsqueeze") == (values.ndim == 0):
                    return values.reshape(shape), known.reshape(shape)
            case "Gather" if values.ndim == 1 and node.attrs.get("axis", 0) in (0, -1):
                index = self._exact(node, 1)
                if index is not None and np.all((index >= -values.size) & (index < values.size)):
                    return np.asarray(values[index]), np.asarray(known[index])
            case "Slice" if values.ndim == 1 and self._notes.opset >= 10:
                window = self._window(node)
                return None if window is None else (values[window], known[window])
            case "Concat" if node.attrs.get("axis", 0) in (0, -1):
                if all(part is not None and part[0].ndim == 1 for part in parts):
                    return (
                        np.concatenate([part[0] for part in parts if part is not None]),
                        np.concatenate([part[1] for part in parts if part is not None]),
                    )
        return None

    def _part(self, tensor: gs.Tensor) -> _Partial | None:
        if id(tensor) in self._known:
            return self._known[id(tensor)][1]
        if isinstance(tensor, gs.Constant) and nbytes(tensor) <= _MOST_ELEMENTS * 8:
            values = self._notes.values(tensor)
            if values.dtype.kind == "i" and values.ndim <= 1:
                return values, np.ones(values.shape, bool)
        return None

    def _exact(self, node: gs.Node, position: int) -> np.ndarray | None:
        """An input that must be known in full."""
        part = self._part(node.inputs[position])
        return part[0] if part is not None and part[1].all() else None

    def _window(self, node: gs.Node) -> slice | None:
        """What a one-dimensional Slice takes; None where that is not known."""
        bounds = [self._exact(node, position) for position in range(1, len(node.inputs)) if node.inputs[position].name]
        if len(bounds) != sum(1 for tensor in node.inputs[1:] if tensor.name) or any(
            bound is None or bound.size != 1 for bound in bounds
        ):
            return None
        step = self._exact(node, 4) if len(node.inputs) > 4 and node.inputs[4].name else np.array([1])
        start, end = self._exact(node, 1), self._exact(node, 2)
        if start is None or end is None or step is None or int(step.item()) <= 0:
            return None
        return slice(int(start.item()), int(end.item()), int(step.item()))


def _shape(node: gs.Node) -> _Partial | None:
    """What the type of a tensor says about its shape or size."""
    shape = sizes(node.inputs[0])
    if shape is None or len(shape) > _MOST_ELEMENTS:
        return None
    if node.op == "Size":
        if any(size is None for size in shape):
            return None
        return np.array(math.prod(size for size in shape if size is not None), np.int64), np.array(True)
    window = slice(node.attrs.get("start", 0), node.attrs.get("end"))
    values = np.array([0 if size is None else size for size in shape], np.int64)[window]
    known = np.array([size is not None for size in shape], bool)[window]
    return values, known
