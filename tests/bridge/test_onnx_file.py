"""convert("model.onnx"): shapes from the file, ranges by input name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

import trtbridge as tb

WEIGHT = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)


def _model(inputs: str = "float[N,16] x", outputs: str = "float[N,32] y", extra: str = "") -> onnx.ModelProto:
    text = f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ y = MatMul(x, w) {extra} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return model


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.rtx
def test_file_with_a_dynamic_batch(tmp_path: Path, external: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.onnx"
    onnx.save(_model(), path, save_as_external_data=external, location="data.bin", size_threshold=0)
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    fast = tb.convert(path, dynamic_shapes=shapes, backend="onnxruntime")
    x = torch.randn(3, 16)
    torch.testing.assert_close(fast(x), x @ torch.from_numpy(WEIGHT))
    torch.testing.assert_close(fast(x=x), fast(x))
    with pytest.raises(tb.InputError, match="batch from 1 to 8"):
        fast(torch.randn(9, 16))
    built = tb.convert(path, dynamic_shapes=shapes, backend="tensorrt_rtx")
    assert built.program.engines[0].inputs[0].ranges == ((1, 4, 8), (16, 16, 16))


def test_several_outputs_come_back_by_name(tmp_path: Path) -> None:
    onnx.save(_model(outputs="float[N,32] y, int64[2] s", extra="s = Shape(x)"), tmp_path / "m.onnx")
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": [tb.Dim("n", max=4), None]}, backend="onnxruntime")
    result = fast(torch.randn(3, 16))
    assert list(result) == ["y", "s"]
    assert result["s"].tolist() == [3, 16]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (None, ["x[0] (N)", "no range", "tb.Dim("]),
        ({"z": {0: 3}}, ["'z'", "['x']"]),
        ({"x": {0: tb.Dim("n", max=4), 1: tb.Dim("m", max=40)}}, ["dimension 1 of x", "fixed at 16"]),
        ({"x": {0: "n"}}, ["'n'", "dimension 0 of x"]),
    ],
)
def test_ranges_that_do_not_fit(tmp_path: Path, shapes: Any, words: list[str]) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.DynamicShapeError) as caught:
        tb.convert(tmp_path / "m.onnx", dynamic_shapes=shapes, backend="onnxruntime")
    for word in words:
        assert word in str(caught.value)


def test_a_number_fixes_a_dimension(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime")
    assert fast.program.signature.inputs[0].shape == (2, 16)
    assert fast(torch.ones(2, 16)).shape == (2, 32)


def test_arguments_beside_a_file_are_refused(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.InputError, match="leave args and kwargs out"):
        tb.convert(tmp_path / "m.onnx", (torch.ones(2, 16),), backend="onnxruntime")


def test_an_opset_beside_a_file_is_refused(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx")
    with pytest.raises(tb.OptionError, match="has its own opset"):
        tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime", opset=20)


def test_missing_external_data(tmp_path: Path) -> None:
    onnx.save(_model(), tmp_path / "m.onnx", save_as_external_data=True, location="data.bin", size_threshold=0)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(tb.ModelFileError, match=r"m.onnx.*(?s:.)*data.bin"):
        tb.convert(tmp_path / "m.onnx", dynamic_shapes={"x": {0: 2}}, backend="onnxruntime")


def test_an_exported_file_equals_the_module(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).eval()
    tb.export(module, (torch.ones(2, 8),), dynamic_shapes=({0: tb.Dim("n", max=4)},)).save(tmp_path / "m.onnx")
    (name,) = (value.name for value in onnx.load(tmp_path / "m.onnx").graph.input)
    fast = tb.convert(tmp_path / "m.onnx", dynamic_shapes={name: {0: tb.Dim("n", max=4)}}, backend="onnxruntime")
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), module(x))
