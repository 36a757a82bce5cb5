"""Find rotary position embedding in its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .fold_shapes import FoldShapes
from .norm_parts import retire_all, shared
from .patterns import View, axes, number, same_size, values
from .pipeline import Notes, Pass
from .surgery import become, element_type, nbytes, rank, scopes, sizes, type_name

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_OPSET = 23
_WHAT = "a rotary embedding"
_MOST_BYTES = 1 << 22
"""Tables of angles up to this size are read and halved."""


@dataclass(frozen=True)
class FuseRotaryEmbedding(Pass):
    """Make one RotaryEmbedding of the ops that it was written with; opset 23 and later.

    ::

        x * cos + Concat(Neg(x[..., d / 2 :]), x[..., : d / 2]) * sin       RotaryEmbedding(x, cos', sin')

    after Su et al., "RoFormer" (arXiv:2104.09864), as transformers' Llama and its kin write it. x is (batch, heads,
    length, d). cos and sin are (batch or 1, length, d) ahead of an Unsqueeze, or constants; their two halves must be
    the same, which is seen from how they are made (``Cos(Concat(angles, angles))``, perhaps times a number, perhaps
    cast), or from a constant's values. cos' and sin' are one half of them, for every sample, made once for all that
    are rotated by them.

    Fires on float32, float16 and bfloat16 with a fixed and even d, where nothing else reads the parts. Numbers that are
    interleaved, or turned as complex ones, are left. The result differs by rounding, about 1e-7 of the largest number
    in float32. TensorRT-RTX 1.6.1 and 1.7.1 build the node in all three types, with dynamic shapes too.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants, FoldShapes)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sum(_Scope(scope, notes).rewrite() for scope in scopes(graph))


@dataclass(frozen=True)
class _Rotation:
    """What is rotated, by what, and the nodes that do it but for the last."""

    source: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor
    nodes: dict[int, gs.Node]


@dataclass
class _Scope:
    """One scope, with the halves of angles that were made in it."""

    scope: gs.Graph
    notes: Notes
    halves: dict[tuple[int, Any], gs.Tensor] = field(default_factory=dict)

    def rewrite(self) -> int:
        view = View(self.scope)
        ahead: dict[int, list[gs.Node]] = {}
        for node in self.scope.nodes:
            found = _rotation(view, node, self.notes) if node.op == "Add" and not view.is_dead(node) else None
            if found is None:
                continue
            if reason := self._why_not(view, node, found):
                self.notes.refused(node, reason)
                continue
            made: list[gs.Node] = []
            inputs = [found.source, *(self._half(view, angle, found.source, made) for angle in (found.cos, found.sin))]
            ahead[id(node)] = made
            become(node, "RotaryEmbedding", inputs)
            retire_all(view, (), found.nodes)
        order = [each for node in self.scope.nodes for each in (*ahead.get(id(node), ()), node)]
        self.scope.nodes = order
        view.close()
        return len(ahead)

    def _why_not(self, view: View, node: gs.Node, found: _Rotation) -> str | None:
        """Why a rotation stays; None if it need not."""
        source = found.source
        if element_type(source) not in _TYPES:
            return f"it is {_WHAT} in {type_name(element_type(source))}; engines have float32, float16 and bfloat16"
        for angle in (found.cos, found.sin):
            if element_type(angle) != element_type(source):
                return f"it is {_WHAT}, but its angles {angle.name!r} are in {type_name(element_type(angle))}"
            table = _table(view, angle, self.notes)
            if table is None:
                return f"it is {_WHAT}, but {angle.name!r} is not seen to be the same for all heads and in both halves"
            samples, length, _ = _shape(table)
            want: Sequence[Any] = source.shape or ()
            if not same_size(length, want[2]) or not (same_size(samples, want[0]) or samples == 1):
                return f"it is {_WHAT}, but {angle.name!r} is not seen to have one row for each position"
            if samples == 1 and not isinstance(want[0], (int, np.integer)) and not want[0]:
                return f"it is {_WHAT}, but how many samples there are is not known"
        if reason := shared(view, node, found.nodes, _WHAT):
            return reason
        if self.notes.opset < _OPSET:
            return f"it is {_WHAT}, but the op came with opset {_OPSET} and the model has {self.notes.opset}"
        return None

    def _half(self, view: View, angle: gs.Tensor, source: gs.Tensor, made: list[gs.Node]) -> gs.Tensor:
        """The first half of angles as (batch, length, d / 2)."""
        assert source.shape is not None
        key = (id(angle), source.shape[0])
        if key in self.halves:
            return self.halves[key]
        table = _table(view, angle, self.notes)
        assert table is not None
        full = _shape(table)
        width = int(source.shape[-1]) // 2
        shape = [*full[:2], width]
        if isinstance(table, gs.Constant):
            first = np.ascontiguousarray(self.notes.values(table).reshape(full)[..., :width])
            half: gs.Tensor = self.notes.constant(first, f"{table.name}_half")
        else:
            bounds = [self.notes.constant(np.array([n], np.int64), f"{table.name}_{n}") for n in (0, width, 2)]
            half = self._write(made, "Slice", [table, *bounds], f"{table.name}_half", table.dtype, shape)
        if not same_size(shape[0], source.shape[0]):
            shape = [source.shape[0], *shape[1:]]
            half = self._write(made, "Expand", [half, self._samples(source, made)], half.name, table.dtype, shape)
        self.halves[key] = half
        return half

    def _samples(self, source: gs.Tensor, made: list[gs.Node]) -> gs.Tensor:
        """[batch, 1, 1] as a tensor."""
        assert source.shape is not None
        size = source.shape[0]
        if isinstance(size, (int, np.integer)):
            return self.notes.constant(np.array([size, 1, 1], np.int64), "samples")
        ones = self.notes.constant(np.ones(2, np.int64), "ones")
        count = self._write(made, "Shape", [source], f"{source.name}_samples", np.int64, [1], start=0, end=1)
        return self._write(made, "Concat", [count, ones], f"{source.name}_samples", np.int64, [3], axis=0)

    def _write(
        self,
        made: list[gs.Node],
        op: str,
        inputs: list[gs.Tensor],
        name: str,
        dtype: Any,
        shape: list[Any],
        **more: int,
    ) -> gs.Tensor:
        result = gs.Variable(self.notes.fresh_name(name), dtype, shape)
        made.append(gs.Node(op, self.notes.fresh_name(f"node_{name}"), attrs=more, inputs=inputs, outputs=[result]))
        return result


