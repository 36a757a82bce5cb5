"""Remove nodes that give back their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .narrow_types import NarrowTypes
from .pipeline import Notes, Pass
from .surgery import (
    adopt_info,
    become,
    drop_outputs,
    element_type,
    fixed_sizes,
    is_standard,
    nbytes,
    output_ids,
    rank,
    redirect,
    remove_nodes,
    scopes,
    set_output,
    sizes,
)  # fmt: skip


@dataclass(frozen=True)
class RemoveNoOps(Pass):
    """Remove nodes that, by attributes, constants and fixed shapes, give back their input bit by bit.

    ::

        x -> Cast(to=float) -> Relu -> y       x -> Relu -> y             where x is float
        x -> Relu -> Identity -> y             x -> Relu -> y             y, an output, keeps its name
        x -> Identity -> y                     (stays)                    x an input, y an output

    Covers Identity, Cast, CastLike, Dropout, Reshape, Transpose, Concat, Sum, Max, Min, Mean, Slice, Pad, Expand, Tile,
    Squeeze and Unsqueeze (also as a pair), and Add, Sub, Mul, Div, Pow with a neutral constant. Adding +0.0 is not
    neutral, since it turns -0.0 into +0.0; adding -0.0 or subtracting +0.0 is. Where an output must keep its name and
    the input cannot take it, the node becomes an Identity.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants, NarrowTypes)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        # A node that goes leaves what it knew of its tensor's type to the node before it, which may go next.
        while found := self._sweep(graph, notes):
            count += found
        return count

    def _sweep(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        for scope in scopes(graph):
            outputs = output_ids(scope)
            own = {id(node) for node in scope.nodes}
            dead: list[gs.Node] = []
            for node in scope.nodes:
                rule = _RULES.get(node.op) if is_standard(node) and node.inputs else None
                source = rule(node, notes) if rule is not None else None
                if source is None:
                    continue
                rewritten, is_dead = _bypass(node, source, outputs, own, notes)
                count += rewritten
                if is_dead:
                    dead.append(node)
            remove_nodes(scope, dead)
        return count


def _bypass(node: gs.Node, source: gs.Tensor, outputs: set[int], own: set[int], notes: Notes) -> tuple[bool, bool]:
    """Let readers of a node's output read `source` instead; whether that changed the graph, and the node can go."""
    result = node.outputs[0]
    if id(result) not in outputs:
        adopt_info(source, result)
        redirect(result, source)
        return True, True
    maker = source.inputs[0] if source.inputs else None
    if maker is not None and id(maker) in own and id(source) not in outputs and is_standard(maker):
        position = next(index for index, tensor in enumerate(maker.outputs) if tensor is source)
        adopt_info(result, source)
        set_output(maker, position, result)
        redirect(source, result)
        return True, True
    reason = "it keeps the name of an output apart from that of an input, an initializer, another output or a plugin's"
    if node.op == "Identity":
        notes.refused(node, reason)
        return False, False
    become(node, "Identity", [source])
    drop_outputs(node, 1)
    return True, False


Rule = Callable[[gs.Node, Notes], "gs.Tensor | None"]


def _identity(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    return node.inputs[0]


def _cast(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    source = element_type(node.inputs[0])
    target = node.attrs.get("to") if node.op == "Cast" else element_type(node.inputs[1])
    return node.inputs[0] if source and source == target else None


def _dropout(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    if notes.opset < 7:
        return None
    if len(node.outputs) > 1 and node.outputs[1].name:
        # Whether the mask is an output of the graph is not seen here, so it must have been trimmed.
        notes.refused(node, "its mask may be read; RemoveDeadNodes trims it where it is not")
        return None
    if len(node.inputs) > 2 and node.inputs[2].name:
        mode = _small(node.inputs[2], notes)
        if mode is None or mode.any():
            notes.refused(node, "it is in training mode, or may be")
            return None
    return node.inputs[0]


def _reshape(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    source, shape = node.inputs[0], sizes(node.inputs[0])
    if shape is None or node.attrs.get("allowzero"):
        return None
    target = sizes(node.outputs[0])
    asked = _small(node.inputs[1], notes) if len(node.inputs) > 1 else None
    if asked is not None and asked.size == len(shape):
        # 0 copies the size of the input.
        target = tuple(
            size if value == 0 else (int(value) if value > 0 else (target[i] if target else None))
            for i, (value, size) in enumerate(zip(asked, shape, strict=True))
        )
        open_ones = [i for i, value in enumerate(asked) if value != 0 and (shape[i] is None or target[i] is None)]
    else:
        open_ones = [i for i in range(len(shape)) if target and i < len(target) and None in (shape[i], target[i])]
    if target is None or len(target) != len(shape):
        return None
    fixed = [i for i in range(len(shape)) if i not in open_ones and shape[i] is not None and target[i] is not None]
    if any(shape[i] != target[i] for i in fixed):
        return None
    # The number of elements stays, so one open dimension cannot differ where all others agree.
    if len(open_ones) > 1:
        notes.refused(node, "more than one dimension is dynamic, so it may change the shape")
        return None
    return source


def _transpose(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    permutation = node.attrs.get("perm")
    if permutation is None:
        known = rank(node.inputs[0])
        return node.inputs[0] if known is not None and known < 2 else None
    return node.inputs[0] if list(permutation) == sorted(permutation) else None


def _single(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _slice(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    source, shape = node.inputs[0], sizes(node.inputs[0])
    if notes.opset < 10:
        starts, ends = np.array(node.attrs["starts"]), np.array(node.attrs["ends"])
        axes, steps = np.array(node.attrs.get("axes", range(starts.size))), np.ones(starts.size, np.int64)
    else:
        parts = [_small(tensor, notes) if tensor.name else None for tensor in node.inputs[1:5]]
        if any(part is None and tensor.name for part, tensor in zip(parts, node.inputs[1:5], strict=True)):
            return None
        parts += [None] * (4 - len(parts))
        if parts[0] is None or parts[1] is None:
            return None
        starts, ends = parts[0], parts[1]
        axes = parts[2] if parts[2] is not None else np.arange(starts.size)
        steps = parts[3] if parts[3] is not None else np.ones(starts.size, np.int64)
    if starts.any() or (steps != 1).any():
        return None
    for end, axis in zip(ends, axes, strict=True):
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        if end < np.iinfo(np.int32).max and (size is None or end < size):
            if size is None:
                notes.refused(node, f"dimension {int(axis)} is dynamic, so it may take a part only")
            return None
    return source


def _pad(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    pads = np.array(node.attrs.get("pads", 1)) if notes.opset < 11 else _small(node.inputs[1], notes)
    return node.inputs[0] if pads is not None and not pads.any() else None


def _expand(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    shape, asked = sizes(node.inputs[0]), _small(node.inputs[1], notes)
    if shape is None:
        return None
    if asked is None:
        same = fixed_sizes(node.inputs[0]) is not None and fixed_sizes(node.inputs[0]) == fixed_sizes(node.outputs[0])
        return node.inputs[0] if same else None
    if asked.size > len(shape):
        return None
    for size, value in zip(shape[len(shape) - asked.size :], asked, strict=True):
        if value != 1 and value != size:
            if size is None:
                notes.refused(node, "a dimension is dynamic, so it may be expanded")
            return None
    return node.inputs[0]


def _tile(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    repeats = _small(node.inputs[1], notes) if notes.opset >= 6 else None
    return node.inputs[0] if repeats is not None and (repeats == 1).all() else None


def _squeeze(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    axes = _axes(node, notes)
    if axes == () and (node.op == "Unsqueeze"):
        return node.inputs[0]
    if axes is None and node.op == "Squeeze" and len(node.inputs) < 2 and "axes" not in node.attrs:
        shape = fixed_sizes(node.inputs[0])
        return node.inputs[0] if shape is not None and 1 not in shape else None
    maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    opposite = "Unsqueeze" if node.op == "Squeeze" else "Squeeze"
    if axes and maker is not None and is_standard(maker, opposite) and _axes(maker, notes) == axes:
        # Both count axes in the longer shape, so equal axes undo each other.
        return maker.inputs[0]
    return None


def _axes(node: gs.Node, notes: Notes) -> tuple[int, ...] | None:
    """The axes of a Squeeze or Unsqueeze where they are known."""
    if "axes" in node.attrs:
        return tuple(sorted(node.attrs["axes"]))
    values = _small(node.inputs[1], notes) if len(node.inputs) > 1 and node.inputs[1].name else None
    return None if values is None else tuple(sorted(int(axis) for axis in values.reshape(-1)))


def _neutral(node: gs.Node, notes: Notes) -> gs.Tensor | None:
    """``x + -0.0``, ``x - 0``, ``x * 1``, ``x / 1``, ``x ** 1``."""
    for position in (1, 0) if node.op in ("Add", "Mul") else (1,):
        constant, source = node.inputs[position], node.inputs[1 - position]
        if not isinstance(constant, gs.Constant) or any(size != 1 for size in constant.shape):
            continue
        if isinstance(source, gs.Constant) or rank(source) is None or len(constant.shape) > len(source.shape):
            continue
        if node.op != "Pow" and element_type(constant) != element_type(source):
            continue
        value = notes.values(constant).reshape(())
        if node.op in ("Mul", "Div", "Pow"):
            if value == 1:
                return source
        elif value == 0:
            is_float = value.dtype.kind not in "iu"
            if is_float and bool(np.signbit(value.astype(np.float64))) != (node.op == "Add"):
                notes.refused(node, "adding +0.0 turns -0.0 into +0.0")
                continue
            return source
    return None


def _small(tensor: gs.Tensor, notes: Notes) -> np.ndarray | None:
    """Values of a constant that is as small as axes, shapes and modes are."""
    if isinstance(tensor, gs.Constant) and nbytes(tensor) <= 1024:
        return notes.values(tensor)
    return None


_RULES: Mapping[str, Rule] = {
    "Identity": _identity, "Cast": _cast, "CastLike": _cast, "Dropout": _dropout, "Reshape": _reshape,
    "Transpose": _transpose, "Concat": _single, "Sum": _single, "Max": _single, "Min": _single, "Mean": _single,
    "Slice": _slice, "Pad": _pad, "Expand": _expand, "Tile": _tile, "Squeeze": _squeeze, "Unsqueeze": _squeeze,
    "Add": _neutral, "Sub": _neutral, "Mul": _neutral, "Div": _neutral, "Pow": _neutral,
}  # fmt: skip
