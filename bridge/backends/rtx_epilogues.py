"""What follows a product with a bias, where TensorRT-RTX 1.6.1 makes one kernel of both that computes something else.

Both were found by building small graphs of each product, activation and next operation in turn, and running them on an
H200 beside ONNX Runtime. Each rule gives what takes the place of a node, as those of rtx_fault_rules.py.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .rtx_fault_rules import SUFFIX, Facts, Instead

_THROUGH = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_MOST_AXES = 7  # TensorRT has tensors of eight at most, and there is one more
_FAR = 6  # nodes that a GELU in its parts has at most between its input and its output
_AXIS = "trtbridge.epilogue_axis"


def scale_apart(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """A product with a bias, ReLU or GELU, and a multiplication: the last in a kernel of its own.

    ::

        Mul(Relu(Gemm(x, w, b)), s)        Squeeze(Mul(Unsqueeze(Relu(Gemm(x, w, b))), s))

    In place of the left side the kernel computes ``Relu(x w) s``, the bias forgotten; with products over three axes and
    more no execution context can be made. It is so with every factor: another product (gated units), one number, the
    activation itself; in float32 and float16; with GELU as a node, with tanh, or in its parts. With other activations
    (SiLU, LeakyReLU, ReLU6, ELU, Mish ...), without a bias, behind a convolution, and with Add or Pow in place of Mul
    it is right, and so is the right side, but for a GELU of a matrix and a constant, which is written out in an order
    that the compiler does not know.
    """
    instead = Instead({}, [])
    for index, node in enumerate(graph.node):
        if node.op_type != "Mul" or node.domain or len(node.input) != 2:
            continue
        for position, name in enumerate(node.input):
            found = _activation(name, facts)
            if found is None or not _has_bias(found[1], facts):
                continue
            kind, source = found
            other = node.input[1 - position]
            rank = len(facts.shapes.get(name, [None] * (_MOST_AXES + 1)))
            of_matrix = rank <= 2 and _before_moves(name, facts) == name
            if kind != "Relu" and of_matrix and _is_constant(other, facts):
                made, constants = _written_out(node, kind, source, other, facts)
                instead.constants.extend(constants)
            elif rank <= _MOST_AXES:
                made = _one_axis_more(node, position)
            else:
                continue
            instead.nodes[index] = made
            break
    return _with_axis(instead)


def add_apart(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """A convolution and one number for each of its images: added in a kernel of its own.

    ::

        Add(Conv(x, w, b), s (N, 1, 1, 1))        Squeeze(Add(Unsqueeze(Conv(x, w, b)), s))

    The left side reads addresses that are none (the process can use the GPU no more), or computes something else with
    filters of one position. With an activation between both, and with Mul, Sub or Div, it is right.
    """
    instead = Instead({}, [])
    for index, node in enumerate(graph.node):
        if node.op_type != "Add" or node.domain:
            continue
        for position, name in enumerate(node.input):
            maker, other = facts.makers.get(name), node.input[1 - position]
            shape = facts.shapes.get(other, [])
            if maker is None or maker.op_type != "Conv" or maker.domain or _is_constant(other, facts):
                continue
            if 3 <= len(shape) <= _MOST_AXES and all(size == 1 for size in shape[1:]):
                instead.nodes[index] = _one_axis_more(node, position)
                break
    return _with_axis(instead)


def _activation(name: str, facts: Facts) -> tuple[str, str] | None:
    """The kind of the ReLU or GELU that makes a tensor, and the tensor that it is of."""
    maker = facts.makers.get(_before_moves(name, facts))
    if maker is None or maker.domain:
        return None
    if maker.op_type == "Relu":
        return "Relu", maker.input[0]
    if maker.op_type == "Gelu":
        form = next((attribute.s for attribute in maker.attribute if attribute.name == "approximate"), b"none")
        return ("Tanh" if form == b"tanh" else "Erf"), maker.input[0]
    if maker.op_type == "Mul":
        return _gelu_in_parts(maker, facts)
    return None


def _gelu_in_parts(last: onnx.NodeProto, facts: Facts) -> tuple[str, str] | None:
    """``x * 0.5 * (1 + Erf(x / sqrt(2)))``, its factors in any order: the tensor x."""
    factors: list[str] = []
    pending = list(last.input)
    while pending and len(factors) < _FAR:
        name = pending.pop()
        maker = facts.makers.get(name)
        if maker is not None and maker.op_type == "Mul" and not maker.domain:
            pending += maker.input
        else:
            factors.append(name)
    if pending or not any(_is_constant(name, facts) for name in factors):
        return None
    for name in factors:
        plus = facts.makers.get(name)
        if plus is None or plus.op_type != "Add" or plus.domain:
            continue
        for term in plus.input:
            erf = facts.makers.get(term)
            scaled = facts.makers.get(erf.input[0]) if erf is not None and erf.op_type == "Erf" else None
            if scaled is not None and scaled.op_type in ("Div", "Mul"):
                source = next((each for each in scaled.input if each in factors), None)
                if source is not None:
                    return "Erf", source
    return None


def _has_bias(name: str, facts: Facts) -> bool:
    """Whether a tensor is a product of matrices plus a constant."""
    maker = facts.makers.get(_before_moves(name, facts))
    if maker is None or maker.domain:
        return False
    if maker.op_type == "Gemm":
        return len(maker.input) > 2 and bool(maker.input[2])
    if maker.op_type != "Add" or not any(_is_constant(term, facts) for term in maker.input):
        return False
    products = [facts.makers.get(_before_moves(term, facts)) for term in maker.input]
    return any(made is not None and made.op_type in ("MatMul", "Gemm") and not made.domain for made in products)


def _before_moves(name: str, facts: Facts) -> str:
    """The tensor that a tensor is, in another shape."""
    maker = facts.makers.get(name)
    while maker is not None and maker.op_type in _THROUGH and not maker.domain:
        name = maker.input[0]
        maker = facts.makers.get(name)
    return name


def _is_constant(name: str, facts: Facts) -> bool:
    maker = facts.makers.get(name)
    return name in facts.initializers or (maker is not None and maker.op_type == "Constant" and not maker.domain)


def _one_axis_more(node: onnx.NodeProto, position: int) -> list[onnx.NodeProto]:
    """The node on one operand with one more axis in front, which is taken off its result again."""
    name, out = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
    inputs = list(node.input)
    inputs[position] = f"{out}.u"
    return [
        helper.make_node("Unsqueeze", [node.input[position], _AXIS], [inputs[position]], f"{name}.unsqueeze"),
        helper.make_node(node.op_type, inputs, [f"{out}.v"], f"{name}.apart"),
        helper.make_node("Squeeze", [f"{out}.v", _AXIS], [node.output[0]], node.name),
    ]


def _written_out(
    node: onnx.NodeProto, kind: str, source: str, other: str, facts: Facts
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """``0.5 (x + x f(x)) c``, in float32: with f the error function of ``x / sqrt(2)``, or the tangent close to it."""
    name, out = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
    element = facts.types.get(node.output[0]) or facts.types.get(source) or onnx.TensorProto.FLOAT
    constants: list[onnx.TensorProto] = []
    made: list[onnx.NodeProto] = []

    def number(value: float, label: str) -> str:
        constants.append(numpy_helper.from_array(np.array(value, np.float32), f"{name}.{label}"))
        return constants[-1].name

    def step(op: str, inputs: list[str], label: str, **attributes: int) -> str:
        made.append(helper.make_node(op, inputs, [f"{out}.{label}"], f"{name}.{label}", **attributes))
        return f"{out}.{label}"

    is_float32 = element == onnx.TensorProto.FLOAT
    x = source if is_float32 else step("Cast", [source], "x", to=onnx.TensorProto.FLOAT)
    if kind == "Erf":
        inner = step("Mul", [x, number(math.sqrt(0.5), "root")], "scaled")
    else:
        cube = step("Mul", [step("Mul", [x, x], "square"), x], "cube")
        inner = step("Add", [x, step("Mul", [cube, number(0.044715, "share")], "bent")], "sum")
        inner = step("Mul", [inner, number(math.sqrt(2 / math.pi), "root")], "scaled")
    whole = step("Add", [x, step("Mul", [x, step(kind, [inner], "f")], "part")], "whole")
    half = step("Mul", [whole, number(0.5, "half")], "halved")
    if not is_float32:
        half = step("Cast", [half], "back", to=element)
    made.append(helper.make_node("Mul", [half, other], [node.output[0]], node.name))
    return made, constants


def _with_axis(instead: Instead) -> Instead:
    if any(_AXIS in node.input for nodes in instead.nodes.values() for node in nodes):
        instead.constants.append(numpy_helper.from_array(np.zeros(1, np.int64), _AXIS))
    return instead