def _rotation(view: View, node: gs.Node, notes: Notes) -> _Rotation | None:
    """A sum that is a rotation of a tensor of four axes."""
    for left, right in (list(node.inputs), list(node.inputs)[::-1]):
        plain, turned = view.maker(left, "Mul"), view.maker(right, "Mul")
        if plain is None or turned is None or plain is turned:
            continue
        for place in (0, 1):
            joined = view.maker(turned.inputs[place], "Concat")
            pieces = None if joined is None else _turned(view, joined, notes)
            if joined is None or pieces is None or not any(tensor is pieces[0] for tensor in plain.inputs):
                continue
            source = pieces[0]
            cos = plain.inputs[1] if plain.inputs[0] is source else plain.inputs[0]
            nodes = {id(part): part for part in (plain, turned, joined, *pieces[1])}
            return _Rotation(source, cos, turned.inputs[1 - place], nodes)
    return None


def _turned(view: View, joined: gs.Node, notes: Notes) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """For ``Concat(-second half, first half)`` along the last of four axes: the tensor, and the nodes above."""
    if len(joined.inputs) != 2 or joined.attrs.get("axis") not in (-1, 3):
        return None
    minus = view.maker(joined.inputs[0], "Neg")
    if minus is None:
        return None
    first, second = _half_of(view, joined.inputs[1], 0, notes), _half_of(view, minus.inputs[0], 1, notes)
    if first is None or second is None or first[0] is not second[0]:
        return None
    return first[0], [minus, *{id(node): node for node in (first[1], second[1])}.values()]


def _half_of(view: View, tensor: gs.Tensor, which: int, notes: Notes) -> tuple[gs.Tensor, gs.Node] | None:
    """Of what a tensor is the first (0) or the second (1) half along the last of four axes, and the node."""
    maker = tensor.inputs[0] if tensor.inputs else None
    split = maker if maker is not None and maker.op == "Split" else None
    node = view.maker(split.outputs[0], "Split") if split is not None else view.maker(tensor, "Slice")
    if node is None:
        return None
    source = node.inputs[0]
    known = sizes(source)
    width = known[-1] if known is not None and len(known) == 4 else None
    if width is None or width % 2:
        return None
    if split is not None:
        own = sizes(tensor)
        fits = len(split.outputs) == 2 and split.outputs[which] is tensor and split.attrs.get("axis", 0) in (-1, 3)
        return (source, node) if fits and own is not None and own[-1] == width // 2 else None
    bounds = [values(each, notes) for each in node.inputs[1:]]
    if len(bounds) < 3 or any(each is None or each.size != 1 for each in bounds):
        return None
    start, stop, axis, *step = (int(each.reshape(-1)[0]) for each in bounds if each is not None)
    if axis not in (-1, 3) or (step or [1]) != [1]:
        return None
    wanted = (0, width // 2) if which == 0 else (width // 2, width)
    return (source, node) if slice(start, stop).indices(width)[:2] == wanted else None


def _table(view: View, angle: gs.Tensor, notes: Notes) -> gs.Tensor | None:
    """The angles of all heads, (batch, length, d) or a constant (..., length, d), if their halves are the same."""
    if isinstance(angle, gs.Constant):
        known: Sequence[Any] = angle.shape or ()
        if not 2 <= len(known) <= 4 or (len(known) > 2 and known[-3] != 1) or nbytes(angle) > _MOST_BYTES:
            return None
        found = notes.values(angle)
        left, right = np.split(found, 2, -1)
        return angle if np.array_equal(left, right) else None
    node = view.maker(angle, "Unsqueeze")
    if node is None or axes(node, notes) != (1,) or rank(node.inputs[0]) != 3:
        return None
    return node.inputs[0] if _has_equal_halves(view, node.inputs[0], notes) else None


def _shape(table: gs.Tensor) -> tuple[Any, Any, Any]:
    """The samples, positions and numbers of a table of angles."""
    shape: Sequence[Any] = table.shape or ()
    if isinstance(table, gs.Constant):
        return (shape[0] if len(shape) == 4 else 1, shape[-2], shape[-1])
    return (shape[0], shape[1], shape[2])


def _has_equal_halves(view: View, tensor: gs.Tensor, notes: Notes) -> bool:
    while (node := view.maker(tensor, "Cast", "Concat", "Cos", "Identity", "Mul", "Sin")) is not None:
        if node.op == "Concat":
            same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            return same and node.attrs.get("axis") in (-1, 2)
        position = 0
        if node.op == "Mul":
            factors = [position for position in (0, 1) if number(node.inputs[position], notes) is not None]
            if not factors:
                return False
            position = 1 - factors[0]
        tensor = node.inputs[position]
    return False
