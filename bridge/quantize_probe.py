"""Asks a backend which products it builds over 8-bit values, each by itself and small, and holds their numbers against
ONNX Runtime's where it can run here.

TensorRT-RTX 1.6, for one, has no int8 convolution: its builder fails over the whole model, without naming a node. And
on an H200 its int8 products in a float16 model were infinite, without a word.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import torch

from ..errors import BuildError, TrtBridgeError, UnsupportedOpError
from .backends import get_backend
from .backends.base import Backend, BuildOptions, Engine, Segment
from .partition import spec_of

logger = logging.getLogger(__name__)

Run = Callable[[Engine, torch.Tensor], torch.Tensor]
"""Runs an engine of one input and one result; both tensors are on the CPU."""

_CHANNELS = 32
_MANY = 512  # terms of a sum, enough for it to leave float16's range before it is scaled
_SHAPES = {
    "Conv": ([2, _CHANNELS, 8, 8], [_CHANNELS, _CHANNELS, 3, 3], 0),
    "ConvTranspose": ([2, _CHANNELS, 8, 8], [_CHANNELS, _CHANNELS, 3, 3], 1),
    "Gemm": ([8, _MANY], [_MANY, _CHANNELS], 1),
    "MatMul": ([2, 8, _MANY], [_MANY, _CHANNELS], 1),
}
"""Of the data and the weight, and the axis of the weight's scales."""
_SCALE = 0.05
_MOST_ERROR = 0.02
"""Of the largest result, that a product may be off by: rounding in another order, and to 16 bits."""


def refused_products(
    backend: Backend, options: BuildOptions, kind: str, is_half: bool, ops: Collection[str], run: Run | None = None
) -> dict[str, str]:
    """Why op types cannot read 8-bit values with a backend; those that can are left out.

    Args:
        backend: is asked to parse and build.
        options: of the build.
        kind: "int8" or "fp8".
        is_half: whether the rest is float16 rather than float32.
        ops: of "Conv", "ConvTranspose", "Gemm" and "MatMul".
        run: runs what was built; None where nothing can be run.
    """
    found = {}
    for op in sorted(ops):
        segment = _segment(op, kind, is_half)
        quick = dataclasses.replace(options, optimization_level=None)
        try:
            engine = backend.build(segment, quick)
        except (BuildError, UnsupportedOpError) as error:
            words = " ".join(str(error).split())[:200]
            found[op] = f"the backend builds no {op} over {kind}: {words}"
            logger.info("%s", found[op])
            continue
        if run is not None and (words := _wrong(engine, op, kind, is_half, run)):
            found[op] = f"the backend computes {op} over {kind} wrongly here: {words}"
            logger.warning("%s", found[op])
    return found


def runner(backend: Backend, options: BuildOptions) -> Run | None:
    """Runs engines of a backend on the current GPU; None where there is none that they are built for."""
    if backend.name == "onnxruntime" or not torch.cuda.is_available():
        return None
    if options.compute_capabilities and torch.cuda.get_device_capability() not in options.compute_capabilities:
        return None
    device = torch.device("cuda", torch.cuda.current_device())

    def run(engine: Engine, data: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.Stream(device)
        with torch.no_grad(), torch.cuda.stream(stream):
            (result,) = backend.load(engine, device).new_context()([data.to(device)])
            stream.synchronize()
        return result.cpu()

    return run


def _wrong(engine: Engine, op: str, kind: str, is_half: bool, run: Run) -> str:
    """How the numbers of a product differ from ONNX Runtime's in float32; "" where they are right."""
    generator = torch.Generator().manual_seed(0)
    data = (torch.rand(_SHAPES[op][0], generator=generator) - 0.5) * (200 * _SCALE)
    data = data.half().float()  # the same values for both
    reference = get_backend("onnxruntime")
    judge = reference.load(reference.build(_segment(op, kind, False), BuildOptions()), torch.device("cpu"))
    (expected,) = judge.new_context()([data])
    try:
        got = run(engine, data.half() if is_half else data)
    except (TrtBridgeError, RuntimeError) as error:
        return " ".join(str(error).split())[:200]
    off = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    return "" if off <= _MOST_ERROR else f"off by {off:.2g} of the largest result"  # NaN is not <= either


def _segment(op: str, kind: str, is_half: bool) -> Segment:
    """``y = op(DQ(Q(x)), DQ(w))``."""
    element = onnx.TensorProto.FLOAT16 if is_half else onnx.TensorProto.FLOAT
    number = np.float16 if is_half else np.float32
    code = np.dtype(np.int8) if kind == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    data, weight, axis = _SHAPES[op]
    generator = np.random.default_rng(0)
    arrays = {
        "scale": np.array(_SCALE, number),
        "zero": np.zeros((), code),
        "scales": np.full(_CHANNELS, _SCALE, number),
        "zeros": np.zeros(_CHANNELS, code),
        "weight": generator.integers(-99, 99, weight).astype(code),
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
