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
from .patterns import View, axes, number, same_shape, same_size, values
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
        x * cos + stack(-x[..., 1::2], x[..., ::2]) * sin                   RotaryEmbedding<interleaved>(x, cos', sin')

    after Su et al., "RoFormer" (arXiv:2104.09864), as transformers write it: by halves Llama and its kin, by neighbours
    Cohere and Helium; "stack" is a Concat of what is unsqueezed, and a Reshape. x is (batch, heads, length, d). cos
    and sin are (batch or 1, length, d) ahead of an Unsqueeze, or constants; their halves, or neighbours, must be the
    same, which is seen from how they are made (``Cos(Concat(angles, angles))`` or of a repeat_interleave, perhaps times
    a number, perhaps cast), or from a constant's values. cos' and sin' are one half of them, for every sample, made
    once for all that are rotated by them.

    Fires on float32, float16 and bfloat16 with a fixed and even d, where nothing else reads the parts. What is turned
    as complex numbers is left. The result differs by rounding, about 1e-7 of the largest number in float32.
    TensorRT-RTX 1.6.1 and 1.7.1 build both forms of the node in all three types, with dynamic shapes too.
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
    by_pairs: bool


@dataclass
class _Scope:
    """One scope, with the halves of angles that were made in it."""

    scope: gs.Graph
    notes: Notes
    halves: dict[tuple[int, Any, bool], gs.Tensor] = field(default_factory=dict)

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
            inputs = [found.source, *(self._half(view, angle, found, made) for angle in (found.cos, found.sin))]
            ahead[id(node)] = made
            become(node, "RotaryEmbedding", inputs)
            if found.by_pairs:
                node.attrs["interleaved"] = 1
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
            table = _table(view, angle, found.by_pairs, self.notes)
            if table is None:
                where = "for neighbours" if found.by_pairs else "in both halves"
                return f"it is {_WHAT}, but {angle.name!r} is not seen to be the same for all heads and {where}"
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

    def _half(self, view: View, angle: gs.Tensor, found: _Rotation, made: list[gs.Node]) -> gs.Tensor:
        """The first half of angles, or the first of each pair, as (batch, length, d / 2)."""
        source = found.source
        assert source.shape is not None
        key = (id(angle), source.shape[0], found.by_pairs)
        if key in self.halves:
            return self.halves[key]
        table = _table(view, angle, found.by_pairs, self.notes)
        assert table is not None
        full = _shape(table)
        width = int(source.shape[-1]) // 2
        shape = [*full[:2], width]
        if isinstance(table, gs.Constant):
            part = slice(0, None, 2) if found.by_pairs else slice(width)
            first = np.ascontiguousarray(self.notes.values(table).reshape(full)[..., part])
            half: gs.Tensor = self.notes.constant(first, f"{table.name}_half")
        else:
            numbers = (0, 2 * width, 2, 2) if found.by_pairs else (0, width, 2)
            bounds = [self.notes.constant(np.array([n], np.int64), f"{table.name}_{n}") for n in numbers]
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
            joined = view.maker(turned.inputs[place], "Concat", "Reshape")
            by_pairs = joined is not None and joined.op == "Reshape"
            pieces = None if joined is None else (_stacked if by_pairs else _turned)(view, joined, notes)
            if joined is None or pieces is None or not any(tensor is pieces[0] for tensor in plain.inputs):
                continue
            source = pieces[0]
            cos = plain.inputs[1] if plain.inputs[0] is source else plain.inputs[0]
            nodes = {id(part): part for part in (plain, turned, joined, *pieces[1])}
            return _Rotation(source, cos, turned.inputs[1 - place], nodes, by_pairs)
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


def _stacked(view: View, flat: gs.Node, notes: Notes) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """For ``stack(-odd, even).flatten(-2)`` along the last of four axes: the tensor, and the nodes above."""
    joined = view.maker(flat.inputs[0], "Concat")
    if joined is None or len(joined.inputs) != 2 or joined.attrs.get("axis") not in (-1, 4):
        return None
    lifted = [view.maker(tensor, "Unsqueeze") for tensor in joined.inputs]
    if any(node is None or axes(node, notes) not in ((4,), (-1,)) for node in lifted):
        return None
    first, second = (node for node in lifted if node is not None)
    minus = view.maker(first.inputs[0], "Neg")
    if minus is None:
        return None
    odd, even = _every_second(view, minus.inputs[0], 1, notes), _every_second(view, second.inputs[0], 0, notes)
    if odd is None or even is None or odd[0] is not even[0] or not same_shape(odd[0], flat.outputs[0]):
        return None
    return odd[0], [joined, first, second, minus, odd[1], even[1]]


