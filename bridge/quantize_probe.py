"""Asks a backend which products it builds over 8-bit values, each by itself and small.

TensorRT-RTX 1.6, for one, has no int8 convolution: its builder fails over the whole model, without naming a node.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper

from ..errors import BuildError, UnsupportedOpError
from .backends.base import Backend, BuildOptions, Segment
from .partition import spec_of

logger = logging.getLogger(__name__)

_CHANNELS = 32
_SHAPES = {
    "Conv": ([2, _CHANNELS, 8, 8], [_CHANNELS, _CHANNELS, 3, 3], 0),
    "ConvTranspose": ([2, _CHANNELS, 8, 8], [_CHANNELS, _CHANNELS, 3, 3], 1),
    "Gemm": ([8, _CHANNELS], [_CHANNELS, _CHANNELS], 1),
    "MatMul": ([2, 8, _CHANNELS], [_CHANNELS, _CHANNELS], 1),
}
"""Of the data and the weight, and the axis of the weight's scales."""


def refused_products(
    backend: Backend, options: BuildOptions, kind: str, is_half: bool, ops: Collection[str]
) -> dict[str, str]:
    """Why op types cannot read 8-bit values with a backend; those that can are left out.

    Args:
        backend: is asked to parse and build.
        options: of the build.
        kind: "int8" or "fp8".
        is_half: whether the rest is float16 rather than float32.
        ops: of "Conv", "ConvTranspose", "Gemm" and "MatMul".
    """
    found = {}
    for op in sorted(ops):
        segment = _segment(op, kind, is_half)
        quick = dataclasses.replace(options, optimization_level=None)
        try:
            backend.build(segment, quick)
        except (BuildError, UnsupportedOpError) as error:
            words = " ".join(str(error).split())[:200]
            found[op] = f"the backend builds no {op} over {kind}: {words}"
            logger.info("%s", found[op])
    return found


def _segment(op: str, kind: str, is_half: bool) -> Segment:
    """``y = op(DQ(Q(x)), DQ(w))``."""
    element = onnx.TensorProto.FLOAT16 if is_half else onnx.TensorProto.FLOAT
    number = np.float16 if is_half else np.float32
    code = np.dtype(np.int8) if kind == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    data, weight, axis = _SHAPES[op]
    generator = np.random.default_rng(0)
    arrays = {
        "scale": np.array(0.05, number),
        "zero": np.zeros((), code),
        "scales": np.full(_CHANNELS, 0.05, number),
        "zeros": np.zeros(_CHANNELS, code),
        "weight": generator.integers(-9, 9, weight).astype(code),
    }
    make = onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            make("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
            make("DequantizeLinear", ["q", "scale", "zero"], ["d"], "dequantize"),
            make("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], "dequantize_weight", axis=axis),
            make(op, ["d", "w"], ["y"], "product"),
        ],
        "probe",
        [onnx.helper.make_tensor_value_info("x", element, data)],
        [onnx.helper.make_tensor_value_info("y", element, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opset = onnx.helper.make_opsetid("", 20)
    proto = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10))
    graph = proto.graph
    return Segment("probe", proto, {}, (spec_of(graph.input[0]),), (spec_of(graph.output[0]),))
