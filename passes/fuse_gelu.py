"""Find GELU in its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .patterns import View, number, sweep
from .pipeline import Notes, Pass
from .surgery import become, element_type

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Make one Gelu of the ops that it was written with; opset 20 and later.

    ::

        x * 0.5 * (1 + Erf(x / sqrt(2)))                                 Gelu(x)
        x * 0.5 * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))     Gelu(x, approximate="tanh")

    after Hendrycks and Gimpel, "Gaussian Error Linear Units" (arXiv:1606.08415). The factors may come in any order, as
    Mul or Div, and the cube as Pow or Mul. Constants are compared to 2e-3 relative: models carry them with few digits,
    and in bfloat16. Fires on float32, float16 and bfloat16 where nothing else reads the parts. The result
    differs by rounding: about 1e-6 of the largest output in float32; halves come out more exact. TensorRT-RTX 1.6.1
    and 1.7.1 build both forms in all three types, with dynamic shapes too.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sweep(graph, lambda view, node: _step(view, node, notes))


@dataclass
class _Product:
    """A product taken apart: the constant in it, the other factors, and the nodes that make it, last first."""

    constant: float
    factors: list[gs.Tensor]
    nodes: list[gs.Node]


_MOST_FACTORS = 8
"""More than any form of GELU has; bounds the work on long products."""


def _product(view: View, node: gs.Node, notes: Notes) -> _Product:
    """The factors of a Mul or Div, and of those Mul and Div that work for it alone."""
    found = _Product(1.0, [], [node])
    pending = [(tensor, node, position) for position, tensor in enumerate(node.inputs)]
    while pending:
        tensor, reader, position = pending.pop()
        value = number(tensor, notes)
        if reader.op == "Div" and position == 1:
            found.constant *= 1 / value if value else math.nan  # No form of GELU divides by a tensor.
            continue
        if value is not None:
            found.constant *= value
            continue
        maker = view.maker(tensor, "Mul", "Div")
        if maker is None or len(found.nodes) >= _MOST_FACTORS or not view.only_for(tensor, {id(reader)}):
            found.factors.append(tensor)
            continue
        found.nodes.append(maker)
        pending.extend((inner, maker, index) for index, inner in enumerate(maker.inputs))
    return found


def _step(view: View, node: gs.Node, notes: Notes) -> bool:
    if node.op not in ("Mul", "Div") or element_type(node.outputs[0]) not in _TYPES:
        return False
    product = _product(view, node, notes)
    if len(product.factors) != 2 or not _near(product.constant, 0.5):
        return False
    for source, gate in (product.factors, product.factors[::-1]):
        add = view.maker(gate, "Add")
        if add is None:
            continue
        ones = [position for position, tensor in enumerate(add.inputs) if number(tensor, notes) == 1.0]
        inner = view.maker(add.inputs[1 - ones[0]], "Erf", "Tanh") if ones else None
        if inner is None:
            continue
        parts = _erf(view, inner, source, notes) if inner.op == "Erf" else _tanh(view, inner, source, notes)
        if parts is None:
            continue
        return _fuse(view, node, source, [*product.nodes, add, inner, *parts], inner.op, notes)
    return False


def _fuse(view: View, node: gs.Node, source: gs.Tensor, parts: list[gs.Node], gate: str, notes: Notes) -> bool:
    ids = {id(part) for part in parts}
    for part in parts:
        if part is not node and not view.only_for(part.outputs[0], ids):
            notes.refused(node, f"it is a GELU, but {part.outputs[0].name!r} inside it is read elsewhere")
            return False
    if notes.opset < 20:
        notes.refused(node, f"it is a GELU, but Gelu came with opset 20 and the model has {notes.opset}")
        return False
    become(node, "Gelu", [source])
    if gate == "Tanh":
        node.attrs["approximate"] = "tanh"
    view.retire(*parts[1:])
    return True


def _erf(view: View, erf: gs.Node, source: gs.Tensor, notes: Notes) -> list[gs.Node] | None:
    """The nodes of ``x / sqrt(2)``."""
    scaled = view.maker(erf.inputs[0], "Mul", "Div")
    if scaled is None:
        return None
    product = _product(view, scaled, notes)
    fits = _is_only(product, source) and _near(product.constant, math.sqrt(0.5))
    return product.nodes if fits else None


def _tanh(view: View, tanh: gs.Node, source: gs.Tensor, notes: Notes) -> list[gs.Node] | None:
    """The nodes of ``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``, or of ``x * sqrt(2 / pi) * (1 + 0.044715 * x ** 2)``."""
    scaled = view.maker(tanh.inputs[0], "Mul", "Div")
    product = _product(view, scaled, notes) if scaled is not None else None
    if product is None or not _near(product.constant, math.sqrt(2 / math.pi)):
        return None
    rest = [factor for factor in product.factors if factor is not source]
    outside = len(product.factors) - len(rest)
    add = view.maker(rest[0], "Add") if len(rest) == 1 and outside <= 1 else None
    if add is None:
        return None
    for position in (0, 1):
        linear, higher = add.inputs[position], add.inputs[1 - position]
        if not (number(linear, notes) == 1.0 if outside else linear is source):
            continue
        power = _power(view, higher, source, 2 if outside else 3, notes)
        if power is not None:
            return [*product.nodes, add, *power]
    return None


def _power(view: View, tensor: gs.Tensor, source: gs.Tensor, exponent: int, notes: Notes) -> list[gs.Node] | None:
    """The nodes of ``0.044715 * x ** exponent``."""
    scaled = view.maker(tensor, "Mul", "Div")
    if scaled is None:
        return None
    product = _product(view, scaled, notes)
    nodes = list(product.nodes)
    for factor in product.factors:
        power = view.maker(factor, "Pow")
        if factor is source:
            exponent -= 1
        elif (
            power is not None and power.inputs[0] is source and (value := number(power.inputs[1], notes)) in (2.0, 3.0)
        ):
            exponent -= int(value)
            nodes.append(power)
        else:
            square = view.maker(factor, "Mul")
            if square is None or any(tensor is not source for tensor in square.inputs):
                return None
            exponent -= 2
            nodes.append(square)
    return nodes if exponent == 0 and _near(product.constant, 0.044715) else None


def _is_only(product: _Product, source: gs.Tensor) -> bool:
    return len(product.factors) == 1 and product.factors[0] is source


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=2e-3)
