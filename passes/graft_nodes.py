"""Nodes that a backend refuses become plugin nodes that run them outside of the engine."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import onnx
import onnx.shape_inference

from ..errors import PassError
from ..nodes import (
    CALL_ATTRIBUTE,
    DOMAIN,
    ONNX_NODE_OP,
    OP_ATTRIBUTE,
    REASON_KEY,
    bodies,
    encode_nodes,
    every_node,
    inputs_of,
    make_onnx_call,
    reads,
)
from .exchange import INLINE_LIMIT_BYTES

_T = onnx.TensorProto
_NOT_IN_TORCH = {_T.STRING, _T.INT4, _T.UINT4, _T.FLOAT4E2M1, _T.INT2, _T.UINT2, _T.UNDEFINED}
"""Element types of which torch has no tensors."""


def graft(proto: onnx.ModelProto, reasons: Mapping[str, str]) -> onnx.ModelProto:
    """Make plugin nodes of nodes.

    ::

        x ──> Det 'n' ──> y            becomes   x ──> trtbridge::onnx_Det 'n' {op, call} ──> y

    Values that torch has no type for (sequences, optionals, texts, 4-bit numbers) cannot leave a plugin, nor can
    tensors of unknown rank, which no engine takes: nodes that pass such values among themselves become one plugin
    together, and so do nodes that stand between them.

    Args:
        proto: the model; not changed. Large initializers may be stand-ins: they become inputs of the plugin. Small ones
            (axes, shapes, little weights) go into the plugin's text, so that nothing is read from the device later.
        reasons: why, by name of node, in the main graph or in a body; for the latter the node of the main graph that
            holds the body goes.

    Returns:
        A new model. The plugin nodes keep the (first) node's name and metadata, and carry the reason in theirs.

    Raises:
        PassError: no node has such a name, or a value that cannot leave a plugin comes from, or goes to, where no ONNX
            node is: the model's inputs and outputs, other plugins.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    chosen = _holders(result.graph, reasons)
    if not chosen:
        return result
    types = _types(result)
    _hoist_stand_ins(result.graph, chosen)
    constants = _small_constants(result.graph)
    groups = _Groups(result.graph, types)
    made: list[tuple[int, onnx.NodeProto]] = []
    gone: set[int] = set()
    for members in groups.around(sorted(chosen)):
        nodes = [result.graph.node[index] for index in members]
        reason = next(chosen[index] for index in members if index in chosen)
        made.append((members[-1], _plugin(result, nodes, groups.leaving(members), constants, reason)))
        gone.update(members)
    kept = [(index, node) for index, node in enumerate(result.graph.node) if index not in gone]
    ordered = _sorted([node for _, node in sorted([*kept, *made], key=lambda pair: pair[0])], result.graph)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    _declare(result.graph, [name for _, node in made for name in node.output], types)
    if all(opset.domain != DOMAIN for opset in result.opset_import):
        result.opset_import.add(domain=DOMAIN, version=1)
    return result


def _holders(graph: onnx.GraphProto, reasons: Mapping[str, str]) -> dict[int, str]:
    """The nodes of the main graph that are named or hold one that is, by position, each with the reason."""
    left = dict(reasons)
    chosen: dict[int, str] = {}
    for index, node in enumerate(graph.node):
        for inner in every_node([node]):
            if inner.name in reasons and inner.name:
                left.pop(inner.name, None)
                chosen.setdefault(index, reasons[inner.name])
        if index in chosen and any(inner.domain == DOMAIN for inner in every_node([node])):
            raise PassError(f"Node {node.name!r} is or holds a plugin node, which cannot become one again.")
    if left:
        raise PassError(f"The graph has no nodes named {sorted(left)}, so they cannot become plugins.")
    return chosen


def _types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """The type of every value in the main graph, as far as it is known."""

    def declared(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
        values = [*graph.value_info, *graph.input, *graph.output]
        return {value.name: value.type for value in values if value.type.WhichOneof("value")}

    known = declared(proto.graph)
    made = {name for node in proto.graph.node for name in node.output if name}
    if made - known.keys():
        known = {**declared(onnx.shape_inference.infer_shapes(proto, data_prop=True).graph), **known}
    for tensor in proto.graph.initializer:
        known.setdefault(tensor.name, onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims))
    return known


def _leaves_a_plugin(kind: onnx.TypeProto | None) -> bool:
    if kind is None or kind.WhichOneof("value") != "tensor_type":
        return False
    return kind.tensor_type.elem_type not in _NOT_IN_TORCH and kind.tensor_type.HasField("shape")


def _hoist_stand_ins(graph: onnx.GraphProto, chosen: Mapping[int, str]) -> None:
    """Weights that stand in a body move to the main graph, where a plugin can take them as inputs."""
    known = {tensor.name for tensor in graph.initializer}
    for index in chosen:
        for node in every_node([graph.node[index]]):
            for body in bodies(node):
                large = [t for t in body.initializer if t.data_location == _T.EXTERNAL]
                small = [t for t in body.initializer if t.data_location != _T.EXTERNAL]
                if not large:
                    continue
                copies = [_T.FromString(tensor.SerializeToString()) for tensor in (*large, *small)]
                del body.initializer[:]
                body.initializer.extend(copies[len(large) :])
                graph.initializer.extend(tensor for tensor in copies[: len(large)] if tensor.name not in known)
                known.update(tensor.name for tensor in large)


