"""Numbers of a model with stand-ins, from ONNX Runtime on the CPU: what passes are checked against on request."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from .exchange import stand_in_name
from .surgery import STANDARD_DOMAINS

_RANDOM_OPS = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip


def why_not_comparable(proto: onnx.ModelProto) -> str | None:
    """Why ONNX Runtime's numbers say nothing about a model; None if they do."""
    own = {(function.domain, function.name) for function in proto.functions}
    pending = [proto.graph]
    while pending:
        for node in pending.pop().node:
            if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in own:
                return f"ONNX Runtime cannot run {node.domain}::{node.op_type}"
            if node.domain in STANDARD_DOMAINS and node.op_type in _RANDOM_OPS:
                return f"{node.op_type} gives other numbers in every run"
            pending.extend(attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
    return None


def session_options() -> ort.SessionOptions:
    """Quiet, single-threaded, and without optimizations that would hide what the graph says."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def run(
    proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], feeds: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of a model. Weights of ordinary types are shared with ONNX Runtime, not copied.

    Args:
        proto: the model.
        weights: values of its stand-ins.
        feeds: a value for each input, cast here to the type that the input has now.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    names: list[str] = []
    values: list[ort.OrtValue] = []
    for tensor in model.graph.initializer:
        key = stand_in_name(tensor)
        if key is None:
            continue
        array = weights[key].numpy()
        if type(array.dtype.type).__module__ == "builtins" and array.dtype.type.__module__ == "numpy":
            names.append(tensor.name)
            values.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        else:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    options = session_options()
    options.add_external_initializers(names, values)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    cast = {
        value.name: np.asarray(feeds[value.name]).astype(onnx.helper.tensor_dtype_to_np_dtype(types[value.name]))
        for value in session.get_inputs()
    }
    outputs = [value.name for value in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, cast), strict=True))


def difference(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], tolerance: float) -> str | None:
    """The first output whose numbers changed, and by how much; None if all agree.

    Args:
        before: outputs by name.
        after: outputs of the changed model.
        tolerance: largest difference allowed, relative to the output's largest magnitude.
    """
    for name, expected in before.items():
        actual = after[name]
        if isinstance(expected, list) or isinstance(actual, list):  # A sequence of tensors.
            if len(expected) != len(actual):
                return f"output {name!r} has {len(actual)} elements, it had {len(expected)}"
            parts = ({name: old} for old in expected), ({name: new} for new in actual)
            changed = next(filter(None, (difference(*pair, tolerance) for pair in zip(*parts, strict=True))), None)
            if changed:
                return changed
            continue
        if expected.shape != actual.shape:
            return f"output {name!r} has shape {actual.shape}, it had {expected.shape}"
        if expected.dtype.kind not in "fiub" or not expected.size:
            if not np.array_equal(expected, actual):
                return f"output {name!r} has other values"
            continue
        old, new = expected.astype(np.float64), actual.astype(np.float64)
        finite = np.isfinite(old) & np.isfinite(new)
        if not np.array_equal(old[~finite], new[~finite], equal_nan=True):
            return f"output {name!r} is infinite or NaN in other places"
        if not finite.any():
            continue
        # A result of 16 bits or less cannot be held to more than its own rounding.
        is_short = expected.dtype.kind == "f" and expected.dtype.itemsize <= 2
        allowed = max(tolerance, 4 * float(np.finfo(expected.dtype).eps)) if is_short and tolerance else tolerance
        error = float(np.abs(old[finite] - new[finite]).max())
        scale = float(np.abs(old[finite]).max())
        if error > allowed * scale:
            return f"output {name!r} changed by up to {error:.3g}, its largest magnitude is {scale:.3g}"
    return None
