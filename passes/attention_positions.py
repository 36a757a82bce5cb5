"""Masks that are computed from positions: what a tensor of whole numbers is as a function of the place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from .patterns import View, axes, number, values
from .pipeline import Notes
from .surgery import rank

_MOST_STEPS = 48
"""Nodes between a mask and the positions that it is made of; transformers' own has some twenty."""


@dataclass(frozen=True)
class Affine:
    """``constant + sum(steps[axis] * index[axis])``; of conditions, whether that is at most zero.

    Attributes:
        constant: at the first place. Of a condition that holds everywhere or nowhere: 0 or 1.
        steps: one an axis.
        is_condition: whether it is a condition.
    """

    constant: int
    steps: tuple[int, ...]
    is_condition: bool = False

    @property
    def is_constant(self) -> bool:
        return not any(self.steps)

    def plus(self, other: Affine, times: int = 1, more: int = 0) -> Affine:
        """``self + times * other + more``, the axes of both aligned at the last."""
        count = max(len(self.steps), len(other.steps))
        mine, theirs = ((0,) * (count - len(each.steps)) + each.steps for each in (self, other))
        steps = tuple(a + times * b for a, b in zip(mine, theirs, strict=True))
        return Affine(self.constant + times * other.constant + more, steps)

    def with_steps(self, steps: tuple[int, ...]) -> Affine:
        return Affine(self.constant, steps, self.is_condition)

    def as_condition(self) -> Affine:
        return Affine(self.constant, self.steps, True)

    def scaled(self, by: int) -> Affine:
        return Affine(self.constant * by, tuple(step * by for step in self.steps))


@dataclass
class Positions:
    """Follows positions through the nodes of one scope.

    What is made of a Range, constants and the shapes of tensors, by ops that keep it a linear function of the place.

    Attributes:
        view: of the scope.
        notes: of the pass.
    """

    view: View
    notes: Notes
    _known: dict[int, Affine | None] = field(default_factory=dict)
    _kept: list[gs.Tensor] = field(default_factory=list)  # so that no id() is given away again

    def keeps_earlier(self, condition: gs.Tensor) -> bool | None:
        """Whether a condition is true where the last index is at most the one ahead; False for the opposite."""
        found = self._value(condition, 0)
        if found is None or not found.is_condition or len(found.steps) < 2 or any(found.steps[:-2]):
            return None
        row, column = found.steps[-2:]
        return {(0, -1, 1): True, (1, 1, -1): False}.get((found.constant, row, column))

    def holds(self, condition: gs.Tensor) -> bool:
        """Whether a condition is true everywhere."""
        found = self._value(condition, 0)
        return found is not None and found.is_condition and found.is_constant and found.constant <= 0

    def _value(self, tensor: gs.Tensor, depth: int) -> Affine | None:
        if id(tensor) not in self._known:
            self._kept.append(tensor)
            self._known[id(tensor)] = None
            if depth < _MOST_STEPS:
                self._known[id(tensor)] = self._evaluate(tensor, depth + 1)
        return self._known[id(tensor)]

    def _evaluate(self, tensor: gs.Tensor, depth: int) -> Affine | None:
        if isinstance(tensor, gs.Constant):
            return self._constant(tensor)
        node = self.view.maker(tensor)
        if node is None or not node.inputs:
            return None
        if node.op == "Range":
            start, step = number(node.inputs[0], self.notes), number(node.inputs[2], self.notes)
            return None if start is None or step is None else _whole(start, (step,))
        if node.op == "GatherND":
            return self._gathered(node, depth)
        if node.op == "Concat":
            return self._joined(node, depth)
        first = self._value(node.inputs[0], depth)
        if first is None:
            return None
        match node.op:
            case "Identity":
                return first
            case "Cast":
                return self._cast(first, tensor)
            case "Not":
                return first.scaled(-1).plus(Affine(1, ())).as_condition() if first.is_condition else None
            case "Unsqueeze" | "Squeeze" | "Expand" | "Slice":
                return self._moved(node, first)
            case "CumSum":
                return first if first.is_constant and first.constant == 0 and not first.is_condition else None
        second = self._value(node.inputs[1], depth) if len(node.inputs) == 2 and _fits(node) else None
        return None if second is None else _combined(node.op, first, second)

    def _constant(self, tensor: gs.Constant) -> Affine | None:
        found = values(tensor, self.notes)
        if found is None or found.size == 0 or found.dtype.kind not in "bi":
            return None
        flat = found.reshape(-1)
        if (flat == flat[0]).all():
            if found.dtype.kind == "b":
                return Affine(0 if flat[0] else 1, (0,) * found.ndim, True)
            return Affine(int(flat[0]), (0,) * found.ndim)
        step = int(flat[1]) - int(flat[0])
        line = found.dtype.kind == "i" and found.ndim == 1 and (np.diff(flat) == step).all()
        return Affine(int(flat[0]), (step,)) if line else None

    def _cast(self, first: Affine, tensor: gs.Tensor) -> Affine | None:
        kind = np.dtype(tensor.dtype).kind if tensor.dtype is not None and not isinstance(tensor.dtype, int) else ""
        if kind == "b":
            if first.is_condition:
                return first
            return Affine(0 if first.constant else 1, first.steps, True) if first.is_constant else None
        if kind != "i":
            return None
        if first.is_condition:
            return Affine(int(first.constant <= 0), first.steps) if first.is_constant else None
        return first

    def _moved(self, node: gs.Node, first: Affine) -> Affine | None:
        """Axes put in, taken out, spread or cut."""
        steps = list(first.steps)
        if node.op == "Expand":
            count = rank(node.outputs[0])
            spread = count is not None and count >= len(steps) and _grows(node)
            return first.with_steps((0,) * ((count or 0) - len(steps)) + first.steps) if spread else None
        if node.op == "Slice":
            return self._cut(node, first)
        over = axes(node, self.notes)
        if over is None:
            return None
        count = len(steps) + len(over) if node.op == "Unsqueeze" else len(steps)
        places = sorted(axis % count for axis in over) if count else []
        if node.op == "Unsqueeze":
            for axis in places:
                steps.insert(axis, 0)
        else:
            steps = [step for axis, step in enumerate(steps) if axis not in places]
        return first.with_steps(tuple(steps))

    def _cut(self, node: gs.Node, first: Affine) -> Affine | None:
        if len(node.inputs) < 4:
            return None
        start, axis = number(node.inputs[1], self.notes), number(node.inputs[3], self.notes)
        stride = number(node.inputs[4], self.notes) if len(node.inputs) > 4 and node.inputs[4].name else 1
        if start is None or axis is None or stride != 1 or start < 0 or not first.steps:
            return None
        step = first.steps[int(axis) % len(first.steps)]
        return Affine(first.constant + int(start) * step, first.steps, first.is_condition)

    def _joined(self, node: gs.Node, depth: int) -> Affine | None:
        """One place and those behind it, where they go on from it."""
        if len(node.inputs) != 2:
            return None
        first, rest = (self._value(each, depth) for each in node.inputs)
        if first is None or rest is None or first.is_condition or rest.is_condition:
            return None
        count = len(rest.steps)
        axis = node.attrs.get("axis", 0) % max(count, 1)
        shape = node.inputs[0].shape
        if len(first.steps) != count or shape is None or len(shape) != count or shape[axis] != 1:
            return None
        whole = Affine(rest.constant - rest.steps[axis], rest.steps)
        others = [a == b for place, (a, b) in enumerate(zip(first.steps, rest.steps, strict=True)) if place != axis]
        return whole if whole.constant == first.constant and all(others) else None

    def _gathered(self, node: gs.Node, depth: int) -> Affine | None:
        """What is at places that are themselves known."""
        data, places = self._value(node.inputs[0], depth), self.view.maker(node.inputs[1], "Concat")
        parts = [node.inputs[1]] if places is None else list(places.inputs)
        if data is None or node.attrs.get("batch_dims", 0) or len(parts) != len(data.steps):
            return None
        total = Affine(data.constant, ())
        for step, part in zip(data.steps, parts, strict=True):
            index = self._value(part, depth) if part.shape is not None and part.shape[-1] == 1 else None
            if index is None or index.is_condition or min(index.constant, *index.steps, 0) < 0:
                return None  # a negative index counts from the end
            total = total.plus(Affine(index.constant, index.steps[:-1]), step)
        return Affine(total.constant, total.steps, data.is_condition)


