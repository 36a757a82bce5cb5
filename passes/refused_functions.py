"""Rules for ops that ONNX itself defines by other ops: the definition stands in for the node."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.inliner
from onnx import helper

from .refused_fragment import Fragment, declared_shape, need

_DOMAIN = "trtbridge.definition"
_MOST_NODES = 256
"""Definitions compute much from shapes, which is folded where these are fixed."""


def inline(f: Fragment) -> None:
    """The body of the op's function in the ONNX standard, as the model's opset has it."""
    schema: Any = onnx.defs.get_schema(f.node.op, f.opset, "")  # its stubs lack what is about functions
    need(schema.has_function or schema.has_context_dependent_function, "ONNX does not define it by other ops")
    proto = helper.make_node(
        f.node.op,
        [f.input(index) if f.has(index) else "" for index in range(len(f.node.inputs))],
        [f"out{index}" if tensor.name else "" for index, tensor in enumerate(f.node.outputs)],
    )
    for name, value in f.node.attrs.items():
        need(not hasattr(value, "nodes"), "it holds a graph")
        proto.attribute.append(helper.make_attribute(name, value))
    # Defaults must stand there: a body refers to attributes by name.
    given = set(f.node.attrs)
    proto.attribute.extend(
        a.default_value for a in schema.attributes.values() if a.name not in given and a.default_value.name
    )
    function = _definition(schema, proto, f)
    need(all(node.domain in ("", "ai.onnx") for node in function.node), "its definition uses other domains")
    # As a function of the model's own: for standard ops the inliner wants a type of inputs that are left out.
    function.domain = proto.domain = _DOMAIN
    for imported in function.opset_import:
        imported.version = f.opset  # what this opset does not know is refused with the whole fragment
    graph = onnx.GraphProto(name="one", node=[proto])
    graph.input.extend(onnx.ValueInfoProto(name=name) for name in f.read)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in proto.output if name)
    model = onnx.ModelProto(ir_version=10, graph=graph, functions=[function])
    model.opset_import.add(domain="", version=f.opset)
    model.opset_import.add(domain=_DOMAIN, version=1)
    inlined = onnx.inliner.inline_local_functions(model)
    need(all(not node.domain for node in inlined.graph.node), "its definition cannot be inlined")
    f.take(inlined)
    f.most_nodes = _MOST_NODES
    for index, tensor in enumerate(f.node.outputs):
        if tensor.name:
            f.result(f"out{index}", index)


def _definition(schema: Any, node: onnx.NodeProto, f: Fragment) -> onnx.FunctionProto:
    """The function that defines an op, for the types that this node has."""
    if schema.has_context_dependent_function:
        types = []
        for index in range(len(f.node.inputs)):
            kind = onnx.TypeProto()
            if f.has(index):
                tensor = f.node.inputs[index]
                kind = helper.make_tensor_type_proto(f.element(index), declared_shape(tensor))
            types.append(kind.SerializeToString())
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= f.opset]
        need(bool(versions), f"ONNX does not define it for opset {f.opset}")
        text = schema.get_context_dependent_function_with_opset_version(max(versions), node.SerializeToString(), types)
    else:
        versions = [v for v in schema.function_opset_versions if v <= f.opset]
        need(bool(versions), f"ONNX does not define it for opset {f.opset}")
        text = schema.get_function_with_opset_version(max(versions))
    need(bool(text), "ONNX does not define it for these types")
    function: onnx.FunctionProto = onnx.FunctionProto.FromString(text)
    return function
