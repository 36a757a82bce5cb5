"""Small models written as text, and the checks that every pass must stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from trtbridge.passes import Pass, Pipeline, PipelineResult
from trtbridge.passes.exchange import make_stand_in


def _model(body: str, opset: int = 20) -> onnx.ModelProto:
    """A model from the text of its graph; value_info is inferred. The plugin domain is imported too."""
    imports = f'["" : {opset}, "trtbridge" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: 10, opset_import: {imports}>\n{body}")
    return onnx.shape_inference.infer_shapes(model)


def _stand_in(model: onnx.ModelProto, name: str, values: np.ndarray) -> dict[str, ir.TensorProtocol]:
    """Add an initializer as a stand-in; its weight."""
    weight = ir.tensor(values, name=name)
    model.graph.initializer.append(make_stand_in(name, weight))
    return {name: weight}


class _Unreadable:
    """A weight that nobody may read."""

    def __init__(self, name: str, dtype: ir.DataType, shape: Sequence[int]) -> None:
        self.name, self.dtype, self.shape = name, dtype, ir.Shape(shape)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape.numpy()) * self.dtype.itemsize)

    def numpy(self) -> np.ndarray:
        raise AssertionError(f"weight {self.name} was read")

    tobytes = __array__ = numpy


def _apply(
    item: Pass,
    model: onnx.ModelProto,
    weights: Mapping[str, ir.TensorProtocol] | None = None,
    *,
    rewrites: int,
    feeds: Mapping[str, np.ndarray] | None = None,
    refused: str | None = None,
    tolerance: float = 0.0,
) -> PipelineResult:
    """Run one pass: the count is right, numbers agree, the caller's model is untouched, and twice is once."""
    before = model.SerializeToString(deterministic=True)
    result = Pipeline((item,)).run(model, weights or {}, check=feeds, tolerance=tolerance)
    report = result.report.passes[0]
    assert report.rewrites == rewrites, f"{report}\n{onnx.printer.to_text(result.proto)}"
    assert model.SerializeToString(deterministic=True) == before
    reasons = [refusal.reason for refusal in report.refusals]
    if refused is None:
        assert reasons == []
    else:
        assert any(refused in reason for reason in reasons), reasons
    if feeds is not None:
        assert result.report.comparison.startswith("compared"), result.report.comparison
    again = Pipeline((item,)).run(result.proto, result.weights)
    assert again.report.rewrites == 0, f"second run:\n{again.report}\n{onnx.printer.to_text(again.proto)}"
    return result


def _ops(model: onnx.ModelProto | PipelineResult) -> list[str]:
    return [node.op_type for node in (model if isinstance(model, onnx.ModelProto) else model.proto).graph.node]


def _initializer(result: PipelineResult, name: str) -> np.ndarray:
    return next(onnx.numpy_helper.to_array(t) for t in result.proto.graph.initializer if t.name == name)


def _types(values: Any) -> list[int]:
    return [value.type.tensor_type.elem_type for value in values]


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    return SimpleNamespace(
        model=_model, stand_in=_stand_in, Unreadable=_Unreadable, apply=_apply, ops=_ops, initializer=_initializer,
        types=_types,
    )  # fmt: skip


@pytest.fixture(scope="session")
def rtx_refusal() -> Callable[[onnx.ModelProto], str | None]:
    """What TensorRT-RTX says against a model, in parsing or building; None if it builds."""
    trt = pytest.importorskip("tensorrt_rtx")

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    def refusal(model: onnx.ModelProto) -> str | None:
        logger = Logger()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.SerializeToString()):
            return "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)) or "refused"
        engine = builder.build_serialized_network(network, builder.create_builder_config())
        return None if engine is not None else "; ".join(logger.errors) or "not built"

    return refusal
