"""Fold batch norms into the convolutions ahead of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .surgery import is_standard, output_ids, remove_nodes, scopes, set_input, set_output, sizes

_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}
"""With the axis of a weight that counts the channels that come out."""


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Fold batch norms into the convolutions ahead of them.

    ::

        y = BatchNormalization(Conv(x, w, b), ...)  y = Conv(x, w', b')

    With s = scale / sqrt(var + epsilon): w' = w * s for each channel that comes out, b' = (b - mean) * s + bias
    (Jacob et al. 2018, arXiv:1712.05877, section 3.2). The result differs by rounding, about 1e-6 of the largest output
    in float32. TensorRT-RTX leaves the norm in a kernel's last step: ResNet-50 takes 11 % longer with it
    (docs/bench-passes.md). Behind a convolution that adds a bias anyway nothing is won, and a weight that others read
    as well would be there twice, so those stay.

    Attributes:
        everywhere: those, too: the scales of a quantized weight are those of the weight with the norm in it.
    """

    everywhere: bool = False

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        count = 0
        for scope in scopes(graph):
            outputs, own = output_ids(scope), {id(node) for node in scope.nodes}
            norms = [node for node in scope.nodes if is_standard(node, "BatchNormalization")]
            dead = [node for node in norms if _fold(node, own, outputs, self.everywhere, notes)]
            remove_nodes(scope, dead)
            count += len(dead)
        return count


def _fold(node: gs.Node, own: set[int], outputs: set[int], everywhere: bool, notes: Notes) -> bool:
    data, *parameters = node.inputs
    maker = data.inputs[0] if data.inputs else None
    if maker is None or id(maker) not in own or not is_standard(maker, *_CONVOLUTIONS):
        return False
    reason = _why_not(node, maker, parameters, id(data) in outputs)
    if not everywhere and not reason:
        reason = _why_better_not(maker, notes)
    if reason:
        notes.refused(node, reason)
        return False
    scale, bias, mean, variance = (notes.values(tensor).astype(np.float64) for tensor in parameters)
    factor = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
    weight = notes.values(maker.inputs[1])
    shape = [1] * weight.ndim
    shape[_CONVOLUTIONS[maker.op]] = -1
    wide = weight.astype(np.float64) * factor.reshape(shape)
    has_bias = len(maker.inputs) > 2 and maker.inputs[2].name
    before = notes.values(maker.inputs[2]).astype(np.float64) if has_bias else 0.0
    shift = ((before - mean) * factor + bias).astype(weight.dtype)
    made = notes.constant(shift, f"{node.name or data.name}_bias")
    set_input(maker, 1, notes.constant(wide.astype(weight.dtype), f"{maker.inputs[1].name}_normalized"))
    if len(maker.inputs) > 2:
        set_input(maker, 2, made)
    else:
        maker.inputs.append(made)
    result = node.outputs[0]
    set_output(maker, 0, result)
    return True


def _why_not(node: gs.Node, maker: gs.Node, parameters: Sequence[gs.Tensor], is_output: bool) -> str:
    if is_output or len(node.inputs[0].outputs) != 1:
        return "something else reads what the convolution makes"
    if node.attrs.get("training_mode") or sum(1 for tensor in node.outputs if tensor.name) != 1:
        return "it trains"
    constants = [*parameters, *(tensor for tensor in maker.inputs[1:] if tensor.name)]
    if not all(isinstance(tensor, gs.Constant) for tensor in constants):
        return "its parameters, or the convolution's, are no constants"
    if maker.op == "ConvTranspose" and maker.attrs.get("group", 1) != 1:
        return "the channels of a grouped ConvTranspose are not along one axis of its weight"
    if sizes(maker.inputs[1]) is None:
        return "the shape of the weight is not known"
    return ""


def _why_better_not(maker: gs.Node, notes: Notes) -> str:
    if len(maker.inputs[1].outputs) > 1:
        return "others read the convolution's weight, too"
    bias = maker.inputs[2] if len(maker.inputs) > 2 and maker.inputs[2].name else None
    # torch.onnx gives each convolution a bias, of zeros where it has none.
    return "the convolution adds a bias anyway" if bias is not None and notes.values(bias).any() else ""
