"""ONNX Runtime sessions over graphs whose weights lie in one buffer beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir

from ...errors import BuildError, ModelFileError
from ...plugins.sessions import session_options
from ..model import iterate_nodes
from .base import Engine, Progress

MODEL_PART = "model.onnx"
WEIGHTS_PART = "weights.bin"
LEFT_OUT = "trtbridge-left-out"
"""``location`` of a stand-in whose values are not in the engine."""
EXTERNAL = onnx.TensorProto.EXTERNAL
_ALIGNMENT_BYTES = 64
_FLOAT8 = {
    onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E4M3FNUZ, onnx.TensorProto.FLOAT8E5M2,
    onnx.TensorProto.FLOAT8E5M2FNUZ,
}  # fmt: skip
_QUANTIZED_TYPE = ("to", "output_dtype")


# Weights


def stand_ins(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in proto.graph.initializer if tensor.data_location == EXTERNAL]


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in iterate_nodes(graph):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
            yield from attribute.graphs


def hoist_stand_ins(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose stand-ins all are in the main graph: ONNX Runtime takes values for those alone."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    known = {tensor.name for tensor in result.graph.initializer}
    for graph in list(_subgraphs(result.graph)):
        tensors = list(graph.initializer)
        hoisted = [tensor for tensor in tensors if tensor.data_location == EXTERNAL]
        if not hoisted:
            continue
        result.graph.initializer.extend(tensor for tensor in hoisted if tensor.name not in known)
        known |= {tensor.name for tensor in hoisted}
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in tensors if t.data_location != EXTERNAL]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    return result


def pack(
    proto: onnx.ModelProto,
    weights: Mapping[str, ir.TensorProtocol],
    name: str,
    report: Progress,
    left_out: Collection[str] = (),
    alignment: int = _ALIGNMENT_BYTES,
) -> np.ndarray:
    """Copy weights into one buffer, and make the stand-ins point into it.

    Args:
        proto: its stand-ins are changed.
        weights: by name; each is read once.
        name: of the engine, for errors.
        report: told the part of the bytes that is copied.
        left_out: stand-ins that point nowhere afterwards.
        alignment: of each weight in the buffer, in bytes.

    Returns:
        the buffer, (bytes,) uint8, aligned as its parts are.
    """
    placed = []
    total = 0
    for tensor in stand_ins(proto):
        if tensor.name in left_out:
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=LEFT_OUT)
            continue
        placed.append(tensor)
        weight = weights.get(tensor.name)
        if weight is None:
            raise BuildError(f"{name}: weight {tensor.name!r} has no values.")
        if int(weight.dtype) != tensor.data_type or tuple(weight.shape.numpy()) != tuple(tensor.dims):
            raise BuildError(
                f"{name}: weight {tensor.name!r} is {weight.dtype.name}{list(weight.shape.numpy())}, the graph "
                f"says {ir.DataType(tensor.data_type).name}{list(tensor.dims)}."
            )
        total = -(-total // alignment) * alignment
        del tensor.external_data[:]
        for key, value in (("location", WEIGHTS_PART), ("offset", total), ("length", weight.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        total += weight.nbytes
    storage = np.zeros(total + alignment, np.uint8)
    start = -storage.ctypes.data % alignment
    buffer = storage[start : start + total]
    for tensor in placed:
        weight = weights[tensor.name]
        offset = _external(tensor)["offset"]
        target = buffer[offset : offset + weight.nbytes]
        if weight.dtype.bitwidth < 8:
            target[:] = np.frombuffer(weight.tobytes(), np.uint8)
        else:
            values = weight.numpy()
            np.copyto(target.view(values.dtype).reshape(values.shape), values)
        report("weights", (offset + weight.nbytes) / max(total, 1))
    return buffer


def _external(tensor: onnx.TensorProto) -> dict[str, int]:
    return {entry.key: int(entry.value) for entry in tensor.external_data if entry.key in ("offset", "length")}


def is_left_out(tensor: onnx.TensorProto) -> bool:
    """Whether a stand-in has no values in an engine: it was built without."""
    return any(entry.key == "location" and entry.value == LEFT_OUT for entry in tensor.external_data)


def unpack(proto: onnx.ModelProto, buffer: memoryview, name: str) -> dict[str, ir.TensorProtocol]:
    """Views of the weights in the buffer that `pack` filled; without those that it left out."""
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in stand_ins(proto):
        if is_left_out(tensor):
            continue
        dtype, shape = ir.DataType(tensor.data_type), tuple(tensor.dims)
        place = _external(tensor)
        offset, length = place.get("offset", -1), place.get("length", -1)
        needed = -(-int(np.prod(shape, dtype=np.int64)) * dtype.bitwidth // 8)
        if offset < 0 or length != needed or offset + length > len(buffer):
            raise ModelFileError(
                f"{name}: weight {tensor.name!r} needs {needed} bytes; {MODEL_PART} places it at offset {offset} with "
                f"length {length}, in {len(buffer)} bytes of {WEIGHTS_PART}. The engine is damaged: build it again."
            )
        data = np.frombuffer(buffer, np.uint8, length, offset)
        if dtype.bitwidth < 8:
            weights[tensor.name] = ir.PackedTensor(data, dtype, shape=ir.Shape(shape), name=tensor.name)
        else:
            array = data.view(dtype.numpy()).reshape(shape)
            weights[tensor.name] = ir.Tensor(array, dtype=dtype, name=tensor.name)
    return weights


def read_parts(engine: Engine, name: str) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    missing = [part for part in (MODEL_PART, WEIGHTS_PART) if part not in engine.parts]
    if missing:
        raise ModelFileError(f"{name}: the engine lacks {' and '.join(missing)}; it has {sorted(engine.parts)}.")
    try:
        proto = onnx.ModelProto.FromString(bytes(engine.parts[MODEL_PART]))
    except Exception as error:  # protobuf's DecodeError
        raise ModelFileError(f"{name}: {MODEL_PART} is damaged: {error}. Build the engine again.") from error
    if not proto.HasField("graph"):
        raise ModelFileError(f"{name}: {MODEL_PART} holds no graph. Build the engine again.")
    return proto, unpack(proto, memoryview(engine.parts[WEIGHTS_PART]), name)


def with_provenance(model: bytes | bytearray | memoryview, proto: onnx.ModelProto) -> bytes:
    """A serialized model whose nodes have the metadata and doc strings of those of a graph that does the same.

    Args:
        model: what `OnnxRuntimeBackend.build` made of a graph.
        proto: the same graph with other metadata.
    """
    made = onnx.ModelProto.FromString(bytes(model))
    theirs, ours = list(iterate_nodes(made.graph)), list(iterate_nodes(proto.graph))
    if len(theirs) == len(ours):  # and in the same order: that is part of an engine's key
        for node, source in zip(theirs, ours, strict=True):
            node.ClearField("metadata_props")
            node.metadata_props.extend(source.metadata_props)
            node.ClearField("doc_string")
            if source.doc_string:
                node.doc_string = source.doc_string
    return bytes(made.SerializeToString())


# Sessions


def _ort_value(ort: Any, array: np.ndarray, dtype: ir.DataType) -> Any:
    """An OrtValue over an array's memory: of the type itself where numpy has it, else of its bits."""
    if is_numpy_dtype(dtype):
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(dtype))


