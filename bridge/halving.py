"""Finds the node that makes a builder fail without a word: by building ever smaller beginnings of the graph."""

from __future__ import annotations

import dataclasses
import logging

import onnx
import onnx_ir as ir

from ..errors import BuildError, TrtBridgeError, UnsupportedOpError
from .backends.base import Backend, BuildOptions, Refusal, Segment
from .model import Origin, TensorSpec
from .partition import spec_of

logger = logging.getLogger(__name__)


def find_culprit(segment: Segment, backend: Backend, options: BuildOptions) -> list[Refusal]:
    """The last node of the shortest beginning of a segment that cannot be built.

    It takes about log2(nodes) builds, made at the lowest optimization level where the backend has one.

    Returns:
        One refusal, or none where every beginning can be built.
    """
    nodes = list(segment.proto.graph.node)
    words: dict[int, str] = {}

    def fails(count: int) -> bool:
        part = beginning(segment, count)
        if part is None:
            return False
        try:
            backend.build(part, options)
        except (BuildError, UnsupportedOpError) as error:
            if isinstance(error, BuildError) and not error.graph_at_fault:
                raise
            words[count] = str(error)
            return True
        return False

    if not fails(len(nodes)) or not _builds_anything(backend, options):
        return []
    low, high = 0, len(nodes)  # beginnings of `low` nodes build, those of `high` nodes do not
    while high - low > 1:
        middle = (low + high) // 2
        if fails(middle):
            high = middle
        else:
            low = middle
        logger.debug("%s: between %d and %d of %d nodes", segment.name, low, high, len(nodes))
    node = nodes[high - 1]
    name = next((output for output in node.output if output), "")
    reason = words[high].strip().splitlines()
    return [
        Refusal(
            node.name,
            node.op_type,
            tuple(node.output),
            f"the builder fails as soon as this node is in the graph: {reason[0][:300] if reason else ''}",
            tuple(name for name in node.input if name),
            segment.provenance.get(name, Origin()),
        )
    ]


def _builds_anything(backend: Backend, options: BuildOptions) -> bool:
    """Whether it is the graph at all that the builder minds."""
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"], "probe")], "probe", value[:1], value[1:]
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    inputs, outputs = (TensorSpec.make(name, ir.DataType.FLOAT, (2, 2), {}) for name in ("x", "y"))
    try:
        backend.build(Segment("probe", proto, {}, (inputs,), (outputs,)), options)
    except TrtBridgeError:
        return False
    return True


def beginning(segment: Segment, count: int) -> Segment | None:
    """The first nodes of a segment as a segment; None where what they hand out has no known type."""
    if count >= len(segment.proto.graph.node):
        return segment
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    graph = proto.graph
    types = {value.name: value for value in [*graph.value_info, *graph.output]}
    rest = list(graph.node)[count:]
    del graph.node[count:]
    made = {name for node in graph.node for name in node.output if name}
    read_later = {name for node in rest for name in node.input} | {value.name for value in segment.proto.graph.output}
    names = [name for name in made & read_later if name in types]
    if not names:
        return None
    values = [onnx.ValueInfoProto.FromString(types[name].SerializeToString()) for name in sorted(names)]
    del graph.output[:]
    graph.output.extend(values)
    outputs: tuple[TensorSpec, ...] = tuple(map(spec_of, values))
    return dataclasses.replace(segment, proto=proto, outputs=outputs)
