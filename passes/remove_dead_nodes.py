"""Remove what no output needs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from ..nodes import DOMAIN
from .pipeline import Notes, Pass
from .surgery import bodies, drop_outputs, is_standard, output_ids, remove_nodes, scopes

_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional


@dataclass(frozen=True)
class RemoveDeadNodes(Pass):
    """Remove nodes whose outputs nobody reads, and unread optional outputs at the end of a node's list.

    ::

        a = Relu(x); b = Exp(a); c = Neg(b)      a = Relu(x)             where only a is an output
        y, mask = Dropout(x)                     y = Dropout(x)
        y, mean = LayerNormalization(x, scale)   y = LayerNormalization(x, scale)

    The second kind matters to TensorRT, which refuses a MaxPool or LayerNormalization with more than one output. Only
    outputs that the operator's schema calls optional are trimmed. Plugin nodes stay, read or not: a torch op may do
    something else than compute. Inputs of the graph stay, and initializers go with their last reader.
    """

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        # Inner graphs last to first, so that what only a dead inner node reads is dead in the outer one too.
        return sum(_clean(scope, notes) for scope in reversed(list(scopes(graph))))


def _clean(scope: gs.Graph, notes: Notes) -> int:
    outputs = output_ids(scope)
    dead: list[gs.Node] = []
    gone: set[int] = set()
    trimmed = 0
    for node in reversed(scope.nodes):
        # Readers come later in the list, those in subgraphs through the node that holds the subgraph.
        read = [id(t) in outputs or any(id(reader) not in gone for reader in t.outputs) for t in node.outputs]
        if not any(read):
            if node.domain == DOMAIN:
                notes.refused(node, "nobody reads it, but a plugin may have side effects")
                continue
            dead.append(node)
            gone.add(id(node))
            gone.update(id(n) for body in bodies(node) for inner in scopes(body) for n in inner.nodes)
        elif is_standard(node) and not read[-1] and len(node.outputs) > 1:
            trimmed += _trim(node, read, notes)
    remove_nodes(scope, dead)
    return len(dead) + trimmed


def _trim(node: gs.Node, read: list[bool], notes: Notes) -> int:
    """Drop unread optional outputs from the end of a node's list; 1 if there were any."""
    try:
        formal = onnx.defs.get_schema(node.op, notes.opset, "").outputs
    except onnx.defs.SchemaError:
        return 0
    count = len(node.outputs)
    while count > 1 and not read[count - 1]:
        optional = (
            count <= len(formal) and formal[count - 1].option == onnx.defs.OpSchema.FormalParameterOption.Optional
        )
        if not optional:
            break
        count -= 1
    if count == len(node.outputs):
        return 0
    drop_outputs(node, count)
    return 1
