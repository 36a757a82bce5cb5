"""Simplifies a freshly exported graph as the exporter's own optimizer does, but never copies a weight.

That optimizer stores a transposed copy of linear weights, and new convolution weights with a batch norm in
them (float32 ones even for a bfloat16 model, which makes the graph invalid). Engines do both when they are built.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from ..nodes import DOMAIN
from .model import INLINE_LIMIT_BYTES
from .parameters import hidden

_ROUNDS = 2  # as many as the exporter makes; the second one finds what the first one opened up


def simplify(model: ir.Model) -> None:
    """Inline functions, fold constants and shape arithmetic, and apply onnxscript's exact rewrites, in place.

    None of that looks at the values of initializers that may change (`parameters.mark`).
    """
    onnxscript.optimizer.inline(model)
    with hidden(model):
        _simplify(model)


def _simplify(model: ir.Model) -> None:
    rewrites = RewritePass(
        [
            rules.cast_cast_rule,
            rules.cast_constant_of_shape_rule,
            rules.cast_constant_of_shape_without_value_rule,
            rules.collapse_slice_rule,
            rules.collapse_slice2_rule,
            rules.dropout_inference_rule,
            rules.dropout_zero_rule,
            rules.flatten_to_reshape_rule,
            rules.fuse_pad_into_conv_rule,
            rules.materialize_reshape_shape_rule,
            rules.no_op_cast_rule,
            rules.no_op_dynamic_scatter_nd_rule,
            rules.no_op_expand_rule,
            rules.no_op_static_scatter_nd_rule,
            rules.no_op_transpose_rule,
            rules.one_reshape_matmul_reshape_rule,
            rules.reshape_reshape_rule,
            rules.squeeze_reshape_1d_rule,
            rules.transpose_transpose_rule,
            rules.two_reshapes_matmul_reshape_rule,
            rules.unsqueeze_unsqueeze_rule,
        ]
    )
    for _ in range(_ROUNDS):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_spare_weights)
        rewritten = rewrites(model).modified
        common_passes.RemoveUnusedNodesPass()(model)
        if not rewritten:
            break
    ir.passes.Sequential(
        common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.LiftSubgraphInitializersToMainGraphPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )(model)


def _spare_weights(node: ir.Node) -> bool | None:
    """Whether to fold a node: the optimizer's own choice (None), but no plugin and none that would copy a weight."""
    if node.domain == DOMAIN:
        return False
    sizes = [value.const_value.nbytes for value in node.inputs if value is not None and value.const_value is not None]
    return False if max(sizes, default=0) > INLINE_LIMIT_BYTES else None
