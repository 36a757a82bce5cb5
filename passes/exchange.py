"""From an ONNX proto to a graphsurgeon graph and back, losing nothing.

graphsurgeon's exporter drops node metadata and doc strings, attributes of rarer types, empty lists, and the place of
initializers that only a subgraph uses; it writes int4 and some float8 values wrongly. So the way back is done here:
whatever a pass left alone is copied from the original proto.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx import numpy_helper
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_shape
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from .parameters import cast_lazily, hide, names_read, parameter_names
from .surgery import bodies, element_type, scopes

EXTERNAL_LOCATION = "trtbridge-weights"
"""``location`` of a stand-in: an initializer whose values stand beside the proto, under its name."""

INLINE_LIMIT_BYTES = 1024
"""Initializers of the main graph larger than this leave the proto."""


_Attribute = onnx.AttributeProto
_CARRIED = {
    _Attribute.FLOAT, _Attribute.INT, _Attribute.STRING, _Attribute.TENSOR, _Attribute.GRAPH,
    _Attribute.FLOATS, _Attribute.INTS, _Attribute.STRINGS,
}  # fmt: skip


def stand_in_name(tensor: gs.Constant | onnx.TensorProto) -> str | None:
    """The key of a stand-in's values among the weights; None for a constant that has its values with it."""
    if isinstance(tensor, gs.Constant):
        if not isinstance(tensor._values, LazyValues) or isinstance(tensor._values, SparseValues):
            return None
        tensor = tensor._values.tensor
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    return tensor.name if location == EXTERNAL_LOCATION else None


def make_stand_in(name: str, weight: ir.TensorProtocol) -> onnx.TensorProto:
    """The initializer that stands for a weight in the proto."""
    tensor = onnx.TensorProto(
        name=name, data_type=int(weight.dtype), dims=list(weight.shape.numpy()), data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=EXTERNAL_LOCATION)
    return tensor


