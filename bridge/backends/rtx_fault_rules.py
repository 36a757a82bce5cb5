"""Nodes that TensorRT-RTX 1.6.1 compiles into wrong kernels, and what is written in their place.

Each rule gives, by index of a node in the graph, the nodes that take its place, and constants that these read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

SUFFIX = ".trtbridge"

ELEMENTWISE = {
    "Abs", "Add", "Cast", "Clip", "Div", "Erf", "Exp", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu",
    "Reshape", "Sigmoid", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip
_MOVING = {"Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_REDUCING = {
    "ArgMax", "ArgMin", "CumSum", "GroupNormalization", "Hardmax", "InstanceNormalization", "LayerNormalization",
    "LogSoftmax", "LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "Softmax", "TopK",
}  # fmt: skip
_FEW_POSITIONS = 16
MOST_AXES = 7  # TensorRT has tensors of eight at most, and there is one more


class Instead(NamedTuple):
    """What takes the place of nodes.

    Attributes:
        nodes: by index of the old node; the last one makes its output and has its name.
        constants: initializers that they read.
    """

    nodes: dict[int, list[onnx.NodeProto]]
    constants: list[onnx.TensorProto]


class Facts:
    """What is known of a graph's tensors."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        values = [*graph.value_info, *graph.input, *graph.output]
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.shapes = {value.name: _shape(value) for value in values if value.type.tensor_type.HasField("shape")}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.results = {value.name for value in graph.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.behind_attention: set[str] = set()  # what comes of some Softmax, or of attention as one node
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if node.op_type in ("Softmax", "Attention") or not self.behind_attention.isdisjoint(node.input):
                self.behind_attention.update(node.output)

    def numbers(self, name: str) -> list[int] | None:
        """The values of a small constant of integers."""
        tensor = self.initializers.get(name)
        maker = self.makers.get(name)
        if tensor is None and maker is not None and maker.op_type == "Constant":
            tensor = next((a.t for a in maker.attribute if a.name == "value"), None)
        if tensor is None or math.prod(tensor.dims) > 64 or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return [int(number) for number in numpy_helper.to_array(tensor).reshape(-1)]


def turn_by_index(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """Rotary embedding that is reduced afterwards: halves change places by a Gather instead of Slices and a Concat.

    ::

        x * cos + Concat(Neg(x[..., 8:]), x[..., :8]) * sin      x * cos + Gather(x, [8.., 0..]) * [-1.., 1..] * sin

    With sizes that are fixed, sums, maxima, norms and softmax over what the left side makes are wrong by half of their
    size, over any axis; without a reduction it is right, and so is the right side (transformers' HunYuan, whose
    queries are normalized behind the rotation).
    """
    instead = Instead({}, [])
    for index, node in enumerate(graph.node):
        if node.op_type != "Concat" or node.domain or not _is_reduced(node.output[0], facts):
            continue
        parts = _parts(node, facts)
        if parts is None:
            continue
        source, axis, order, signs = parts
        constants = [numpy_helper.from_array(np.array(order, np.int64), f"{node.name}{SUFFIX}.order")]
        chosen = f"{node.output[0]}{SUFFIX}.chosen"
        last = helper.make_node("Gather", [source, constants[0].name], [node.output[0]], node.name, axis=axis)
        made = [last]
        if min(signs) < 0:
            last.name, last.output[0] = f"{node.name}{SUFFIX}.gather", chosen
            shape = [len(signs)] + [1] * (len(facts.shapes[source]) - axis - 1)
            signed = helper.make_tensor(f"{node.name}{SUFFIX}.signs", facts.types[source], shape, signs)
            constants.append(signed)
            made.append(helper.make_node("Mul", [chosen, signed.name], [node.output[0]], node.name))
        instead.nodes[index] = made
        instead.constants.extend(constants)
    return instead


def multiply_pointwise(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """Convolutions of one position over 2 to 15 positions become products of matrices.

    ::

        Conv(x (N, C, 3, 3), w (O, C, 1, 1), b)        Transpose(MatMul(Transpose(x), Transpose(Reshape(w))) + b)

    Behind the global response normalization of ConvNeXt V2 (arXiv:2301.00808) the left side is NaN over 4 and 9
    positions, and right over 1, 16 and more.
    """
    instead = Instead({}, [])
    for index, node in enumerate(graph.node):
        if node.op_type != "Conv" or node.domain or not _is_pointwise(node, facts):
            continue
        weight = facts.initializers[node.input[1]]
        rank = len(weight.dims)
        name, out = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
        sizes = numpy_helper.from_array(np.array(weight.dims[:2], np.int64), f"{name}.sizes")
        there, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        made = [
            helper.make_node("Reshape", [weight.name, sizes.name], [f"{out}.w"], f"{name}.reshape"),
            helper.make_node("Transpose", [f"{out}.w"], [f"{out}.wt"], f"{name}.turn", perm=[1, 0]),
            helper.make_node("Transpose", [node.input[0]], [f"{out}.x"], f"{name}.there", perm=there),
            helper.make_node("MatMul", [f"{out}.x", f"{out}.wt"], [f"{out}.y"], f"{name}.product"),
        ]
        last = f"{out}.y"
        if len(node.input) > 2 and node.input[2]:
            made.append(helper.make_node("Add", [last, node.input[2]], [f"{out}.z"], f"{name}.bias"))
            last = f"{out}.z"
        made.append(helper.make_node("Transpose", [last], [node.output[0]], node.name, perm=back))
        instead.nodes[index] = made
        instead.constants.append(sizes)
    return instead


def lift_products(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """Products with transposed tokens get one more axis.

    ::

        MatMul(c (B, Q, C), Transpose(x (B, T, C)))      Squeeze(MatMul(c (B, 1, Q, C), Transpose(x (B, 1, T, C))))

    Behind attention the compiler keeps x as (T, B, C), and reads place t of that as token t of each image: every image
    is given the tokens of the first ones (Grounding DINO, whose learned queries are the constant c; also where c and x
    come of the same tokens, x by a linear layer). With x first, as an Einsum, or with a copy of what makes x it is as
    wrong; a product for each image is right, too.
    """
    instead = Instead({}, [])
    axis = numpy_helper.from_array(np.array([1], np.int64), f"trtbridge{SUFFIX}.image_axis")
    for index, node in enumerate(graph.node):
        if node.op_type != "MatMul" or node.domain:
            continue
        turned = facts.makers.get(node.input[1])
        if turned is None or turned.op_type != "Transpose" or turned.domain:
            continue
        constant = facts.initializers.get(node.input[0])
        rank = len(facts.shapes.get(node.input[0], [])) if constant is None else len(constant.dims)
        if not 3 <= rank <= MOST_AXES or _order(turned) != _swap(rank):
            continue
        if constant is None and not _is_projected(turned.input[0], facts):
            continue
        swapped = _swap(rank + 1)
        name, made = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
        instead.nodes[index] = [
            helper.make_node("Unsqueeze", [node.input[0], axis.name], [f"{made}.c"], f"{name}.c"),
            helper.make_node("Unsqueeze", [turned.input[0], axis.name], [f"{made}.x"], f"{name}.x"),
            helper.make_node("Transpose", [f"{made}.x"], [f"{made}.turned"], f"{name}.turn", perm=swapped),
            helper.make_node("MatMul", [f"{made}.c", f"{made}.turned"], [f"{made}.product"], f"{name}.product"),
            helper.make_node("Squeeze", [f"{made}.product", axis.name], [node.output[0]], node.name),
        ]
    if instead.nodes:
        instead.constants.append(axis)
    return instead


def lift_transposes(graph: onnx.GraphProto, facts: Facts) -> Instead:
    """Tokens behind attention that are read across get one more axis.

    ::

        Transpose(x (B, T, C))      Squeeze(Transpose(Unsqueeze(x)))

    As with `lift_products`: the compiler keeps x as (T, B, C), and reads place t of that as token t of each image, into
    a result, a sum, a reshape or a convolution over the sequence (a linear layer on a BERT, with fixed sizes). With x
    as a result, too, it is right; with an Einsum, two Transposes, or the linear layer over rows it is as wrong.
    """
    instead = Instead({}, [])
    axis = numpy_helper.from_array(np.array([1], np.int64), f"trtbridge{SUFFIX}.token_axis")
    for index, node in enumerate(graph.node):
        if node.op_type != "Transpose" or node.domain or _order(node) != _swap(3):
            continue
        if not _is_projected(node.input[0], facts) or not _is_read_across(node, facts):
            continue
        name, made = f"{node.name}{SUFFIX}", f"{node.output[0]}{SUFFIX}"
        instead.nodes[index] = [
            helper.make_node("Unsqueeze", [node.input[0], axis.name], [f"{made}.x"], f"{name}.x"),
            helper.make_node("Transpose", [f"{made}.x"], [f"{made}.turned"], f"{name}.turn", perm=_swap(4)),
            helper.make_node("Squeeze", [f"{made}.turned", axis.name], [node.output[0]], node.name),
        ]
    if instead.nodes:
        instead.constants.append(axis)
    return instead


def _order(node: onnx.NodeProto) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])


def _swap(rank: int) -> list[int]:
    """The order of axes in which the last two change places."""
    return [*range(rank - 2), rank - 1, rank - 2]


def _is_projected(name: str, facts: Facts) -> bool:
    """Whether elementwise ops make a tensor of what a linear layer gives behind attention: what comes of a norm is
    right.
    """
    pending, seen = [name] if name in facts.behind_attention else [], {name}
    while pending:
        maker = facts.makers.get(pending.pop())
        if maker is None or maker.domain:
            continue
        if maker.op_type == "MatMul" and _is_weight(maker.input[1], facts):
            return True
        if maker.op_type in ELEMENTWISE - _MOVING | {"Gelu"}:
            pending += [source for source in maker.input if source not in seen]
            seen.update(maker.input)
    return False


def _is_weight(name: str, facts: Facts) -> bool:
    """Whether it is an initializer, or one that a Transpose turns."""
    maker = facts.makers.get(name)
    turned = maker is not None and maker.op_type == "Transpose" and maker.input[0] in facts.initializers
    return turned or name in facts.initializers


def _is_read_across(node: onnx.NodeProto, facts: Facts) -> bool:
    """Whether it is a result, or something else than a product reads it: `lift_products` takes care of those, and
    attention has such.
    """
    readers = facts.readers.get(node.output[0], [])
    return node.output[0] in facts.results or any(
        reader.op_type != "MatMul" or reader.domain or reader.input[0] == node.output[0] for reader in readers
    )


def _shape(value: onnx.ValueInfoProto) -> list[int | None]:
    return [size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim]


def _is_reduced(name: str, facts: Facts) -> bool:
    """Whether some reduction reads what elementwise ops make of a tensor."""
    seen, pending = {name}, [name]
    while pending:
        for reader in facts.readers.get(pending.pop(), ()):
            if reader.op_type in _REDUCING or reader.op_type.startswith("Reduce"):
                return True
            if reader.op_type in ELEMENTWISE:
                new = {made for made in reader.output if made not in seen}
                seen |= new
                pending += new
    return False


def _parts(node: onnx.NodeProto, facts: Facts) -> tuple[str, int, list[int], list[float]] | None:
    """The tensor whose pieces a Concat joins, the axis, and for each place in it the index and the sign."""
    sources: set[str] = set()
    order: list[int] = []
    signs: list[float] = []
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    for name in node.input:
        maker, sign = facts.makers.get(name), 1.0
        if maker is not None and maker.op_type == "Neg" and not maker.domain:
            name, sign = maker.input[0], -1.0
            maker = facts.makers.get(name)
        if maker is None or maker.domain or None in facts.shapes.get(maker.input[0], [None]):
            return None
        rank = len(facts.shapes[maker.input[0]])
        axis = axis % rank
        piece = _slice(maker, axis, facts) if maker.op_type == "Slice" else _split(maker, name, axis, facts)
        if piece is None:
            return None
        sources.add(maker.input[0])
        order += piece
        signs += [sign] * len(piece)
    if len(sources) != 1 or min(signs) > 0 or not order:
        return None
    source = sources.pop()
    if all(reader.op_type in ("Slice", "Split") for reader in facts.readers[source]):
        return None  # What is wrong is to read a tensor both ways.
    return source, axis, order, signs


def _slice(node: onnx.NodeProto, axis: int, facts: Facts) -> range | None:
    shape = facts.shapes[node.input[0]]
    given = [facts.numbers(name) for name in node.input[1:] if name]
    if len(given) != len(node.input) - 1 or len(given) < 3 or any(numbers is None for numbers in given):
        return None
    starts, ends, axes = (numbers or [] for numbers in given[:3])
    steps = (given[3] if len(given) > 3 else None) or [1]
    size = shape[axis]
    if len(axes) != 1 or axes[0] % len(shape) != axis or size is None or steps != [1]:
        return None
    return range(*slice(starts[0], ends[0]).indices(size))


def _split(node: onnx.NodeProto, name: str, axis: int, facts: Facts) -> range | None:
    if node.op_type != "Split":
        return None
    along = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    shapes = [facts.shapes.get(made) for made in node.output]
    if along % len(facts.shapes[node.input[0]]) != axis or any(shape is None for shape in shapes):
        return None
    sizes = [shape[axis] for shape in shapes if shape is not None]
    position = list(node.output).index(name)
    if any(size is None for size in sizes):
        return None
    start = sum(size or 0 for size in sizes[:position])
    return range(start, start + (sizes[position] or 0))


def _is_pointwise(node: onnx.NodeProto, facts: Facts) -> bool:
    weight, shape = facts.initializers.get(node.input[1]), facts.shapes.get(node.input[0])
    if weight is None or shape is None or any(size != 1 for size in weight.dims[2:]) or len(weight.dims) < 3:
        return False
    plain: Mapping[str, tuple[object, ...]] = {"strides": (1,), "pads": (0,), "group": (1,), "auto_pad": (b"NOTSET",)}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        values = value if isinstance(value, list) else [value]
        if any(each not in plain.get(attribute.name, (each,)) for each in values):
            return False
    positions = shape[2:]
    return None not in positions and 1 < math.prod(size or 0 for size in positions) < _FEW_POSITIONS
