"""What passes share to look at a graphsurgeon graph and to change it in linear time.

graphsurgeon's own synchronized lists find an element by deep comparison of nodes, which is slow for a tensor with many
consumers and may hit an equal node instead of the one meant. The functions here go by identity.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

"""Domain of the nodes that call a torch op. Passes leave them as they are."""

STANDARD_DOMAINS = (None, "", "ai.onnx")


def scopes(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph (branch or loop body) in it, outer ones first."""
    pending = [graph]
    while pending:
        scope = pending.pop()
        yield scope
        pending.extend(body for node in scope.nodes for body in bodies(node))


def bodies(node: gs.Node) -> list[gs.Graph]:
    """The subgraphs that a node holds directly."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Whether a node is an op of the ONNX standard; with names given, one of these."""
    return node.domain in STANDARD_DOMAINS and (not ops or node.op in ops)


def describe(node: gs.Node) -> str:
    """A node for messages: ``ArgMax 'node_argmax' -> best``."""
    op = node.op if is_standard(node) else f"{node.domain}::{node.op}"
    name = f" {node.name!r}" if node.name else ""
    return f"{op}{name} -> {', '.join(tensor.name for tensor in node.outputs if tensor.name) or 'nothing'}"


def element_type(tensor: gs.Tensor) -> int:
    """The ONNX element type (`onnx.TensorProto.FLOAT`, ...), 0 (UNDEFINED) where unknown."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, onnx.TypeProto):  # Optional and map types come as protos.
        return 0
    return int(dtype) if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def type_name(element: int) -> str:
    """``float16``, ``int64`` for an ONNX element type."""
    return str(onnx.TensorProto.DataType.Name(element)).lower()


def gs_type(element: int) -> Any:
    """An ONNX element type the way graphsurgeon writes it: a numpy type, or the number where numpy itself has none."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    return dtype if dtype.type.__module__ == "numpy" else element


def sizes(tensor: gs.Tensor) -> tuple[int | None, ...] | None:
    """The sizes of a tensor's dimensions, None for one that is not fixed; None altogether where the rank is unknown.

    A size of 0 counts as not fixed in a Variable: some exporters write it for "unknown".
    """
    if tensor.shape is None:
        return None
    if isinstance(tensor, gs.Constant):
        return tuple(int(size) for size in tensor.shape)
    return tuple(int(s) if isinstance(s, (int, np.integer)) and s > 0 else None for s in tensor.shape)


def fixed_sizes(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The shape where all of it is known before running, else None."""
    known = sizes(tensor)
    if known is None or any(size is None for size in known):
        return None
    return tuple(size for size in known if size is not None)


def rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def nbytes(tensor: gs.Constant) -> int:
    """Size of a constant's values, without reading them."""
    return (
        math.prod(int(size) for size in tensor.shape)
        * onnx.helper.tensor_dtype_to_np_dtype(element_type(tensor)).itemsize
    )


def output_ids(scope: gs.Graph) -> set[int]:
    """``id()`` of each tensor that is an output of this very graph."""
    return {id(tensor) for tensor in scope.outputs}


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of `old` read `new` instead, those in subgraphs too. Graph outputs are not touched."""
    for node in {id(consumer): consumer for consumer in old.outputs}.values():
        for position, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, position, new)
    list.extend(new.outputs, old.outputs)
    list.clear(old.outputs)


def set_input(node: gs.Node, position: int, tensor: gs.Tensor) -> None:
    """Let one input of a node be another tensor."""
    _discard(node.inputs[position].outputs, node)
    list.__setitem__(node.inputs, position, tensor)
    list.append(tensor.outputs, node)


def set_output(node: gs.Node, position: int, tensor: gs.Tensor) -> None:
    """Let a node produce another tensor, which loses its former producer."""
    _discard(node.outputs[position].inputs, node)
    list.__setitem__(node.outputs, position, tensor)
    for producer in list(tensor.inputs):
        for other, produced in enumerate(producer.outputs):
            if produced is tensor and producer is not node:
                list.__setitem__(producer.outputs, other, gs.Variable.empty())
    list.clear(tensor.inputs)
    list.append(tensor.inputs, node)


def release_outputs(node: gs.Node) -> list[gs.Tensor]:
    """Take its outputs from a node, so that other nodes can produce them; returns them."""
    released = list(node.outputs)
    for tensor in released:
        _discard(tensor.inputs, node)
    list.clear(node.outputs)
    return released


def remove_nodes(scope: gs.Graph, dead: Collection[gs.Node]) -> None:
    """Remove nodes from a graph, together with their subgraphs, and unlink them from all tensors in one sweep."""
    if not dead:
        return
    outer = {id(node) for node in dead}
    scope.nodes = [node for node in scope.nodes if id(node) not in outer]
    everything = list(dead)
    for node in dead:
        for body in bodies(node):
            everything.extend(inner for nested in scopes(body) for inner in nested.nodes)
    gone = {id(node) for node in everything}
    touched = {id(tensor): tensor for node in everything for tensor in (*node.inputs, *node.outputs)}
    for tensor in touched.values():
        for links in (tensor.inputs, tensor.outputs):
            kept = [node for node in links if id(node) not in gone]
            list.clear(links)
            list.extend(links, kept)
    for node in everything:
        list.clear(node.inputs)
        list.clear(node.outputs)


def drop_outputs(node: gs.Node, keep: int) -> None:
    """Shorten a node's outputs to the first `keep`; nobody may read the others."""
    for tensor in node.outputs[keep:]:
        _discard(tensor.inputs, node)
    list.__delitem__(node.outputs, slice(keep, None))


def become(node: gs.Node, op: str, inputs: list[gs.Tensor]) -> None:
    """Turn a node into another op without attributes, over other inputs; its outputs stay."""
    for tensor in node.inputs:
        _discard(tensor.outputs, node)
    list.clear(node.inputs)
    for tensor in inputs:
        list.append(node.inputs, tensor)
        list.append(tensor.outputs, node)
    node.op = op
    node.attrs.clear()


def adopt_info(tensor: gs.Tensor, source: gs.Tensor) -> None:
    """Fill in a Variable's missing dtype and shape from a tensor that is known to have the same."""
    if isinstance(tensor, gs.Variable):
        if tensor.dtype is None:
            tensor.dtype = source.dtype
        if tensor.shape is None and source.shape is not None:
            tensor.shape = list(source.shape)


def _discard(links: list[gs.Node], node: gs.Node) -> None:
    """Remove one entry that is this very node."""
    for position, other in enumerate(links):
        if other is node:
            list.__delitem__(links, position)
            return
