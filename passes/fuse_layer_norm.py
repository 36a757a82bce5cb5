"""Find layer normalization in its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .norm_parts import Uniform, affine, counted, fits, mean, normalized, retire_all, shared, why_not
from .patterns import View, sweep, trailing_sizes
from .pipeline import Notes, Pass
from .surgery import become, element_type, rank


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Make one LayerNormalization of the ops that it was written with; opset 17 and later.

    ::

        d = x - ReduceMean(x)                                            LayerNormalization(x, scale, bias,
        y = d / Sqrt(ReduceMean(d * d) + epsilon) * scale + bias             axis, epsilon)

    after Ba, Kiros and Hinton, "Layer Normalization" (arXiv:1607.06450). Squares may be Pow or Mul, the quotient Div or
    Mul by Reciprocal, 1 / x or x ** -0.5, and the scale may come before it; means may drop their dimensions and put
    them back. Scale and bias are taken in where they have the shape and type of what is normalized, else they stay
    behind a LayerNormalization with a scale of ones.

    Fires over the last axes of fixed sizes, on float32, float16 and bfloat16, where nothing else reads the parts. Sums
    are taken in float32, whatever the type is: in halves, whose squares overflow at 256, that is the greater gain. In
    float32 the result differs by rounding, about 1e-6 of the largest output. TensorRT-RTX 1.6.1 and 1.7.1 build the
    node in all three types, with dynamic shapes too, where scale and input have one type.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        ones = Uniform()
        return sweep(graph, lambda view, node: _step(view, node, ones, notes))


class _Centred(NamedTuple):
    """``source - mean(source)`` over `axes`; `nodes` make it, last first."""

    source: gs.Tensor
    axes: tuple[int, ...]
    nodes: tuple[gs.Node, ...]


class _Numerator(NamedTuple):
    """What is divided by the root: a centred tensor, with or without a scale."""

    scale: gs.Tensor | None
    nodes: tuple[gs.Node, ...]


def _step(view: View, node: gs.Node, ones: Uniform, notes: Notes) -> bool:
    found = normalized(view, node, notes) if node.op in ("Div", "Mul") else None
    if found is None:
        return False
    position, spread = found
    centred = _centred(view, spread.source, notes)
    if centred is None or centred.axes != counted(spread.axes, centred.source):
        return False
    numerator = _numerator(view, node.inputs[position], centred, notes)
    if numerator is None:
        return False
    source, scale = centred.source, numerator.scale
    parts = {id(part): part for part in (*numerator.nodes, *spread.nodes, *centred.nodes)}
    reason = why_not(source, spread.axes, "a layer normalization", notes, 17)
    shape = trailing_sizes(source, (rank(source) or 0) - len(spread.axes)) or ()
    if reason is None and scale is not None and not fits(scale, source, shape):
        reason = f"it is a layer normalization, but its scale {scale.name!r} has another shape or type"
    reason = reason or shared(view, node, parts, "a layer normalization")
    if reason:
        notes.refused(node, reason)
        return False
    last = node
    behind: list[gs.Node] = []
    if scale is None and (follow := affine(view, last.outputs[0], "Mul", shape)) is not None:
        behind.append(last)
        last, scale = follow
    bias: gs.Tensor | None = None
    if (follow := affine(view, last.outputs[0], "Add", shape)) is not None:
        behind.append(last)
        last, bias = follow
    if scale is None:
        scale = ones.get(shape, element_type(source), notes)
    become(last, "LayerNormalization", [source, scale] if bias is None else [source, scale, bias])
    last.attrs.update(axis=-len(spread.axes), epsilon=spread.epsilon, stash_type=int(onnx.TensorProto.FLOAT))
    retire_all(view, behind, parts)
    return True


def _centred(view: View, tensor: gs.Tensor, notes: Notes) -> _Centred | None:
    node = view.maker(tensor, "Sub")
    average = mean(view, node.inputs[1], notes) if node is not None else None
    if node is None or average is None or average.source is not node.inputs[0]:
        return None
    return _Centred(average.source, counted(average.axes, average.source), (node, *average.nodes))


def _numerator(view: View, tensor: gs.Tensor, centred: _Centred, notes: Notes) -> _Numerator | None:
    """What a tensor is beside the centred one that the root is made of: the same, or a scale times it."""
    plain = _same(view, tensor, centred, notes)
    if plain is not None:
        return _Numerator(None, plain)
    node = view.maker(tensor, "Mul")
    if node is None:
        return None
    for position in (0, 1):
        inner = _same(view, node.inputs[position], centred, notes)
        if inner is not None:
            return _Numerator(node.inputs[1 - position], (node, *inner))
    return None


def _same(view: View, tensor: gs.Tensor, centred: _Centred, notes: Notes) -> tuple[gs.Node, ...] | None:
    """The nodes that make a tensor if it is this centred one, or the same written again."""
    other = _centred(view, tensor, notes)
    if other is None or other.source is not centred.source or other.axes != centred.axes:
        return None
    return other.nodes
