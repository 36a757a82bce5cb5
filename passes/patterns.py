"""What the merging and fusing passes share: who makes a tensor, who reads it, and what lies between two nodes.

A `View` is one scope during one sweep. Nodes that a rewrite leaves without readers are taken out at its end, all at
once, so that a sweep stays linear.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Container, Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes
from .surgery import (
    adopt_info,
    become,
    is_standard,
    nbytes,
    output_ids,
    rank,
    redirect,
    remove_nodes,
    scopes,
    sizes,
)  # fmt: skip

SMALL_BYTES = 1024
"""Constants up to this size are parameters, such as axes and shapes, not weights; a second one costs nothing."""

_ONE_OPERAND = frozenset({"Clip", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Ops that work on their first input; the others say how."""


@dataclass(frozen=True)
class Edge:
    """Where a node reads a tensor."""

    node: gs.Node
    position: int

    @property
    def tensor(self) -> gs.Tensor:
        return self.node.inputs[self.position]


class View:
    """One scope as a pattern sees it: only standard nodes of this very scope, without those already taken out."""

    def __init__(self, scope: gs.Graph) -> None:
        self._scope = scope
        self._outputs = output_ids(scope)
        self._position = {id(node): index for index, node in enumerate(scope.nodes)}
        self._dead: dict[int, gs.Node] = {}
        self._barred: dict[Hashable, set[int]] = {}

    def maker(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """The node of one of these ops that makes a tensor as its first output."""
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or id(node) not in self._position or not is_standard(node, *ops):
            return None
        return node if node.outputs[0] is tensor else None

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read a tensor, those in subgraphs too, each once."""
        return list({id(node): node for node in tensor.outputs if id(node) not in self._dead}.values())

    def only_for(self, tensor: gs.Tensor, readers: Container[int]) -> bool:
        """Whether nobody but nodes with these ``id()`` needs a tensor."""
        return id(tensor) not in self._outputs and all(
            id(node) in readers or id(node) in self._dead for node in tensor.outputs
        )

    def reader(self, tensor: gs.Tensor, *ops: str) -> gs.Node | None:
        """The one node that needs a tensor, if there is just one, it is in this scope and of one of these ops."""
        found = self.readers(tensor) if id(tensor) not in self._outputs else []
        if len(found) != 1 or id(found[0]) not in self._position or not is_standard(found[0], *ops):
            return None
        return found[0]

    def is_dead(self, node: gs.Node) -> bool:
        return id(node) in self._dead

    def is_output(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self._outputs

    def retire(self, *nodes: gs.Node) -> None:
        """Take out those nodes whose first output nobody needs any more; the last reader comes first."""
        for node in nodes:
            if id(node) in self._position and all(self.only_for(tensor, ()) for tensor in node.outputs):
                self._dead[id(node)] = node

    def bypass(self, node: gs.Node, source: gs.Tensor) -> None:
        """Let readers of a node's output read `source`; an output of the scope keeps its name behind an Identity."""
        result = node.outputs[0]
        if self.is_output(result):
            become(node, "Identity", [source])
            return
        if self.maker(source) is not None and not self.is_output(source):  # Inputs and outputs stay as declared.
            adopt_info(source, result)
        redirect(result, source)
        self._dead[id(node)] = node

    def bar(self, key: Hashable, nodes: Iterable[gs.Node]) -> None:
        """Keep later regions of this sweep with the same key from these nodes: what is above them does not fit."""
        self._barred.setdefault(key, set()).update(map(id, nodes))

    def region(self, end: gs.Node, ops: Collection[str], key: Hashable) -> tuple[list[gs.Node], list[Edge]]:
        """The nodes above `end` that are of these ops, work for `end` alone and are not barred.

        Nodes are visited last to first, so all readers of one are known when its turn comes, and no walk goes past a
        node that others need too. With what is found in vain barred, that is linear over a whole sweep.

        Args:
            end: where to begin.
            ops: what a region is made of.
            key: what it is looked at for, see `bar`.

        Returns:
            The nodes, last first, and the edges where these and `end` read anything else. Parameters (shapes, axes,
            bounds) do not count, nor does anything but the first input of `end`.
        """
        members: dict[int, gs.Node] = {}
        readers = {id(end)}
        edges = [Edge(end, 0)]
        pending: list[tuple[int, int]] = []
        queued: dict[int, gs.Node] = {}
        barred = self._barred.get(key, ())

        def push(tensor: gs.Tensor) -> None:
            node = self.maker(tensor)
            if node is None or id(node) in queued or id(node) in barred:
                return
            if node.op in ops and len(node.outputs) == 1:
                queued[id(node)] = node
                heapq.heappush(pending, (-self._position[id(node)], id(node)))

        push(end.inputs[0])
        while pending:
            node = queued[heapq.heappop(pending)[1]]
            if not self.only_for(node.outputs[0], readers):
                continue
            members[id(node)] = node
            readers.add(id(node))
            for position, tensor in enumerate(node.inputs[:1] if node.op in _ONE_OPERAND else node.inputs):
                if tensor.name:
                    edges.append(Edge(node, position))
                    push(tensor)
        inside = {id(node.outputs[0]) for node in members.values()}
        return list(members.values()), [edge for edge in edges if id(edge.tensor) not in inside]

    def close(self) -> None:
        """Take the dead nodes out of the scope."""
        remove_nodes(self._scope, list(self._dead.values()))


def sweep(graph: gs.Graph, step: Callable[[View, gs.Node], bool]) -> int:
    """Offer every standard node of every scope to `step`, in order, until nothing changes; the number of rewrites."""
    total = 0
    while True:
        found = 0
        for scope in scopes(graph):
            view = View(scope)
            for node in scope.nodes:
                if is_standard(node) and node.inputs and not view.is_dead(node):
                    found += step(view, node)
            view.close()
        if not found:
            return total
        total += found


def values(tensor: gs.Tensor, notes: Notes) -> np.ndarray | None:
    """The values of a small constant; None for anything else."""
    if not isinstance(tensor, gs.Constant) or nbytes(tensor) > SMALL_BYTES:
        return None
    return notes.values(tensor)


def number(tensor: gs.Tensor, notes: Notes) -> float | None:
    """The value of a constant of one element."""
    found = values(tensor, notes)
    return float(found.reshape(-1)[0]) if found is not None and found.size == 1 and found.dtype.kind != "b" else None


def axes(node: gs.Node, notes: Notes, position: int = 1) -> tuple[int, ...] | None:
    """The axes of a node, an attribute or a constant input; None where not known.

    They are counted from the front, but for negative ones where the rank is not known.
    """
    found = node.attrs.get("axes")
    if found is None and len(node.inputs) > position and node.inputs[position].name:
        constant = values(node.inputs[position], notes)
        found = None if constant is None else constant.reshape(-1).tolist()
    if not found:
        return None
    data = node.inputs[0] if node.op != "Unsqueeze" else node.outputs[0]
    known = rank(data)
    return tuple(int(axis) + known if axis < 0 and known is not None else int(axis) for axis in found)


def same_size(left: object, right: object) -> bool:
    """Whether two entries of shapes are one size: equal numbers, or one symbol (which ONNX lets mean one size)."""
    if isinstance(left, str) or isinstance(right, str):
        return bool(left) and bool(left == right)
    whole = isinstance(left, (int, np.integer)) and isinstance(right, (int, np.integer))
    return whole and bool(left == right) and bool(left)


def same_shape(left: gs.Tensor, right: gs.Tensor) -> bool:
    """Whether two tensors surely have one shape."""
    if left.shape is None or right.shape is None or len(left.shape) != len(right.shape):
        return False
    return all(same_size(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def trailing_sizes(tensor: gs.Tensor, first: int) -> tuple[int, ...] | None:
    """The sizes from one axis to the last where they are fixed."""
    known = sizes(tensor)
    tail = () if known is None else known[first:]
    return tuple(size for size in tail if size is not None) if tail and None not in tail else None
