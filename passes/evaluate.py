"""Evaluate single nodes on known values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from .exchange import make_attribute
from .numbers import session_options
from .pipeline import Notes
from .surgery import element_type, nbytes

_GROWING = {
    "CenterCropPad", "Col2Im", "ConstantOfShape", "Einsum", "Expand", "EyeLike", "Gather", "GatherElements", "GatherND",
    "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample", "BlackmanWindow", "HammingWindow", "HannWindow",
}  # fmt: skip
"""Ops whose result can be larger than the product of their inputs' sizes."""

_VALUES_READ_BYTES = 1024
"""Inputs up to this size are shown to shape inference with their values: shapes, sizes, repeats."""


class Evaluator:
    """Runs nodes one at a time, keeping a session for each kind of node and input types."""

    def __init__(self, opset: int) -> None:
        self._imports = [onnx.helper.make_opsetid("", opset)]
        self._sessions: dict[bytes, ort.InferenceSession | ReferenceEvaluator | str] = {}

    def predict_bytes(self, node: gs.Node, notes: Notes, limit: int) -> int:
        """Size of a node's results as far as shape inference can tell; 0 where they cannot be large."""
        constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
        if node.op not in _GROWING and math.prod(max(1, math.prod(t.shape)) for t in constants) * 16 <= limit:
            return 0
        proto = _make_node(node)
        types, values = {}, {}
        for position, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                types[f"i{position}"] = onnx.helper.make_tensor_type_proto(element_type(tensor), list(tensor.shape))
                if nbytes(tensor) <= _VALUES_READ_BYTES:
                    values[f"i{position}"] = onnx.numpy_helper.from_array(notes.values(tensor), f"i{position}")
        try:
            schema = onnx.defs.get_schema(node.op, self._imports[0].version, "")
            inferred = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, values, opset_imports=self._imports, ir_version=onnx.IR_VERSION
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
            return 0
        total = 0
        for value in inferred.values():
            shape, element = value.tensor_type.shape.dim, value.tensor_type.elem_type
            if element and value.tensor_type.HasField("shape"):
                itemsize = onnx.helper.tensor_dtype_to_np_dtype(element).itemsize
                total += math.prod(dim.dim_value for dim in shape) * itemsize
        return total

    def run(self, node: gs.Node, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | str:
        """The outputs of a node, an empty array for one that it leaves out; a text says why it cannot be run."""
        feeds = {f"i{position}": array for position, array in enumerate(inputs) if array is not None}
        graph = onnx.helper.make_graph(
            [_make_node(node)],
            "node",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in feeds.items()
            ],
            [
                onnx.helper.make_empty_tensor_value_info(f"o{position}")
                for position, tensor in enumerate(node.outputs)
                if tensor.name
            ],
        )
        model = onnx.helper.make_model(graph, opset_imports=self._imports, ir_version=10).SerializeToString()
        if model not in self._sessions:
            self._sessions[model] = _make_session(model, _needs_reference(node, feeds))
        session = self._sessions[model]
        if isinstance(session, str):
            return session
        try:
            results = iter(session.run(None, feeds))
        except Exception as error:  # ONNX Runtime and the reference raise whatever the op meets.
            return f"it cannot be computed: {_first_line(error)}"
        values = [next(results) if tensor.name else np.empty(0) for tensor in node.outputs]
        if not all(isinstance(value, (np.ndarray, np.generic)) for value in values):
            return "its result is not a tensor"
        return [np.asarray(value) for value in values]


def _make_node(node: gs.Node) -> onnx.NodeProto:
    """The node with names that depend on positions only, so that equal nodes share a session."""
    proto = onnx.NodeProto(op_type=node.op)
    proto.input.extend(f"i{position}" if tensor.name else "" for position, tensor in enumerate(node.inputs))
    proto.output.extend(f"o{position}" if tensor.name else "" for position, tensor in enumerate(node.outputs))
    proto.attribute.extend(make_attribute(name, value) for name, value in node.attrs.items())
    return proto


def _needs_reference(node: gs.Node, feeds: dict[str, np.ndarray]) -> bool:
    """Whether a type is involved that ONNX Runtime cannot exchange with NumPy (bfloat16, float8, int4)."""
    types = [array.dtype for array in feeds.values()]
    types += [onnx.helper.tensor_dtype_to_np_dtype(node.attrs[key]) for key in ("to", "dtype") if key in node.attrs]
    return any(dtype.type.__module__ != "numpy" for dtype in types)


def _make_session(model: bytes, use_reference: bool) -> ort.InferenceSession | ReferenceEvaluator | str:
    try:
        if use_reference:
            return ReferenceEvaluator(onnx.load_model_from_string(model))
        return ort.InferenceSession(model, session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # Both raise many types for an op or type they lack.
        return f"it cannot be computed: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
