"""The masks of attention: which are causal, and how the others are written for one node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .attention_operands import Operand
from .attention_parts import LOW, Block, Mask
from .attention_positions import Positions, is_unnamed
from .exchange import stand_in_name
from .patterns import View, number, same_size
from .pipeline import Notes
from .surgery import element_type, gs_type, nbytes

LIMITS: Mapping[int, float] = {
    onnx.TensorProto.FLOAT16: 32752.0,
    onnx.TensorProto.BFLOAT16: 2.0**126,
    onnx.TensorProto.FLOAT: 2.0**126,
}
"""Half of what each type holds: what is added to scores leaves room for them; the weight of such a score is 0."""

_MOST_BYTES = 64 << 20
"""Larger constants are not read to see whether they are causal."""

_MOST_STEPS = 12
"""Nodes that are looked at between a mask and the constant that it is made of."""


@dataclass
class Masks:
    """Writes the masks of one scope, each once however many blocks share it.

    Attributes:
        view: of the scope.
        notes: of the pass.
        nodes: new nodes, in order.
    """

    view: View
    notes: Notes
    nodes: list[gs.Node] = field(default_factory=list)
    _made: dict[tuple[object, ...], gs.Tensor] = field(default_factory=dict)
    _causal: dict[int, tuple[gs.Tensor, bool]] = field(default_factory=dict)
    _positions: Positions = field(init=False, repr=False)
    _idle: dict[int, tuple[gs.Tensor, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._positions = Positions(self.view, self.notes)

    def is_causal(self, block: Block) -> bool:
        """Whether the one mask hides from each query the keys behind it, of as many keys as queries, and no others."""
        if len(block.masks) != 1 or not same_size(block.query.shape[-2], block.key.shape[-2]):
            return False
        mask = block.masks[0]
        if id(mask.tensor) not in self._causal:
            sizes = list(mask.tensor.shape or [None, None])[-2:]
            fits = all(_may_be(size, block.query.shape[-2]) for size in sizes)
            self._causal[id(mask.tensor)] = (mask.tensor, fits and self._hides_later(mask))
        return self._causal[id(mask.tensor)][1]

    def hides_no_row(self, block: Block) -> bool:
        """Whether no row can be -infinity altogether: masks are finite, or the only one leaves a number in each row."""
        if len(block.masks) == 1 and block.masks[0].low is None:
            constant = self._constant(block.masks[0].tensor)
            if constant is not None and constant.ndim:
                return bool(np.isfinite(constant.max(axis=-1, initial=-np.inf)).all())
        return all(self._is_finite(mask) for mask in block.masks)

    def why_not(self, block: Block) -> str:
        """Why the masks of a block cannot be written; "" where they can."""
        element = element_type(block.final.outputs[0])
        for mask in block.masks:
            narrowed = mask.low is None and element_type(mask.tensor) != element and self._numbers(mask.tensor) is None
            if block.guarded and narrowed and not self.hides_no_row(block):
                return "rows that are NaN become zero, and in 16 bits its mask would make none"
        return ""

    def write(self, block: Block, element: int) -> gs.Tensor | None:
        """The sum of a block's masks, of four axes in the type of the block; None without masks."""
        masks = [mask for mask in block.masks if not self._is_idle(mask)]
        parts = [self._written(mask, element, len(block.query.shape)) for mask in masks]
        total = parts[0] if parts else None
        for part in parts[1:]:
            assert total is not None
            total = self._sum(total, part)
        return None if total is None else self._spread(total, block)

    # What a mask is

    def _is_idle(self, mask: Mask) -> bool:
        """Whether a mask is known to change nothing: zeros, or a condition that lets all stay."""
        if id(mask.tensor) not in self._idle:
            idle = 0 if mask.low is None or not mask.keeps else 1
            self._idle[id(mask.tensor)] = (mask.tensor, self._is_full_of(mask.tensor, idle))
        return self._idle[id(mask.tensor)][1]

    def _is_full_of(self, tensor: gs.Tensor, value: int, depth: int = 0) -> bool:
        """Whether all elements are one number, as far as the graph tells without running it."""
        constant = self._constant(tensor)
        if constant is not None:
            return bool((constant == value).all())
        if value == 1 and depth == 0 and self._positions.holds(tensor):
            return True
        node = self.view.maker(tensor)
        if node is None or depth == _MOST_STEPS:
            return False
        if node.op in ("Expand", "Unsqueeze", "Squeeze", "Reshape", "Identity", "Cast", "Slice", "Transpose"):
            return self._is_full_of(node.inputs[0], value, depth + 1)
        if node.op == "ConstantOfShape":
            return self._filled(tensor) == value
        if node.op == "And" and value == 1:
            return all(self._is_full_of(each, 1, depth + 1) for each in node.inputs)
        if node.op == "Not":
            return self._is_full_of(node.inputs[0], 1 - value, depth + 1)
        found = self._numbers(tensor)
        if found is None:
            return False
        return any(found[1 + p] == value and self._is_full_of(found[0], 1 - p, depth + 1) for p in (0, 1))

    def _constant(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The values of a constant that is not too large to look at."""
        if not isinstance(tensor, gs.Constant) or nbytes(tensor) > _MOST_BYTES:
            return None
        known = stand_in_name(tensor) is not None or isinstance(tensor._values, np.ndarray) or nbytes(tensor) < 4096
        return self.notes.values(tensor) if known else None

    def _hides_later(self, mask: Mask) -> bool:
        tensor = mask.tensor
        if isinstance(tensor, gs.Constant):
            found = self._square(tensor)
            if found is None:
                return False
            lower = _lower(found)
            if mask.low is not None:
                return bool((found.astype(np.bool_) == (lower == mask.keeps)).all())
            return bool((found[:, lower] == 0).all() and (found[:, np.logical_not(lower)] <= LOW).all())
        if mask.low is not None:
            return self._triangle(tensor) is mask.keeps
        choice = self.view.maker(tensor, "Where", "Trilu")
        if choice is None:
            return False
        if choice.op == "Trilu":  # of a matrix of -infinity
            filled = self._filled(choice.inputs[0])
            return filled is not None and filled <= LOW and self._is_upper(choice)
        first, second = (number(t, self.notes) for t in choice.inputs[1:])
        if first is None or second is None or {first == 0, second == 0} != {True, False} or min(first, second) > LOW:
            return False
        return self._triangle(choice.inputs[0]) is (first == 0)

    def _square(self, tensor: gs.Constant) -> np.ndarray | None:
        """The values of a constant of square matrices: (count, length, length)."""
        shape = [int(size) for size in tensor.shape]
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            return None
        values = self._constant(tensor)
        return None if values is None else values.reshape(-1, *shape[-2:])

    def _triangle(self, tensor: gs.Tensor) -> bool | None:
        """Whether a condition is true on and below the diagonal alone; False for the opposite; None for others."""
        if isinstance(tensor, gs.Constant):
            found = self._square(tensor)
            if found is None or found.dtype != np.bool_:
                return None
            lower = _lower(found)
            return True if (found == lower).all() else False if (found != lower).all() else None
        by_position = self._positions.keeps_earlier(tensor)
        node = self.view.maker(tensor)
        if by_position is not None or node is None:
            return by_position
        if node.op in ("Not", "Equal"):
            inner = self._triangle(node.inputs[0])
            is_zero = node.op == "Not" or number(node.inputs[1], self.notes) == 0
            return None if inner is None or not is_zero else not inner
        if node.op in ("Cast", "Unsqueeze", "Identity"):
            return self._triangle(node.inputs[0])
        if node.op == "Trilu" and self._filled(node.inputs[0]) == 1:
            if self._is_upper(node):
                return False
            return True if not node.attrs.get("upper", 1) and self._offset(node) == 0 else None
        return None

    def _is_upper(self, node: gs.Node) -> bool:
        """Whether a Trilu keeps what is above the diagonal."""
        return bool(node.attrs.get("upper", 1)) and self._offset(node) == 1

    def _offset(self, node: gs.Node) -> float | None:
        return number(node.inputs[1], self.notes) if len(node.inputs) > 1 and node.inputs[1].name else 0

    def _filled(self, tensor: gs.Tensor) -> float | None:
        """The number that a matrix is full of."""
        node = self.view.maker(tensor, "Expand", "ConstantOfShape", "Cast")
        if node is None:
            return None
        if node.op == "Cast":
            return self._filled(node.inputs[0])
        if node.op == "Expand":
            constant = node.inputs[0]
            if not isinstance(constant, gs.Constant) or nbytes(constant) > 16:
                return None
            found = self.notes.values(constant)
            return float(found.reshape(-1)[0]) if found.size == 1 else None
        value = node.attrs.get("value")
        return 0.0 if value is None else float(self.notes.values(value).reshape(-1)[0])

    def _is_finite(self, mask: Mask) -> bool:
        if mask.low is not None:
            return math.isfinite(mask.low)
        constant = self._constant(mask.tensor)
        if constant is not None:
            return bool(np.isfinite(constant).all())
        numbers = self._numbers(mask.tensor)
        return numbers is not None and all(map(math.isfinite, numbers[1:]))

    def _numbers(self, tensor: gs.Tensor) -> tuple[gs.Tensor, float, float] | None:
        """The condition and the two numbers that a mask is chosen from; None for other masks."""
        choice = self.view.maker(tensor, "Where")
        if choice is None or choice.inputs[0].shape is None:
            return None
        first, second = (number(each, self.notes) for each in choice.inputs[1:])
        return None if first is None or second is None else (choice.inputs[0], first, second)

    # How it is written

    def _written(self, mask: Mask, element: int, count: int) -> gs.Tensor:
        tensor = self._number(mask, element)
        shape = list(tensor.shape or [])
        if count == 3 and len(shape) == 3:
            return self._unsqueezed(tensor, (1,))
        return self._unsqueezed(tensor, tuple(range(4 - len(shape)))) if len(shape) < 4 else tensor

    def _number(self, mask: Mask, element: int) -> gs.Tensor:
        """What is added to the scores, in their type."""
        tensor = mask.tensor
        if mask.low is not None:
            return self._choice(tensor, 0.0 if mask.keeps else mask.low, mask.low if mask.keeps else 0.0, element)
        if element_type(tensor) == element:
            return tensor
        numbers = self._numbers(tensor)
        if numbers is not None:
            return self._choice(*numbers, element)
        return self._narrowed(tensor, element)

    def _choice(self, condition: gs.Tensor, first: float, second: float, element: int) -> gs.Tensor:
        limit = LIMITS[element]
        first, second = (min(max(v, -limit), limit) if math.isfinite(v) else v for v in (first, second))
        key = ("choice", id(condition), first, second, element)
        if key not in self._made:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
            constants = [self.notes.constant(np.array(value, dtype), "mask_value") for value in (first, second)]
            self._add(key, "Where", [condition, *constants], list(condition.shape or []), element)
        return self._made[key]

    def _narrowed(self, tensor: gs.Tensor, element: int) -> gs.Tensor:
        key = ("narrowed", id(tensor), element)
        if key not in self._made:
            limit, own = LIMITS[element], element_type(tensor)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(own)
            low, high = (self.notes.constant(np.array(v, dtype), "mask_limit") for v in (-limit, limit))
            shape = list(tensor.shape or [])
            clipped = self._add(("clipped", id(tensor), element), "Clip", [tensor, low, high], shape, own)
            self._add(key, "Cast", [clipped], shape, element, to=int(element))
        return self._made[key]

    def _unsqueezed(self, tensor: gs.Tensor, axes: tuple[int, ...]) -> gs.Tensor:
        key = ("unsqueezed", id(tensor), axes)
        if key not in self._made:
            shape = list(tensor.shape or [])
            for axis in axes:
                shape.insert(axis, 1)
            where = self.notes.constant(np.array(axes, np.int64), "mask_axes")
            self._add(key, "Unsqueeze", [tensor, where], shape, element_type(tensor))
        return self._made[key]

    def _spread(self, tensor: gs.Tensor, block: Block) -> gs.Tensor:
        """A mask with a row for each query and a column for each key; ONNX Runtime spreads none over these itself."""
        shape = list(tensor.shape or [])
        wanted = (block.query, block.key)
        short = [not same_size(size, operand.shape[-2]) for size, operand in zip(shape[2:], wanted, strict=True)]
        if not any(short):
            return tensor
        key = ("spread", id(tensor), *(id(operand.source) for operand in wanted))
        if key not in self._made:
            one = self.notes.constant(np.array([1], np.int64), "one")
            sizes = [self._length(operand) if s else one for s, operand in zip(short, wanted, strict=True)]
            asked = self._add((*key, "sizes"), "Concat", [one, one, *sizes], [4], onnx.TensorProto.INT64, axis=0)
            shape[2:] = [op.shape[-2] if s else size for size, s, op in zip(shape[2:], short, wanted, strict=True)]
            self._add(key, "Expand", [tensor, asked], shape, element_type(tensor))
        return self._made[key]

    def _length(self, operand: Operand) -> gs.Tensor:
        """The number of queries or keys, as a vector."""
        size = operand.shape[-2]
        if isinstance(size, (int, np.integer)):
            return self.notes.constant(np.array([size], np.int64), "length")
        axis = len(operand.shape) - 2 if operand.order is None else operand.order[-2]
        key = ("length", id(operand.source), axis)
        if key not in self._made:
            self._add(key, "Shape", [operand.source], [1], onnx.TensorProto.INT64, start=axis, end=axis + 1)
        return self._made[key]

    def _sum(self, left: gs.Tensor, right: gs.Tensor) -> gs.Tensor:
        key = ("sum", id(left), id(right))
        if key not in self._made:
            shape = [a if b == 1 or same_size(a, b) else b if a == 1 else None
                     for a, b in zip(left.shape or [], right.shape or [], strict=True)]  # fmt: skip
            self._add(key, "Add", [left, right], shape, element_type(left))
        return self._made[key]

    def _add(
        self, key: tuple[object, ...], op: str, inputs: list[gs.Tensor], shape: list[int | str | None], element: int,
        **attributes: object,
    ) -> gs.Tensor:  # fmt: skip
        name = self.notes.fresh_name(f"{inputs[0].name}_{op.lower()}")
        made = gs.Variable(name, gs_type(element), shape)
        node = gs.Node(op, self.notes.fresh_name(f"node_{name}"), attrs=dict(attributes), inputs=inputs, outputs=[made])
        self.nodes.append(node)
        self._made[key] = made
        return made


def _may_be(size: object, length: object) -> bool:
    """Whether the side of a mask, which is no wider than the scores, is as long as these; it might be 1 else."""
    if isinstance(size, str) and isinstance(length, str) and not is_unnamed(size):
        return size == length
    return size != 1


def _lower(matrices: np.ndarray) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """True on and below the diagonal of a square."""
    return np.tri(matrices.shape[-1]).astype(np.bool_)
