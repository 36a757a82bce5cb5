"""Compute in float16 or bfloat16 what may be computed there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ..errors import PassError
from .exchange import stand_in_name
from .narrow_types import NarrowTypes
from .pipeline import Notes, Pass
from .precision_judge import Decision, Judge
from .precision_rules import FLOAT, LARGEST, SENSITIVE, TARGETS, is_cast, is_float32, positions
from .surgery import element_type, gs_type, output_ids, redirect, remove_nodes, scopes, set_input, set_output


@dataclass(frozen=True)
class ConvertPrecision(Pass):
    """Make a float32 graph a mixed one, for engines that take the types of the graph as they are.

    ::

        x -> Conv(w) -> Relu -> LayerNormalization -> Reshape -> MatMul(v) -> y                      all float32
        x -> Cast(16) -> Conv(w) -> Relu -> Cast(32) -> LayerNormalization
          -> Cast(16) -> Reshape -> MatMul(v) -> Cast(32) -> y                                       w, v in 16 bits

    Products (Conv, MatMul, LSTM, ...) work in 16 bits. What sums squares or many values, takes exponentials or
    logarithms, or computes with positions and masks stays in float32; so do plugins, subgraphs, and what a constant
    does not fit. Elementwise ops follow what they read; ops that only move values take the type of their neighbours. A
    tensor is cast once for all its readers, and what was widened by a Cast is read from ahead of it. Inputs and
    outputs of the model keep their types.

    Masks: -infinity is the same in 16 bits. A finite -3.4e38 or -1e9 would become infinite, and a row that is all
    masked would turn from numbers into NaN; so what such a number is added to stays in float32, up to the softmax,
    which is there anyway. Where 16 bits cannot be avoided (Attention) the mask is clipped to their range.

    A weight beside the proto is not copied: a Cast stands behind it, which the backend folds.

    Attributes:
        target: "float16" or "bfloat16".
        keep: names of nodes, or of tensors that they make, which stay in float32; with the reason.
        wide: names of tensors whose values need float32 (too large for 16 bits), with the reason: the nodes that make
            or read them stay in float32.
        sensitive: op types that stay in float32, with the reason.

    Raises:
        PassError: ``target`` is no such type.
    """

    target: str = "float16"
    keep: Mapping[str, str] = field(default_factory=dict)
    wide: Mapping[str, str] = field(default_factory=dict)
    sensitive: Mapping[str, str] = field(default_factory=lambda: SENSITIVE)

    after: ClassVar[tuple[type[Pass], ...]] = (NarrowTypes,)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise PassError(f"ConvertPrecision: target {self.target!r} is none of {', '.join(TARGETS)}.")

    @property
    def tolerance(self) -> float:
        """Of the outputs: a few hundred times the rounding of one value, 2**-11 or 2**-8."""
        return 0.05 if self.target == "float16" else 0.2

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        target = TARGETS[self.target]
        decision = Judge(graph, notes, target, self.keep, self.wide, self.sensitive).decide()
        for node in graph.nodes:
            if id(node) in decision.reasons:
                notes.refused(node, decision.reasons[id(node)])
        return _Rewriter(graph, notes, target, decision).run()


@dataclass
class _Rewriter:
    """One run.

    Attributes:
        narrow: the 16-bit form of a float32 tensor, by ``id()``.
        wanted: float32 tensors that nodes in 16 bits read, by ``id()``.
        needed: those that are read as float32 too, or leave the graph.
    """

    graph: gs.Graph
    notes: Notes
    target: int
    decision: Decision
    narrow: dict[int, gs.Tensor] = field(default_factory=dict)
    wanted: dict[int, gs.Tensor] = field(default_factory=dict)
    needed: set[int] = field(default_factory=set)

    def run(self) -> int:
        uses = {id(node): positions(node, self.notes.opset, self.target) or ((), ()) for node in self.graph.nodes}
        half = {key for key in self.decision.half if any(uses[key])}
        if not half:
            return 0
        self._find_readers(half, uses)
        result: list[gs.Node] = []
        for tensor in list(self.wanted.values()):
            if isinstance(tensor, gs.Constant) or not tensor.inputs:
                self._narrow_source(tensor, result)
        for node in self.graph.nodes:
            result.append(node)
            if id(node) in half:
                for position in uses[id(node)][0]:
                    set_input(node, position, self.narrow[id(node.inputs[position])])
                for position in uses[id(node)][1]:
                    self._narrow_output(node, position, result)
            else:
                for tensor in node.outputs:
                    if id(tensor) in self.wanted and id(tensor) not in self.narrow:
                        self._narrow_source(tensor, result)
        self.graph.nodes = result
        self._merge_casts()
        return len(half)

    def _find_readers(self, half: set[int], uses: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        self.needed = set().union(*(output_ids(scope) for scope in scopes(self.graph)))
        for scope in scopes(self.graph):
            for node in scope.nodes:
                narrow = uses[id(node)][0] if id(node) in half else ()
                for position, tensor in enumerate(node.inputs):
                    if position in narrow:
                        self.wanted[id(tensor)] = tensor
                    elif is_float32(tensor) and not self._is_merged(node):
                        self.needed.add(id(tensor))

    def _is_merged(self, node: gs.Node) -> bool:
        """Whether a node casts to the very type, and goes where its input has that form."""
        return is_cast(node) and node.attrs.get("to") == self.target

    def _narrow_source(self, tensor: gs.Tensor, nodes: list[gs.Node]) -> None:
        """Make the 16-bit form of a float32 tensor: of a constant, of an input, or of what a node makes."""
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is not None and is_cast(maker) and element_type(maker.inputs[0]) == self.target:
            self.narrow[id(tensor)] = maker.inputs[0]  # Widening is exact, so this is the same number.
            return
        if isinstance(tensor, gs.Constant) and stand_in_name(tensor) is None:
            with np.errstate(over="ignore"):  # Bounds beyond the range become infinite.
                values = self.notes.values(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(self.target))
            if id(tensor) in self.needed:
                self.narrow[id(tensor)] = self.notes.constant(values, self._name(tensor))
            else:
                tensor._values = values
                self.narrow[id(tensor)] = tensor
            return
        source = tensor
        if id(tensor) in self.decision.huge:
            source = self._clipped(tensor, nodes)
        made = gs.Variable(self.notes.fresh_name(self._name(tensor)), gs_type(self.target), tensor.shape)
        nodes.append(self._cast(source, made, self.target))
        self.narrow[id(tensor)] = made

    def _clipped(self, tensor: gs.Tensor, nodes: list[gs.Node]) -> gs.Variable:
        """A mask whose finite numbers stay finite in 16 bits."""
        limit = LARGEST[self.target]
        low, high = (self.notes.constant(np.array(value, np.float32), "limit") for value in (-limit, limit))
        made = self.notes.variable(tensor, f"{tensor.name}_clipped", tensor.shape)
        name = self.notes.fresh_name(f"{tensor.name}_clip")
        nodes.append(gs.Node("Clip", name, inputs=[tensor, low, high], outputs=[made]))
        return made

    def _narrow_output(self, node: gs.Node, position: int, nodes: list[gs.Node]) -> None:
        tensor = node.outputs[position]
        if id(tensor) not in self.needed:
            tensor.dtype = gs_type(self.target)
            self.narrow[id(tensor)] = tensor
            return
        made = gs.Variable(self.notes.fresh_name(self._name(tensor)), gs_type(self.target), tensor.shape)
        set_output(node, position, made)
        self.narrow[id(tensor)] = made
        nodes.append(self._cast(made, tensor, FLOAT))

    def _cast(self, source: gs.Tensor, made: gs.Tensor, element: int) -> gs.Node:
        name = self.notes.fresh_name(f"{made.name}_cast")
        return gs.Node("Cast", name, attrs={"to": int(element)}, inputs=[source], outputs=[made])

    def _name(self, tensor: gs.Tensor) -> str:
        return f"{tensor.name}_{'float16' if self.target == TARGETS['float16'] else 'bfloat16'}"

    def _merge_casts(self) -> None:
        """Casts that were in the model give what a tensor has by now; casts that nobody reads go."""
        outputs = output_ids(self.graph)
        captured = {id(t) for scope in scopes(self.graph) if scope is not self.graph for t in scope.outputs}
        dead = []
        for node in self.graph.nodes:
            if not self._is_merged(node) or id(node.inputs[0]) not in self.narrow:
                continue
            known, made = self.narrow[id(node.inputs[0])], node.outputs[0]
            if known is made:
                continue
            if id(made) in outputs | captured:
                set_input(node, 0, known)
            else:
                redirect(made, known)
                dead.append(node)
        remove_nodes(self.graph, dead)
        while unread := [
            node
            for node in self.graph.nodes
            if is_cast(node) and not node.outputs[0].outputs and id(node.outputs[0]) not in outputs | captured
        ]:
            remove_nodes(self.graph, unread)
