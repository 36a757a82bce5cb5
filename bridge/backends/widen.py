"""Rewrites a float16 or bfloat16 graph in float32, for runtimes whose kernels know nothing narrower.

Values are no longer rounded to 16 bits between nodes, so results are closer to the exact ones than those of the
original graph; what would overflow to infinity in float16 does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from ...errors import ModelFileError
from ..model import iterate_nodes

NARROW_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_FunctionId = tuple[str, str, str]
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.preview", "com.microsoft"})
# Every integer attribute that holds an element type, in all versions of the ops in onnx.defs. BitCast's `to` is not
# one of them: it says how bits are read.
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "stash_type", "precision"}
)
_FLOAT = onnx.TensorProto.FLOAT
_SIXTEEN_BITS = frozenset(
    {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT16, onnx.TensorProto.UINT16}
)


def widen(
    proto: onnx.ModelProto,
    weights: Mapping[str, ir.TensorProtocol],
    types: frozenset[ir.DataType] = NARROW_TYPES,
) -> tuple[onnx.ModelProto, Mapping[str, ir.TensorProtocol]]:
    """A copy of the graph in which every tensor of the given types is float32.

    Names stay. Graph inputs and outputs become float32 too: the caller casts at the boundary. Weights are converted
    each time they are read, one at a time, and never kept.

    Args:
        proto: the graph; it is not changed.
        weights: the values of its external stand-ins, by name.
        types: the element types to replace.

    Returns:
        The new graph and weights, or the very objects given where nothing has one of the types.

    Raises:
        ModelFileError: an external initializer of one of the types has no values in ``weights``.
    """
    widener = _Widener(frozenset(int(t) for t in types), weights)
    result = widener.model(proto)
    wide_weights = {name: _wide_weight(weight) if weight.dtype in types else weight for name, weight in weights.items()}
    if any(wide_weights[name] is not weight for name, weight in weights.items()):
        return result, wide_weights
    return (result if widener.count else proto), weights


def _wide_weight(weight: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape(weight.shape.numpy())
    return ir.LazyTensor(partial(_to_float32, weight), dtype=ir.DataType.FLOAT, shape=shape, name=weight.name)


def _to_float32(weight: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(weight.numpy().astype(np.float32), name=weight.name)


@dataclass
class _Widener:
    """One run of `widen`.

    Attributes:
        types: element types to replace.
        weights: values of stand-ins.
        count: what was replaced so far.
        parameters: for each local function, the attributes that hand an element type to a node in its body.
        element_types: element types by tensor name, before widening; filled only where BitCast needs them.
    """

    types: frozenset[int]
    weights: Mapping[str, ir.TensorProtocol]
    count: int = 0
    parameters: dict[_FunctionId, set[str]] = field(default_factory=dict)
    element_types: dict[str, int] = field(default_factory=dict)

    def model(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        if any(map(_reads_16_bits, _function_nodes(proto.functions))):
            proto = onnx.inliner.inline_local_functions(proto)  # tensors in a function body have no types
        if any(map(_reads_16_bits, iterate_nodes(proto.graph))):
            self.element_types = _element_types(proto)
        result = onnx.ModelProto()
        result.CopyFrom(proto)
        self._find_parameters(result.functions)
        self._graph(result.graph)
        for function in result.functions:
            own = self.parameters[_function_id(function)]
            for attribute in function.attribute_proto:
                self._attribute(attribute, attribute.name in own)
            self._nodes(function.node)
            self._values(function.value_info)
        return result

    def _find_parameters(self, functions: Iterable[onnx.FunctionProto]) -> None:
        self.parameters = {_function_id(function): set() for function in functions}
        changed = True
        while changed:  # a function may hand its attribute on to another one
            changed = False
            for function in functions:
                own = self.parameters[_function_id(function)]
                for node in _function_nodes([function]):
                    refs = {a.ref_attr_name for a in node.attribute if a.ref_attr_name and self._is_type(node, a.name)}
                    changed |= not refs <= own
                    own |= refs

    def _is_type(self, node: onnx.NodeProto, attribute: str) -> bool:
        if attribute in self.parameters.get((node.domain, node.op_type, node.overload), ()):
            return True
        return node.domain in _DOMAINS and node.op_type != "BitCast" and attribute in _TYPE_ATTRIBUTES

    def _graph(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._tensor(tensor)
        for sparse in graph.sparse_initializer:
            self._tensor(sparse.values)
        for values in (graph.input, graph.output, graph.value_info):
            self._values(values)
        self._nodes(graph.node)

    def _values(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        for value in values:
            self._type(value.type)

    def _type(self, proto: onnx.TypeProto) -> None:
        kind = proto.WhichOneof("value")
        if kind in ("tensor_type", "sparse_tensor_type"):
            tensor = getattr(proto, kind)
            if tensor.elem_type in self.types:
                tensor.elem_type = _FLOAT
                self.count += 1
        elif kind in ("sequence_type", "optional_type"):
            self._type(getattr(proto, kind).elem_type)
        elif kind == "map_type":
            self._type(proto.map_type.value_type)

    def _tensor(self, tensor: onnx.TensorProto) -> None:
        if tensor.data_type not in self.types:
            return
        self.count += 1
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            return
        if tensor.name not in self.weights:
            raise ModelFileError(f"The external initializer {tensor.name!r} has no values: it is not in the weights.")
        tensor.data_type = _FLOAT
        # Offset and length spoke of the narrow values.
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)

    def _attribute(self, attribute: onnx.AttributeProto, is_type: bool) -> None:
        if attribute.type == onnx.AttributeProto.INT and is_type and attribute.i in self.types:
            attribute.i = _FLOAT
            self.count += 1
        if attribute.HasField("t"):
            self._tensor(attribute.t)
        if attribute.HasField("sparse_tensor"):
            self._tensor(attribute.sparse_tensor.values)
        if attribute.HasField("tp"):
            self._type(attribute.tp)
        if attribute.HasField("g"):
            self._graph(attribute.g)
        for tensor in attribute.tensors:
            self._tensor(tensor)
        for sparse in attribute.sparse_tensors:
            self._tensor(sparse.values)
        for proto in attribute.type_protos:
            self._type(proto)
        for graph in attribute.graphs:
            self._graph(graph)

    def _nodes(self, nodes: MutableSequence[onnx.NodeProto]) -> None:
        result: list[onnx.NodeProto] = []
        for node in nodes:
            for attribute in node.attribute:
                self._attribute(attribute, self._is_type(node, attribute.name))
            result += self._bit_cast(node) if _reads_16_bits(node) else [node]
        if len(result) != len(nodes):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in result]
            del nodes[:]
            nodes.extend(copies)

    def _bit_cast(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """``BitCast`` reads the 16 bits of the original type, so it stands between casts to and from that type."""
        before, after = [], []
        source, target = self.element_types.get(node.input[0], 0), _target(node)
        if source in self.types:
            narrow = f"{node.output[0]}.narrow"
            before = [onnx.helper.make_node("Cast", [node.input[0]], [narrow], to=source)]
            node.input[0] = narrow
        if target in self.types:
            bits, wide = f"{node.output[0]}.bits", node.output[0]
            after = [onnx.helper.make_node("Cast", [bits], [wide], to=_FLOAT)]
            node.output[0] = bits
        self.count += len(before) + len(after)
        return [*before, node, *after]


def _function_id(function: onnx.FunctionProto) -> _FunctionId:
    return (function.domain, function.name, function.overload)


def _function_nodes(functions: Iterable[onnx.FunctionProto]) -> Iterator[onnx.NodeProto]:
    for function in functions:
        yield from iterate_nodes(onnx.GraphProto(node=function.node))


def _target(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)


def _reads_16_bits(node: onnx.NodeProto) -> bool:
    return node.op_type == "BitCast" and node.domain in ("", "ai.onnx") and _target(node) in _SIXTEEN_BITS


def _element_types(proto: onnx.ModelProto) -> dict[str, int]:
    """The element types of tensors by name, in the graph and its subgraphs."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    graphs = [inferred.graph]
    for node in iterate_nodes(inferred.graph):
        graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    types: dict[str, int] = {}
    for graph in graphs:
        types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        for values in (graph.input, graph.output, graph.value_info):
            types |= {value.name: value.type.tensor_type.elem_type for value in values}
    return types
