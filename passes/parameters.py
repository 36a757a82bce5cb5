"""Initializers whose values no pass may read: the parameters of a model that is to be refitted.

A program can take new weights only where nothing in its graph hangs on the old ones. So passes see parameters as
inputs of the graph (`Exchange`): what they leave is right for any values of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import partial

import onnx
import onnx_ir as ir

PARAMETERS_KEY = "trtbridge.parameters"
"""Key of the model metadata entry that names, in JSON, the initializers that are parameters."""


def parameter_names(proto: onnx.ModelProto) -> dict[str, str]:
    """The initializers of a model whose values may change, with the names of what they are in the torch module."""
    found = next((entry.value for entry in proto.metadata_props if entry.key == PARAMETERS_KEY), "{}")
    return dict(json.loads(found))


def set_parameter_names(proto: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Write into a model which of its stand-ins are parameters; an empty mapping takes the marks off."""
    others = [entry for entry in proto.metadata_props if entry.key != PARAMETERS_KEY]
    kept = [onnx.StringStringEntryProto.FromString(entry.SerializeToString()) for entry in others]
    proto.ClearField("metadata_props")
    proto.metadata_props.extend(kept)
    if names:
        proto.metadata_props.add(key=PARAMETERS_KEY, value=json.dumps(names))


def hide(graph: onnx.GraphProto, names: Collection[str]) -> None:
    """Make inputs of parameters, behind the real ones."""
    if not names:
        return
    hidden = [tensor for tensor in graph.initializer if tensor.name in names]
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name not in names]
    described = [value for value in graph.value_info if value.name not in names]
    described = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in described]
    for tensor in hidden:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.value_info.extend(described)


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Names of all tensors that a graph or its subgraphs read or give out."""
    found = {value.name for value in graph.output}
    for node in graph.node:
        found.update(node.input)
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else []), *attribute.graphs):
                found |= names_read(body)
    return found


def cast_lazily(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """A weight in another type, converted each time it is read, so that no second copy is held."""
    if weight.dtype == dtype:
        return weight
    shape = ir.Shape(weight.shape.numpy())
    return ir.LazyTensor(partial(_cast, weight, dtype), dtype=dtype, shape=shape, name=weight.name)


def _cast(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(weight.numpy().astype(dtype.numpy()), dtype=dtype, name=weight.name)
