"""Rewrite nodes at ranks that TensorRT's parser refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .remove_no_ops import RemoveNoOps
from .surgery import become, is_standard, rank, scopes, set_input, set_output


@dataclass(frozen=True)
class RepairRanks(Pass):
    """Lift 1-D nodes to 2-D where the parser needs two dimensions, and drop reductions of scalars.

    ::

        i = ArgMax(x)         u = Unsqueeze(x, 0); v = ArgMax(u, axis=1); i = Squeeze(v, 0)     x: (N)
        y = Softmax(x)        u = Unsqueeze(x, 0); v = Softmax(u, axis=1); y = Squeeze(v, 0)    x: (N)
        y = MatMul(x, w)      u = Unsqueeze(x, 0); v = MatMul(u, w); y = Squeeze(v, -2)         x: (K), w: (..., K, N)
        y = ReduceSum(x)      y = Identity(x)                                                   x: ()

    All of them are exact. Each was refused by the parser of TensorRT-RTX 1.6.1 before and builds after: "at least 2
    dimensions are required" for ArgMax, ArgMin, Softmax, LogSoftmax and Hardmax, "reshape changes volume" for MatMul
    where w has three dimensions or more, "at least 1 dimensions are required" for reductions.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (RemoveNoOps,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        if notes.opset < 13:
            return 0  # Axes of Squeeze and Unsqueeze were attributes, and Softmax had another meaning.
        count = 0
        for scope in scopes(graph):
            result: list[gs.Node] = []
            for node in scope.nodes:
                rule = _RULES.get(node.op) if is_standard(node) else None
                rewritten = rule(node, notes) if rule is not None else None
                count += rewritten is not None
                result.extend([node] if rewritten is None else rewritten)
            scope.nodes = result
        return count


Rule = Callable[[gs.Node, Notes], "list[gs.Node] | None"]


def _lift(node: gs.Node, notes: Notes, squeeze_axis: int, shape: list[int | str | None]) -> list[gs.Node]:
    """The node with its first input unsqueezed at 0 and its output, of this shape, squeezed again."""
    source, target = node.inputs[0], node.outputs[0]
    lifted = notes.variable(source, f"{source.name}_lifted", [1, *source.shape])
    unsqueeze = gs.Node("Unsqueeze", inputs=[source, notes.constant(np.array([0]), "axis")], outputs=[lifted])
    set_input(node, 0, lifted)
    result = notes.variable(target, f"{target.name}_lifted", shape)
    set_output(node, 0, result)
    axis = notes.constant(np.array([squeeze_axis]), "axis")
    return [unsqueeze, node, gs.Node("Squeeze", inputs=[result, axis], outputs=[target])]


def _along_axis(node: gs.Node, notes: Notes) -> list[gs.Node] | None:
    """ArgMax, ArgMin, Softmax, LogSoftmax, Hardmax over their only axis."""
    source = node.inputs[0]
    if rank(source) != 1:
        if rank(source) is None:
            notes.refused(node, "the rank of its input is not known")
        return None
    node.attrs["axis"] = 1
    if node.op not in ("ArgMax", "ArgMin"):
        return _lift(node, notes, 0, [1, *source.shape])
    # (1, N) gives (1, 1), or (1) without keepdims: one dimension more than before, in both cases the first.
    return _lift(node, notes, 0, [1, 1] if node.attrs.get("keepdims", 1) else [1])


def _matmul(node: gs.Node, notes: Notes) -> list[gs.Node] | None:
    left, right = node.inputs
    right_rank = rank(right)
    if rank(left) != 1 or right_rank is None or right_rank < 3:
        if rank(left) == 1 and right_rank is None:
            notes.refused(node, "the rank of its second input is not known")
        return None
    return _lift(node, notes, -2, [*right.shape[:-2], 1, right.shape[-1]])


def _reduce(node: gs.Node, notes: Notes) -> list[gs.Node] | None:
    if rank(node.inputs[0]) != 0:
        return None
    become(node, "Identity", [node.inputs[0]])
    return [node]


_RULES: Mapping[str, Rule] = {
    "ArgMax": _along_axis, "ArgMin": _along_axis, "Softmax": _along_axis, "LogSoftmax": _along_axis,
    "Hardmax": _along_axis, "MatMul": _matmul, "ReduceSum": _reduce, "ReduceMean": _reduce, "ReduceMax": _reduce,
    "ReduceMin": _reduce, "ReduceProd": _reduce,
}  # fmt: skip
