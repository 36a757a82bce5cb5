"""What plugin nodes look like in an ONNX graph. Neither torch nor TensorRT is needed to make one.

It stands at the top level because ``passes`` makes plugin nodes and ``plugins`` runs them, while neither knows the
other. A plugin node has the domain `DOMAIN`, the torch op's name in `OP_ATTRIBUTE` and a JSON template of the op's
arguments in `CALL_ATTRIBUTE` (see ``plugins/calls.py``). ONNX nodes themselves run through the torch op `ONNX_NODE_OP`,
whose first argument is the text that `encode_nodes` makes: a small ONNX model, serialized.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx

DOMAIN = "trtbridge"
"""ONNX domain of plugin nodes."""

OP_ATTRIBUTE = "op"
"""Node attribute with the op's full name ("aten::cummax.default")."""

CALL_ATTRIBUTE = "call"
"""Node attribute with the call's JSON template."""

REASON_KEY = "trtbridge.reason"
"""Key of the node metadata entry that says why a node is a plugin."""

ONNX_NODE_OP = "trtbridge::onnx_node.default"
"""The torch op that runs ONNX nodes: ``onnx_node(str node, Tensor[] inputs, Device device) -> Tensor[]``."""

STANDARD_DOMAINS = ("", "ai.onnx")

_FIRST_IR_VERSION = 10


def tensor(index: int) -> dict[str, int]:
    """The template of an argument that is the node's input number `index`."""
    return {"tensor": index}


