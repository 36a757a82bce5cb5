"""Find SiLU in its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .patterns import View, number, sweep
from .pipeline import Notes, Pass
from .surgery import become, element_type

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_OPSET = 24


@dataclass(frozen=True)
class FuseSilu(Pass):
    """Make one Swish of the ops that it was written with; opset 24 and later.

    ::

        x * Sigmoid(x)                  Swish(x)                    SiLU
        x * Sigmoid(1.702 * x)          Swish(x, alpha=1.702)       the quick GELU of CLIP

    after Ramachandran, Zoph and Le, "Searching for Activation Functions" (arXiv:1710.05941). Fires on float32, float16
    and bfloat16 where nothing else reads the parts. Exact, but for the digits of alpha. TensorRT-RTX 1.6.1 and 1.7.1
    build the node in all three types, and write it in its parts again: it is for graphs that go elsewhere.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sweep(graph, lambda view, node: _step(view, node, notes))


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    if node.op != "Mul" or element_type(node.outputs[0]) not in _TYPES:
        return False
    for source, gate in (list(node.inputs), list(node.inputs)[::-1]):
        sigmoid = view.maker(gate, "Sigmoid")
        found = None if sigmoid is None else _alpha(view, sigmoid.inputs[0], source, notes)
        if sigmoid is None or found is None:
            continue
        alpha, scaling = found
        parts = [sigmoid, *scaling]
        for reader, part in zip([node, *parts], parts, strict=False):
            if not view.only_for(part.outputs[0], {id(reader)}):
                notes.refused(node, f"it is a SiLU, but {part.outputs[0].name!r} inside it is read elsewhere")
                return False
        if notes.opset < _OPSET:
            notes.refused(node, f"it is a SiLU, but Swish came with opset {_OPSET} and the model has {notes.opset}")
            return False
        become(node, "Swish", [source])
        if alpha != 1.0:
            node.attrs["alpha"] = alpha
        view.retire(*parts)
        return True
    return False


def _alpha(view: View, tensor: gs.Tensor, source: gs.Tensor, notes: Notes) -> tuple[float, list[gs.Node]] | None:
    """By what `source` is multiplied to make a tensor, and the node that does."""
    if tensor is source:
        return 1.0, []
    scaling = view.maker(tensor, "Mul")
    if scaling is None:
        return None
    for position in (0, 1):
        alpha = number(scaling.inputs[1 - position], notes)
        if scaling.inputs[position] is source and alpha is not None:
            return alpha, [scaling]
    return None