class Exchange:
    """One trip of a model to graphsurgeon and back.

    Local functions are left out of `graph` and return unchanged; a node that calls one is an op of an unknown domain.
    Initializers that are graph inputs as well (defaults that a caller may override) become plain constants.

    Parameters (`parameter_names`) are inputs of `graph`: the values of a model that is to be refitted are not known, so
    that no rewrite can hang on them. On the way back they are initializers again.

    Attributes:
        graph: the graph for the passes.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Import a model.

        Args:
            proto: is not changed, now or later.
        """
        self._original = proto
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.ClearField("functions")
        _strip_attributes(copy.graph)
        self._parameters = parameter_names(proto)
        hide(copy.graph, self._parameters)
        with G_LOGGER.suppress(G_LOGGER.ERROR):  # The checks say better what its warnings say.
            self.graph: gs.Graph = gs.import_onnx(copy)
        # The objects are kept beside what is known of them, so that no id() can be given away again.
        self._nodes: dict[int, tuple[gs.Node, onnx.NodeProto]] = {}
        self._scopes: dict[int, tuple[gs.Graph, onnx.GraphProto]] = {}
        self._owners: dict[int, tuple[gs.Constant, gs.Graph]] = {}
        self._by_output: dict[str, onnx.NodeProto] = {}
        self._pair(self.graph, proto.graph, {})

    def names(self) -> set[str]:
        """Every name in the original model, used or not."""
        found: set[str] = set()
        for _, proto in self._scopes.values():
            for group in (proto.input, proto.output, proto.initializer, proto.value_info):
                found.update(value.name for value in group)
            for node in proto.node:
                found.update((node.name, *node.input, *node.output))
        return found

    def _pair(self, scope: gs.Graph, proto: onnx.GraphProto, outer: Mapping[str, gs.Graph]) -> None:
        self._scopes[id(scope)] = (scope, proto)
        own = (tensor.name for tensor in proto.initializer if tensor.name not in self._parameters)
        owners = {**outer, **dict.fromkeys(own, scope)}
        for node, node_proto in zip(scope.nodes, proto.node, strict=True):
            self._nodes[id(node)] = (node, node_proto)
            self._by_output.update((name, node_proto) for name in node_proto.output if name)
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name in owners:
                    self._owners[id(tensor)] = (tensor, owners[tensor.name])
            for attribute in node_proto.attribute:
                if attribute.type == _Attribute.GRAPH:
                    self._pair(node.attrs[attribute.name], attribute.g, owners)
        for tensor in scope.outputs:
            if isinstance(tensor, gs.Constant) and tensor.name in owners:
                self._owners[id(tensor)] = (tensor, owners[tensor.name])

    def export(self, weights: Mapping[str, ir.TensorProtocol]) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
        """The graph as a proto again.

        Args:
            weights: values of the stand-ins that came in.

        Returns:
            The model, and the values of its stand-ins: those still used, and constants that passes made and that are
            too large to stay in the proto.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self._original)
        model.ClearField("opset_import")
        model.opset_import.extend(self.graph.import_domains or [])
        kept: dict[str, ir.TensorProtocol] = {}
        homes = self._homes()
        sources = {
            tensor.name: key
            for tensor in itertools.chain.from_iterable(homes.values())
            if (key := stand_in_name(tensor)) is not None
        }
        relatives = self._relatives()
        model.graph.CopyFrom(self._export_scope(self.graph, homes, relatives))
        kept |= _show(model.graph, self._parameters, weights)
        initializers = list(model.graph.initializer)
        model.graph.ClearField("initializer")
        for tensor in initializers:
            # The name may be new, while the weight is known by the one it came with.
            if tensor.name in kept:
                pass
            elif tensor.name in sources:
                kept[tensor.name] = weights[sources[tensor.name]]
            elif len(tensor.raw_data) > INLINE_LIMIT_BYTES or _typed_bytes(tensor) > INLINE_LIMIT_BYTES:
                kept[tensor.name] = ir.serde.TensorProtoTensor(tensor)
                tensor = make_stand_in(tensor.name, kept[tensor.name])
            model.graph.initializer.append(tensor)
        return model, kept

    def _homes(self) -> dict[int, list[gs.Constant]]:
        """The constants of each scope, by ``id(scope)``: where they came from, else the main graph."""
        parents: dict[int, gs.Graph | None] = {id(self.graph): None}
        users: dict[int, tuple[gs.Constant, list[gs.Graph]]] = {}
        for scope in scopes(self.graph):
            for node in scope.nodes:
                parents.update((id(body), scope) for body in bodies(node))
            for tensor in (*(t for node in scope.nodes for t in node.inputs), *scope.outputs):
                if isinstance(tensor, gs.Constant):
                    users.setdefault(id(tensor), (tensor, []))[1].append(scope)

        def encloses(home: gs.Graph, scope: gs.Graph | None) -> bool:
            while scope is not None and scope is not home:
                scope = parents[id(scope)]
            return scope is home

        homes: dict[int, list[gs.Constant]] = {}
        for tensor, used_in in users.values():
            home = self._owners[id(tensor)][1] if id(tensor) in self._owners else self.graph
            if id(home) not in parents or not all(encloses(home, s) for s in {id(s): s for s in used_in}.values()):
                home = self.graph
            homes.setdefault(id(home), []).append(tensor)
        return homes

    def _relatives(self) -> dict[int, onnx.NodeProto]:
        """For each node, the original node whose metadata it carries.

        A new node takes that of the node whose output it now makes, else of the nearest consumer, else of the nearest
        producer.
        """
        found: dict[int, onnx.NodeProto] = {}
        ordered = [node for scope in scopes(self.graph) for node in scope.nodes]
        missing: list[gs.Node] = []
        for node in ordered:
            known = self._nodes[id(node)][1] if id(node) in self._nodes else None
            if known is None:
                candidates = (self._by_output.get(tensor.name) for tensor in node.outputs if tensor.name)
                known = next((candidate for candidate in candidates if candidate is not None), None)
            if known is not None:
                found[id(node)] = known
            else:
                missing.append(node)
        for links, neighbours, sequence in (("outputs", "outputs", missing[::-1]), ("inputs", "inputs", missing)):
            for node in sequence:
                if id(node) in found:
                    continue
                for tensor in getattr(node, links):
                    near = (found.get(id(other)) for other in getattr(tensor, neighbours))
                    known = next((candidate for candidate in near if candidate is not None), None)
                    if known is not None:
                        found[id(node)] = known
                        break
        return found

    def _export_scope(
        self, scope: gs.Graph, homes: Mapping[int, list[gs.Constant]], relatives: Mapping[int, onnx.NodeProto]
    ) -> onnx.GraphProto:
        original = self._scopes[id(scope)][1] if id(scope) in self._scopes else onnx.GraphProto()
        proto = onnx.GraphProto()
        proto.CopyFrom(original)
        for field in ("node", "initializer", "sparse_initializer", "input", "output", "value_info"):
            proto.ClearField(field)
        proto.name = scope.name or ""
        described = {value.name: value for group in (original.input, original.output, original.value_info)
                     for value in group}  # fmt: skip
        proto.input.extend(_value_info(tensor, described.get(tensor.name)) for tensor in scope.inputs)
        proto.output.extend(_value_info(tensor, described.get(tensor.name)) for tensor in scope.outputs)
        for node in scope.nodes:
            proto.node.append(self._export_node(node, homes, relatives))
        done = {value.name for value in (*proto.input, *proto.output)}
        produced = (tensor for node in scope.nodes for tensor in node.outputs if tensor.name)
        for tensor in (*produced, *homes.get(id(scope), [])):
            known = described.get(tensor.name)
            if tensor.name not in done and (known is not None or _is_described(tensor)):
                proto.value_info.append(_value_info(tensor, known))
        position = {tensor.name: index for index, tensor in enumerate(original.initializer)}
        for tensor in sorted(homes.get(id(scope), []), key=lambda t: position.get(t.name, len(position))):
            if isinstance(tensor._values, SparseValues):
                proto.sparse_initializer.append(tensor._values.tensor)
            else:
                proto.initializer.append(tensor_proto(tensor))
        return proto

    def _export_node(
        self, node: gs.Node, homes: Mapping[int, list[gs.Constant]], relatives: Mapping[int, onnx.NodeProto]
    ) -> onnx.NodeProto:
        proto = onnx.NodeProto(op_type=node.op, name=node.name or None, domain=node.domain)
        proto.input.extend(tensor.name for tensor in node.inputs)
        proto.output.extend(tensor.name for tensor in node.outputs)
        relative = relatives.get(id(node))
        if relative is not None:
            proto.metadata_props.extend(relative.metadata_props)
            if relative.doc_string:
                proto.doc_string = relative.doc_string
        own = self._nodes[id(node)][1] if id(node) in self._nodes else None
        if own is not None and (own.op_type, own.domain) != (proto.op_type, proto.domain):
            own = None  # Another op now: what its attributes were says nothing.
        before = {attribute.name: attribute for attribute in own.attribute} if own is not None else {}
        if own is not None and own.overload:
            proto.overload = own.overload
        for name, attribute in before.items():
            if not _is_carried(attribute):
                proto.attribute.append(attribute)
            elif name in node.attrs:
                proto.attribute.append(self._export_attribute(name, node.attrs[name], attribute, homes, relatives))
        for name, value in node.attrs.items():
            if name not in before:
                proto.attribute.append(self._export_attribute(name, value, None, homes, relatives))
        return proto

    def _export_attribute(
        self,
        name: str,
        value: Any,
        before: onnx.AttributeProto | None,
        homes: Mapping[int, list[gs.Constant]],
        relatives: Mapping[int, onnx.NodeProto],
    ) -> onnx.AttributeProto:
        if isinstance(value, gs.Graph):
            return _Attribute(name=name, type=_Attribute.GRAPH, g=self._export_scope(value, homes, relatives))
        if before is not None and isinstance(value, gs.Constant) and isinstance(value._values, LazyValues):
            if value._values.tensor == before.t:
                return before
            return make_attribute(name, value)
        if before is not None and not isinstance(value, gs.Constant) and _plain(before) == value:
            return before
        if before is not None and isinstance(value, (list, tuple)) and not len(value):
            return _Attribute(name=name, type=before.type)
        return make_attribute(name, value)


def make_attribute(name: str, value: Any) -> onnx.AttributeProto:
    """The proto of an attribute that is no subgraph. An empty list is taken for one of ints."""
    if isinstance(value, gs.Constant):
        return _Attribute(name=name, type=_Attribute.TENSOR, t=tensor_proto(value))
    if isinstance(value, (list, tuple)) and not len(value):
        return _Attribute(name=name, type=_Attribute.INTS)
    return onnx.helper.make_attribute(name, value)


def tensor_proto(tensor: gs.Constant) -> onnx.TensorProto:
    """The initializer for a constant; a stand-in stays one."""
    values = tensor._values
    if isinstance(values, np.ndarray):
        return numpy_helper.from_array(values, tensor.name)
    proto = onnx.TensorProto()
    proto.CopyFrom(values.tensor)
    proto.name = tensor.name
    return proto


def _is_carried(attribute: onnx.AttributeProto) -> bool:
    """Whether graphsurgeon takes this attribute in."""
    if attribute.type not in _CARRIED or attribute.ref_attr_name:
        return False
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _strip_attributes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        carried = [attribute for attribute in node.attribute if _is_carried(attribute)]
        if len(carried) < len(node.attribute):
            copies = [onnx.AttributeProto.FromString(attribute.SerializeToString()) for attribute in carried]
            node.ClearField("attribute")
            node.attribute.extend(copies)
        for attribute in node.attribute:
            if attribute.type == _Attribute.GRAPH:
                _strip_attributes(attribute.g)


def _plain(attribute: onnx.AttributeProto) -> Any:
    """An attribute's value the way graphsurgeon imports it."""
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == _Attribute.STRING:
        return value.decode()
    if attribute.type == _Attribute.STRINGS:
        return [text.decode() for text in value]
    return list(value) if attribute.type in (_Attribute.FLOATS, _Attribute.INTS) else value