def _whole(start: float, steps: Sequence[float]) -> Affine | None:
    numbers = [start, *steps]
    return Affine(int(start), tuple(map(int, steps))) if all(n == int(n) for n in numbers) else None


def _fits(node: gs.Node) -> bool:
    """Whether two operands surely have the same size where both vary."""
    shapes = [list(tensor.shape) if tensor.shape is not None else None for tensor in node.inputs]
    if shapes[0] is None or shapes[1] is None:
        return True
    pairs = zip(reversed(shapes[0]), reversed(shapes[1]), strict=False)
    return all(a == b or 1 in (a, b) or is_unnamed(a) or is_unnamed(b) for a, b in pairs)


def _grows(node: gs.Node) -> bool:
    """Whether an Expand leaves sizes other than 1, as it must."""
    have, made = list(node.inputs[0].shape or ()), list(node.outputs[0].shape or ())
    pairs = zip(reversed(have), reversed(made), strict=False)
    return all(a == b or a == 1 or is_unnamed(b) for a, b in pairs)


def is_unnamed(size: object) -> bool:
    """Whether nothing is known of a size; ONNX's inference gives such sizes names of its own."""
    return size is None or (isinstance(size, str) and size.startswith("unk__"))


def _combined(op: str, first: Affine, second: Affine) -> Affine | None:
    if op in ("And", "Or"):
        if not (first.is_condition and second.is_condition):
            return None
        idle = {"And": True, "Or": False}[op]
        for one, other in ((first, second), (second, first)):
            if one.is_constant and (one.constant <= 0) is idle:
                count = max(len(one.steps), len(other.steps))
                return other.with_steps((0,) * (count - len(other.steps)) + other.steps)
        return None
    if first.is_condition or second.is_condition:
        return None
    match op:
        case "Add":
            return first.plus(second)
        case "Sub":
            return first.plus(second, -1)
        case "LessOrEqual":
            return first.plus(second, -1).as_condition()
        case "Less":
            return first.plus(second, -1, 1).as_condition()
        case "GreaterOrEqual":
            return second.plus(first, -1).as_condition()
        case "Greater":
            return second.plus(first, -1, 1).as_condition()
        case "Equal":
            apart = first.plus(second, -1)
            return Affine(int(apart.constant != 0), apart.steps, True) if apart.is_constant else None
    return None
