"""Weights that take 16 bits when they are read."""

from __future__ import annotations

import dataclasses
from collections import Counter

import onnx
import onnx_ir as ir

from ..passes.exchange import stand_in_name
from ..passes.parameters import cast_lazily
from .model import OnnxModel, iterate_nodes, make_stand_in

_FLOATS = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def narrow_weights(model: OnnxModel) -> OnnxModel:
    """Weights that are only read through a Cast to 16 bits get that type; they are converted each time they are read.

    No second copy of a weight is held, and none in float32 reaches the engines.
    """
    graph = model.proto.graph
    stand_ins = {t.name: t for t in graph.initializer if stand_in_name(t) is not None and t.name in model.weights}
    uses = Counter(name for node in iterate_nodes(graph) for name in node.input)
    uses.update(value.name for value in (*graph.input, *graph.output))
    for node in iterate_nodes(graph):
        for attribute in node.attribute:
            uses.update(value.name for value in attribute.g.output)
    results = {value.name for value in graph.output}
    names: dict[str, str] = {}  # what a cast makes -> the weight
    weights = dict(model.weights)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type != "Cast" or node.domain or node.input[0] not in stand_ins or uses[node.input[0]] != 1:
            continue
        target = next(attribute.i for attribute in node.attribute if attribute.name == "to")
        if target in _FLOATS and node.output[0] not in results:
            names[node.output[0]] = node.input[0]
            weights[node.input[0]] = cast_lazily(weights[node.input[0]], ir.DataType(target))
            del proto.graph.node[index]
    if not names:
        return model
    for node in iterate_nodes(proto.graph):
        if any(name in names for name in node.input):
            node.input[:] = [names.get(name, name) for name in node.input]
    narrowed = set(names.values())
    for tensor in proto.graph.initializer:
        if tensor.name in narrowed:
            tensor.CopyFrom(make_stand_in(tensor.name, weights[tensor.name]))
    types = {name: weights[name].dtype for name in narrowed}
    described = [value for value in proto.graph.value_info if value.name not in names]
    for value in described:
        if value.name in types:
            value.type.tensor_type.elem_type = int(types[value.name])
    kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in described]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return dataclasses.replace(model, proto=proto, weights=weights)
