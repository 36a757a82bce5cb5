"""Make one Transpose of several, and none where they undo each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .patterns import SMALL_BYTES, Edge, View, same_size, sweep
from .pipeline import Notes, Pass
from .surgery import become, nbytes, rank, set_input

UNARY = frozenset({
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cast", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf",
    "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg",
    "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt",
    "Swish", "Tan", "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Ops that work element by element on their one input."""

BROADCASTING = frozenset({
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
})  # fmt: skip
"""Ops that work element by element on inputs that broadcast as in NumPy, from opset 7 on."""

_MOST_CONSTANT_BYTES = 1 << 16


@dataclass(frozen=True)
class MergeTransposes(Pass):
    """Merge consecutive Transposes, and drop pairs that undo each other around elementwise ops. Exact.

    ::

        Transpose(perm=p) -> Transpose(perm=q)        Transpose(perm=q after p), or nothing

        x -> Transpose(p) -\\                         x -\\
        y -> Transpose(p) --> Add -> Relu -> Transpose(p inverse) -> z      y --> Add -> Relu -> z

        x (b, 4, s, 16) -> Reshape (-1, s, 16)                               x -> Transpose(0, 1, 3, 2)
          -> Transpose(0, 2, 1) -> Reshape (b, 4, 16, s)

    In the second form everything between must work for the last Transpose alone, and all that flows in must come from
    a Transpose that it undoes, or be a constant. A constant that is not a single number is transposed the other way (a
    bias of ``(C)`` becomes ``(C, 1, 1)``): up to 64 KiB, and over 1 KiB only where nobody else reads it, so that the
    model does not grow. Concat moves to the other axis. Shapes may be dynamic.

    The third form, which exporters write for the transpose of matrices, needs shapes that show what is grouped: one run
    of neighbouring axes, all others left as they are.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sweep(graph, lambda view, node: _step(view, node, notes))


def permutation(node: gs.Node) -> list[int] | None:
    """What a Transpose does; None where it depends on a rank that is not known."""
    given = node.attrs.get("perm")
    if given is not None:
        return [int(axis) for axis in given]
    known = rank(node.inputs[0])
    return None if known is None else list(range(known))[::-1]


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    if node.op == "Reshape":
        return _between_reshapes(view, node)
    second = permutation(node) if node.op == "Transpose" else None
    if second is None:
        return False
    before = view.maker(node.inputs[0], "Transpose")
    if before is None:
        return _around(view, node, second, notes)
    first = permutation(before)
    if first is None or len(first) != len(second):
        return False
    source = before.inputs[0]
    merged = [first[axis] for axis in second]
    if merged == sorted(merged):
        view.bypass(node, source)
    else:
        set_input(node, 0, source)
        node.attrs["perm"] = merged
    view.retire(before)
    return True


def _between_reshapes(view: View, end: gs.Node) -> bool:
    """Transpose ungrouped axes where a Reshape groups neighbours before a Transpose and another undoes that."""
    middle = view.maker(end.inputs[0], "Transpose")
    first = view.maker(middle.inputs[0], "Reshape") if middle is not None else None
    order = permutation(middle) if middle is not None else None
    if first is None or middle is None or order is None:
        return False
    source, grouped, result = first.inputs[0], first.outputs[0], end.outputs[0]
    groups = _groups(list(source.shape), list(grouped.shape)) if source.shape and grouped.shape else None
    if groups is None or len(groups) != len(order) or result.shape is None:
        return False
    merged = [axis for group in order for axis in groups[group]]
    if len(result.shape) != len(merged):
        return False
    same = [same_size(size, source.shape[axis]) for size, axis in zip(result.shape, merged, strict=True)]
    if same.count(False) > 1 or not all(
        good or not isinstance(size, (int, np.integer)) for good, size in zip(same, result.shape, strict=True)
    ):
        return False
    become(end, "Transpose", [source])
    end.attrs["perm"] = merged
    view.retire(middle)
    view.retire(first)
    return True


def _groups(source: list[Any], grouped: list[Any]) -> list[list[int]] | None:
    """Which axes each axis of a Reshape's result is made of; None unless all but one are single and found by size.

    What is found by size on both sides leaves one group for the rest, whose size then follows.
    """
    left = 0
    while left < min(len(source), len(grouped)) and same_size(source[left], grouped[left]):
        left += 1
    right = 0
    while right < min(len(source), len(grouped)) - left and same_size(source[-1 - right], grouped[-1 - right]):
        right += 1
    if len(grouped) - left - right != 1 or len(source) - left - right < 1:
        return None
    rest = list(range(left, len(source) - right))
    ends = [[axis] for axis in range(len(source) - right, len(source))]
    return [*([axis] for axis in range(left)), rest, *ends]


def _around(view: View, end: gs.Node, back: list[int], notes: Notes) -> bool:
    """Drop a Transpose and those that it undoes on the other side of elementwise ops."""
    ops = UNARY | BROADCASTING | {"Clip", "Concat"} if notes.opset >= 7 else UNARY
    members, edges = view.region(end, ops, tuple(back))
    if not members:
        return False
    forth = [back.index(axis) for axis in range(len(back))]
    ids = {id(node) for node in (*members, end)}
    sources: list[tuple[Edge, gs.Node]] = []
    constants: list[Edge] = []
    for edge in edges:
        before = view.maker(edge.tensor, "Transpose")
        if before is not None and permutation(before) == forth:
            sources.append((edge, before))
        elif isinstance(edge.tensor, gs.Constant):
            constants.append(edge)
        else:
            if any(view.maker(other.tensor, "Transpose") for other in edges):
                notes.refused(end, f"{edge.tensor.name!r} flows in without the Transpose that it would undo")
            view.bar(tuple(back), members)
            return False
    if not sources:
        return False
    for edge in constants:
        if reason := _fixed(edge, ids, len(back)):
            notes.refused(end, reason)
            view.bar(tuple(back), members)
            return False
    if any(all(isinstance(tensor, gs.Constant) for tensor in node.inputs) for node in members):
        return False  # Its rank is not that of the others; FoldConstants folds it, or says why it does not.
    moved: dict[tuple[int, bool], gs.Tensor] = {}
    for edge in constants:
        key = (id(edge.tensor), edge.node.op == "Concat")
        if key not in moved:
            moved[key] = _transposed(edge, back, notes)
        set_input(edge.node, edge.position, moved[key])
    for edge, before in sources:
        set_input(edge.node, edge.position, before.inputs[0])
    for node in members:
        if node.op == "Concat":
            node.attrs["axis"] = forth[node.attrs["axis"] % len(forth)]
        result = node.outputs[0]
        if result.shape is not None and len(result.shape) == len(back):
            result.shape = [result.shape[axis] for axis in back]
    view.bypass(end, end.inputs[0])
    view.retire(*(before for _, before in sources))
    return True


def _fixed(edge: Edge, members: set[int], known_rank: int) -> str | None:
    """Why a constant cannot be transposed; None if it can, or need not."""
    constant = edge.tensor
    size, shape = nbytes(constant), tuple(constant.shape)
    if len(shape) > known_rank or (edge.node.op == "Concat" and len(shape) != known_rank):
        return f"constant {constant.name!r} has rank {len(shape)} beside tensors of rank {known_rank}"
    if size > _MOST_CONSTANT_BYTES:
        return (
            f"constant {constant.name!r} has {size:,} bytes, more than the {_MOST_CONSTANT_BYTES:,} that it transposes"
        )
    if size > SMALL_BYTES and any(id(node) not in members for node in constant.outputs):
        return f"constant {constant.name!r} of {size:,} bytes has other readers: transposing it would make a copy"
    return None


def _transposed(edge: Edge, back: Sequence[int], notes: Notes) -> gs.Tensor:
    """A constant in the axes of the source; itself where all its sizes are 1 and only its value counts."""
    constant = edge.tensor
    shape = tuple(constant.shape)
    if edge.node.op != "Concat" and all(size == 1 for size in shape):
        return constant
    full = notes.values(constant).reshape((1,) * (len(back) - len(shape)) + shape)
    return notes.constant(np.ascontiguousarray(full.transpose(back)), f"{constant.name}_transposed")
