"""What localize says and writes: text, JSON, repros, errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from localize_nets import Net, run_repro, spoiled
from torch import nn

import trtbridge as tb
from trtbridge.bridge.model import OnnxModel, origin_of

pytestmark = pytest.mark.usefixtures("export_once")


def test_the_report_as_json_and_text(net: nn.Module, graph: OnnxModel, x: torch.Tensor) -> None:
    report = tb.localize(net, spoiled(graph), (x,))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["found"]
    assert data["suspect"]["op_type"] == "Sigmoid"
    assert data["suspect"]["origin"]["line"] == report.suspect.origin.line  # type: ignore[union-attr]
    layers = data["stages"][-1]["layers"]
    wrong = next(layer for layer in layers if layer["tensor"] == data["suspect"]["layer"])
    assert wrong["own_error"] > 0.1
    assert wrong["growth"] > 1e4
    text = str(report)
    assert "first wrong: Sigmoid" in text
    assert "localize_nets.py" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_repro_runs_by_itself(dtype: torch.dtype, x: torch.Tensor, tmp_path: Path) -> None:
    model = Net().eval().to(dtype)
    report = tb.localize(model, spoiled(tb.export(model, (x.to(dtype),))), (x.to(dtype),), repro=tmp_path / "repro")
    assert report.repro_dir == tmp_path / "repro"
    assert sorted(path.name for path in report.repro_dir.iterdir()) == [
        "expected.npz", "inputs.npz", "model.onnx", "run.py",
    ]  # fmt: skip
    done = run_repro(report.repro_dir)
    assert done.returncode == 1, done.stderr
    assert "relative error" in done.stdout
    graph = onnx.load(report.repro_dir / "model.onnx")
    assert [node.op_type for node in graph.graph.node] == ["Sigmoid"]
    # With the right op it says so.
    graph.graph.node[0].op_type = "Tanh"
    onnx.save(graph, report.repro_dir / "model.onnx")
    assert run_repro(report.repro_dir).returncode == 0
    code = (report.repro_dir / "run.py").read_text().splitlines()
    assert {line.split()[1] for line in code if line.startswith("import ")} == {"os,", "numpy", "onnxruntime"}


def test_a_repro_of_an_engine_builds_it(net: nn.Module, graph: OnnxModel, x: torch.Tensor, tmp_path: Path) -> None:
    report = tb.localize(net, spoiled(graph), (x,))
    assert report.repro is not None
    dataclasses.replace(report.repro, backend="onnxruntime").save(tmp_path)
    assert "trtbridge.convert(" in (tmp_path / "run.py").read_text()
    done = run_repro(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "tanh: relative error" in done.stdout


def test_a_repro_in_bfloat16_has_inputs_in_float32(x: torch.Tensor, tmp_path: Path) -> None:
    model = Net().eval().bfloat16()
    wrong = spoiled(tb.export(model, (x.bfloat16(),)))
    report = tb.localize(model, wrong, (x.bfloat16(),), repro=tmp_path)
    assert report.suspect is not None, str(report)
    held = np.load(tmp_path / "inputs.npz")
    assert {name: held[name].dtype for name in held.files} == {"add__float32": np.float32}
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Sigmoid"]


def test_what_is_no_model_is_refused(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, converted: tb.EngineModule
) -> None:
    with pytest.raises(tb.InputError, match="takes what convert"):
        tb.localize(net, 3, (x,))  # type: ignore[arg-type]
    with pytest.raises(tb.InputError, match="Give inputs"):
        tb.localize(net)
    with pytest.raises(tb.OptionError, match="tolerance=-1"):
        tb.localize(net, converted, (x,), tolerance=-1)
    with pytest.raises(tb.TrtBridgeError, match="are they the same model"):
        tb.localize(Two(), converted, (x, x))
    with pytest.raises(tb.TrtBridgeError, match="no repro to save"):
        tb.localize(net, graph, (x,)).save_repro("nowhere")


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_every_node_knows_its_line(graph: OnnxModel) -> None:
    """What all of this hangs on: every node of an export knows its line."""
    lines = [origin_of(node).line for node in graph.proto.graph.node]
    assert all(lines)
    assert np.unique(lines).size >= 4
