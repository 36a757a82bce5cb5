"""What an engine keeps of the graph that it was built from: where each node comes from, and what the weights are.

TensorRT's layers are named after nodes, and the graph itself is gone once it is built. The table of origins is text in
`Engine.info`, every string in it once and compressed: 6.4 KiB for BERT-base, beside 418 MiB of engine.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from .backends.base import Segment
from .model import Origin, iterate_nodes, origin_of

KEY = "graph"
"""Where `Engine.info` has these facts."""

_MOVES = ("Cast", "Identity", "Reshape", "Transpose")  # between a weight and the nodes that use it
_FIELDS = ("file", "line", "code", "module", "module_class", "op")  # of an Origin; ``call`` is for building alone


@dataclass(frozen=True)
class NodeFacts:
    """A node of the graph.

    Attributes:
        op_type: its ONNX op.
        origin: where it comes from.
    """

    op_type: str
    origin: Origin


@dataclass(frozen=True)
class WeightFacts:
    """The initializers of a graph.

    Attributes:
        count: how many.
        bytes_by_dtype: their size by element type, in bytes.
        shared: how many of them several nodes read.
        shared_bytes: the size of these.
    """

    count: int
    bytes_by_dtype: Mapping[str, int]
    shared: int = 0
    shared_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())


def gather(segment: Segment) -> dict[str, Any]:
    """The facts about a segment, ready for JSON."""
    return {"origins": _pack(segment), "weights": _weigh(segment), "dtypes": _count_dtypes(segment)}


def read_nodes(info: Mapping[str, Any]) -> dict[str, NodeFacts]:
    """The nodes of an engine by name, in the order of the graph; empty where the engine does not tell.

    Args:
        info: `Engine.info`.
    """
    packed = info.get(KEY, {}).get("origins")
    if not packed:
        return {}
    table = json.loads(zlib.decompress(base64.b64decode(packed)))
    strings = table["strings"]
    origins = []
    for row in table["origins"]:
        values = {name: value if name == "line" else strings[value] for name, value in zip(_FIELDS, row, strict=True)}
        origins.append(Origin(**values))
    return {name: NodeFacts(strings[op_type], origins[origin]) for name, op_type, origin in table["nodes"]}


def read_weights(info: Mapping[str, Any]) -> WeightFacts | None:
    """The weights of an engine; None where it does not tell.

    Args:
        info: `Engine.info`.
    """
    found = info.get(KEY, {}).get("weights")
    return None if found is None else WeightFacts(**found)


def read_dtypes(info: Mapping[str, Any]) -> dict[str, int]:
    """How many nodes make tensors of which element type; empty where the engine does not tell.

    Args:
        info: `Engine.info`.
    """
    return dict(info.get(KEY, {}).get("dtypes", {}))


def _count_dtypes(segment: Segment) -> dict[str, int]:
    graph = segment.proto.graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    found: Counter[str] = Counter()
    for node in graph.node:
        known = [types[name] for name in node.output if types.get(name)]
        found[ir.DataType(known[0]).name.lower() if known else "unknown"] += 1
    return dict(found.most_common())


def _pack(segment: Segment) -> str:
    strings: dict[str, int] = {}
    origins: dict[tuple[int, ...], int] = {}
    nodes = []
    for node in iterate_nodes(segment.proto.graph):
        if not node.name:
            continue
        origin = origin_of(node)
        row = tuple(
            origin.line if name == "line" else strings.setdefault(getattr(origin, name), len(strings))
            for name in _FIELDS
        )
        op_type = strings.setdefault(node.op_type, len(strings))
        nodes.append((node.name, op_type, origins.setdefault(row, len(origins))))
    table = {"strings": list(strings), "origins": list(origins), "nodes": nodes}
    return base64.b64encode(zlib.compress(json.dumps(table, separators=(",", ":")).encode(), 9)).decode()


def _weigh(segment: Segment) -> dict[str, Any]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in iterate_nodes(segment.proto.graph):
        for name in set(node.input):
            readers.setdefault(name, []).append(node)

    def count_uses(name: str) -> int:
        """How many nodes read a tensor, as it is or moved."""
        return sum(count_uses(node.output[0]) if node.op_type in _MOVES else 1 for node in readers.get(name, ()))

    sizes: Counter[str] = Counter()
    shared = shared_bytes = 0
    for tensor in segment.proto.graph.initializer:
        dtype = ir.DataType(tensor.data_type)
        elements = 1
        for size in tensor.dims:
            elements *= size
        size_bytes = -(-elements * dtype.bitwidth // 8) if dtype != ir.DataType.STRING else 0
        sizes[dtype.name.lower()] += size_bytes
        if count_uses(tensor.name) > 1:
            shared, shared_bytes = shared + 1, shared_bytes + size_bytes
    count = len(segment.proto.graph.initializer)
    return {"count": count, "bytes_by_dtype": dict(sizes), "shared": shared, "shared_bytes": shared_bytes}
