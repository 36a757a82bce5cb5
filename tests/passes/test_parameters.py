"""Parameters: initializers that passes see as inputs, and that come back as initializers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest

from trtbridge.passes import DEFAULT, FoldConstants, Pipeline, RemoveNoOps
from trtbridge.passes.exchange import Exchange, make_stand_in, stand_in_name
from trtbridge.passes.narrow_types import NarrowTypes
from trtbridge.passes.parameters import parameter_names, set_parameter_names
from trtbridge.passes.pipeline import Notes, Pass

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[2, 3] x) => (float[2, 3] y) {
    a = Mul(x, one)
    t = Transpose<perm = [1, 0]>(w)
    b = MatMul(a, t)
    y = Add(b, zero)
}
"""


def _model(text: str = GRAPH, **values: np.ndarray) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    proto = onnx.parser.parse_model(text)
    weights: dict[str, ir.TensorProtocol] = {name: ir.Tensor(value, name=name) for name, value in values.items()}
    proto.graph.initializer.extend(make_stand_in(name, weight) for name, weight in weights.items())
    set_parameter_names(proto, {name: f"net.{name}" for name in values})
    return proto, weights


def _usual() -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    return _model(one=one, zero=zero, w=np.arange(9, dtype=np.float32).reshape(3, 3))


def test_a_trip_changes_nothing() -> None:
    proto, weights = _usual()
    exchange = Exchange(proto)
    assert [tensor.name for tensor in exchange.graph.inputs] == ["x", "one", "zero", "w"]
    back, kept = exchange.export(weights)
    assert [value.name for value in back.graph.input] == ["x"]
    assert {tensor.name: stand_in_name(tensor) for tensor in back.graph.initializer} == {n: n for n in weights}
    assert all(kept[name] is weight for name, weight in weights.items())
    assert parameter_names(back) == parameter_names(proto) == {name: f"net.{name}" for name in weights}


def test_no_rewrite_reads_them() -> None:
    proto, weights = _usual()
    result = DEFAULT.run(proto, weights, check={"x": np.ones((2, 3), np.float32)})
    assert [node.op_type for node in result.proto.graph.node] == ["Mul", "Transpose", "MatMul", "Add"]
    assert "compared by ONNX Runtime" in result.report.comparison
    set_parameter_names(proto, {})
    result = Pipeline((FoldConstants(), RemoveNoOps())).run(proto, weights)
    assert "Mul" not in [node.op_type for node in result.proto.graph.node]  # a product by one, as far as it knows


def test_what_nothing_reads_goes() -> None:
    class Drop(Pass):
        def apply(self, graph: gs.Graph, notes: Notes) -> int:
            node = next((node for node in graph.nodes if node.op == "Add"), None)
            if node is None:
                return 0
            node.op, node.inputs = "Identity", [node.inputs[0]]
            return 1

    proto, weights = _usual()
    result = Pipeline((Drop(),)).run(proto, weights)
    assert {tensor.name for tensor in result.proto.graph.initializer} == set(result.weights) == {"one", "w"}


def test_narrowed_types_are_cast_when_read() -> None:
    text = GRAPH.replace("float[", "double[")
    values = {"one": np.ones(1), "zero": np.zeros(1), "w": np.full((3, 3), 1 / 3)}
    proto, weights = _model(text, **values)
    result = Pipeline((NarrowTypes(),)).run(proto, weights)
    assert result.weights["w"].dtype == ir.DataType.FLOAT
    assert np.array_equal(result.weights["w"].numpy(), values["w"].astype(np.float32))
    types = {tensor.name: tensor.data_type for tensor in result.proto.graph.initializer}
    assert set(types.values()) == {onnx.TensorProto.FLOAT}
    assert weights["w"].dtype == ir.DataType.DOUBLE


@pytest.mark.parametrize("names", [{}, {"w": "a"}])
def test_marks_replace_each_other(names: Mapping[str, str]) -> None:
    proto = onnx.parser.parse_model(GRAPH)
    proto.metadata_props.add(key="other", value="1")
    set_parameter_names(proto, {"x": "y"})
    set_parameter_names(proto, names)
    assert parameter_names(proto) == names
    assert proto.metadata_props[0].key == "other"
    assert len(proto.metadata_props) == 1 + bool(names)
