"""The key of an engine in the cache: one digest over everything that decides what a backend builds.

What merely tells where things come from (doc strings, stack traces, `model.ORIGIN_KEY`, the lines at which plugins are
called) is left out, so that a comment above the model costs no rebuild; `Backend.revive` puts it into an engine that
comes from the cache. What a backend parses in place of the graph counts, so that a rule which rewrites it counts too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ..nodes import DOMAIN
from ..plugins.host_spec import HOST_ATTRIBUTE
from ..plugins.op_version import op_version
from .backends.base import Backend, BuildOptions, Segment

KEY_FORMAT = 1
"""Counted up whenever keys or what is kept under them are made in another way."""

IRRELEVANT_OPTIONS = ("isolate", "timeout_s", "cache_dir")
"""Build options that do not decide what is built. All others do, those to come included."""

_PROVENANCE = ("trtbridge.", "pkg.", "namespace")
"""How keys of metadata begin that say where a node comes from: ours, torch.onnx's and onnxscript's."""

_CHUNK_BYTES = 64 << 20


class TensorDigests:
    """Digests of tensors' types, shapes and values, where memory that several share is read once."""

    def __init__(self) -> None:
        self._pinned: dict[Any, tuple[str, torch.Tensor]] = {}

    def pin(self, tensor: torch.Tensor) -> str:
        """The digest of a tensor, which is kept, as the tensor is: no other one can come to lie in its place."""
        place = _place(tensor)
        if place not in self._pinned:
            self._pinned[place] = _torch_digest(tensor), tensor
        return self._pinned[place][0]

    def of(self, weights: Mapping[str, ir.TensorProtocol]) -> dict[str, str]:
        """The digest of each of some weights, by name; they are read where they lie, piece by piece."""
        known = {place: found for place, (found, _) in self._pinned.items()}
        digests = {}
        for name in sorted(weights):
            raw = getattr(weights[name], "raw", None)
            if isinstance(raw, torch.Tensor):
                place = _place(raw)
                if place not in known:
                    known[place] = _torch_digest(raw)
                digests[name] = known[place]
            else:
                digests[name] = _weight_digest(weights[name])
        return digests


def engine_key(segment: Segment, backend: Backend, options: BuildOptions) -> str:
    """The key under which a segment's engine is kept.

    Args:
        segment: what is built. Weights are read where they lie, piece by piece.
        backend: what builds it.
        options: how.

    Returns:
        64 hexadecimal digits, the same in every process and on every day.

    Raises:
        PluginError: a plugin op inside the segment is not registered.
    """
    return digest(key_facts(segment, backend, options))


def key_facts(
    segment: Segment, backend: Backend, options: BuildOptions, digests: TensorDigests | None = None
) -> dict[str, Any]:
    """What the key is a digest of, JSON-ready; `digests` may know some of the weights already."""
    from .. import __version__  # the package imports this module before it says

    parsed = backend.parsed(segment)
    return {
        "format": KEY_FORMAT,
        "trtbridge": __version__,
        "backend": backend.name,
        "library": dict(backend.identity(options)),
        "options": build_facts(options),
        "inputs": [spec.to_json() for spec in segment.inputs],
        "outputs": [spec.to_json() for spec in segment.outputs],
        "refittable": sorted(segment.refittable),
        "graph": hashlib.sha256(canonical(segment.proto)).hexdigest(),
        "parsed": "" if parsed is segment.proto else hashlib.sha256(canonical(parsed)).hexdigest(),
        "weights": (digests or TensorDigests()).of(segment.weights),
        "plugins": {op: op_version(op) for op in sorted({call.op for call in segment.hosted})},
        "calls": [_without_place(call.to_json()) for call in segment.hosted],
    }


def build_facts(options: BuildOptions) -> dict[str, Any]:
    """The build options that decide what is built."""
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in IRRELEVANT_OPTIONS}


def digest(facts: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-ready facts, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def canonical(proto: onnx.ModelProto) -> bytes:
    """A graph as bytes that are equal where two graphs do the same in the same words.

    The order of nodes, inputs, outputs and operands counts; that of attributes, initializers and value infos does not.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    for field in ("doc_string", "producer_name", "producer_version"):
        model.ClearField(field)
    _strip(model)
    _sort(model.opset_import, lambda opset: (opset.domain, opset.version))
    _plain_graph(model.graph)
    _sort(model.functions, lambda function: (function.domain, function.name, function.overload))
    for function in model.functions:
        function.ClearField("doc_string")
        _strip(function)
        _sort(function.opset_import, lambda opset: (opset.domain, opset.version))
        _plain_values(function.value_info)
        _plain_nodes(function.node)
    return bytes(model.SerializeToString(deterministic=True))


def _place(tensor: torch.Tensor) -> Any:
    """Equal for tensors that are the same memory seen in the same way."""
    if not tensor.numel():
        return tensor.dtype, tuple(tensor.shape)
    return tensor.dtype, tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _torch_digest(tensor: torch.Tensor) -> str:
    hasher = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if tensor.numel():
        values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, values.numel(), _CHUNK_BYTES):  # those on a GPU come over in pieces
            hasher.update(values[start : start + _CHUNK_BYTES].cpu().numpy().data)
    return hasher.hexdigest()


def _weight_digest(weight: ir.TensorProtocol) -> str:
    hasher = hashlib.sha256(f"{weight.dtype.name} {list(weight.shape.numpy())}".encode())
    if weight.dtype.bitwidth < 8:
        hasher.update(weight.tobytes())
    else:
        values = np.ascontiguousarray(weight.numpy()).reshape(-1)
        if values.size:
            hasher.update(values.view(np.uint8).data)
    return hasher.hexdigest()


def _plain_graph(graph: onnx.GraphProto) -> None:
    graph.ClearField("doc_string")
    _strip(graph)
    _plain_values(graph.value_info)
    for values in (graph.input, graph.output):
        for value in values:
            value.ClearField("doc_string")
            _strip(value)
    for tensor in [*graph.initializer, *(part for sparse in graph.sparse_initializer for part in _parts(sparse))]:
        _plain_tensor(tensor)
    _sort(graph.initializer, lambda tensor: tensor.name)
    _sort(graph.sparse_initializer, lambda tensor: tensor.values.name)
    _sort(graph.quantization_annotation, lambda annotation: annotation.tensor_name)
    _plain_nodes(graph.node)


def _parts(sparse: onnx.SparseTensorProto) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    return sparse.values, sparse.indices


def _plain_values(values: Any) -> None:
    for value in values:
        value.ClearField("doc_string")
        _strip(value)
    _sort(values, lambda value: value.name)


def _plain_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.ClearField("doc_string")
        _strip(node)
        _sort(node.attribute, lambda attribute: attribute.name)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            if node.domain == DOMAIN and attribute.name == HOST_ATTRIBUTE:
                attribute.s = json.dumps({**json.loads(attribute.s), "place": ""}, sort_keys=True).encode()
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _plain_graph(graph)
            for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
                _plain_tensor(tensor)


def _plain_tensor(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("doc_string")
    _strip(tensor)


def _strip(proto: Any) -> None:
    """Take away metadata about where something comes from, and sort the rest."""
    kept = sorted(
        (entry for entry in proto.metadata_props if not entry.key.startswith(_PROVENANCE)), key=lambda entry: entry.key
    )
    _replace(proto.metadata_props, kept)


def _sort(field: Any, key: Any) -> None:
    if len(field) > 1:
        _replace(field, sorted(field, key=key))


def _replace(field: Any, entries: list[Any]) -> None:
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
    del field[:]
    field.extend(copies)


def _without_place(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("origin", "reason", "host_refusal")}
