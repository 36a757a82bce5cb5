"""ONNX nodes that torch has no op for: they run in ONNX Runtime on the CPU, else in ONNX's reference implementation."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx.shape_inference
import torch

from ..errors import PluginError
from ..nodes import decode_nodes, every_node, wrong_in_onnxruntime
from .sessions import never_spin, session_options

_T = onnx.TensorProto
# torch type: ONNX element type, and how numpy holds it.
_TYPES: dict[torch.dtype, tuple[int, Any]] = {
    torch.float32: (_T.FLOAT, np.float32),
    torch.float16: (_T.FLOAT16, np.float16),
    torch.float64: (_T.DOUBLE, np.float64),
    torch.bfloat16: (_T.BFLOAT16, ml_dtypes.bfloat16),
    torch.bool: (_T.BOOL, np.bool_),
    torch.int8: (_T.INT8, np.int8),
    torch.int16: (_T.INT16, np.int16),
    torch.int32: (_T.INT32, np.int32),
    torch.int64: (_T.INT64, np.int64),
    torch.uint8: (_T.UINT8, np.uint8),
    torch.uint16: (_T.UINT16, np.uint16),
    torch.uint32: (_T.UINT32, np.uint32),
    torch.uint64: (_T.UINT64, np.uint64),
    torch.float8_e4m3fn: (_T.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (_T.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: (_T.FLOAT8E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    torch.float8_e5m2fnuz: (_T.FLOAT8E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
}
_BY_ELEMENT = {element: dtype for dtype, (element, _) in _TYPES.items()}
_BY_NUMPY = {np.dtype(kind): dtype for dtype, (_, kind) in _TYPES.items()}
# Types that torch converts to and from numpy only as bits.
_AS_BITS = {torch.bfloat16: torch.int16} | {
    dtype: torch.uint8 for dtype in _TYPES if dtype.is_floating_point and dtype.itemsize == 1
}


def run(text: str, tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Run a model that `encode_nodes` made.

    Args:
        text: the model.
        tensors: its inputs, on any device; they are copied to the host, which waits for them.
        device: where the results go.

    Raises:
        PluginError: neither ONNX Runtime nor the reference takes the model with these inputs.
    """
    arrays = [to_numpy(tensor) for tensor in tensors]
    key = _key(tensors)
    session, refusal = _session(text, key)
    if session is not None:
        try:
            results = _run_session(session, arrays, [element for element, _ in key])
            return [to_torch(result).to(device) for result in results]
        except Exception as error:  # ONNX Runtime's errors have no common base
            refusal = str(error)
    model = _typed(text, key)
    try:
        feeds = {value.name: array for value, array in zip(model.graph.input, arrays, strict=True)}
        found = _reference(text, key).run(None, feeds)
        return [to_torch(np.asarray(result)).to(device) for result in found]
    except Exception as error:
        nodes = ", ".join(node.op_type for node in model.graph.node)
        given = [f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors]
        raise PluginError(
            f"ONNX node {nodes} cannot run on inputs {given}.\n  torch has no op for it.\n"
            f"  ONNX Runtime: {refusal}\n  ONNX's reference implementation: {type(error).__name__}: {error}"
        ) from error


def infer(text: str, tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, list[int | str | None]]]:
    """Types and shapes of results, from shapes alone.

    Args:
        text: the model.
        tensors: fake tensors; a size that is no int counts as unknown, equal ones as equal.

    Returns:
        For each output dtype and sizes: an int, the text of a size of an input, or None where it is not known.

    Raises:
        PluginError: a result's type or rank is not known.
    """
    symbolic = _infer(text, tensors, hints=False)
    if any(dtype is None or sizes is None for dtype, sizes in symbolic):
        # ONNX infers less from symbols than from numbers; the rank is the same for all numbers.
        at_hints = _infer(text, tensors, hints=True)
        symbolic = [
            (dtype or other, sizes if sizes is not None or rank is None else [None] * len(rank))
            for (dtype, sizes), (other, rank) in zip(symbolic, at_hints, strict=True)
        ]
    known = [(d, s) if d is not None and s is not None else None for d, s in symbolic]
    return [found or _ask_session(text, tensors, index) for index, found in enumerate(known)]


_Inferred = tuple[torch.dtype | None, list[int | str | None] | None]


