"""What follows a product with a bias, where TensorRT-RTX 1.6.1 makes one kernel of both that computes something else.

Both were found by building small graphs of each product, activation and next operation in turn, and running them on an
H200 beside ONNX Runtime. Each rule gives what takes the place of a node, as those of rtx_fault_rules.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .rtx_fault_rules import SUFFIX, Facts, Instead

_THROUGH = {"Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"}
_MOST_AXES = 7  # TensorRT has tensors of eight at most, and there is one more
_FACTORS = 3  # of a GELU in its parts
_AXIS = "trtbridge.epilogue_axis"
_UNKNOWN = [None] * (_MOST_AXES + 1)


def scale_apart(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """A product with a bias, ReLU or GELU, and a multiplication: not in one kernel.

    ::

        Mul(Relu(Gemm(x, w, b)), s)        Squeeze(Mul(Unsqueeze(Relu(Gemm(x, w, b))), s))
        Mul(Gelu(Gemm(x, w, b)), s)        y = Gemm(x, w, b)    Mul(0.5 (y + y Erf(y / sqrt(2))), s)

    In place of the left side the kernel computes ``Relu(x w) s``, the bias forgotten; with products over three axes and
    more no execution context can be made. It is so with every factor: another product or the other half of the same
    one (gated units), one number, the activation itself; in float32 and float16; with GELU as a node, with tanh, or in
    its parts. With other activations (SiLU, LeakyReLU, ReLU6, ELU, Mish ...), without a bias, behind a convolution, and
    with Add or Pow in place of Mul it is right, and so is the right side: a ReLU's product is kept apart by one more
    axis, which is not enough for GELU, so that is written out in an order that the compiler does not know.
    """
    instead = Instead({}, [])
    places = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    for index, node in enumerate(graph.node):
        if node.op_type != "Mul" or node.domain or len(node.input) != 2:
            continue
        for position, name in enumerate(node.input):
            found = _activation(name, facts)
            if found is None or not _has_bias(found[1], facts):
                continue
            kind, source = found
            if kind == "Relu":
                if index not in instead.nodes and len(facts.shapes.get(name, _UNKNOWN)) <= _MOST_AXES:
                    instead.nodes[index] = one_axis_more(node, position)
                continue
            last = _before_moves(name, facts)
            if places[last] not in instead.nodes:
                made, constants = _written_out(graph.node[places[last]], kind, source, facts)
                instead.nodes[places[last]] = made
                instead.constants.extend(constants)
    return with_axis(instead)


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
                instead.nodes[index] = one_axis_more(node, position)
                break
    return with_axis(instead)


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
    while pending:
        name = pending.pop()
        maker = facts.makers.get(name)
        if maker is not None and maker.op_type == "Mul" and not maker.domain:
            pending += maker.input
        else:
            factors.append(name)
        if len(factors) + len(pending) > _FACTORS:
            return None
    halves = [name for name in factors if _is_number(name, 0.5, facts)]
    others = [name for name in factors if name not in halves]
    if len(halves) != 1 or len(others) != _FACTORS - 1:
        return None
    for sum_, source in (others, others[::-1]):
        erf = _other_operand(sum_, "Add", 1.0, facts)
        maker = facts.makers.get(erf or "")
        if maker is None or maker.op_type != "Erf":
            continue
        scaled = maker.input[0]
        if source in (
            _other_operand(scaled, "Mul", math.sqrt(0.5), facts),
            _other_operand(scaled, "Div", math.sqrt(2), facts),
        ):
            return "Erf", source
    return None


def _other_operand(name: str, op: str, number: float, facts: Facts) -> str | None:
    """The operand beside a number of the operation that makes a tensor; None where it is made otherwise."""
    maker = facts.makers.get(name)
    if maker is None or maker.op_type != op or maker.domain:
        return None
    first, second = str(maker.input[0]), str(maker.input[1])
    if _is_number(second, number, facts):
        return first
    return second if op != "Div" and _is_number(first, number, facts) else None


def _is_number(name: str, number: float, facts: Facts) -> bool:
    tensor, maker = facts.initializers.get(name), facts.makers.get(name)
    if tensor is None and maker is not None and maker.op_type == "Constant":
        tensor = next((attribute.t for attribute in maker.attribute if attribute.name == "value"), None)
    if tensor is None or math.prod(tensor.dims) != 1 or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return math.isclose(float(numpy_helper.to_array(tensor).reshape(())), number, rel_tol=1e-3)


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
    """The tensor that a tensor is, or is a part of, in another shape."""
    maker = facts.makers.get(name)
    while maker is not None and maker.op_type in _THROUGH and not maker.domain:
        name = maker.input[0]
        maker = facts.makers.get(name)
    return name


def _is_constant(name: str, facts: Facts) -> bool:
    maker = facts.makers.get(name)
    return name in facts.initializers or (maker is not None and maker.op_type == "Constant" and not maker.domain)


def one_axis_more(node: onnx.NodeProto, position: int) -> list[onnx.NodeProto]:
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
    node: onnx.NodeProto, kind: str, source: str, facts: Facts
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """``0.5 (x + x f(x))``, in float32: with f the error function of ``x / sqrt(2)``, or the tangent close to it."""
    name, out = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
    element = facts.types.get(node.output[0]) or facts.types.get(source) or onnx.TensorProto.FLOAT
    constants: list[onnx.TensorProto] = []
    made: list[onnx.NodeProto] = []

    def number(value: float, label: str) -> str:
        constants.append(numpy_helper.from_array(np.array(value, np.float32), f"{name}.{label}"))
        return constants[-1].name

    def step(op: str, inputs: list[str], label: str, **attributes: Any) -> str:
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
    step("Add", [x, step("Mul", [x, step(kind, [inner], "f")], "part")], "whole")
    step("Mul", [f"{out}.whole", number(0.5, "half")], "halved")
    if not is_float32:
        step("Cast", [f"{out}.halved"], "back", to=element)
    made[-1].name, made[-1].output[0] = node.name, node.output[0]
    return made, constants


def with_axis(instead: Instead) -> Instead:
    """The same with the constant that `one_axis_more` reads, where something does."""
    if any(_AXIS in node.input for nodes in instead.nodes.values() for node in nodes):
        instead.constants.append(numpy_helper.from_array(np.zeros(1, np.int64), _AXIS))
    return instead
