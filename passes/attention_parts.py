"""What FuseAttention looks for: scores, masks, the softmax and the product with the values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import onnx
import onnx_graphsurgeon as gs

from .attention_operands import Operand, peel
from .patterns import View, number, same_size
from .pipeline import Notes
from .surgery import element_type, rank, type_name

TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
LOW = -3e4
"""Scores from here down are none: what is added to hide a position is at most this."""

_MOST_STEPS = 12
"""Nodes between a product and the softmax; attention as people write it has half as many."""


@dataclass(frozen=True)
class Mask:
    """What hides or shifts scores.

    Attributes:
        tensor: what is added, or the condition.
        low: for a condition what stands in the place of hidden scores; None where the tensor is added.
        keeps: whether the condition says which scores stay, not which are hidden.
    """

    tensor: gs.Tensor
    low: float | None = None
    keeps: bool = True


@dataclass(frozen=True)
class Scores:
    """``(product * factor + masks)``, as a softmax reads it.

    Attributes:
        product: the node that multiplies queries and keys.
        factor: what its result is multiplied by.
        masks: in the order in which they come.
        parts: all nodes up to here, that product too.
        problem: why this cannot be attention; "" where it can.
    """

    product: gs.Node
    factor: float = 1.0
    masks: tuple[Mask, ...] = ()
    parts: tuple[gs.Node, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Weights:
    """What comes behind a softmax.

    Attributes:
        final: the node that multiplies the weights with the values.
        parts: the nodes between, first to last, the softmax too.
        guarded: whether rows that are NaN become zero.
    """

    final: gs.Node
    parts: tuple[gs.Node, ...]
    guarded: bool = False


@dataclass(frozen=True)
class Block:
    """Attention in its parts: ``softmax(q k^T * scale + masks) v``.

    Attributes:
        query: (batch, heads, length, size), or (batch, length, size).
        key: (batch, heads, length, size), whose heads may be fewer by a whole factor.
        value: likewise.
        scale: what scores are multiplied by.
        masks: as found.
        softmax: the node.
        final: the node whose output is the result.
        output: the order of axes of the result, where it is not (batch, heads, length, size).
        parts: the nodes that nothing else needs, first to last, `final` not among them.
        guarded: whether rows that are NaN become zero.
    """

    query: Operand
    key: Operand
    value: Operand
    scale: float
    masks: tuple[Mask, ...]
    softmax: gs.Node
    final: gs.Node
    output: tuple[int, ...] | None
    parts: tuple[gs.Node, ...]
    guarded: bool = False


@dataclass
class Finder:
    """Finds attention around the softmaxes of one scope.

    Attributes:
        view: of the scope.
        notes: of the pass.
    """

    view: View
    notes: Notes
    _seen: dict[int, Scores | None] = field(default_factory=dict)

    def find(self, softmax: gs.Node) -> Block | str | None:
        """The attention around a softmax, why it is none although it looks so, or None."""
        self._seen.clear()
        scores = self._scores(softmax.inputs[0], 0)
        if scores is None:
            return None
        known = rank(softmax.inputs[0])
        axis = softmax.attrs.get("axis", -1)
        behind = self._weights(softmax)
        if isinstance(behind, str) or behind is None:
            return behind
        if axis != -1 and axis + 1 != known:
            return f"its softmax is over axis {axis}, not over the keys"
        if scores.problem:
            return scores.problem
        parts = (*scores.parts, *behind.parts)
        inside = {id(node) for node in (*parts, behind.final)}
        for node in parts:
            if not self.view.only_for(node.outputs[0], inside):
                return f"{node.outputs[0].name!r} inside it is read elsewhere"
        return self._block(scores, softmax, behind, parts)

    def _scores(self, tensor: gs.Tensor, depth: int) -> Scores | None:
        """The product that a tensor comes from, and what happens to it on the way."""
        if id(tensor) not in self._seen:
            self._seen[id(tensor)] = None  # A graph has no cycles, but the same sum may be met by many ways.
            self._seen[id(tensor)] = self._follow(tensor, depth)
        return self._seen[id(tensor)]

    def _follow(self, tensor: gs.Tensor, depth: int) -> Scores | None:
        node = self.view.maker(tensor)
        if node is None or depth > _MOST_STEPS:
            return None
        match node.op:
            case "MatMul" | "Einsum":
                if len(node.inputs) != 2 or any(isinstance(t, gs.Constant) or (rank(t) or 4) < 3 for t in node.inputs):
                    return None
                return Scores(node, parts=(node,))
            case "Mul" | "Div":
                found = scaled_by(node, self.notes)
                inner = self._scores(found[0], depth + 1) if found else None
                if inner is None or found is None:
                    return None
                problem = "its mask is scaled, too" if inner.masks else inner.problem
                return self._add(inner, node, factor=inner.factor * found[1], problem=problem)
            case "Cast" | "Identity":
                inner = self._scores(node.inputs[0], depth + 1)
                fits = element_type(node.outputs[0]) in TYPES
                return None if inner is None or not fits else self._add(inner, node)
            case "Add":
                for position in (0, 1):
                    inner = self._scores(node.inputs[position], depth + 1)
                    if inner is not None:
                        return self._add(inner, node, masks=(*inner.masks, Mask(node.inputs[1 - position])))
            case "Where":
                for position in (1, 2):
                    inner = self._scores(node.inputs[position], depth + 1)
                    if inner is None:
                        continue
                    low = number(node.inputs[3 - position], self.notes)
                    problem = inner.problem
                    if low is None or not low <= LOW:
                        problem = f"hidden scores become {'what varies' if low is None else low}, not a very low number"
                    mask = Mask(node.inputs[0], low if low is not None else -math.inf, position == 1)
                    return self._add(inner, node, masks=(*inner.masks, mask), problem=problem)
            case "Tanh":
                inner = self._scores(node.inputs[0], depth + 1)
                return None if inner is None else self._add(inner, node, problem="its scores are capped by a tanh")
            case "Reshape":
                inner = self._scores(node.inputs[0], depth + 1)
                return None if inner is None else self._add(inner, node, problem="its scores are reshaped")
        return None

    def _add(
        self,
        inner: Scores,
        node: gs.Node,
        factor: float | None = None,
        masks: tuple[Mask, ...] | None = None,
        problem: str | None = None,
    ) -> Scores:
        return replace(
            inner,
            parts=(*inner.parts, node),
            factor=inner.factor if factor is None else factor,
            masks=inner.masks if masks is None else masks,
            problem=inner.problem if problem is None else problem,
        )

    def _weights(self, softmax: gs.Node) -> Weights | str | None:
        """What multiplies the weights with values; words where the way there is not clear."""
        tensor = softmax.outputs[0]
        parts, guarded = [softmax], False
        for _ in range(_MOST_STEPS):
            readers = self.view.readers(tensor)
            products = [n for n in readers if n.op in ("MatMul", "Einsum") and n.inputs[0] is tensor]
            if len(products) == 1 and len(readers) == 1 and not self.view.is_output(tensor):
                return Weights(products[0], tuple(parts), guarded)
            if products:
                return f"its weights {tensor.name!r} are read elsewhere"
            guard = self._guard(tensor, readers)
            if guard is not None:
                parts += guard
                guarded, tensor = True, guard[-1].outputs[0]
                continue
            node = self.view.reader(tensor, "Cast", "Identity", "Dropout")
            if node is None:
                return None
            if node.op == "Dropout":
                return "a Dropout stands behind its softmax"
            if node.op == "Cast" and element_type(node.outputs[0]) not in TYPES:
                return None
            parts.append(node)
            tensor = node.outputs[0]
        return None

    def _guard(self, tensor: gs.Tensor, readers: Sequence[gs.Node]) -> list[gs.Node] | None:
        """``Where(IsNaN(x), 0, x)``, the latter perhaps cast."""
        tests = [node for node in readers if node.op == "IsNaN"]
        others = [node for node in readers if node.op != "IsNaN"]
        if len(tests) != 1 or len(others) != 1 or self.view.is_output(tensor):
            return None
        test, choice = tests[0], others[0]
        between = [choice] if choice.op == "Cast" else []
        if between:
            tensor = choice.outputs[0]
            found = self.view.reader(tensor, "Where")
            if found is None:
                return None
            choice = found
        fits = choice.op == "Where" and choice.inputs[0] is test.outputs[0] and choice.inputs[2] is tensor
        return [test, *between, choice] if fits and number(choice.inputs[1], self.notes) == 0 else None

    def _block(self, scores: Scores, softmax: gs.Node, behind: Weights, parts: tuple[gs.Node, ...]) -> Block | str:
        final = behind.final
        result = final.outputs[0]
        element = element_type(result)
        if element not in TYPES:
            return f"it is in {type_name(element)}; the op has float32, float16 and bfloat16 here"
        operands = peel(self.view, scores.product, final, element, self.notes)
        if isinstance(operands, str):
            return operands
        query, key, value, factor, output = operands
        scale = scores.factor * factor
        if not (math.isfinite(scale) and scale > 0):
            return f"its scores are scaled by {scale}"
        reason = self._misfit(query, key, value, result, output, scores.masks)
        if reason:
            return reason
        return Block(query, key, value, scale, scores.masks, softmax, final, output, parts, behind.guarded)

    def _misfit(
        self,
        query: Operand,
        key: Operand,
        value: Operand,
        result: gs.Tensor,
        output: tuple[int, ...] | None,
        masks: Sequence[Mask],
    ) -> str:
        """Why shapes do not fit the op; "" where they do."""
        count = len(query.shape)
        if count not in (3, 4) or {len(key.shape), len(value.shape)} != {count}:
            return f"its tensors have {count}, {len(key.shape)} and {len(value.shape)} axes; the op takes 4"
        for operand in (key, value):
            if not same_size(query.shape[0], operand.shape[0]):
                return f"its batches {query.shape[0]} and {operand.shape[0]} may differ"
        if count == 4:
            heads = [operand.shape[1] for operand in (query, key, value)]
            if not all(isinstance(size, int) and size > 0 for size in heads):
                return f"the numbers of its heads are not fixed: {heads}"
            if heads[1] != heads[2] or heads[0] % heads[1]:
                return f"its {heads[0]} heads do not share {heads[1]} keys and {heads[2]} values evenly"
        sizes = [query.shape[-1], key.shape[-1], value.shape[-1]]
        if not all(isinstance(size, int) and size > 0 for size in sizes) or sizes[0] != sizes[1]:
            return f"the sizes of its heads are not fixed and alike: {sizes}"
        if any(rank(mask.tensor) is None or (rank(mask.tensor) or 0) > count for mask in masks):
            return "a mask has more axes than the scores, or nobody knows how many"
        for mask in masks:
            if not self._broadcasts(mask.tensor, query, result, output):
                return f"its mask {mask.tensor.name!r} may be larger than its scores"
        return ""

    def _broadcasts(self, mask: gs.Tensor, query: Operand, result: gs.Tensor, output: tuple[int, ...] | None) -> bool:
        """Whether a mask surely does not widen scores: the result is as large as the queries, or the mask is small."""
        made = list(result.shape or [])
        if output is not None and len(made) == len(output):
            made = [made[output.index(axis)] for axis in range(len(output))]
        last = len(query.shape) - 1
        if len(made) == last + 1 and all(same_size(made[axis], query.shape[axis]) for axis in range(last)):
            return True
        shape = list(mask.shape or [])
        ahead = [None] * (last + 1 - len(shape)) + shape
        return all(
            (size is None and axis < last + 1 - len(shape)) or size == 1 or same_size(size, query.shape[axis])
            for axis, size in enumerate(ahead[:last])
        )


def scaled_by(node: gs.Node, notes: Notes) -> tuple[gs.Tensor, float] | None:
    """For a product or quotient with a number: what is scaled, and by what."""
    for position in (1, 0):
        value = number(node.inputs[position], notes)
        if value is None or (rank(node.inputs[position]) or 0) > (rank(node.inputs[1 - position]) or 0):
            continue
        if node.op == "Mul":
            return node.inputs[1 - position], value
        return (node.inputs[0], 1 / value) if position == 1 and value else None
    return None
