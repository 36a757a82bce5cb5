"""Which nodes of a graph ONNX Runtime has no kernel for: all of them, each with where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from ...errors import BuildError
from ..model import origin_of
from .base import Refusal, Segment
from .ort_session import EXTERNAL, make_session
from .widen import widen

# The ways in which ONNX Runtime's messages name a node.
_NAMED_NODE = re.compile(r"""node with name '([^']+)'|Node, \("([^"]+)"|Node ?\(([^)]+)\)|in node \(([^)]+)\)""")


def find_refusals(ort: Any, segment: Segment, error: Exception) -> list[Refusal]:
    """Every node that fails in a model of its own; if none does, the node that the error names.

    Raises:
        BuildError: no node is to blame.
    """
    proto = onnx.inliner.inline_local_functions(segment.proto) if segment.proto.functions else segment.proto
    probe = _Probe(ort, proto)
    if probe.fails_always():
        raise BuildError(f"ONNX Runtime {ort.__version__} does not take {segment.name}: {error}") from error

    def refuse(node: onnx.NodeProto, scope: _Scope, reason: str) -> Refusal:
        origin = next((segment.provenance[name] for name in node.output if name in segment.provenance), origin_of(node))
        inputs = tuple(scope.describe(name) for name in node.input if name)
        op_type = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        return Refusal(node.name, op_type, tuple(filter(None, node.output)), reason, inputs, origin)

    nodes = list(_scoped_nodes(_with_types(proto).graph, _Scope()))
    refusals = [refuse(node, scope, reason) for node, scope in nodes if (reason := probe(node, scope))]
    if not refusals:
        named = {name for names in _NAMED_NODE.findall(str(error)) for name in names if name}
        refusals = [refuse(node, scope, str(error)) for node, scope in nodes if node.name in named]
    if not refusals:
        raise BuildError(f"ONNX Runtime {ort.__version__} does not take {segment.name}: {error}") from error
    return refusals


def _with_types(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto)
    except onnx.shape_inference.InferenceError:
        return proto  # the graph contradicts itself; the types that it states still help


class _Scope:
    """What is known of the tensors that a graph's nodes see: its own and those of the graphs around it."""

    def __init__(self, types: Mapping[str, onnx.TypeProto] | None = None) -> None:
        self.types: dict[str, onnx.TypeProto] = dict(types or {})
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.constants: dict[str, onnx.NodeProto] = {}

    def inside(self, graph: onnx.GraphProto) -> _Scope:
        scope = _Scope(self.types)
        scope.initializers, scope.constants = dict(self.initializers), dict(self.constants)
        for tensor in graph.initializer:
            scope.types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if tensor.data_location != EXTERNAL:
                scope.initializers[tensor.name] = tensor
        for values in (graph.value_info, graph.input, graph.output):
            scope.types |= {value.name: value.type for value in values if value.type.WhichOneof("value")}
        scope.constants |= {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
        return scope

    def describe(self, name: str) -> str:
        """``x: (N, 3) float16``, as far as it is known."""
        proto = self.types.get(name)
        if proto is None or not proto.tensor_type.elem_type:
            return f"{name}: of unknown type" if proto is None else f"{name}: {proto.WhichOneof('value')}"
        dtype = ir.DataType(proto.tensor_type.elem_type).name.lower()
        if not proto.tensor_type.HasField("shape"):
            return f"{name}: (...) {dtype}"
        dims = (
            d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "?") for d in proto.tensor_type.shape.dim
        )
        return f"{name}: ({', '.join(dims)}) {dtype}"


def _scoped_nodes(graph: onnx.GraphProto, outer: _Scope) -> Iterator[tuple[onnx.NodeProto, _Scope]]:
    scope = outer.inside(graph)
    for node in graph.node:
        yield node, scope
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _scoped_nodes(attribute.g, scope)
            for subgraph in attribute.graphs:
                yield from _scoped_nodes(subgraph, scope)


class _Probe:
    """Asks ONNX Runtime for one node alone; alike nodes are asked for once."""

    def __init__(self, ort: Any, proto: onnx.ModelProto) -> None:
        self._ort = ort
        self._frame = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
        self._answers: dict[bytes, str] = {}

    def __call__(self, node: onnx.NodeProto, scope: _Scope) -> str:
        """ONNX Runtime's reason against the node; "" where it takes it."""
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            return ""  # control flow has kernels; the nodes inside are asked for one by one
        names = {name: f"i{index}" for index, name in enumerate(dict.fromkeys(filter(None, node.input)))}
        single = onnx.NodeProto()
        single.CopyFrom(node)
        single.ClearField("name")
        single.ClearField("metadata_props")
        single.ClearField("doc_string")
        single.input[:] = [names.get(name, "") for name in node.input]
        single.output[:] = [f"o{index}" if name else "" for index, name in enumerate(node.output)]
        graph = onnx.GraphProto(name="probe", output=[onnx.ValueInfoProto(name=name) for name in single.output if name])
        all_typed = True
        for name, new_name in names.items():
            if name in scope.initializers:
                graph.initializer.add().CopyFrom(scope.initializers[name])
                graph.initializer[-1].name = new_name
            elif name in scope.constants:
                graph.node.add().CopyFrom(scope.constants[name])
                graph.node[-1].output[:] = [new_name]
            else:
                unknown = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, None)
                graph.input.add(name=new_name).type.CopyFrom(scope.types.get(name, unknown))
                all_typed &= name in scope.types
        graph.node.append(single)
        reason = self._ask(graph)
        # Without the inputs' types, only the op's being unknown counts.
        return reason if all_typed or "not a registered" in reason or "No Op registered" in reason else ""

    def fails_always(self) -> bool:
        """True where it is not a node that ONNX Runtime minds, but say the version of the opset."""
        if not any(opset.domain in ("", "ai.onnx") for opset in self._frame.opset_import):
            return False
        types = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [1])
        graph = onnx.GraphProto(name="probe", output=[onnx.ValueInfoProto(name="o0", type=types)])
        graph.input.add(name="i0", type=types)
        graph.node.add(op_type="Identity", input=["i0"], output=["o0"])
        return bool(self._ask(graph))

    def _ask(self, graph: onnx.GraphProto) -> str:
        model = onnx.ModelProto()
        model.CopyFrom(self._frame)
        model.graph.CopyFrom(graph)
        key = model.SerializeToString(deterministic=True)
        if key not in self._answers:
            try:
                make_session(self._ort, widen(model, {})[0], {}, optimize=False)
                self._answers[key] = ""
            except Exception as error:  # ONNX Runtime's errors have no common base
                self._answers[key] = str(error)
        return self._answers[key]
