"""Which nodes the parser refuses: all of them at once, though it may stop at the first, or name none.

Part of the process that builds (`trt_build`): no torch, and onnx only where something is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

_MOST = 100
"""Refusals that are looked for."""

_MOST_TRIES = 300
"""Nodes that are tried alone."""

Refusals = list[dict[str, Any]]
"""Each with node index, name, op and words."""


def find_all(model: bytes, refusals: Refusals, parse: Callable[[bytes], Refusals]) -> Refusals:
    """All nodes that a parser refuses.

    It may stop at the first node that it cannot import, so the model is parsed again without that node, which shows the
    next; and what follows from a tensor without a known type cannot be parsed then, so there the nodes of the ops that
    were refused are tried alone.

    Args:
        model: that was refused.
        refusals: what the parser said of it.
        parse: gives what the parser says of a model; nothing where it takes it.
    """

    whole = model
    found = named = find_unnamed(model, refusals, parse)
    while named and len(found) < _MOST:
        model = without_nodes(model, {refusal["name"] for refusal in named})
        named = find_unnamed(model, parse(model), parse)
        known = {refusal["name"] for refusal in found}
        named = [refusal for refusal in named if refusal["name"] not in known]
        found = found + named
    return found + _find_alike(whole, found, parse)


def _find_alike(model: bytes, refusals: Refusals, parse: Callable[[bytes], Refusals]) -> Refusals:
    """Nodes of the ops that were refused, which the parser refuses alone as well, in the same words."""
    import onnx  # here alone: a build that succeeds does without

    proto = onnx.ModelProto.FromString(model)
    known = {refusal["name"] for refusal in refusals}
    words = {(refusal["op"], refusal["reason"]) for refusal in refusals}
    ops = {op for op, _ in words}
    types = {v.name for v in [*proto.graph.input, *proto.graph.value_info]}
    types |= {tensor.name for tensor in proto.graph.initializer}
    found: Refusals = []
    tries = 0
    for index, node in enumerate(proto.graph.node):
        # With inputs of no known type the parser refuses any node.
        if (
            node.op_type not in ops
            or not node.name
            or node.name in known
            or not types.issuperset(filter(None, node.input))
        ):
            continue
        tries += 1
        if tries > _MOST_TRIES or len(refusals) + len(found) >= _MOST:
            break
        said = parse(_alone(proto, node))
        if said and (node.op_type, said[0]["reason"]) in words:
            found.append({"index": index, "name": node.name, "op": node.op_type, "reason": said[0]["reason"]})
    return found


def find_unnamed(model: bytes, refusals: Refusals, parse: Callable[[bytes], Refusals]) -> Refusals:
    """Refusals with the nodes that they are about, where the parser tells only its function or an initializer.

    Args:
        model: that was refused.
        refusals: what the parser said.
        parse: gives what the parser says of a model.
    """
    if all(refusal["name"] for refusal in refusals):
        return refusals
    import onnx  # here alone: a build that succeeds does without

    proto = onnx.ModelProto.FromString(model)
    found: Refusals = []
    for refusal in refusals:
        if refusal["name"]:
            found.append(refusal)
            continue
        words = refusal["reason"]
        initializer = re.search(r"import initializer: (\S+) \[", words)
        importer = re.search(r"import(\w+)\]$", words)
        if initializer:
            nodes = [node for node in proto.graph.node if initializer[1] in node.input]
        elif importer:
            nodes = [node for node in proto.graph.node if node.op_type == importer[1]]
            if len(nodes) > 1:
                said = [(node, [refusal["reason"] for refusal in parse(_alone(proto, node))]) for node in nodes]
                same = [node for node, reasons in said if words in reasons]
                nodes = same or [node for node, reasons in said if reasons] or nodes
        else:
            nodes = []
        found += [{**refusal, "name": node.name, "op": node.op_type} for node in nodes] or [refusal]
    return found


def _alone(model: onnx.ModelProto, node: onnx.NodeProto) -> bytes:
    """A model of one node; what it reads are inputs or initializers."""
    import onnx

    proto = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = proto.graph
    graph.name = "alone"
    graph.node.append(node)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in node.input)
    constants = {tensor.name for tensor in graph.initializer}
    types = {v.name: v for v in [*model.graph.input, *model.graph.value_info, *model.graph.output]}
    graph.input.extend(types[name] for name in node.input if name in types and name not in constants)
    graph.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in node.output if name)
    return bytes(proto.SerializeToString())


def weights_in(part: bytes, weights: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The weights that a part of a model has: the parser takes no others, and refuses the part without a word."""
    import onnx

    names = {tensor.name for tensor in onnx.ModelProto.FromString(part).graph.initializer}
    return [weight for weight in weights if weight[0] in names]


def without_nodes(model: bytes, names: set[str]) -> bytes:
    """A model without some nodes: what they make becomes an input, or goes with all that reads it if untyped."""
    import onnx  # here alone: a build that succeeds does without

    proto = onnx.ModelProto.FromString(model)
    graph = proto.graph
    types = {value.name: value for value in [*graph.value_info, *graph.output]}
    gone: set[str] = set()
    kept = []
    for node in graph.node:
        if node.name in names:
            graph.input.extend(types[output] for output in node.output if output in types)
            gone.update(output for output in node.output if output not in types)
        elif gone.intersection(node.input):
            gone.update(node.output)
        else:
            kept.append(node)
    made = {name for node in kept for name in node.output}
    outputs = [value for value in graph.output if value.name in made]
    del graph.node[:], graph.output[:]
    graph.node.extend(kept)
    graph.output.extend(outputs)
    return bytes(proto.SerializeToString())
