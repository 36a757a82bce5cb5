"""Rewrite nodes of element types that TensorRT's parser refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .narrow_types import NarrowTypes
from .pipeline import Notes, Pass
from .surgery import element_type, gs_type, is_standard, scopes, set_input, set_output, type_name

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)


@dataclass(frozen=True)
class RepairTypes(Pass):
    """Compute in another type where that is exact.

    ::

        y = ReduceMax(x)      u = Cast(x, int32); v = ReduceMax(u); y = Cast(v, bool)     x: bool; ReduceMin too
        y = Relu(x)           y = Max(x, 0)                                               x: int32 or int64

    Each was refused by the parser of TensorRT-RTX 1.6.1 ("unsupported input type") and builds after. A MatMul of
    integers is refused with a reason: float32 is exact up to 2**24 only.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (NarrowTypes,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        for scope in scopes(graph):
            result: list[gs.Node] = []
            for node in scope.nodes:
                element = element_type(node.inputs[0]) if is_standard(node) and node.inputs else 0
                if node.op in ("ReduceMax", "ReduceMin") and element == onnx.TensorProto.BOOL:
                    result.extend(_through_int(node, notes))
                    count += 1
                    continue
                if node.op == "Relu" and element in _INTEGERS:
                    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
                    node.op = "Max"
                    node.inputs.append(notes.constant(np.zeros((), dtype), "zero"))
                    count += 1
                elif node.op in ("MatMul", "Gemm") and element in _INTEGERS:
                    notes.refused(node, f"a product of {type_name(element)} is exact in float32 up to 2**24 only")
                result.append(node)
            scope.nodes = result
        return count


def _through_int(node: gs.Node, notes: Notes) -> list[gs.Node]:
    source, target = node.inputs[0], node.outputs[0]
    number = gs_type(onnx.TensorProto.INT32)
    wide = gs.Variable(notes.fresh_name(f"{source.name}_int32"), number, source.shape)
    result = gs.Variable(notes.fresh_name(f"{target.name}_int32"), number, target.shape)
    before = gs.Node("Cast", attrs={"to": int(onnx.TensorProto.INT32)}, inputs=[source], outputs=[wide])
    set_input(node, 0, wide)
    set_output(node, 0, result)
    # Not a cast: the maximum of nothing is the least integer, and that is False.
    zero = notes.constant(np.zeros((), np.int32), "zero")
    after = gs.Node("Greater", inputs=[result, zero], outputs=[target])
    return [before, node, after]
