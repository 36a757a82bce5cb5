"""How large a size that depends on data can get, as an expression over the sizes of the inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..nodes import ONNX_NODE_OP, STANDARD_DOMAINS, decode_nodes

Size = int | str | None
"""A size: a number, an expression ("2*batch + 1"), or None where it is not known."""

Sizes = Sequence[Size]


def bound(op: str, call: str, input_shapes: Sequence[Sizes | None]) -> int | str | None:
    """The most that the sizes of an op's results which depend on data can be.

    Args:
        op: the torch op's name ("aten::nonzero.default").
        call: the JSON template of its arguments.
        input_shapes: of the plugin node's inputs, in order; None for one whose rank is not known.

    Returns:
        A number, an expression over the names in the shapes, or None where no bound is known (``repeat_interleave``) or
        the op's results have no such size. All known ops have one such size each, which may stand in several results.
    """
    template = json.loads(call)
    if op == ONNX_NODE_OP:
        return _onnx_bound(template["args"][0], input_shapes)
    rule = _RULES.get(op.partition(".")[0])
    return None if rule is None else rule(_Arguments(template, input_shapes))


def node_bound(
    node: onnx.NodeProto, shapes: Mapping[str, Sizes], constants: Mapping[str, np.ndarray]
) -> int | str | None:
    """The same for an ONNX node.

    Args:
        node: of any op; None is returned for one whose results' sizes do not depend on data.
        shapes: of its inputs by name, as far as they are known.
        constants: values of its inputs, by name, as far as they are constants.
    """
    if node.domain not in STANDARD_DOMAINS or node.op_type not in DATA_DEPENDENT:
        return None
    first = shapes.get(node.input[0])
    if first is None:
        return None
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
    if node.op_type == "NonMaxSuppression":
        scores = shapes.get(node.input[1])
        if scores is None or len(scores) != 3:
            return None
        most = scores[2]
        if len(node.input) > 2 and node.input[2]:
            limit = constants.get(node.input[2])
            if limit is not None:
                most = _smaller(most, max(0, int(limit.reshape(-1)[0])))
        else:
            most = 0
        return product([*scores[:2], most])
    if node.op_type == "NonZero" or axis is None:
        return product(first)
    return first[axis] if first else 1


DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression")
"""ONNX ops whose results' sizes depend on data, with a bound."""


def product(sizes: Sizes) -> int | str | None:
    """The product of sizes, as a number or an expression; None where one is not known."""
    if any(size is None for size in sizes):
        return None
    if any(size == 0 for size in sizes):
        return 0
    number = math.prod(size for size in sizes if isinstance(size, int))
    texts = [size for size in sizes if isinstance(size, str)]
    if not texts:
        return number
    if len(texts) == 1 and number == 1:
        return texts[0]
    names = [text if text.isidentifier() else f"({text})" for text in texts]
    return "*".join(names if number == 1 else [str(number), *names])


def _smaller(size: Size, limit: int) -> Size:
    if isinstance(size, int):
        return min(size, limit)
    return limit if size is None or limit == 0 else f"Min({size}, {limit})"


def _larger(sizes: Sequence[Size]) -> Size:
    if not sizes or any(size is None for size in sizes):
        return None
    numbers = [size for size in sizes if isinstance(size, int)]
    texts = list(dict.fromkeys(size for size in sizes if isinstance(size, str)))
    parts = ([str(max(numbers))] if numbers else []) + texts
    return max(numbers) if not texts else parts[0] if len(parts) == 1 else f"Max({', '.join(parts)})"


class _Arguments:
    """Arguments of a call: positions and names, with the shapes of tensors."""

    def __init__(self, template: Mapping[str, Any], shapes: Sequence[Sizes | None]) -> None:
        self.args, self.kwargs = template["args"], template["kwargs"]
        self._shapes = shapes

    def __call__(self, position: int, name: str) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def shape(self, argument: Any) -> Sizes | None:
        """The shape of an argument that is a tensor."""
        return self._shapes[argument["tensor"]] if isinstance(argument, dict) and "tensor" in argument else None

    def numel(self, argument: Any) -> int | str | None:
        shape = self.shape(argument)
        return None if shape is None else product(shape)


def _numel(given: _Arguments) -> int | str | None:
    return given.numel(given(0, "self"))


def _masked_select(given: _Arguments) -> int | str | None:
    shapes = [given.shape(given(0, "self")), given.shape(given(1, "mask"))]
    if any(shape is None for shape in shapes):
        return None
    known = [list(shape) for shape in shapes if shape is not None]
    rank = max(map(len, known))
    ones: list[Size] = [1]
    aligned = [ones * (rank - len(shape)) + shape for shape in known]
    return product([_broadcast(a, b) for a, b in zip(*aligned, strict=True)])


def _broadcast(a: Size, b: Size) -> Size:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    numbers = [size for size in (a, b) if isinstance(size, int)]
    return numbers[0] if numbers else _larger([a, b])


def _index(given: _Arguments) -> int | str | None:
    indices = [entry for entry in given(1, "indices") or () if entry is not None]
    return _larger([given.numel(entry) for entry in indices])


def _along(position: int, name: str) -> Callable[[_Arguments], int | str | None]:
    """Of ops that take an optional dimension: the size along it, else the number of elements."""

    def rule(given: _Arguments) -> int | str | None:
        shape, axis = given.shape(given(0, "self")), given(position, name)
        if shape is None:
            return None
        return product(shape) if axis is None else (shape[axis] if shape else 1)

    return rule


def _boxes(given: _Arguments) -> int | str | None:
    shape = given.shape(given(0, "boxes"))
    return None if not shape else shape[0]


def _batched_nms(given: _Arguments) -> int | str | None:
    count, limit = _boxes(given), given(4, "max_output")
    return _smaller(count, limit) if isinstance(limit, int) and not isinstance(limit, bool) else count


_RULES: Mapping[str, Callable[[_Arguments], int | str | None]] = {
    "aten::nonzero": _numel,
    "aten::nonzero_numpy": _numel,
    "aten::argwhere": _numel,
    "aten::masked_select": _masked_select,
    "aten::index": _index,
    "aten::_unique": _numel,
    "aten::_unique2": _numel,
    "aten::unique_dim": _along(1, "dim"),
    "aten::unique_consecutive": _along(3, "dim"),
    "aten::unique_dim_consecutive": _along(1, "dim"),
    "torchvision::nms": _boxes,
    "trtbridge::batched_nms": _batched_nms,
}


def _onnx_bound(text: str, input_shapes: Sequence[Sizes | None]) -> int | str | None:
    model = decode_nodes(text)
    if len(model.graph.node) != 1:
        return None
    shapes: dict[str, Sizes] = {
        value.name: shape for value, shape in zip(model.graph.input, input_shapes, strict=True) if shape is not None
    }
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes |= {name: values.shape for name, values in constants.items()}
    return node_bound(model.graph.node[0], shapes, constants)
