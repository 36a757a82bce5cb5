"""Queries, keys and values behind the two products of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .patterns import View, axes, number, same_size, values
from .pipeline import Notes
from .surgery import element_type, rank

_SCALES = {"Mul", "Div"}
_MOST_STEPS = 6


@dataclass(frozen=True)
class Operand:
    """Queries, keys or values.

    Attributes:
        source: a tensor of the graph.
        order: how its axes must be transposed; None where they are right.
        shape: then: (batch, heads, length, size), or without heads.
    """

    source: gs.Tensor
    order: tuple[int, ...] | None
    shape: tuple[Any, ...]

    @classmethod
    def of(cls, source: gs.Tensor, order: Sequence[int] | None = None) -> Operand:
        shape = tuple(source.shape or ())
        if order is None or list(order) == list(range(len(order))):
            return cls(source, None, shape)
        return cls(source, tuple(order), tuple(shape[axis] for axis in order))


Found = tuple[Operand, Operand, Operand, float, tuple[int, ...] | None]


def peel(view: View, product: gs.Node, final: gs.Node, element: int, notes: Notes) -> Found | str:
    """Queries, keys, values, the factor on queries and keys, and the order of the result's axes; or why there are none.

    Args:
        view: of the scope.
        product: of queries and keys.
        final: of weights and values.
        element: the type of the result, which all three must have.
        notes: of the pass.
    """
    letters = _first_letters(product)
    last = _last_letters(final)
    if isinstance(letters, str) or isinstance(last, str):
        return letters if isinstance(letters, str) else str(last)
    if any(rank(tensor) is None for tensor in (*product.inputs, final.inputs[1])):
        return "the number of axes of a product is not known"
    q_tensor, k_tensor = product.inputs
    if letters[2]:
        q_tensor, k_tensor = k_tensor, q_tensor
    q_tensor, q_factor = _unscaled(view, q_tensor, element, notes)
    query = Operand.of(q_tensor, letters[0])
    if letters[1] is None:
        key, k_factor = _transposed(view, k_tensor, element, notes)
    else:
        k_tensor, k_factor = _unscaled(view, k_tensor, element, notes)
        key = Operand.of(k_tensor, letters[1])
    value = Operand.of(final.inputs[1], last[0])
    shared_key, shared_value = unrepeated(view, key, notes), unrepeated(view, value, notes)
    if shared_key is not None and shared_value is not None and shared_key.shape[1] == shared_value.shape[1]:
        key, value = shared_key, shared_value
    for operand, what in ((query, "queries"), (key, "keys"), (value, "values")):
        if element_type(operand.source) != element:
            return f"its {what} have another type than its result"
    return query, key, value, q_factor * k_factor, last[1]


def _first_letters(node: gs.Node) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, bool] | str:
    """Orders of queries and of keys, and whether the keys come first; None for keys that come transposed."""
    if node.op == "MatMul":
        return None, None, False
    parsed = _equation(node)
    if parsed is None:
        return "an Einsum of its is no product of matrices"
    first, second, made = parsed
    batch, row, column = made[:-2], made[-2], made[-1]
    swapped = row not in first
    query, key = (second, first) if swapped else (first, second)
    inner = set(query) & set(key) - set(made)
    fits = len(inner) == 1 and set(query) == {*batch, row, *inner} and set(key) == {*batch, column, *inner}
    if not fits:
        return "an Einsum of its is no product of queries and keys"
    size = inner.pop()
    return _order(query, (*batch, row, size)), _order(key, (*batch, column, size)), swapped


def _last_letters(node: gs.Node) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None] | str:
    """Orders of the values, and of the result."""
    if node.op == "MatMul":
        return None, None
    parsed = _equation(node)
    if parsed is None:
        return "an Einsum of its is no product of matrices"
    weights, value, made = parsed
    batch, row, column = weights[:-2], weights[-2], weights[-1]
    size = set(value) - {*batch, column}
    if len(size) != 1 or set(value) != {*batch, column, *size} or set(made) != {*batch, row, *size}:
        return "an Einsum of its is no product of weights and values"
    letter = size.pop()
    order = _order((*batch, row, letter), made)
    return _order(value, (*batch, column, letter)), None if list(order) == list(range(len(order))) else order


def _equation(node: gs.Node) -> tuple[str, str, str] | None:
    text = node.attrs.get("equation", "")
    text = (text.decode() if isinstance(text, bytes) else text).replace(" ", "")
    left, arrow, made = text.partition("->")
    first, comma, second = left.partition(",")
    terms = (first, second, made)
    if not arrow or not comma or any(len(set(t)) != len(t) or not t.isalpha() for t in terms) or len(made) < 3:
        return None
    return terms


def _order(have: Sequence[str], want: Sequence[str]) -> tuple[int, ...]:
    return tuple(have.index(letter) for letter in want)


def _unscaled(view: View, tensor: gs.Tensor, element: int, notes: Notes) -> tuple[gs.Tensor, float]:
    """What a tensor is ahead of scaling by numbers and of widening, and the number."""
    factor = 1.0
    for _ in range(_MOST_STEPS):
        node = view.maker(tensor, *_SCALES, "Cast", "Identity")
        step = None if node is None else _step(node, tensor, element, notes)
        if step is None:
            break
        tensor, factor = step[0], factor * step[1]
    return tensor, factor


def _step(node: gs.Node, tensor: gs.Tensor, element: int, notes: Notes) -> tuple[gs.Tensor, float] | None:
    if node.op == "Identity":
        return node.inputs[0], 1.0
    if node.op == "Cast":
        widens = element_type(tensor) == onnx.TensorProto.FLOAT != element
        return (node.inputs[0], 1.0) if widens and element_type(node.inputs[0]) == element else None
    for position in (1, 0) if node.op == "Mul" else (1,):
        value = number(node.inputs[position], notes)
        if value and (rank(node.inputs[position]) or 0) <= (rank(node.inputs[1 - position]) or 0):
            return node.inputs[1 - position], value if node.op == "Mul" else 1 / value
    return None


def _transposed(view: View, tensor: gs.Tensor, element: int, notes: Notes) -> tuple[Operand, float]:
    """Keys, of which a tensor is the transpose, and the number that they are scaled by."""
    inner, factor = _unscaled(view, tensor, element, notes)
    node = view.maker(inner, "Transpose")
    if node is not None and node.attrs.get("perm") is not None:
        order = list(node.attrs["perm"])
        order[-2:] = reversed(order[-2:])
        source, more = _unscaled(view, node.inputs[0], element, notes)
        if rank(source) == len(order):
            return Operand.of(source, order), factor * more
    found = _through_reshapes(view, inner, notes)
    if found is not None:
        return found, factor
    known = rank(inner) or 0
    return Operand.of(inner, (*range(known - 2), known - 1, known - 2)), factor


def _through_reshapes(view: View, tensor: gs.Tensor, notes: Notes) -> Operand | None:
    """Keys (B, H, L, D) that were transposed as (B * H, L, D), which is how torch.onnx writes it."""
    back = view.maker(tensor, "Reshape")
    swap = None if back is None else view.maker(back.inputs[0], "Transpose")
    ahead = None if swap is None else view.maker(swap.inputs[0], "Reshape")
    if ahead is None or swap is None or list(swap.attrs.get("perm", ())) != [0, 2, 1] or rank(tensor) != 4:
        return None
    source, flat, made = ahead.inputs[0], ahead.outputs[0], tensor.shape
    wanted = (made[0], made[1], made[3], made[2])
    if rank(flat) != 3 or not (same_size(flat.shape[1], made[3]) and same_size(flat.shape[2], made[2])):
        return None
    if rank(source) == 4 and all(same_size(a, b) for a, b in zip(source.shape, wanted, strict=True)):
        return Operand.of(source)
    shared = _repeated(view, source, wanted, notes)
    # As a Reshape of the repeated heads, so that whoever cannot share them still has them.
    return None if shared is None else replace(Operand.of(source), shape=wanted)


def unrepeated(view: View, operand: Operand, notes: Notes) -> Operand | None:
    """The heads of which an operand has each several times, as grouped-query attention writes it; None if it has not.

    ``Reshape(Expand(Unsqueeze(x, 2), (B, H, n, L, D)), (B, H * n, L, D))``
    """
    if operand.order is not None or len(operand.shape) != 4:
        return None
    source: gs.Tensor | None = operand.source
    if rank(operand.source) == 4:
        node = view.maker(operand.source, "Reshape")
        source = None if node is None else node.inputs[0]
    return None if source is None else _repeated(view, source, operand.shape, notes)


def _repeated(view: View, source: gs.Tensor, shape: Sequence[Any], notes: Notes) -> Operand | None:
    """The heads that an Expand repeats, where the result is read as `shape`."""
    spread = view.maker(source, "Expand")
    apart = None if spread is None else view.maker(spread.inputs[0], "Unsqueeze")
    if spread is None or apart is None or axes(apart, notes) != (2,):
        return None
    heads = apart.inputs[0]
    if rank(heads) != 4 or not all(same_size(heads.shape[axis], shape[axis]) for axis in (0, 2, 3)):
        return None
    few, many = heads.shape[1], shape[1]
    if not (isinstance(few, (int, np.integer)) and isinstance(many, (int, np.integer)) and few > 0) or many % few:
        return None
    asked = values(spread.inputs[1], notes)
    times = source.shape[2] if source.shape is not None and len(source.shape) == 5 else None
    if asked is not None and asked.size == 5:
        times = int(asked[2])
    return Operand.of(heads) if times == many // few else None
