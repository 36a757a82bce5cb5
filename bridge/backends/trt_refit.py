"""Puts other weights into an engine of TensorRT or TensorRT-RTX, or keeps them off the device.

`OnnxParserRefitter` does what the parser did, on the weights alone: it knows which of the engine's weights are those of
the ONNX graph, and which it computes of them (batch norms). So an engine that can be refitted carries its graph without
these weights, as the parser got it. The plan is loaded, refitted and serialized apart from what runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ...errors import BackendError, ModelFileError, RefitError
from ...passes.exchange import stand_in_name
from ...plugins.tensorrt_v3 import plugin_host
from .base import Engine, Segment
from .flavour import Flavour, tf32_environment
from .plugin_nodes import require_ops

if TYPE_CHECKING:
    import tensorrt as trt

SKELETON_PART = "refit.onnx.zlib"
_PLAN_PART = "engine.plan"


def make_skeleton(proto: onnx.ModelProto, segment: Segment) -> bytes:
    """The graph that an engine is refitted by: weights that may be exchanged are stand-ins, all others are in it.

    The others are needed too: the engine may have folded them into the same numbers, and a stripped one lacks them.

    Args:
        proto: as the parser gets it.
        segment: of which the proto is.

    Returns:
        The serialized proto, compressed.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for tensor in copied.graph.initializer:
        if stand_in_name(tensor) is not None and tensor.name not in segment.refittable:
            weight = segment.weights[tensor.name]
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = weight.tobytes()
    return zlib.compress(copied.SerializeToString(), 6)


def refit_plan(
    flavour: Flavour, engine: Engine, weights: Mapping[str, ir.TensorProtocol], device: torch.device
) -> memoryview:
    """The plan of an engine with other weights.

    Args:
        flavour: the library.
        engine: refittable, which has a skeleton, with or without weights; it is not changed.
        weights: all that may be exchanged.
        device: a CUDA device, of the kind that the engine was built for.

    Raises:
        BackendError: the engine cannot be loaded there.
        RefitError: it does not take the weights; in the library's words.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    try:
        skeleton = zlib.decompress(engine.parts[SKELETON_PART])
    except zlib.error as error:
        raise ModelFileError(f"{SKELETON_PART} of the engine is damaged: {error}. Convert again.") from error
    plugins = engine.info.get("plugins", [])
    require_ops(plugins)
    host = plugin_host(flavour.module) if plugins else None
    with torch.cuda.device(device), tf32_environment(flavour, bool(engine.info.get("tf32"))):
        torch.cuda.set_device(device)  # makes torch's context that of this thread, also where it is a new one
        logger = trt.Logger(trt.ILogger.ERROR)
        runtime = trt.Runtime(logger)
        loaded = runtime.deserialize_cuda_engine(engine.parts[_PLAN_PART])
        if host is not None and (failure := host.take_failure()) is not None:
            try:
                raise failure
            finally:
                del failure  # or it would keep this frame, and the frame it
        if loaded is None:
            raise BackendError(
                f"{flavour.title} {trt.__version__} cannot load this engine on {torch.cuda.get_device_name(device)}: "
                f"it was built with {engine.info.get('version')} for {engine.info.get('target')}. Convert again here."
            )
        refitter = trt.Refitter(loaded, logger)
        held = _give_weights(flavour, refitter, logger, skeleton, weights)
        missing = refitter.get_missing_weights()
        if missing:
            raise RefitError(f"{flavour.title} asks for more weights than the graph has: {', '.join(missing[:8])}.")
        if not refitter.refit_cuda_engine():
            raise RefitError(f"{flavour.title} could not refit the engine; its own words are on standard error.")
        del held, refitter
        config = loaded.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)  # an engine built without weights has some now
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)  # and takes others again
        return memoryview(loaded.serialize_with_config(config))


def _give_weights(
    flavour: Flavour,
    refitter: trt.Refitter,
    logger: trt.Logger,
    skeleton: bytes,
    weights: Mapping[str, ir.TensorProtocol],
) -> list[object]:
    """Name all weights of the graph to a refitter; what is returned must live until the engine is refitted."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    parser = trt.OnnxParserRefitter(refitter, logger)
    given = parser.load_model_proto(skeleton)
    held: list[object] = [parser, skeleton]
    for tensor in onnx.ModelProto.FromString(skeleton).graph.initializer:
        if stand_in_name(tensor) is None:
            continue
        if tensor.name not in weights:
            raise RefitError(
                f"The engine needs the weight {tensor.name!r}, for which there is no recipe: convert again."
            )
        data = np.frombuffer(weights[tensor.name].tobytes(), np.uint8)
        held.append(data)
        given = given and parser.load_initializer(tensor.name, data.ctypes.data, data.nbytes)
    if not (given and parser.refit_model_proto()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        words = "; ".join(error.desc() for error in errors) or "its own words are on standard error"
        raise RefitError(f"{flavour.title} does not take the weights: {words}.")
    return held


def stream_weights(engine: trt.ICudaEngine, info: Mapping[str, Any]) -> None:
    """Let a loaded engine keep no more weights on the device than it was converted for; before any context is made.

    Args:
        engine: built with weight streaming.
        info: of it; ``weight_streaming_bytes`` is the budget, absent for engines that do not stream.

    Raises:
        BackendError: the library does not accept the budget.
    """
    budget = info.get("weight_streaming_bytes")
    if budget is None:
        return
    most = engine.streamable_weights_size
    engine.weight_streaming_budget_v2 = wanted = min(int(budget), most)
    if engine.weight_streaming_budget_v2 != wanted:
        raise BackendError(
            f"The engine does not take weight_streaming_bytes={budget}: {most} bytes of its weights can be streamed, "
            f"and it keeps a budget of {engine.weight_streaming_budget_v2}."
        )
