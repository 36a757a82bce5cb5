"""What TensorRT's parser and builder say, as refusals of nodes with their Python lines."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import onnx
import onnx_ir as ir

from ..model import Origin
from . import trt_build
from .base import Refusal, Segment
from .flavour import Flavour
from .plugin_nodes import make_parseable
from .rtx_faults import avoid_faults, original_name
from .shape_values import shaped_by_values


def describe_refusals(title: str, refusals: Sequence[Refusal]) -> str:
    """One message for all refused nodes."""
    lines = "\n".join(f"  {index}. {refusal}" for index, refusal in enumerate(refusals, 1))
    return (
        f"{title} does not take {len(refusals)} node{'s' * (len(refusals) > 1)} of the graph:\n{lines}\n"
        "Replace the op in the model, or make it a custom op (torch.library.custom_op), run as a plugin."
    )


def parsed_graph(flavour: Flavour, segment: Segment) -> onnx.ModelProto:
    """The graph that the parser gets."""
    proto = make_parseable(segment.proto)
    return avoid_faults(proto) if flavour.name == "tensorrt_rtx" else proto


def find_refusals(
    flavour: Flavour, outcome: trt_build.Outcome, segment: Segment, weight_inputs: Collection[str] = ()
) -> list[Refusal]:
    """What the parser refused, as nodes of the segment.

    Args:
        flavour: the library.
        outcome: what it said.
        segment: the graph.
        weight_inputs: its weights that were inputs.
    """
    by_name = {node.name: node for node in segment.proto.graph.node if node.name}
    by_output = {name: node for node in segment.proto.graph.node for name in node.output if name}
    parsed = parsed_graph(flavour, segment).graph.node if outcome.refusals else ()
    types = _types_by_name(segment)
    found = []
    for entry in outcome.refusals:
        index = entry["index"]
        node = by_name.get(original_name(entry["name"]))
        if node is None and 0 <= index < len(parsed):
            node = by_output.get(original_name(next(filter(None, parsed[index].output), "")))
        if node is None:
            found.append(Refusal(entry["name"], entry["op"] or "?", (), entry["reason"]))
            continue
        origin = next((segment.provenance[name] for name in node.output if name in segment.provenance), Origin())
        inputs = tuple(types.get(name, name) for name in node.input if name)
        reason, exchanged = entry["reason"], [name for name in node.input if name in weight_inputs]
        if exchanged:
            reason += f" (to be refittable, {', '.join(exchanged)} is no constant of the engine but an input)"
        found.append(Refusal(node.name, node.op_type, tuple(node.output), reason, inputs, origin))
    return found


def _types_by_name(segment: Segment) -> dict[str, str]:
    graph = segment.proto.graph
    found = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        found[value.name] = f"{value.name}: ({', '.join(sizes)}) {ir.DataType(tensor.elem_type).name.lower()}"
    for initializer in graph.initializer:
        sizes = list(map(str, initializer.dims))
        found[initializer.name] = (
            f"{initializer.name}: ({', '.join(sizes)}) {ir.DataType(initializer.data_type).name.lower()}"
        )
    return found


def failure_words(flavour: Flavour, segment: Segment, outcome: trt_build.Outcome) -> str:
    """The builder's own words, with the Python lines of the nodes that they name."""
    words = [message for message in outcome.messages if not message.startswith("WARNING")] or outcome.messages
    text = f"{flavour.title} {outcome.version} cannot build {segment.name}: {outcome.error}."
    if words:
        text += "\n  " + "\n  ".join(words[-8:])
    for refusal in find_suspects(segment, outcome)[:8]:
        text += f"\n  {refusal.op_type} {refusal.node!r} is from {refusal.origin}"
    return text


def find_suspects(segment: Segment, outcome: trt_build.Outcome) -> list[Refusal]:
    """The nodes that the builder's words are about."""
    words = [message for message in outcome.messages if not message.startswith("WARNING")] or outcome.messages
    joined = "\n".join(words)
    nodes = segment.proto.graph.node
    named = [node for node in nodes if node.name and re.search(rf"(?<![\w.]){re.escape(node.name)}(?![\w.])", joined)]
    # The builder may speak of the kind of a node alone: "Attention operation was not supported".
    named = named or [node for node in nodes if len(node.op_type) > 4 and re.search(rf"\b{node.op_type}\b", joined)]
    shape_input = re.match(r"input '([^']+)' is used as a shape", outcome.error)
    if shape_input:
        # All that would follow, one input after the other, is told at once.
        inputs = [value.name for value in segment.proto.graph.input]
        words, named = [outcome.error], shaped_by_values(segment.proto.graph, inputs)
        named = named or [node for node in nodes if shape_input[1] in node.input]
    types = _types_by_name(segment)
    reason = words[-1] if words else outcome.error
    return [
        Refusal(
            node.name,
            node.op_type,
            tuple(node.output),
            reason,
            tuple(types.get(name, name) for name in node.input if name),
            segment.provenance.get(next((name for name in node.output if name), ""), Origin()),
        )
        for node in named
    ]
