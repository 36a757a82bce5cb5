"""Runs small graphs on the CPU that compute weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from ..errors import RefitError
from ..passes.numbers import session_options


def evaluate(proto: onnx.ModelProto, given: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
    """Run a graph in ONNX Runtime; where a type is involved that NumPy lacks, in ONNX's reference implementation.

    Args:
        proto: standard ONNX ops, fixed shapes.
        given: all inputs.
        outputs: names of the results wanted.

    Raises:
        RefitError: it cannot be run.
    """
    try:
        if _needs_reference(proto, given):
            found = ReferenceEvaluator(proto).run(list(outputs), dict(given))
        else:
            session = ort.InferenceSession(
                proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
            )
            found = session.run(list(outputs), dict(given))
    except Exception as error:  # ONNX Runtime and the reference raise whatever the op meets.
        raise RefitError(f"The weights {', '.join(outputs)} cannot be computed: {error}") from error
    return [np.asarray(array) for array in found]


def _needs_reference(proto: onnx.ModelProto, given: Mapping[str, np.ndarray]) -> bool:
    types = {array.dtype for array in given.values()}
    types |= {onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        casts = [attribute.i for attribute in node.attribute if attribute.name in ("to", "dtype")]
        types |= {onnx.helper.tensor_dtype_to_np_dtype(element) for element in casts if element}
    return any(np.dtype(kind).type.__module__ != "numpy" for kind in types)
