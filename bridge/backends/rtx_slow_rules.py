"""Nodes over which TensorRT-RTX 1.6.1 builds for minutes or hours, and what is written in their place."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .rtx_fault_rules import SUFFIX, Facts, Instead

_MOVES = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_FUSED = _MOVES | {
    "Abs", "Add", "And", "Ceil", "Clip", "Concat", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Gather", "Gelu",
    "Greater", "GreaterOrEqual", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg",
    "Not", "Or", "Pad", "Pow", "Reciprocal", "Relu", "ScatterElements", "ScatterND", "Sigmoid", "Sin", "Slice",
    "Softplus", "Split", "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip
_NORMALIZING = {"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"}
_SUMS = {"ReduceMean", "ReduceSum"}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_MOST = 4
"""Reductions in a row that are left as they are; four build in half a second, nine in half a minute."""


def cut_reductions(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """Sums of what sums went into, many times over, become products with a vector of ones.

    ::

        x1 = x0 / ReduceSum(x0, -1)                      x1 = x0 / ReduceSum(x0, -1)
        x2 = x1 / ReduceSum(x1, -2)                      x2 = x1 / ReduceSum(x1, -2)
        ...                                              ...
        x6 = x5 / ReduceSum(x5, -2)                      x6 = x5 / MatMul(ones, x5)

    The compiler puts all that comes before into the kernel of each reduction, once for every time that it is read, so
    that its work doubles and more with each further one (Sinkhorn's algorithm in transformers' DeepSeek-V4).
    """
    instead = Instead({}, [])
    outputs = {value.name for value in graph.output}
    depths: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        depth = max((depths.get(name, 0) for name in node.input), default=0)
        reduces = not node.domain and (node.op_type.startswith("Reduce") or node.op_type in _NORMALIZING)
        if reduces:
            depth += 1
            if depth > _MOST and (made := _product(node, facts, instead.constants)):
                instead.nodes[index] = made
                depth = 0  # but what it reads keeps its own: the compiler still looks through that
        elif node.domain or node.op_type not in _FUSED:
            depth = 0
        if depth:
            depths |= {name: depth for name in node.output if name not in outputs and not _is_stored(name, facts)}
    return instead


def _is_stored(name: str, facts: Facts) -> bool:
    """Whether a tensor is read, as it is or moved, by an op that is fused with nothing before it."""
    for reader in facts.readers.get(name, ()):
        if reader.domain:
            return True
        if reader.op_type in _MOVES:
            if any(_is_stored(made, facts) for made in reader.output):
                return True
        elif not (reader.op_type in _FUSED or reader.op_type in _NORMALIZING or reader.op_type.startswith("Reduce")):
            return True
    return False


def _product(node: onnx.NodeProto, facts: Facts, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """A sum or mean over one of the last two axes as a product; nothing where it is no such."""
    shape, element = facts.shapes.get(node.input[0]), facts.types.get(node.input[0], 0)
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    axes = attributes.get("axes") or (facts.numbers(node.input[1]) if len(node.input) > 1 and node.input[1] else None)
    if node.op_type not in _SUMS or shape is None or element not in _FLOATS or axes is None or len(axes) != 1:
        return []
    rank = len(shape)
    axis, size = axes[0] % rank, shape[axes[0] % rank]
    if rank < 2 or axis < rank - 2 or size is None:
        return []
    last = axis == rank - 1
    dtype = helper.tensor_dtype_to_np_dtype(element)
    weight = 1 / size if node.op_type == "ReduceMean" else 1
    name, out = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
    ones = np.full((size, 1) if last else (1, size), weight).astype(dtype)
    constants.append(numpy_helper.from_array(ones, f"{name}.ones"))
    operands = [node.input[0], f"{name}.ones"] if last else [f"{name}.ones", node.input[0]]
    if attributes.get("keepdims", 1):
        return [helper.make_node("MatMul", operands, [node.output[0]], node.name)]
    constants.append(numpy_helper.from_array(np.array([axis], np.int64), f"{name}.axis"))
    return [
        helper.make_node("MatMul", operands, [f"{out}.product"], f"{name}.product"),
        helper.make_node("Squeeze", [f"{out}.product", f"{name}.axis"], [node.output[0]], node.name),
    ]
