"""Graphs that TensorRT-RTX builds without a word and computes wrongly, in a form that it computes right.

All were seen with TensorRT-RTX 1.6.1 on an H200, in models of transformers, torchvision and timm, and an engine gives
no sign of any (tests/gpu/test_rtx_faults.py). The other form computes the same, so it is taken always:

* **Indices of a top-k in another order.** Behind attention the compiler keeps activations as (sequence, batch) where
  the graph has (batch, sequence). The values of a TopK (ArgMax and ArgMin are one too) come back in the graph's order,
  its indices do not. With one more axis in front of the TopK they do.
* **A result that is never written.** Where one result of the engine is another one with its elements moved (joined
  again from slices, or reshaped to the shape that it has), the compiler drops the moves and writes only one of the two;
  the other is whatever was in memory. An Identity between the tensor and the first result is enough.
* **Reductions of a rotation**, **convolutions of one position over few**, **constants times transposed tokens**, and
  **tokens read across**: rtx_fault_rules.py.
* **A bias that is forgotten** before an activation that is multiplied, and **images with a number added**:
  rtx_epilogues.py.
* **A convolution that joins what was made right ahead of it**, wrong while other work delays that:
  rtx_overlap_rules.py.

And what is computed right, but takes the builder minutes or hours, is written otherwise by rtx_slow_rules.py.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..model import iterate_nodes
from .rtx_epilogues import add_apart, scale_apart
from .rtx_fault_rules import MOST_AXES, Facts, lift_products, lift_transposes, multiply_pointwise, turn_by_index
from .rtx_fault_rules import SUFFIX as _SUFFIX
from .rtx_overlap_rules import operand_apart
from .rtx_slow_rules import cut_reductions

_TOP_K = ("TopK", "ArgMax", "ArgMin")
_MOVES = {
    "Cast", "Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
_FIRST_AXIS = "trtbridge.first_axis"


def avoid_faults(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in a form that TensorRT-RTX computes right.

    Args:
        proto: a segment's graph; not changed.

    Returns:
        A changed copy, or `proto` itself where there is nothing to change. Nodes keep their names; those that are new
        have the name of the one that they belong to with a suffix, which `original_name` takes off again.
    """
    graph = proto.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
        if value.type.tensor_type.HasField("shape")
    }
    lifted = {
        index
        for index, node in enumerate(graph.node)
        if node.op_type in _TOP_K and not node.domain and ranks.get(node.input[0], 0) <= MOST_AXES
    }
    results = _moved_results(graph)
    facts = Facts(graph)
    rules = (
        turn_by_index, multiply_pointwise, lift_products, lift_transposes, operand_apart, scale_apart, add_apart,
        cut_reductions,
    )  # fmt: skip
    rewritten = [rule(graph, facts) for rule in rules]
    instead = {index: made for rule in rewritten for index, made in rule.nodes.items()}
    constants = {tensor.name: tensor for rule in rewritten for tensor in rule.constants}
    if not lifted and not results and not instead:
        return proto
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(copied.graph.node):
        nodes += _lift(node) if index in lifted else instead.get(index, [node])
    nodes = _read(nodes, graph) if instead else nodes
    copied.graph.initializer.extend(constants.values())
    if lifted:
        copied.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), _FIRST_AXIS))
    nodes = [made for node in nodes for made in _apart(node, results)]
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    return copied


def original_name(name: str) -> str:
    """The name of a node of the graph before `avoid_faults` that a node of the graph after it belongs to."""
    return name.partition(_SUFFIX)[0]


def _read(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Less those that nobody reads any more, such as the Slices of a Concat that is gone."""
    kept: list[onnx.NodeProto] = []
    read = {value.name for value in graph.output}
    bodies = [attribute.g for node in nodes for attribute in node.attribute if attribute.HasField("g")]
    inner = {name for body in bodies for node in iterate_nodes(body) for name in node.input}
    inner |= {value.name for body in bodies for value in body.output}
    for node in reversed(nodes):
        if not read.isdisjoint(node.output) or not inner.isdisjoint(node.output) or node.domain:
            kept.append(node)
            read.update(node.input)
    return kept[::-1]


def _moved_results(graph: onnx.GraphProto) -> set[str]:
    """The results whose elements are another result too, moved."""
    results = {value.name for value in graph.output}
    reaches: dict[str, bool] = {}  # by tensor: whether some result comes of moving it
    for node in reversed(graph.node):
        if node.op_type in _MOVES and not node.domain and any(n in results or reaches.get(n) for n in node.output):
            reaches.update(dict.fromkeys(node.input, True))
    made = {name for node in graph.node for name in node.output}
    return {name for name in results & made if reaches.get(name)}


def _lift(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A top-k over one more axis, which is taken off its results again."""
    inside = node.input[0] + f"{_SUFFIX}.{node.output[0] or node.output[1]}"
    before = helper.make_node("Unsqueeze", [node.input[0], _FIRST_AXIS], [inside], f"{node.name}{_SUFFIX}.unsqueeze")
    node.input[0] = inside
    axis = next((attribute for attribute in node.attribute if attribute.name == "axis"), None)
    if axis is None:
        node.attribute.append(helper.make_attribute("axis", -1 if node.op_type == "TopK" else 1))
    elif axis.i >= 0:
        axis.i += 1
    after = []
    for position, name in enumerate(node.output):
        if name:
            node.output[position] = name + _SUFFIX
            squeezed = f"{node.name}{_SUFFIX}.squeeze{position}"
            after.append(helper.make_node("Squeeze", [name + _SUFFIX, _FIRST_AXIS], [name], squeezed))
    return [before, node, *after]


def _apart(node: onnx.NodeProto, results: set[str]) -> list[onnx.NodeProto]:
    """A node that reads and makes results under another name, and Identity nodes that make the results of it."""
    for position, name in enumerate(node.input):
        if name in results:
            node.input[position] = name + _SUFFIX
    made = []
    for position, name in enumerate(node.output):
        if name in results:
            node.output[position] = name + _SUFFIX
            identity = f"{node.name}{_SUFFIX}.identity{position}"
            made.append(helper.make_node("Identity", [name + _SUFFIX], [name], identity))
    return [node, *made]
