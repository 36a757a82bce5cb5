"""Keys and values of grouped-query attention repeated ahead of its node."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .surgery import is_standard, scopes, set_input, sizes


@dataclass(frozen=True)
class RepeatHeads(Pass):
    """Give Attention nodes, named one by one, as many heads of keys and values as of queries.

    ::

        k (b, 2, s, d)      k -> Unsqueeze (b, 2, 1, s, d) -> Expand (b, 2, 2, s, d) -> Reshape (b, 4, s, d)

    for four heads of queries, and the same for values: what the op does itself with shared heads (Ainslie et al.,
    "GQA", arXiv:2305.13245). For backends that have a kernel for the node where all heads are there, and none where
    they are shared. Exact. Keys that several of the nodes read are repeated once.

    It is in no default pipeline: a node that a backend takes is best left as it is. Nodes with other than four axes,
    with past keys, or whose heads or sizes of heads are not fixed, are left.

    Attributes:
        nodes: names of nodes, in the main graph or in subgraphs.
    """

    nodes: frozenset[str] = field(default=frozenset())

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sum(self._repeat(scope, notes) for scope in scopes(graph))

    def _repeat(self, scope: gs.Graph, notes: Notes) -> int:
        made: dict[tuple[int, int], gs.Tensor] = {}
        ordered: list[gs.Node] = []
        count = 0
        for node in scope.nodes:
            if is_standard(node, "Attention") and node.name in self.nodes:
                heads = _heads(node)
                if isinstance(heads, str):
                    notes.refused(node, heads)
                elif heads[0] != heads[1]:
                    for position in (1, 2):
                        key = id(node.inputs[position]), heads[0]
                        if key not in made:
                            new, made[key] = _repeated(node.inputs[position], heads, node, notes)
                            ordered += new
                        set_input(node, position, made[key])
                    count += 1
            ordered.append(node)
        if count:
            scope.nodes = ordered
        return count


def _heads(node: gs.Node) -> tuple[int, int] | str:
    """Heads of queries and of keys, or why keys and values cannot be repeated."""
    if any(tensor.name for tensor in node.inputs[4:]) or any(tensor.name for tensor in node.outputs[1:]):
        return "it has past keys, or gives more than its result"
    shapes = [sizes(tensor) for tensor in node.inputs[:3]]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return "its operands have other than four axes, or are not known"
    queries, keys, values = (shape for shape in shapes if shape is not None)
    if queries[1] is None or keys[1] is None or keys[1] != values[1] or None in (keys[3], values[3]):
        return "its heads or their sizes are not fixed"
    if queries[1] % keys[1]:
        return f"{queries[1]} heads of queries cannot share {keys[1]} of keys"
    return queries[1], keys[1]


def _repeated(
    tensor: gs.Tensor, heads: tuple[int, int], node: gs.Node, notes: Notes
) -> tuple[list[gs.Node], gs.Variable]:
    """The nodes that repeat a tensor's heads, and what they make."""
    wanted, given = heads
    times = wanted // given
    batch, _, length, size = tensor.shape
    shapes = ([batch, given, 1, length, size], [batch, given, times, length, size], [batch, wanted, length, size])
    ops = {
        "Unsqueeze": np.array([2], np.int64),
        "Expand": np.array([1, 1, times, 1, 1], np.int64),
        "Reshape": np.array([0, wanted, -1, int(size)], np.int64),
    }
    nodes: list[gs.Node] = []
    made = tensor
    for (op, operand), shape in zip(ops.items(), shapes, strict=True):
        inputs = [made, notes.constant(operand, f"{op.lower()}_heads")]
        made = notes.variable(tensor, f"{tensor.name}_{op.lower()}", shape)
        nodes.append(gs.Node(op, notes.fresh_name(f"{node.name}_{op.lower()}"), inputs=inputs, outputs=[made]))
    return nodes, made
