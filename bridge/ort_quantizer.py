"""ONNX Runtime's quantizer, called for nodes and ranges that are chosen elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Ops whose inputs are quantized."""


def run_quantizer(
    proto: onnx.ModelProto, ranges: Mapping[str, tuple[Any, Any]], nodes: Sequence[str], others: Sequence[str]
) -> onnx.ModelProto:
    """Put int8 Q/DQ pairs ahead of what nodes read.

    Args:
        proto: with the weights of these nodes in it, and all types; it is changed.
        ranges: (least, largest) of each activation, as float32 scalars.
        nodes: names of the products.
        others: tensors that are quantized besides.

    Returns:
        The model, in topological order.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    # Types are known here; without this mark it would write the model to disk to infer them.
    proto.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        # Else it reads the biases, which may stand beside the proto, to make room for them in int32.
        "QDQDisableWeightAdjustForInt32Bias": True,
        "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
        "QDQOpTypePerChannelSupportToAxis": {"MatMul": -1},
    }
    data = TensorsData(CalibrationMethod.MinMax, dict(ranges))
    kind = QuantType.QInt8
    quantizer = QDQQuantizer(proto, True, False, kind, kind, data, list(nodes), [], list(PRODUCTS), options)
    for name in others:
        quantizer.quantize_activation_tensor(name)
    with _quiet():
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the user's screen what the quantizer says on the root logger: of biases, which are not quantized."""
    import onnxruntime.quantization

    folder = str(Path(onnxruntime.quantization.__file__).parent)

    def is_other(record: logging.LogRecord) -> bool:
        return not record.pathname.startswith(folder)

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)
