"""Small graphs for the tests of the rules for TensorRT-RTX: made of text, and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser


def parsed(text: str, constants: Mapping[str, np.ndarray[Any, Any]] | None = None) -> onnx.ModelProto:
    """A model with the constants that its nodes read, types inferred, and nodes named by their places."""
    proto = parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    for name, value in (constants or {}).items():
        if name in used:
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    found = onnx.shape_inference.infer_shapes(proto)
    for number, node in enumerate(found.graph.node):
        node.name = f"node{number}"
    return found


def run(proto: onnx.ModelProto, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """The results for the inputs that the model has."""
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    return [np.asarray(result) for result in results]
