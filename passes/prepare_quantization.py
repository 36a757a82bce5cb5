"""Give products the weights that are quantized: constants that they read directly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .surgery import is_standard, output_ids, remove_nodes, set_input

_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class PrepareQuantization(Pass):
    """Fold transposes of weights that products read.

    ::

        y = MatMul(x, Transpose(w))                 y = MatMul(x, w')

    It makes copies of weights, which quantization does anyway; so this pass is no part of `DEFAULT`, where weights stay
    those of the torch module. Batch norms: see FuseBatchNorm.
    """

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        outputs = output_ids(graph)
        count = 0
        dead: list[gs.Node] = []
        folded: dict[int, gs.Constant] = {}
        for node in graph.nodes:
            if is_standard(node, *_PRODUCTS):
                count += self._fold_transpose(node, folded, notes)
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