def _every_second(view: View, tensor: gs.Tensor, start: int, notes: Notes) -> tuple[gs.Tensor, gs.Node] | None:
    """Of what a tensor is every second element from one on along the last of four axes, and the node."""
    node = view.maker(tensor, "Slice")
    known = None if node is None else sizes(node.inputs[0])
    if node is None or known is None or len(known) != 4 or known[-1] is None or known[-1] % 2:
        return None
    bounds = [values(each, notes) for each in node.inputs[1:]]
    if len(bounds) != 4 or any(each is None or each.size != 1 for each in bounds):
        return None
    begin, stop, axis, step = (int(each.reshape(-1)[0]) for each in bounds if each is not None)
    found = slice(begin, stop).indices(known[-1])[:2]
    # One that ends ahead of the last element takes the same where it would not have been taken.
    fits = axis in (-1, 3) and step == 2 and found[0] == start and found[1] >= known[-1] - 1 + start
    return (node.inputs[0], node) if fits else None


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


def _table(view: View, angle: gs.Tensor, by_pairs: bool, notes: Notes) -> gs.Tensor | None:
    """The angles of all heads, (batch, length, d) or a constant (..., length, d), if halves, or pairs, are the same."""
    if isinstance(angle, gs.Constant):
        known: Sequence[Any] = angle.shape or ()
        if not 2 <= len(known) <= 4 or (len(known) > 2 and known[-3] != 1) or nbytes(angle) > _MOST_BYTES:
            return None
        found = notes.values(angle)
        left, right = (found[..., ::2], found[..., 1::2]) if by_pairs else np.split(found, 2, -1)
        return angle if np.array_equal(left, right) else None
    node = view.maker(angle, "Unsqueeze")
    if node is None or axes(node, notes) != (1,) or rank(node.inputs[0]) != 3:
        return None
    return node.inputs[0] if _is_twice(view, node.inputs[0], by_pairs, notes) else None


def _shape(table: gs.Tensor) -> tuple[Any, Any, Any]:
    """The samples, positions and numbers of a table of angles."""
    shape: Sequence[Any] = table.shape or ()
    if isinstance(table, gs.Constant):
        return (shape[0] if len(shape) == 4 else 1, shape[-2], shape[-1])
    return (shape[0], shape[1], shape[2])


def _is_twice(view: View, tensor: gs.Tensor, by_pairs: bool, notes: Notes) -> bool:
    """Whether each angle is there twice: in both halves, or side by side."""
    ops = ("Cast", "Cos", "Identity", "Mul", "Sin", "Reshape" if by_pairs else "Concat")
    while (node := view.maker(tensor, *ops)) is not None:
        if node.op == "Concat":
            same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
            return same and node.attrs.get("axis") in (-1, 2)
        if node.op == "Reshape":
            return _is_repeated(view, node, notes)
        position = 0
        if node.op == "Mul":
            factors = [position for position in (0, 1) if number(node.inputs[position], notes) is not None]
            if not factors:
                return False
            position = 1 - factors[0]
        tensor = node.inputs[position]
    return False


def _is_repeated(view: View, flat: gs.Node, notes: Notes) -> bool:
    """Whether a Reshape ends ``repeat_interleave(2)`` along the last of three axes: (b, l, n, 1), (b, l, n, 2), ..."""
    spread = view.maker(flat.inputs[0], "Expand", "Tile")
    lifted = None if spread is None else view.maker(spread.inputs[0], "Unsqueeze")
    if spread is None or lifted is None or axes(lifted, notes) not in ((3,), (-1,)):
        return False
    once, twice, whole = (sizes(each.outputs[0]) for each in (lifted, spread, flat))
    if once is None or twice is None or whole is None or (len(once), len(twice), len(whole)) != (4, 4, 3):
        return False
    width = once[2]
    if width is None or whole[2] != 2 * width or (twice[2], twice[3]) != (width, 2):
        return False
    # Of batch and length two are the same on both sides, or one, and then the other is what is left.
    before, after = spread.outputs[0].shape, flat.outputs[0].shape
    assert before is not None
    assert after is not None
    return any(same_size(before[axis], after[axis]) for axis in (0, 1))