def _infer(text: str, tensors: Sequence[torch.Tensor], *, hints: bool) -> list[_Inferred]:
    model = onnx.ModelProto()
    model.CopyFrom(_typed(text, _key(tensors)))
    all_positive = True
    for value, tensor in zip(model.graph.input, tensors, strict=True):
        for size, proto in zip(tensor.shape, value.type.tensor_type.shape.dim, strict=True):
            hint = getattr(getattr(size, "node", None), "hint", None) if hints else None
            if isinstance(size, int) or hint is not None:
                proto.dim_value = size if isinstance(size, int) else hint
                all_positive &= proto.dim_value > 0
            else:
                proto.dim_param = str(size)
    found: list[_Inferred] = []
    for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
        kind = value.type.tensor_type
        sizes: list[int | str | None] | None = None
        if kind.HasField("shape"):
            # ONNX's inference takes some symbols for 0 (Attention in 3-D): a 0 out of nothing is not believed.
            sizes = [
                d.dim_value if d.HasField("dim_value") and (d.dim_value or not all_positive) else (d.dim_param or None)
                for d in kind.shape.dim
            ]
        found.append((_BY_ELEMENT.get(kind.elem_type), sizes))
    return found


def _ask_session(text: str, tensors: Sequence[torch.Tensor], index: int) -> tuple[torch.dtype, list[int | str | None]]:
    """The type and shape of an output that ONNX cannot infer, from ONNX Runtime."""
    model = _typed(text, _key(tensors))
    nodes = ", ".join(node.op_type for node in model.graph.node)
    unknown = f"The type or the rank of the results of ONNX node {nodes} is not known before it runs."
    try:
        output = _make_session(model).get_outputs()[index]
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise PluginError(f"{unknown} ONNX Runtime: {error}") from error
    name = re.fullmatch(r"tensor\((.+)\)", output.type)
    element = _ELEMENT_NAMES.get(name[1] if name else "", "").upper()
    dtype = _BY_ELEMENT.get(_T.DataType.Value(element)) if element else None
    if dtype is None or (not output.shape and len(model.graph.input) > 0):  # it says () for an unknown rank too
        raise PluginError(unknown)
    return dtype, list(output.shape)


_ELEMENT_NAMES = {name: name for name in ("float", "double", "float16", "bfloat16", "bool")} | {
    f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values on the host."""
    host = tensor.detach().cpu().contiguous()
    if host.dtype in _AS_BITS:
        return host.view(_AS_BITS[host.dtype]).numpy().view(_TYPES[host.dtype][1])
    return host.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The opposite of `to_numpy`; the memory is the tensor's own."""
    dtype = _BY_NUMPY.get(array.dtype)
    if dtype is None:
        raise PluginError(f"torch has no tensors of type {array.dtype}.")
    copy = np.array(array, order="C")
    if dtype in _AS_BITS:
        return torch.from_numpy(copy.view(np.int16 if dtype.itemsize == 2 else np.uint8)).view(dtype)
    return torch.from_numpy(copy)


_Key = tuple[tuple[int, int], ...]  # element type and rank of each input


def _key(tensors: Sequence[torch.Tensor]) -> _Key:
    return tuple((_TYPES[tensor.dtype][0], tensor.dim()) for tensor in tensors)


@functools.lru_cache(maxsize=512)
def _typed(text: str, key: _Key) -> onnx.ModelProto:
    model = decode_nodes(text)
    for value, (element, rank) in zip(model.graph.input, key, strict=True):
        value.type.CopyFrom(onnx.helper.make_tensor_type_proto(element, [None] * rank))
    return model


@functools.lru_cache(maxsize=512)
def _session(text: str, key: _Key) -> tuple[Any, str]:
    """A session, or why there is none."""
    model = _typed(text, key)
    for node in every_node(model.graph.node):
        if reason := wrong_in_onnxruntime(node):
            return None, reason
    try:
        return _make_session(model), ""
    except Exception as error:  # ONNX Runtime's errors have no common base
        return None, str(error)


def _make_session(model: onnx.ModelProto) -> Any:
    import onnxruntime

    options = session_options(onnxruntime)
    never_spin(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run_session(session: Any, arrays: Sequence[np.ndarray], elements: Sequence[int]) -> list[np.ndarray]:
    import onnxruntime

    feeds = {}
    for entry, array, element in zip(session.get_inputs(), arrays, elements, strict=True):
        if array.dtype.type.__module__ == "numpy":
            feeds[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        else:
            bits = array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)
            feeds[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
    names = [entry.name for entry in session.get_outputs()]
    results = []
    for value in session.run_with_ort_values(names, feeds):
        element = value.element_type()
        array = value.numpy() if not value.has_value() or element not in _BITS else _bits_of(value, element)
        results.append(array)
    return results


_BITS = {_TYPES[dtype][0]: _TYPES[dtype][1] for dtype in _AS_BITS}


def _bits_of(value: Any, element: int) -> np.ndarray:
    array: np.ndarray = value.numpy()  # ONNX Runtime hands out such types as ml_dtypes or as bits
    return array if array.dtype == np.dtype(_BITS[element]) else array.view(_BITS[element])


@functools.lru_cache(maxsize=512)
def _reference(text: str, key: _Key) -> onnx.reference.ReferenceEvaluator:
    return onnx.reference.ReferenceEvaluator(_typed(text, key))