def ort_values(ort: Any, weights: Mapping[str, ir.TensorProtocol]) -> dict[str, Any]:
    values = {}
    for name, weight in weights.items():
        dtype = weight.dtype
        if dtype.bitwidth < 8:
            # The packed values fill the front; the array has the logical shape, as ONNX Runtime reads that off it.
            packed = np.frombuffer(weight.tobytes(), np.uint8)
            array = np.zeros(tuple(weight.shape.numpy()), np.uint8)
            array.reshape(-1)[: packed.size] = packed
        else:
            array = weight.numpy().view(_storage_dtype(dtype))
        values[name] = _ort_value(ort, array, dtype)
    return values


def zeros_like(ort: Any, tensor: onnx.TensorProto) -> Any:
    dtype = ir.DataType(tensor.data_type)
    return _ort_value(ort, np.zeros(tuple(tensor.dims), _storage_dtype(dtype)), dtype)


def is_numpy_dtype(dtype: ir.DataType) -> bool:
    """True for element types that numpy has without ml_dtypes."""
    return dtype.bitwidth >= 8 and dtype.numpy().isbuiltin == 1


def _storage_dtype(dtype: ir.DataType) -> np.dtype[Any]:
    return dtype.numpy() if is_numpy_dtype(dtype) else np.dtype(f"u{-(-dtype.bitwidth // 8)}")


def make_session(
    ort: Any,
    proto: onnx.ModelProto,
    values: Mapping[str, Any],
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    optimize: bool = True,
    prepack: bool = True,
    prepare: Callable[[Any], None] | None = None,
) -> Any:
    """A session whose stand-ins have the given values; ``prepare`` may change its options.

    ONNX Runtime copies those values while the session is created. `SessionOptions.add_initializer` would not, but it
    goes by name, and the optimizer that moves transposes puts other values under the same name: wrong results.
    """
    options = session_options(ort)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif _has_float8(proto):
        # Its fusions of Q/DQ pairs with other nodes give wrong numbers for float8 (seen with 1.32).
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    if prepare is not None:
        prepare(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=list(providers), enable_fallback=0)


def _has_float8(proto: onnx.ModelProto) -> bool:
    return any(t.data_type in _FLOAT8 for t in proto.graph.initializer) or any(
        a.i in _FLOAT8 for node in iterate_nodes(proto.graph) for a in node.attribute if a.name in _QUANTIZED_TYPE
    )
