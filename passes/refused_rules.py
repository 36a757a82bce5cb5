"""The rules by which refused nodes are rewritten, by op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import refused_bits as bits
from . import refused_bytes
from . import refused_calls as calls
from . import refused_functions as functions
from . import refused_scatter as scatter
from . import refused_transforms as transforms
from . import refused_windows as windows
from .refused_einsum import einsum
from .refused_fragment import Fragment

Rule = Callable[[Fragment], None]
"""Writes what stands in for a node into the fragment, or raises `CannotRewriteError`."""

_DEFINED = (
    "AffineGrid", "Attention", "CausalConvWithState", "Celu", "CenterCropPad", "GroupNormalization",
    "LayerNormalization", "LinearAttention", "MeanVarianceNormalization", "NegativeLogLikelihoodLoss",
    "RMSNormalization", "RotaryEmbedding", "SoftmaxCrossEntropyLoss", "SwiGLU",
)  # fmt: skip

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_DEFINED, functions.inline),
    **dict.fromkeys(refused_bytes.OPS, refused_bytes.through_int32),
    "AveragePool": windows.average_pool,
    "BitShift": bits.shift,
    "BitwiseAnd": bits.binary,
    "BitwiseNot": bits.invert,
    "BitwiseOr": bits.binary,
    "BitwiseXor": bits.binary,
    "Col2Im": windows.col2im,
    "Compress": scatter.compress,
    "CumProd": scatter.cumulative_product,
    "DFT": transforms.dft,
    "Einsum": einsum,
    "LpPool": windows.lp_pool,
    "MaxPool": windows.max_pool,
    "NonZero": scatter.masked_put,
    "Resize": transforms.resize,
    "ScatterElements": scatter.scatter_elements,
    "ScatterND": scatter.scatter_nd,
    **{f"aten::adaptive_avg_pool{n}d.default": windows.adaptive_average_pool for n in (1, 2, 3)},
    **{f"aten::adaptive_max_pool{n}d.default": windows.adaptive_max_pool for n in (1, 2, 3)},
    **{f"aten::{name}.default": calls.extreme for name in ("amax", "amin", "aminmax")},
    **{f"aten::fft_{name}.default": calls.fft for name in ("fft", "ifft", "fft2", "ifft2", "fftn", "ifftn")},
    "aten::bucketize.Tensor": calls.bucketize,
    "aten::cumprod.default": scatter.aten_cumulative_product,
    "aten::histc.default": calls.histc,
    "aten::scaled_dot_product_attention.default": calls.attention,
    "aten::searchsorted.Tensor": calls.bucketize,
    "transformers::grouped_mm_fallback.default": calls.grouped_mm,
}
"""By ONNX op, or by full name of the torch op in a plugin node."""
