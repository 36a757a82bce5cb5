"""Find group normalization in its parts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .fold_constants import FoldConstants
from .norm_parts import TYPES, Uniform
from .patterns import SMALL_BYTES, View, same_shape, same_size, sweep, values
from .pipeline import Notes, Pass
from .surgery import become, element_type, nbytes, rank, sizes

_MOST_SCALE_BYTES = 1 << 16


@dataclass(frozen=True)
class FuseGroupNorm(Pass):
    """Make one GroupNormalization of the InstanceNormalization that it was written with; opset 21 and later.

    ::

        x -> Reshape (N, groups, -1)                                     GroupNormalization(x, scale, bias,
          -> InstanceNormalization(ones, zeros) -> Reshape (as x)            num_groups, epsilon)
          -> Mul(scale) -> Add(bias)                                     scale and bias (C)

    after Wu and He, "Group Normalization" (arXiv:1803.08494); exporters write it so for opsets before 21. Scale and
    bias must be constants of one value a channel, ``(C, 1, 1)`` or with a 1 in front; they become ``(C)``, for which
    their values are read (up to 64 KiB, and over 1 KiB only where nobody else reads them, so that nothing is stored
    twice). One that is missing, or does not fit, is one, or zero, and what was there stays behind.

    Fires on float32, float16 and bfloat16 with a fixed number of channels; other sizes may be dynamic. Sums are taken
    in float32 whatever the type is; the result differs by rounding, about 1e-6 of the largest output in float32.
    TensorRT-RTX 1.6.1 and 1.7.1 build the node in all three types, with a dynamic batch too.
    """

    after: ClassVar[tuple[type[Pass], ...]] = (FoldConstants,)

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        ones, zeros = Uniform("unit_scale", 1), Uniform("no_bias", 0)
        return sweep(graph, lambda view, node: _step(view, node, ones, zeros, notes))


def _step(view: View, node: gs.Node, ones: Uniform, zeros: Uniform, notes: Notes) -> bool:
    if node.op != "InstanceNormalization":
        return False
    split = view.maker(node.inputs[0], "Reshape")
    joined = view.reader(node.outputs[0], "Reshape")
    if split is None or joined is None:
        return False
    source, result = split.inputs[0], joined.outputs[0]
    reason = _why_not(view, node, split, joined, notes)
    if reason:
        notes.refused(node, reason)
        return False
    channels, groups = int(source.shape[1]), int(node.inputs[0].shape[1])
    last, gone = joined, [node, split]
    scale: gs.Tensor | None = None
    bias: gs.Tensor | None = None
    if (follow := _per_channel(view, result, "Mul", channels, notes)) is not None:
        gone.insert(0, last)
        last, scale = follow
    if (follow := _per_channel(view, last.outputs[0], "Add", channels, notes)) is not None:
        gone.insert(0, last)
        last, bias = follow
    element = element_type(source)
    scale = scale if scale is not None else ones.get((channels,), element, notes)
    bias = bias if bias is not None else zeros.get((channels,), element, notes)
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    become(last, "GroupNormalization", [source, scale, bias])
    last.attrs.update(num_groups=groups, epsilon=epsilon, stash_type=int(onnx.TensorProto.FLOAT))
    view.retire(*gone)
    return True


def _why_not(view: View, node: gs.Node, split: gs.Node, joined: gs.Node, notes: Notes) -> str | None:
    """Why this is no group normalization, or one that cannot be the standard op; None if it can."""
    source, grouped = split.inputs[0], node.inputs[0]
    shape, parts = sizes(source), sizes(grouped)
    if shape is None or parts is None or len(shape) < 3 or len(parts) < 3 or shape[1] is None or parts[1] is None:
        return "it may be a group normalization, but the number of channels or groups is not known"
    if shape[1] % parts[1] or not _same_batch(split, notes) or not same_shape(source, joined.outputs[0]):
        return "it is no group normalization: its groups are not made of whole channels, or not put back as they were"
    if not view.only_for(grouped, {id(node)}):
        return f"it is a group normalization, but {grouped.name!r} inside it is read elsewhere"
    for tensor, neutral in ((node.inputs[1], 1), (node.inputs[2], 0)):
        constant = values(tensor, notes)
        if constant is None or (constant != neutral).any():
            return f"it is a group normalization, but {tensor.name!r} is a scale or bias of its own for each group"
    if element_type(source) not in TYPES:
        return "it is a group normalization in float64; engines have float32, float16 and bfloat16"
    if notes.opset < 21:
        return f"it is a group normalization, but the op came with opset 21 and the model has {notes.opset}"
    return None


def _same_batch(split: gs.Node, notes: Notes) -> bool:
    """Whether a Reshape leaves the first dimension alone."""
    asked = values(split.inputs[1], notes)
    if asked is not None and asked[0] == 0 and not split.attrs.get("allowzero"):
        return True
    source, grouped = split.inputs[0].shape, split.outputs[0].shape
    if same_size(source[0], grouped[0]):
        return True
    # What is left over is the batch where all else is fixed and as large as before.
    rest, after = sizes(split.inputs[0])[1:], sizes(split.outputs[0])[1:]  # type: ignore[index]
    return None not in rest and None not in after and math.prod(rest) == math.prod(after)


def _per_channel(
    view: View, tensor: gs.Tensor, op: str, channels: int, notes: Notes
) -> tuple[gs.Node, gs.Constant] | None:
    """The one reader of a tensor if it is this op with a constant for each channel, and that constant as ``(C)``."""
    node = view.reader(tensor, op)
    known = rank(tensor)
    if node is None or known is None:
        return None
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    if not isinstance(other, gs.Constant) or element_type(other) != element_type(tensor):
        return None
    shape = list(other.shape)
    if shape not in ([channels, *[1] * (known - 2)], [1, channels, *[1] * (known - 2)]):
        return None
    size = nbytes(other)
    if size > _MOST_SCALE_BYTES or (size > SMALL_BYTES and len(view.readers(other)) > 1):
        notes.refused(
            node, f"{other.name!r} of {size:,} bytes stays behind: making it ({channels},) would store it twice"
        )
        return None
    flat = np.ascontiguousarray(notes.values(other).reshape(channels))
    return node, notes.constant(flat, f"{other.name}_flat")
