"""Find attention in its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .attention_masks import Masks
from .attention_operands import Operand
from .attention_parts import Block, Finder
from .fold_shapes import FoldShapes
from .patterns import View
from .pipeline import Notes, Pass
from .surgery import become, element_type, gs_type, is_standard, rank, release_outputs, scopes, set_output

OPSET = 23
"""From which ONNX has the op."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one Attention of the ops that it was written with; opset 23 and later.

    ::

        s = MatMul(q * a, k^T * b)                                              Attention(q, k, v, mask, scale=a*b*c)
        y = MatMul(Softmax(s * c + mask), v)

    the scaled dot-product attention of Vaswani et al., "Attention Is All You Need" (arXiv:1706.03762), in whatever form
    exporters and people write it:

    * queries, keys and scores multiplied or divided by numbers anywhere; keys transposed by a Transpose, one that
      splits heads as well, or Reshapes around one; products as MatMul or Einsum; of three axes (batch times heads) too;
    * scores that are cast to float32 for the softmax and back; in what type the node has them is up to the backend;
    * masks that are added (ALiBi and other biases are such), and ones that choose a low number (Where): they are added
      too, which is the same up to -3e4. A mask that hides what comes later, of as many keys as queries, becomes
      ``is_causal``;
    * keys and values whose heads an Expand repeats (grouped-query attention): the op shares them itself;
    * rows that are all NaN set to zero, as torch.onnx writes it: where the mask is finite there are none, else what
      such rows hold is set to zero behind the node.

    A mask in float32 over attention in 16 bits is rounded to it, its infinite numbers to half the range. A row that a
    mask hides altogether by -infinity is NaN in parts; what the op gives there is up to the backend.

    Fires where nothing else reads the parts. The result differs by rounding.

    Attributes:
        keep: blocks that stay as they are written, with the reason: names of their last nodes (which the new node
            takes), or of the tensors that these make.
    """

    keep: Mapping[str, str] = field(default_factory=dict)

    after: ClassVar[tuple[type[Pass], ...]] = (FoldShapes,)

    @property
    def tolerance(self) -> float:
        """Of the outputs: scores are rounded in other places."""
        return 5e-3

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        return sum(self._fuse(scope, notes) for scope in scopes(graph))

    def _fuse(self, scope: gs.Graph, notes: Notes) -> int:
        view = View(scope)
        finder, masks = Finder(view, notes), Masks(view, notes)
        ahead: dict[int, list[gs.Node]] = {}
        behind: dict[int, list[gs.Node]] = {}
        count = 0
        for node in scope.nodes:
            if not is_standard(node, "Softmax") or view.is_dead(node):
                continue
            block = finder.find(node)
            kept = self._kept(block) if isinstance(block, Block) else ""
            reason = block if isinstance(block, str) else kept
            if isinstance(block, Block) and not kept:
                reason = self._why_not(block, notes) or masks.why_not(block)
            if reason:
                notes.refused(node, reason if kept else f"it may be attention, but {reason}")
            if block is None or isinstance(block, str) or reason:
                continue
            new, follow = _write(block, masks, view, notes)
            ahead[id(block.final)] = new
            behind[id(block.final)] = follow
            view.retire(*reversed(block.parts))
            count += 1
        if count:
            # A mask that several blocks share is written ahead of the first of them.
            order = [n for node in scope.nodes for n in (*ahead.get(id(node), ()), node, *behind.get(id(node), ()))]
            scope.nodes = order
            view.close()
        return count

    def _kept(self, block: Block) -> str:
        """Why a block was asked to stay; "" where it was not."""
        names = (block.final.name, block.final.outputs[0].name)
        return next((self.keep[name] for name in names if name in self.keep), "")

    def _why_not(self, block: Block, notes: Notes) -> str:
        """Why a block stays in parts; "" where it becomes one node."""
        if notes.opset < OPSET:
            return f"the op came with opset {OPSET} and the model has {notes.opset}"
        sources = [block.query, block.key, block.value]
        if block.query.source is block.key.source and block.query.order == block.key.order:
            return "queries and keys are one tensor, over which TensorRT's builder crashes"
        for each in sources:
            unknown = sum(not isinstance(size, (int, np.integer)) for size in each.shape)
            if rank(each.source) != len(each.shape) and each.order is None and unknown > 1:
                return f"{each.source.name!r} has other axes, and their sizes are not fixed"
        return ""


def _write(block: Block, masks: Masks, view: View, notes: Notes) -> tuple[list[gs.Node], list[gs.Node]]:
    """Turn the last product of a block into the node; returns what goes ahead of it and behind it."""
    final = block.final
    result = final.outputs[0]
    element = element_type(result)
    writer = _Writer(notes, element, final.name)
    lifted = len(block.query.shape) == 3
    inputs = [writer.operand(operand, lifted) for operand in (block.query, block.key, block.value)]
    causal = masks.is_causal(block)
    mark = len(masks.nodes)
    mask = None if causal else masks.write(block, element)
    if mask is not None:
        inputs.append(mask)
    guarded = mask is not None and block.guarded and not masks.hides_no_row(block)
    become(final, "Attention", inputs)
    if causal:
        final.attrs["is_causal"] = 1
    size = int(block.query.shape[-1])
    # The default is written by leaving it out; in 16 bits the factors of the parts are rounded.
    tolerance = 1e-6 if element == onnx.TensorProto.FLOAT else 2e-3
    if not math.isclose(block.scale, 1 / math.sqrt(size), rel_tol=tolerance):
        final.attrs["scale"] = float(block.scale)
    ahead = [*masks.nodes[mark:], *writer.nodes]
    writer.nodes = []
    shape = [*block.query.shape[:-1], block.value.shape[-1]]
    if lifted:
        shape.insert(1, 1)
    steps: list[tuple[str, list[gs.Tensor], dict[str, Any]]] = []
    if guarded and mask is not None:
        steps.append(("guard", [mask], {}))
    if lifted:
        steps.append(("Squeeze", [notes.constant(np.array([1], np.int64), "head_axis")], {}))
    if block.output is not None:
        steps.append(("Transpose", [], {"perm": list(block.output)}))
    if steps:
        made = gs.Variable(notes.fresh_name(f"{result.name}_attention"), gs_type(element), shape)
        set_output_of(final, made)
        writer.chain(made, steps, result)
    return ahead, writer.nodes


def set_output_of(node: gs.Node, tensor: gs.Variable) -> None:
    """Let a node make another tensor; the old one is free for another maker."""
    release_outputs(node)
    list.append(node.outputs, tensor)
    list.append(tensor.inputs, node)


@dataclass
class _Writer:
    """Writes the nodes around one Attention node."""

    notes: Notes
    element: int
    name: str
    nodes: list[gs.Node] = field(default_factory=list)

    def operand(self, operand: Operand, lifted: bool) -> gs.Tensor:
        """A tensor of four axes: (batch, heads, length, size)."""
        tensor, shape = operand.source, list(operand.shape)
        if operand.order is not None:
            tensor = self._node("Transpose", [tensor], shape, perm=list(operand.order))
        elif rank(tensor) != len(shape):
            asked = [int(size) if isinstance(size, (int, np.integer)) else -1 for size in shape]
            tensor = self._node("Reshape", [tensor, self.notes.constant(np.array(asked, np.int64), "heads")], shape)
        if lifted:
            shape.insert(1, 1)
            tensor = self._node("Unsqueeze", [tensor, self.notes.constant(np.array([1], np.int64), "head_axis")], shape)
        return tensor

    def chain(
        self, tensor: gs.Tensor, steps: list[tuple[str, list[gs.Tensor], dict[str, Any]]], result: gs.Tensor
    ) -> None:
        """Nodes one behind the other, the last of which makes `result`."""
        for op, more, attributes in steps:
            if op == "guard":
                tensor = self._guarded(tensor, more[0])
            else:
                tensor = self._node(op, [tensor, *more], None, **attributes)
        last = self.nodes[-1]
        set_output(last, 0, result)

    def _guarded(self, tensor: gs.Tensor, mask: gs.Tensor) -> gs.Tensor:
        """Zero where a mask hides a whole row."""
        dtype = np.dtype(np.float32)
        wide = self._node("Cast", [mask], list(mask.shape or []), kind=dtype, to=int(onnx.TensorProto.FLOAT))
        last = self.notes.constant(np.array([-1], np.int64), "key_axis")
        best = self._node("ReduceMax", [wide, last], None, kind=dtype, keepdims=1)
        lowest = self.notes.constant(np.array(-np.inf, np.float32), "lowest")
        hidden = self._node("Equal", [best, lowest], None, kind=np.dtype(bool))
        zero = self.notes.constant(np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(self.element)), "zero")
        return self._node("Where", [hidden, zero, tensor], list(tensor.shape or []))

    def _node(self, op: str, inputs: list[gs.Tensor], shape: Any, kind: Any = None, **attributes: Any) -> gs.Tensor:
        name = self.notes.fresh_name(f"{inputs[0].name}_{op.lower()}")
        made = gs.Variable(name, gs_type(self.element) if kind is None else kind, shape)
        label = self.notes.fresh_name(f"{self.name or 'node'}_{op.lower()}")
        self.nodes.append(gs.Node(op, label, attrs=attributes, inputs=inputs, outputs=[made]))
        return made
