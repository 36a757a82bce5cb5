"""Nodes whose shapes are the values of tensors: TensorRT knows sizes, but not values, before it runs."""

from __future__ import annotations

from collections.abc import Collection

import onnx

_SHAPE_OPERANDS = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}
"""By op the inputs from whose values the shape of a result follows."""

_SHAPES_ONLY = {"Shape", "Size"}
"""Ops whose results say nothing of values."""


def shaped_by_values(graph: onnx.GraphProto, inputs: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of a graph that make a tensor whose shape is computed from the values of some inputs, in order."""
    values = set(inputs)
    found = []
    for node in graph.node:
        operands = () if node.domain else _SHAPE_OPERANDS.get(node.op_type, ())
        if any(index < len(node.input) and node.input[index] in values for index in operands):
            found.append(node)
        if node.op_type not in _SHAPES_ONLY and values.intersection(node.input):
            values.update(filter(None, node.output))
    return found
