"""Numbers of a model with stand-ins, from ONNX Runtime on the CPU: what passes are checked against on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from .exchange import stand_in_name
from .surgery import STANDARD_DOMAINS

Numbers = Mapping[str, np.ndarray]
"""Values of tensors by name; a sequence of tensors is a list."""

Weights = Mapping[str, ir.TensorProtocol]
"""Values of stand-ins by name."""


class Runner(Protocol):
    """Runs a model, as `run` does."""

    def __call__(
        self,
        proto: onnx.ModelProto,
        weights: Mapping[str, ir.TensorProtocol],
        feeds: Numbers,
        extra: Sequence[str] = (),
    ) -> Numbers: ...


_RANDOM_OPS = {
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
_EPSILONS = {
    onnx.TensorProto.DOUBLE: 2.0**-52, onnx.TensorProto.FLOAT: 2.0**-23, onnx.TensorProto.FLOAT16: 2.0**-10,
    onnx.TensorProto.BFLOAT16: 2.0**-7,
}  # fmt: skip


def why_not_comparable(proto: onnx.ModelProto, any_domain: bool = False) -> str | None:
    """Why ONNX Runtime's numbers say nothing about a model; None if they do.

    Args:
        proto: the model.
        any_domain: take it that nodes of other domains (plugins) can be run, too.
    """
    own = {(function.domain, function.name) for function in proto.functions}
    pending = [proto.graph]
    while pending:
        for node in pending.pop().node:
            if not any_domain and node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in own:
                return f"ONNX Runtime cannot run {node.domain}::{node.op_type}"
            if node.domain in STANDARD_DOMAINS and node.op_type in _RANDOM_OPS and not _has_seed(node):
                return f"{node.op_type} gives other numbers in every run"
            pending.extend(attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
    return None


def _has_seed(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "seed" for attribute in node.attribute)


def rounding(proto: onnx.ModelProto) -> float:
    """The coarsest machine epsilon of the floating types that a model computes in; 0.0 where none is known."""
    coarsest = 0.0
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        types = {value.type.tensor_type.elem_type for group in (graph.input, graph.output, graph.value_info)
                 for value in group}  # fmt: skip
        types |= {tensor.data_type for tensor in graph.initializer}
        for element, epsilon in _EPSILONS.items():
            if element in types:
                coarsest = max(coarsest, epsilon)
        for node in graph.node:
            pending.extend(attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
    return coarsest


def session_options() -> ort.SessionOptions:
    """Quiet, single-threaded, and without optimizations that would hide what the graph says."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def run(
    proto: onnx.ModelProto,
    weights: Mapping[str, ir.TensorProtocol],
    feeds: Numbers,
    extra: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The outputs of a model. Weights of ordinary types are shared with ONNX Runtime, not copied.

    Args:
        proto: the model.
        weights: values of its stand-ins.
        feeds: a value for each input, cast here to the type that the input has now.
        extra: inner tensors of the main graph whose values are wanted as well.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in extra if name not in known)
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


def difference(before: Numbers, after: Numbers, tolerance: float, names: Iterable[str] | None = None) -> str | None:
    """The first output whose numbers changed, and by how much; None if all agree.

    Args:
        before: outputs by name.
        after: outputs of the changed model.
        tolerance: largest difference allowed, relative to the output's largest magnitude. From 1e-3 on, which is the
            rounding of half precision, that share of an integer or boolean output may differ, too.
        names: the outputs to compare; default: those of `before`.
    """
    for name in before if names is None else names:
        if changed := _change(before[name], after[name], tolerance):
            return f"output {name!r} {changed}"
    return None


def _change(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> str | None:
    if isinstance(expected, list) or isinstance(actual, list):  # A sequence of tensors.
        if len(expected) != len(actual):
            return f"has {len(actual)} elements, it had {len(expected)}"
        return next(filter(None, (_change(*pair, tolerance) for pair in zip(expected, actual, strict=True))), None)
    if expected is None or actual is None:  # An empty optional.
        return None if expected is actual else "is empty in one of the two"
    if expected.shape != actual.shape:
        return f"has shape {actual.shape}, it had {expected.shape}"
    is_float = expected.dtype.kind == "f" or expected.dtype == ml_dtypes.bfloat16
    if (not is_float and expected.dtype.kind not in "iub") or not expected.size:
        return None if np.array_equal(expected, actual) else "has other values"
    if not is_float and tolerance >= _LOSSY:
        share = float((expected != actual).mean())
        return f"has other values in {share:.1%} of its elements" if share > tolerance else None
    old, new = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(old) & np.isfinite(new)
    if not np.array_equal(old[~finite], new[~finite], equal_nan=True):
        return "is infinite or NaN in other places"
    if not finite.any():
        return None
    # A result of 16 bits or less cannot be held to more than its own rounding.
    is_short = expected.dtype in _SHORT
    allowed = max(tolerance, 4 * _SHORT[expected.dtype]) if is_short and tolerance else tolerance
    error = float(np.abs(old[finite] - new[finite]).max())
    scale = float(np.abs(old[finite]).max())
    if error <= allowed * max(scale, _LEAST_SCALE):
        return None
    return f"changed by up to {error:.3g}, its largest magnitude is {scale:.3g}"


_LOSSY = 1e-3
_SHORT = {np.dtype(np.float16): 2.0**-10, np.dtype(ml_dtypes.bfloat16): 2.0**-7}
"""Machine epsilons of short types."""

_LEAST_SCALE = 1e-3
"""An output that is smaller is taken to be that large: where all cancels out, what is left is rounding."""