def make_call(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """A template from arguments that are JSON already: numbers, texts, lists, `tensor` and other tagged objects."""
    return json.dumps({"args": list(args), "kwargs": dict(kwargs or {})}, separators=(",", ":"), allow_nan=False)


def make_onnx_call(text: str, inputs: int) -> str:
    """The template of a call of `ONNX_NODE_OP`.

    Args:
        text: what `encode_nodes` made.
        inputs: how many inputs the plugin node has.
    """
    return make_call([text, [tensor(index) for index in range(inputs)], {"device": "cpu"}])


def encode_node(
    node: onnx.NodeProto,
    opset_imports: Iterable[onnx.OperatorSetIdProto],
    functions: Iterable[onnx.FunctionProto] = (),
    constants: Mapping[str, onnx.TensorProto] | None = None,
) -> str:
    """One node as text; see `encode_nodes`. Its inputs are those that `inputs_of` lists."""
    known = constants or {}
    inputs = [name for name in inputs_of([node]) if name not in known]
    return encode_nodes([node], inputs, [name for name in node.output if name], opset_imports, functions, known)


def encode_nodes(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset_imports: Iterable[onnx.OperatorSetIdProto],
    functions: Iterable[onnx.FunctionProto] = (),
    constants: Mapping[str, onnx.TensorProto] | None = None,
) -> str:
    """Nodes as the text that `ONNX_NODE_OP` takes: a model of them alone, without names, metadata and types.

    Nodes that do the same to other tensors give the same text, so that what is made from a text can be kept.

    Args:
        nodes: in an order in which they can run. Bodies of If, Loop and Scan may read tensors from outside.
        inputs: tensors that come from outside, in the order of the op's inputs.
        outputs: tensors that leave.
        opset_imports: of the model that the nodes are from.
        functions: the model's local functions.
        constants: values, by name, of tensors that are always the same (axes, shapes, small weights).

    Returns:
        A serialized ModelProto in base64.
    """
    copies = [_bare(node) for node in nodes]
    imports = {_domain(opset.domain): opset.version for opset in opset_imports}
    read = {*outputs, *(name for node in copies for name in reads(node))}
    for node in copies:
        _drop_unread_outputs(node, read, imports)
    known = {name: value for name, value in (constants or {}).items() if name in set(inputs_of(copies))}
    renamed = {name: f"i{index}" for index, name in enumerate(inputs)}
    renamed |= {name: f"c{index}" for index, name in enumerate(known)}
    made = dict.fromkeys(name for node in copies for name in node.output if name)
    position = {name: index for index, name in enumerate(outputs)}
    for index, name in enumerate(made):
        renamed[name] = f"o{position[name]}" if name in position else f"t{index}"
    if any(True for node in copies for _ in bodies(node)):
        # Names inside the bodies may be any; those outside stay as they are rather than meet them.
        renamed = {name: name for name in renamed}
    for node in copies:
        node.input[:] = [renamed[name] if name else "" for name in node.input]
        node.output[:] = [renamed[name] if name else "" for name in node.output]
    graph = onnx.GraphProto(name="node", node=copies)
    graph.input.extend(onnx.ValueInfoProto(name=renamed[name]) for name in inputs)
    graph.output.extend(onnx.ValueInfoProto(name=renamed[name]) for name in outputs)
    for name, value in known.items():
        graph.initializer.add().CopyFrom(value)
        graph.initializer[-1].name = renamed[name]
        graph.initializer[-1].ClearField("doc_string")
    called = list(_called(copies, {(f.domain, f.name): f for f in functions}))
    domains = {_domain(node.domain) for node in every_node(copies)} | {
        _domain(opset.domain) for function in called for opset in function.opset_import
    }
    model = onnx.ModelProto(ir_version=_FIRST_IR_VERSION, graph=graph, functions=called)
    for domain in sorted(domains & imports.keys()):
        model.opset_import.add(domain=domain, version=imports[domain])
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode()


def decode_nodes(text: str) -> onnx.ModelProto:
    """The model in a text that `encode_nodes` made."""
    model = onnx.ModelProto()
    model.ParseFromString(base64.b64decode(text))
    return model


def inputs_of(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """The tensors that nodes read but do not make, each once, those that their bodies capture included."""
    made = {name for node in nodes for name in node.output if name}
    return [name for name in dict.fromkeys(name for node in nodes for name in reads(node)) if name not in made]


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds directly."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those that its bodies capture included; a name may come twice."""
    yield from filter(None, node.input)
    for body in bodies(node):
        own = {value.name for value in body.input} | {value.name for value in body.initializer}
        own |= {name for inner in body.node for name in inner.output}
        yield from (name for inner in body.node for name in reads(inner) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their bodies."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from every_node(body.node)


def wrong_in_onnxruntime(node: onnx.NodeProto) -> str:
    """Why ONNX Runtime's result for a node is known not to be what the ONNX standard says; "" where it is none.

    Found by running ONNX's own node tests (``scripts/onnx_coverage.py``) with ONNX Runtime 1.32.
    """
    if node.domain not in STANDARD_DOMAINS:
        return ""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "MaxUnpool" and len(node.input) > 2 and node.input[2]:
        return "ONNX Runtime takes MaxUnpool's indices as places in output_shape, not in the shape that was pooled"
    if node.op_type == "Resize" and len(node.input) > 2 and node.input[2]:
        mode = attributes.get("coordinate_transformation_mode")
        if mode is not None and mode.s == b"align_corners" and attributes["mode"].s in (b"linear", b"cubic"):
            return "ONNX Runtime aligns corners by the rounded output size where scales are given, not by the exact one"
    if node.op_type == "Attention" and len(node.output) > 3 and node.output[3]:
        return (
            "ONNX Runtime masks the scores that qk_matmul_output_mode asks for by the lowest number, not by -infinity"
        )
    if node.op_type == "Attention" and len(node.input) > 6 and node.input[6]:
        return "ONNX Runtime takes nonpad_kv_seqlen with a mask of all keys only"
    return ""


def _bare(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for each in every_node([copy]):
        each.ClearField("name")
        each.ClearField("doc_string")
        each.ClearField("metadata_props")
        for body in bodies(each):
            body.ClearField("metadata_props")
            body.ClearField("doc_string")
    ordered = sorted(copy.attribute, key=lambda attribute: attribute.name)
    copy.ClearField("attribute")
    copy.attribute.extend(ordered)
    for attribute in copy.attribute:
        attribute.ClearField("doc_string")
    return copy


def _drop_unread_outputs(node: onnx.NodeProto, read: Collection[str], imports: Mapping[str, int]) -> None:
    """Do not ask for the last outputs where they are optional and nobody reads them: many ops leave work out then."""
    try:
        schema = onnx.defs.get_schema(node.op_type, imports.get(_domain(node.domain), 1), _domain(node.domain))
    except onnx.defs.SchemaError:
        return
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    while len(node.output) > 1 and node.output[-1] not in read:
        if len(node.output) > len(schema.outputs) or schema.outputs[len(node.output) - 1].option != optional:
            return
        del node.output[-1]


def _called(
    nodes: Iterable[onnx.NodeProto], functions: Mapping[tuple[str, str], onnx.FunctionProto]
) -> Iterator[onnx.FunctionProto]:
    pending, seen = list(nodes), set()
    while pending:
        for node in every_node([pending.pop()]):
            key = (node.domain, node.op_type)
            if key in functions and key not in seen:
                seen.add(key)
                yield functions[key]
                pending.extend(functions[key].node)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
