"""Give products the weights that are quantized: constants, with the batch norm that follows in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .surgery import is_standard, output_ids, remove_nodes, set_input, set_output, sizes

_PRODUCTS = ("MatMul", "Gemm")
_CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}
"""With the axis of a weight that counts the channels that come out."""


@dataclass(frozen=True)
class PrepareQuantization(Pass):
    """Fold what stands between a weight and its product, and batch norms behind convolutions.

    ::

        y = MatMul(x, Transpose(w))                 y = MatMul(x, w')
        y = BatchNormalization(Conv(x, w, b), ...)  y = Conv(x, w', b')

    With s = scale / sqrt(var + epsilon): w' = w * s for each channel that comes out, b' = (b - mean) * s + bias
    (Jacob et al. 2018, arXiv:1712.05877, section 3.2). Both make copies of weights, which quantization does anyway; so
    this pass is no part of `DEFAULT`, where weights stay those of the torch module.
    """

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        outputs = output_ids(graph)
        count = 0
        dead: list[gs.Node] = []
        folded: dict[int, gs.Constant] = {}
        for node in graph.nodes:
            if is_standard(node, *_PRODUCTS):
                count += self._fold_transpose(node, folded, notes)
            elif is_standard(node, "BatchNormalization") and self._fold_batch_norm(node, outputs, notes):
                dead.append(node)
                count += 1
        for node in graph.nodes:
            made = node.outputs
            if (
                is_standard(node, "Transpose")
                and id(node) in folded
                and not made[0].outputs
                and id(made[0]) not in outputs
            ):
                dead.append(node)
        remove_nodes(graph, dead)
        return count

    def _fold_transpose(self, node: gs.Node, folded: dict[int, gs.Constant], notes: Notes) -> int:
        tensor = node.inputs[1]
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is None or not is_standard(maker, "Transpose") or not isinstance(maker.inputs[0], gs.Constant):
            return 0
        if id(maker) not in folded:
            values = notes.values(maker.inputs[0])
            turned = np.ascontiguousarray(np.transpose(values, maker.attrs.get("perm")))
            folded[id(maker)] = notes.constant(turned, f"{maker.inputs[0].name}_transposed")
        set_input(node, 1, folded[id(maker)])
        return 1

    def _fold_batch_norm(self, node: gs.Node, outputs: set[int], notes: Notes) -> bool:
        data, *parameters = node.inputs
        maker = data.inputs[0] if data.inputs else None
        if maker is None or not is_standard(maker, *_CONVOLUTIONS):
            return False
        if reason := self._refusal(node, maker, parameters, id(data) in outputs):
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

    def _refusal(self, node: gs.Node, maker: gs.Node, parameters: Sequence[gs.Tensor], is_output: bool) -> str:
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
