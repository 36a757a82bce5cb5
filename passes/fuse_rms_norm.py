"""Find root mean square normalization in its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .norm_parts import Uniform, affine, fits, normalized, retire_all, shared, why_not
from .patterns import View, sweep, trailing_sizes
from .pipeline import Notes, Pass
from .surgery import become, element_type, rank


@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Make one RMSNormalization of the ops that it was written with; opset 23 and later.

    ::

        y = x / Sqrt(ReduceMean(x * x) + epsilon) * scale               RMSNormalization(x, scale, axis, epsilon)
        h = Cast(x, float)                                              the same, where x and scale are halves
        y = Cast(h / Sqrt(ReduceMean(h * h) + epsilon), float16) * scale

    after Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467); the second form is that of
    transformers' Llama and its kin. Squares, quotients and the scale are found as by FuseLayerNorm; without a scale of
    the right shape and type one of ones is made.

    Fires over the last axes of fixed sizes, on float32, float16 and bfloat16, where nothing else reads the parts. The
    result differs by rounding, about 1e-6 of the largest output in float32. TensorRT-RTX 1.6.1 and 1.7.1 build the
    node in all three types, with dynamic shapes too.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        ones = Uniform()
        return sweep(graph, lambda view, node: _step(view, node, ones, notes))


def _step(view: View, node: gs.Node, ones: Uniform, notes: Notes) -> bool:
    found = normalized(view, node, notes) if node.op in ("Div", "Mul") else None
    if found is None:
        return False
    position, spread = found
    source, above = spread.source, node.inputs[position]
    scale: gs.Tensor | None = None
    parts = {id(part): part for part in spread.nodes}
    if above is not source:
        scaling = view.maker(above, "Mul")
        sides = [] if scaling is None else [index for index in (0, 1) if scaling.inputs[index] is source]
        if scaling is None or not sides:
            return False
        scale = scaling.inputs[1 - sides[0]]
        parts[id(scaling)] = scaling
    if view.maker(source, "Sub") is not None and _is_centred(view, source):
        return False  # A layer normalization, which FuseLayerNorm takes or refuses.
    reason = why_not(source, spread.axes, "an RMS normalization", notes, 23)
    shape = trailing_sizes(source, (rank(source) or 0) - len(spread.axes)) or ()
    if reason is None and scale is not None and not fits(scale, source, shape):
        reason = f"it is an RMS normalization, but its scale {scale.name!r} has another shape or type"
    reason = reason or shared(view, node, parts, "an RMS normalization")
    if reason:
        notes.refused(node, reason)
        return False
    last = node
    behind: list[gs.Node] = []
    if scale is None:
        last, source, scale, behind = _scaled(view, node, source, shape)
    if scale is None:
        scale = ones.get(shape, element_type(source), notes)
    become(last, "RMSNormalization", [source, scale])
    last.attrs.update(axis=-len(spread.axes), epsilon=spread.epsilon, stash_type=int(onnx.TensorProto.FLOAT))
    before = spread.source.inputs[0] if source is not spread.source else None
    retire_all(view, behind, parts)
    if before is not None:
        view.retire(before)
    return True


def _scaled(
    view: View, node: gs.Node, source: gs.Tensor, shape: tuple[int, ...]
) -> tuple[gs.Node, gs.Tensor, gs.Tensor | None, list[gs.Node]]:
    """Look behind a normalization for its scale: the last node, the source and scale of the whole, and what goes."""
    follow = affine(view, node.outputs[0], "Mul", shape)
    if follow is not None:
        return follow[0], source, follow[1], [node]
    before, down = view.maker(source, "Cast"), view.reader(node.outputs[0], "Cast")
    if before is None or down is None or element_type(source) != onnx.TensorProto.FLOAT:
        return node, source, None, []
    half = before.inputs[0]
    follow = affine(view, down.outputs[0], "Mul", shape)
    if follow is None or element_type(half) != element_type(down.outputs[0]):
        return node, source, None, []
    return follow[0], half, follow[1], [node, down]


def _is_centred(view: View, tensor: gs.Tensor) -> bool:
    """Whether a difference takes a mean away from what it is the mean of."""
    node = view.maker(tensor, "Sub")
    average = None if node is None else view.maker(node.inputs[1], "ReduceMean")
    return node is not None and average is not None and average.inputs[0] is node.inputs[0]
