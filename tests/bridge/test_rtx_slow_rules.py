"""Graphs over which TensorRT-RTX's builder takes minutes or hours get another form, which gives the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from rtx_graphs import parsed, run

import trtbridge as tb
from trtbridge.bridge.backends.rtx_faults import avoid_faults, original_name

X = np.random.default_rng(0).uniform(1, 2, (2, 3, 5)).astype(np.float32)


def model(steps: list[str], size: str = "3") -> onnx.ModelProto:
    """x divided by each of the reductions in turn ("{x}" is what is reduced)."""
    body, name = "", "x"
    for number, step in enumerate(steps):
        body += f"s{number} = {step.format(x=name)} d{number} = Div({name}, s{number}) "
        name = f"d{number}"
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[2,{size},5] x) => (float[2,{size},5] y)
    <int64[1] last = {{-1}}, int64[1] rows = {{1}}, int64[1] first = {{0}}, int64[2] both = {{1, 2}},
    float[5,5] w = {{1,0,0,0,0, 0,2,0,0,0, 0,0,1,0,0, 0,0,0,3,0, 0,0,0,0,1}}> {{ {body} y = Sqrt({name}) }}"""
    return parsed(text)


ROWS, LAST = "ReduceSum({x}, rows)", "ReduceSum({x}, last)"


@pytest.mark.parametrize(
    ("steps", "products"),
    [
        ([LAST, ROWS] * 6, 8),
        (["ReduceMean({x}, rows)", LAST] * 6, 8),
        ([LAST, ROWS, "Softmax({x})", "ReduceMax({x}, last)", "ReduceMean({x}, last)"], 1),
        ([ROWS] * 4 + ["Softmax({x})", "ReduceSum({x}, first)", LAST], 1),
    ],
)
def test_sums_of_sums_become_products(steps: list[str], products: int) -> None:
    before = model(steps)
    after = avoid_faults(before)
    onnx.checker.check_model(after, full_check=True)
    assert sum(node.op_type == "MatMul" for node in after.graph.node) == products
    assert [original_name(node.name) for node in after.graph.node] == [node.name for node in before.graph.node]
    np.testing.assert_allclose(run(after, {"x": X})[0], run(before, {"x": X})[0], rtol=1e-5)
    assert avoid_faults(after) is after


def test_a_sum_that_drops_its_axis() -> None:
    before = model([LAST, ROWS, LAST, ROWS])
    before.graph.node.pop()  # what makes y
    text = "h (float[2,3,5] d3) => (float[2,3] z) <int64[1] last = {-1}> { z = ReduceSum<keepdims = 0>(d3, last) }"
    other = parser.parse_graph(text)
    before.graph.node.extend(other.node)
    before.graph.node[-1].name = "last"
    del before.graph.output[:]
    before.graph.output.extend(other.output)
    after = avoid_faults(before)
    assert [node.op_type for node in after.graph.node[-2:]] == ["MatMul", "Squeeze"]
    assert after.graph.node[-1].name == "last"
    np.testing.assert_allclose(run(after, {"x": X})[0], run(before, {"x": X})[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        ([LAST, ROWS] * 2, "3"),  # few
        ([LAST, ROWS, LAST, "MatMul({x}, w)"] * 3, "3"),  # a product reads every fourth anyway
        (["ReduceMax({x}, last)", "ReduceSum({x}, first)", "ReduceSum({x}, both)"] * 3, "3"),  # none that is a product
        ([ROWS] * 8, "n"),  # over a size that varies
    ],
)
def test_the_rest_is_left_alone(steps: list[str], size: str) -> None:
    proto = model(steps, size)
    assert avoid_faults(proto) is proto


class Sinkhorn(torch.nn.Module):
    """Rows and columns that sum to one: left as it is, TensorRT-RTX 1.6.1 does not get done with six rounds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.softmax(-1)
        for _ in range(6):
            x = x / (x.sum(-1, keepdim=True) + 1e-6)
            x = x / (x.sum(-2, keepdim=True) + 1e-6)
        return x


@pytest.mark.rtx
def test_sinkhorn_builds() -> None:
    pytest.importorskip("tensorrt_rtx")
    converted = tb.convert(Sinkhorn(), (torch.randn(2, 16, 4, 4),), backend="tensorrt_rtx", timeout_s=120)
    assert len(converted.program.engines) == 1
    assert not converted.program.plugin_calls
