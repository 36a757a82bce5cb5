"""The nodes that stand in for one refused node, while a rule writes them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from ..nodes import CALL_ATTRIBUTE
from .pipeline import Notes
from .surgery import element_type, nbytes, sizes, type_name

MOST_NODES = 64
"""A rewrite into more nodes would cost more than the plugin that it saves."""

MOST_BYTES = 4 << 20
"""Most bytes of new constants for one node."""

_T = onnx.TensorProto
FLOATS = (_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE)
INTEGERS = (_T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT8, _T.UINT16, _T.UINT32, _T.UINT64)
_READ_LIMIT_BYTES = 1 << 16


class CannotRewriteError(Exception):
    """A rule cannot write exactly what the node does; the text says why. It never leaves the pass."""


class Fragment:
    """A small graph that computes what one node computes, in ONNX ops of the model's own opset.

    A rule reads the node (`attr`, `shape`, `fixed`, `values`), adds nodes (`op`, `const` and the helpers, which give
    tensor names) and ends with `result`. Whatever it cannot do exactly, it refuses by `CannotRewriteError`.

    Attributes:
        node: the node that is replaced. A rule may point it at another one that takes its place.
        opset: of the default domain.
        nodes: written so far.
        constants: written so far.
        results: for each output that is made the name of the tensor here.
        read: the tensors of the model that are read, by their names here.
        most_nodes: more of them are refused.
    """

    def __init__(self, node: gs.Node, notes: Notes, outputs: Collection[int] = ()) -> None:
        """Begin with nothing.

        Args:
            node: what is replaced.
            notes: of the pass.
            outputs: ids of the graph's outputs.
        """
        self.node = node
        self._outputs = outputs
        self.opset = notes.opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.results: dict[int, str] = {}
        self.read: dict[str, gs.Tensor] = {}
        self._names: dict[int, str] = {}
        self._notes = notes
        self.most_nodes = MOST_NODES

    # What the node is.

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute's value; a tensor comes as an array."""
        value = self.node.attrs.get(name, default)
        return self._notes.values(value) if isinstance(value, gs.Constant) else value

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a plugin node's call, as its JSON template has them."""
        template = json.loads(self.attr(CALL_ATTRIBUTE))
        need(not template.get("writes"), "it writes to its inputs")
        return template["args"], template["kwargs"]

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def use(self, tensor: gs.Tensor) -> str:
        """The name here of a tensor of the model."""
        name = self._names.setdefault(id(tensor), f"in{len(self._names)}")
        self.read[name] = tensor
        return name

    def input(self, index: int) -> str:
        """The name here of one of the node's inputs."""
        return self.use(self.node.inputs[index])

    def element(self, index: int) -> int:
        """Element type of an input; refuses where it is unknown."""
        found = element_type(self.node.inputs[index])
        need(found != 0, f"the type of input {index} is not known")
        return found

    def output_element(self, index: int = 0) -> int:
        """Element type of an output; refuses where it is unknown."""
        found = element_type(self.node.outputs[index])
        need(found != 0, f"the type of output {index} is not known")
        return found

    def shape(self, index: int) -> tuple[int | None, ...]:
        """Sizes of an input, None for one that is not fixed; refuses where the rank is unknown."""
        found = sizes(self.node.inputs[index])
        if found is None:
            raise CannotRewriteError(f"the rank of input {index} is not known")
        return found

    def rank(self, index: int) -> int:
        return len(self.shape(index))

    def fixed(self, index: int, axes: Sequence[int] | None = None) -> tuple[int, ...]:
        """Sizes of an input along some axes (all); refuses where one is not fixed."""
        shape = self.shape(index)
        found = [shape[axis] for axis in (range(len(shape)) if axes is None else axes)]
        known = tuple(size for size in found if size is not None)
        need(len(known) == len(found), f"input {index} has sizes that are not fixed: {list(shape)}")
        return known

    def values(self, index: int) -> np.ndarray:
        """The values of a small constant input; refuses where it is none."""
        return self.read_constant(self.node.inputs[index])

    def read_constant(self, tensor: gs.Tensor) -> np.ndarray:
        """The values of a small constant; refuses where it is none."""
        if not isinstance(tensor, gs.Constant) or nbytes(tensor) > _READ_LIMIT_BYTES:
            raise CannotRewriteError(f"{tensor.name!r} is no small constant")
        return self._notes.values(tensor)

    def is_read(self, index: int) -> bool:
        """Whether anything reads an output."""
        if index >= len(self.node.outputs) or not self.node.outputs[index].name:
            return False
        tensor = self.node.outputs[index]
        return bool(tensor.outputs) or id(tensor) in self._outputs

    # What stands in for it.

    def const(self, values: Any, dtype: Any = None) -> str:
        """A constant. int64 unless the values or `dtype` say otherwise."""
        array = np.asarray(values, dtype=dtype)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def scalar(self, value: float, element: int) -> str:
        """A 0-d constant of an ONNX element type."""
        return self.const(np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(element)))

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """A node; the name of its first output (the others: the same with ``.1``, ``.2``, ...)."""
        first = f"t{len(self.nodes)}"
        names = [first, *(f"{first}.{index}" for index in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return first

    def result(self, name: str, index: int = 0) -> None:
        """Say which tensor is an output of the node."""
        self.results[index] = name

    def cast(self, tensor: str, element: int) -> str:
        return self.op("Cast", tensor, to=int(element))

    def reshape(self, tensor: str, shape: Sequence[int]) -> str:
        """0 copies a size, -1 is what is left."""
        return self.op("Reshape", tensor, self.const(shape, np.int64))

    def transpose(self, tensor: str, order: Sequence[int]) -> str:
        return tensor if list(order) == sorted(order) else self.op("Transpose", tensor, perm=list(order))

    def unsqueeze(self, tensor: str, axes: Sequence[int]) -> str:
        return self._with_axes("Unsqueeze", 13, tensor, axes, {})

    def squeeze(self, tensor: str, axes: Sequence[int]) -> str:
        return self._with_axes("Squeeze", 13, tensor, axes, {})

    def reduce(self, op_type: str, tensor: str, axes: Sequence[int], keepdims: bool = False) -> str:
        """``ReduceSum``, ``ReduceMax``, ...: their axes became an input in different opsets."""
        since = 13 if op_type == "ReduceSum" else 18
        return self._with_axes(op_type, since, tensor, axes, {"keepdims": int(keepdims)})

    def slice(self, tensor: str, axis: int, start: int, end: int, step: int = 1) -> str:
        numbers = (self.const([number], np.int64) for number in (start, end, axis, step))
        return self.op("Slice", tensor, *numbers)

    def pad(self, tensor: str, before: Sequence[int], after: Sequence[int], value: float, element: int) -> str:
        """Constant padding; the type of `tensor` is `element`."""
        return self.op("Pad", tensor, self.const([*before, *after], np.int64), self.scalar(value, element))

    def _with_axes(self, op_type: str, since: int, tensor: str, axes: Sequence[int], attributes: dict[str, Any]) -> str:
        if self.opset >= since:
            return self.op(op_type, tensor, self.const(list(axes), np.int64), **attributes)
        return self.op(op_type, tensor, axes=list(axes), **attributes)

    def take(self, model: onnx.ModelProto) -> None:
        """Nodes and initializers of another small graph, whose inputs have the names that `input` gives."""
        self.nodes.extend(model.graph.node)
        self.constants.extend(model.graph.initializer)

    def model(self) -> onnx.ModelProto:
        """All of it as a model with inferred types, its inputs the tensors that are read.

        Raises:
            CannotRewriteError: it is too large, or no valid graph for this opset.
        """
        need(len(self.nodes) <= self.most_nodes, f"it would take {len(self.nodes)} nodes")
        size = sum(len(tensor.raw_data) for tensor in self.constants)
        need(size <= MOST_BYTES, f"it would take {size / 2**20:.1f} MiB of constants")
        proto = onnx.ModelProto(ir_version=10)
        proto.opset_import.add(domain="", version=self.opset)
        graph = proto.graph
        graph.name = "fragment"
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants)
        for name, tensor in self.read.items():
            element = element_type(tensor)
            need(element != 0, f"the type of {tensor.name!r} is not known")
            graph.input.append(helper.make_tensor_value_info(name, element, declared_shape(tensor)))
        for index, name in self.results.items():
            element = element_type(self.node.outputs[index])
            graph.output.append(
                helper.make_tensor_value_info(name, element, None) if element else onnx.ValueInfoProto(name=name)
            )
        try:
            return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            raise CannotRewriteError(f"opset {self.opset} has no such nodes: {str(error).strip()[:300]}") from error


def need(condition: bool, reason: str) -> None:
    """Refuse unless something holds.

    Raises:
        CannotRewriteError: it does not.
    """
    if not condition:
        raise CannotRewriteError(reason)


def need_type(fragment: Fragment, index: int, allowed: Sequence[int]) -> int:
    """The element type of an input, which must be one of some."""
    found = fragment.element(index)
    need(found in allowed, f"there is no exact form for {type_name(found)}")
    return found


def declared_shape(tensor: gs.Tensor) -> list[int | str | None] | None:
    """A tensor's shape as `onnx.helper` takes it."""
    if tensor.shape is None:
        return None
    return [int(size) if isinstance(size, (int, np.integer)) else size for size in tensor.shape]