def _is_described(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and tensor.dtype is not None and tensor.type == "tensor_type"


def _value_info(tensor: gs.Tensor, known: onnx.ValueInfoProto | None) -> onnx.ValueInfoProto:
    """What is known of a tensor now: the original's own text as far as it still holds."""
    element = element_type(tensor)
    shape = None if tensor.shape is None else [_size(size) for size in tensor.shape]
    if known is None:
        if element == 0:
            return onnx.helper.make_empty_tensor_value_info(tensor.name)
        return onnx.helper.make_tensor_value_info(tensor.name, element, shape)
    if not known.type.HasField("tensor_type"):
        return known
    changed = onnx.ValueInfoProto()
    changed.CopyFrom(known)
    if element:
        changed.type.tensor_type.elem_type = element
    if shape is not None and shape != get_onnx_tensor_shape(known):
        new = onnx.helper.make_tensor_value_info(tensor.name, element, shape)
        changed.type.tensor_type.shape.CopyFrom(new.type.tensor_type.shape)
    return changed


def _size(size: Any) -> int | str | None:
    return int(size) if isinstance(size, np.integer) else size


def _typed_bytes(tensor: onnx.TensorProto) -> int:
    """Size of values that stand in the typed fields (`float_data`, ...) of an initializer, strings excepted."""
    if tensor.data_type == onnx.TensorProto.STRING or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return 0
    return len(tensor.SerializeToString()) if not tensor.raw_data else 0


def iterate_stand_ins(graph: onnx.GraphProto) -> Iterator[str]:
    """Keys of all stand-ins among the initializers of the main graph."""
    for tensor in graph.initializer:
        key = stand_in_name(tensor)
        if key is not None:
            yield key


def _show(
    graph: onnx.GraphProto, names: Mapping[str, str], weights: Mapping[str, ir.TensorProtocol]
) -> dict[str, ir.TensorProtocol]:
    """Make initializers of parameters again, and say what they hold; those that nothing reads go."""
    if not names:
        return {}
    inputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in graph.input]
    used = names_read(graph)
    found: dict[str, ir.TensorProtocol] = {}
    del graph.input[:]
    for value in inputs:
        if value.name not in names:
            graph.input.append(value)
        elif value.name in used:
            # A pass may have narrowed a type that the backend lacks.
            found[value.name] = cast_lazily(weights[value.name], ir.DataType(value.type.tensor_type.elem_type))
            graph.initializer.append(make_stand_in(value.name, found[value.name]))
            graph.value_info.append(value)
    return found
