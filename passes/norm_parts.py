"""What the fusions of normalizations look for: means, squares, the root and what comes behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .patterns import View, axes, number, same_size, trailing_sizes
from .pipeline import Notes
from .surgery import element_type, rank, type_name

TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
"""What TensorRT normalizes in."""


class Mean(NamedTuple):
    """A mean of `source` over `axes`, its dimensions kept; `nodes` make it, last first."""

    source: gs.Tensor
    axes: tuple[int, ...]
    nodes: tuple[gs.Node, ...]


class Spread(NamedTuple):
    """``sqrt(mean(source ** 2) + epsilon)``, or one over it; `nodes` make it, last first."""

    source: gs.Tensor
    axes: tuple[int, ...]
    epsilon: float
    nodes: tuple[gs.Node, ...]


def mean(view: View, tensor: gs.Tensor, notes: Notes) -> Mean | None:
    """ReduceMean that keeps dimensions, or a Reshape or Unsqueeze that puts them back."""
    node = view.maker(tensor, "ReduceMean", "Reshape", "Unsqueeze")
    if node is None:
        return None
    if node.op == "ReduceMean":
        over = axes(node, notes)
        return Mean(node.inputs[0], over, (node,)) if over and node.attrs.get("keepdims", 1) else None
    inner = view.maker(node.inputs[0], "ReduceMean")
    over = axes(inner, notes) if inner is not None and not inner.attrs.get("keepdims", 1) else None
    if inner is None or not over:
        return None
    source = inner.inputs[0]
    if source.shape is None or tensor.shape is None or len(source.shape) != len(tensor.shape):
        return None
    expected = [1 if axis in over else size for axis, size in enumerate(source.shape)]
    if not all(same_size(have, want) for have, want in zip(tensor.shape, expected, strict=True)):
        return None
    return Mean(source, over, (node, inner))


def counted(over: tuple[int, ...], tensor: gs.Tensor) -> tuple[int, ...]:
    """Axes counted from the front of a tensor, in order, as far as its rank is known."""
    known = rank(tensor)
    return tuple(sorted(axis + known if axis < 0 and known is not None else axis for axis in over))


def square(view: View, tensor: gs.Tensor, notes: Notes) -> tuple[gs.Tensor, gs.Node] | None:
    """What is squared, and the node that does it: Pow or Mul."""
    node = view.maker(tensor, "Pow", "Mul")
    if node is None:
        return None
    if node.op == "Pow":
        fits = number(node.inputs[1], notes) == 2
    else:
        fits = node.inputs[0] is node.inputs[1]
    return (node.inputs[0], node) if fits else None


def root(view: View, tensor: gs.Tensor, notes: Notes) -> Spread | None:
    """``Sqrt(Add(mean of squares, epsilon))``."""
    node = view.maker(tensor, "Sqrt")
    return None if node is None else _spread(view, node.inputs[0], (node,), notes)


def reciprocal_root(view: View, tensor: gs.Tensor, notes: Notes) -> Spread | None:
    """One over that root: Reciprocal, ``1 / x`` or ``x ** -0.5``."""
    node = view.maker(tensor, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op == "Pow":
        return _spread(view, node.inputs[0], (node,), notes) if number(node.inputs[1], notes) == -0.5 else None
    if node.op == "Div" and number(node.inputs[0], notes) != 1:
        return None
    found = root(view, node.inputs[-1], notes)
    return None if found is None else found._replace(nodes=(node, *found.nodes))


def _spread(view: View, tensor: gs.Tensor, nodes: tuple[gs.Node, ...], notes: Notes) -> Spread | None:
    add = view.maker(tensor, "Add")
    if add is None:
        return None
    for position in (0, 1):
        epsilon = number(add.inputs[position], notes)
        squares = mean(view, add.inputs[1 - position], notes) if epsilon is not None else None
        squared = square(view, squares.source, notes) if squares is not None else None
        if epsilon is not None and epsilon >= 0 and squares is not None and squared is not None:
            return Spread(squared[0], squares.axes, epsilon, (*nodes, add, *squares.nodes, squared[1]))
    return None


def normalized(view: View, node: gs.Node, notes: Notes) -> tuple[int, Spread] | None:
    """For ``x / root`` or ``x * (1 / root)``: the position of x among the inputs, and the root."""
    if node.op == "Div":
        found = root(view, node.inputs[1], notes)
        return None if found is None else (0, found)
    if node.op == "Mul":
        for position in (1, 0):
            found = reciprocal_root(view, node.inputs[position], notes)
            if found is not None:
                return 1 - position, found
    return None


def affine(view: View, tensor: gs.Tensor, op: str, shape: tuple[int, ...]) -> tuple[gs.Node, gs.Tensor] | None:
    """The one reader of a tensor if it is this op with an operand of this very shape and type, and that operand."""
    node = view.reader(tensor, op)
    if node is None:
        return None
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    return (node, other) if fits(other, tensor, shape) else None


def fits(operand: gs.Tensor, tensor: gs.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether an operand has this very shape, and the type of a tensor."""
    return list(operand.shape or ()) == list(shape) and element_type(operand) == element_type(tensor)


def shared(view: View, node: gs.Node, parts: Mapping[int, gs.Node], what: str) -> str | None:
    """Why the parts of a normalization that ends in `node` cannot go; None if nothing else reads them."""
    for part in parts.values():
        tensor = part.outputs[0]
        if id(tensor) != id(node.outputs[0]) and not view.only_for(tensor, {id(node), *parts}):
            return f"it is {what}, but {tensor.name!r} inside it is read elsewhere"
    return None


def retire_all(view: View, behind: Sequence[gs.Node], parts: Mapping[int, gs.Node]) -> None:
    """Take out what a fused node has replaced: first what came behind, last first, then the parts."""
    view.retire(*reversed(behind))
    for _ in range(len(parts)):  # Parts read one another in an order that differs from form to form.
        view.retire(*(part for part in parts.values() if not view.is_dead(part)))


def why_not(source: gs.Tensor, over: tuple[int, ...], what: str, notes: Notes, opset: int) -> str | None:
    """Why a normalization over some axes cannot be the standard op; None if it can."""
    known = rank(source)
    if known is None or list(counted(over, source)) != list(range(known - len(over), known)):
        return f"it is {what}, but over axes {sorted(over)} and not over the last ones"
    if trailing_sizes(source, known - len(over)) is None:
        return f"it is {what}, but over a dynamic size, so its scale has no fixed shape"
    if element_type(source) not in TYPES:
        return f"it is {what} in {type_name(element_type(source))}; engines have float32, float16 and bfloat16"
    if notes.opset < opset:
        return f"it is {what}, but the op came with opset {opset} and the model has {notes.opset}"
    return None


@dataclass
class Uniform:
    """Constants of one value all over, one for each shape and type.

    Attributes:
        base: what they are named after.
        value: the value.
    """

    base: str = "unit_scale"
    value: int = 1
    _made: dict[tuple[tuple[int, ...], int], gs.Constant] = field(default_factory=dict)

    def get(self, shape: tuple[int, ...], element: int, notes: Notes) -> gs.Constant:
        key = (shape, element)
        if key not in self._made:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
            self._made[key] = notes.constant(np.full(shape, self.value, dtype), self.base)
        return self._made[key]