def _small_constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_location != _T.EXTERNAL and tensor.ByteSize() <= INLINE_LIMIT_BYTES + 256
    }
    for node in graph.node:
        for attribute in node.attribute:
            is_value = node.op_type == "Constant" and not node.domain and attribute.name == "value"
            if is_value and attribute.t.ByteSize() <= INLINE_LIMIT_BYTES + 256:
                found[node.output[0]] = attribute.t
    return found


class _Groups:
    """Which nodes go into one plugin. Nodes are known by their position in the graph."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto]) -> None:
        self.graph = graph
        self.types = types
        self.reads = [set(reads(node)) for node in graph.node]
        self.makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, names in enumerate(self.reads):
            for name in names:
                self.readers.setdefault(name, []).append(index)

    def around(self, chosen: Sequence[int]) -> list[list[int]]:
        """A list of positions, in order, for each plugin that these nodes need."""
        groups = [self._grown({index}) for index in chosen]
        merged: list[set[int]] = []
        for group in groups:
            for other in [other for other in merged if other & group]:
                merged.remove(other)
                group = self._grown(group | other)
            merged.append(group)
        return [sorted(group) for group in merged]

    def leaving(self, members: Sequence[int]) -> list[str]:
        """What a group makes and others read; for a group that nobody reads, its first output."""
        inside = set(members)
        outputs = {value.name for value in self.graph.output}
        made = [name for index in members for name in self.graph.node[index].output if name]
        read = [n for n in made if n in outputs or not inside.issuperset(self.readers.get(n, ()))]
        return read or made[:1]

    def _grown(self, group: set[int]) -> set[int]:
        while True:
            grown = group | {near for index in group for near in self._bound_to(index)}
            grown |= self._between(grown)
            if grown == group:
                return group
            group = grown

    def _bound_to(self, index: int) -> set[int]:
        """The nodes that exchange values with this one which cannot leave a plugin."""
        node = self.graph.node[index]
        bound: set[int] = set()
        inputs = {value.name for value in self.graph.input}
        outputs = {value.name for value in self.graph.output}
        for name in (*self.reads[index], *filter(None, node.output)):
            if _leaves_a_plugin(self.types.get(name)):
                continue
            ends = {*self.readers.get(name, ()), *([self.makers[name]] if name in self.makers else ())}
            strange = [self.graph.node[end] for end in ends if self.graph.node[end].domain == DOMAIN]
            if name in inputs or name in outputs or strange:
                where = strange[0].name if strange else "the model's inputs or outputs"
                raise PassError(
                    f"Node {node.name!r} ({node.op_type}) cannot become a plugin: value {name!r} is no tensor of known "
                    f"rank and a type that torch has, and is shared with {where}."
                )
            bound |= ends
        return bound

    def _between(self, group: set[int]) -> set[int]:
        """Nodes on a way from one member to another: a plugin runs at one time, so they must go into it."""
        if len(group) == 1:
            return set()
        below = self._closure(group, lambda i: (r for n in self.graph.node[i].output for r in self.readers.get(n, ())))
        above = self._closure(group, lambda i: (self.makers[n] for n in self.reads[i] if n in self.makers))
        between = (below & above) - group
        for index in between:
            if self.graph.node[index].domain == DOMAIN:
                raise PassError(f"Plugin node {self.graph.node[index].name!r} stands between nodes of one plugin.")
        return between

    def _closure(self, start: set[int], step: object) -> set[int]:
        assert callable(step)
        seen: set[int] = set()
        pending = list(start)
        while pending:
            for near in step(pending.pop()):
                if near not in seen:
                    seen.add(near)
                    pending.append(near)
        return seen


def _plugin(
    proto: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    constants: Mapping[str, onnx.TensorProto],
    reason: str,
) -> onnx.NodeProto:
    inputs = [name for name in inputs_of(nodes) if name not in constants]
    text = encode_nodes(nodes, inputs, outputs, proto.opset_import, proto.functions, constants)
    kinds = list(dict.fromkeys(node.op_type for node in nodes))
    plugin = onnx.NodeProto(
        name=nodes[0].name,
        op_type="_".join(["onnx", *kinds[:4]]),
        domain=DOMAIN,
        input=inputs,
        output=outputs,
        attribute=[
            onnx.helper.make_attribute(OP_ATTRIBUTE, ONNX_NODE_OP),
            onnx.helper.make_attribute(CALL_ATTRIBUTE, make_onnx_call(text, len(inputs))),
        ],
    )
    plugin.metadata_props.extend(nodes[0].metadata_props)
    plugin.metadata_props.add(key=REASON_KEY, value=reason)
    return plugin


def _sorted(nodes: Sequence[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes in an order in which they can run, as near to the given one as that allows."""
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waits = [{makers[name] for name in reads(node) if name in makers} for node in nodes]
    followers: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(waits):
        for maker in needed:
            followers[maker].append(index)
    ready = [index for index, needed in enumerate(waits) if not needed]
    heapq.heapify(ready)
    order: list[onnx.NodeProto] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(nodes[index])
        for follower in followers[index]:
            waits[follower].discard(index)
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(order) < len(nodes):
        raise PassError(f"Graph {graph.name!r} has a cycle.")
    return order


def _declare(graph: onnx.GraphProto, names: Sequence[str], types: Mapping[str, onnx.TypeProto]) -> None:
    """State the types of plugins' outputs, which nobody can infer any more."""
    stated = {value.name for value in (*graph.value_info, *graph.output)}
    for name in names:
        if name in types and name not in stated:
            graph.value_info.add(name=name).type.CopyFrom(types[name])
