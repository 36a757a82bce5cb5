"""How a model can do without a plugin, for the causes and ops for which a way is known."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from .plan import PluginCall

INSTEAD: Mapping[str, str] = {
    "aten::bucketize": "(x.unsqueeze(-1) > boundaries).sum(-1)",
    "aten::cummax": "for few elements x.unsqueeze(-2).masked_fill(~torch.ones(n, n).tril().bool(), -inf).max(-1)",
    "aten::cummin": "for few elements x.unsqueeze(-2).masked_fill(~torch.ones(n, n).tril().bool(), inf).min(-1)",
    "aten::histc": "for whole numbers (x.unsqueeze(-1) == torch.arange(bins)).sum(0)",
    "aten::hypot": "torch.sqrt(x * x + y * y)",
    "aten::kthvalue": "torch.topk(x, k, largest=False) and of that the last",
    "aten::masked_scatter": "torch.where(mask, source.flatten()[(mask.flatten().cumsum(0) - 1).clamp(min=0)]"
    ".view(mask.shape), x), where the mask is not broadcast",
    "aten::nonzero": "keep every element and its mask, with torch.where, instead of choosing some",
    "aten::searchsorted": "for one sorted row (sorted < values.unsqueeze(-1)).sum(-1)",
    "aten::_upsample_bilinear2d_aa": "antialias=False, or a convolution with the filter's weights",
    "aten::_upsample_bicubic2d_aa": "antialias=False, or a convolution with the filter's weights",
}
"""What computes the same in ops that engines have, by torch op without its overload."""

_BY_REASON = (
    ("random generator", "draw the numbers outside of the model and give them to it as an input"),
    ("cannot look into it", "write what depends on values with torch.where, or move that line out of the model"),
    ("is used as a shape", "make that size a Python number, or the size of an input"),
    ("Int8 type", "compute it in int32 or float32"),
    ("as_plugins names it", "leave it out of as_plugins"),
)

_CHOOSES = ("aten::index.", "aten::index_put")


def ways_to_avoid(call: PluginCall, plugin_host: str) -> tuple[str, ...]:
    """How to do without a plugin, or have it inside an engine; nothing where no way is known.

    Args:
        call: of a plan.
        plugin_host: the option of the conversion.
    """
    ways = [way for words, way in _BY_REASON if words in call.reason]
    name = call.op.partition(".")[0]
    if name in INSTEAD:
        ways.append(INSTEAD[name])
    elif call.op.startswith(_CHOOSES) and "NonZero" in call.reason:
        ways.append("torch.where(mask, ...) over every element, instead of choosing with a mask")
    dtypes = {spec.dtype for spec in call.output_specs if spec is not None} | set(call.input_dtypes)
    if ir.DataType.DOUBLE in dtypes:
        ways.append("compute it in float32: TensorRT has no float64")
    if plugin_host == "segments":
        ways.append('plugin_host="auto" keeps it inside the engine where the backend can')
    elif "may be empty" in call.host_refusal:
        ways.append(
            "to have it inside the engine state a lower bound: tb.Dim(..., min=1) for a size that depends on data"
        )
    return tuple(ways)
