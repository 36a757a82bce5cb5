"""convert(verify=...): the report stays with the module, and what is out of tolerance never gets out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx.parser
import pytest
import torch
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge import compare_verify
from trtbridge.bridge.cli import app
from trtbridge.bridge.planner import Planner


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 4)
        self.dropout = torch.nn.Dropout()

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.dropout(self.layer(x))
        return {"y": y if scale is None else y * scale, "mean": y.mean(1)}


GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
net (float["n", 3] x) => (float["n", 3] z) { z = Relu(x) }
"""


def test_the_report_stays_with_the_module(tmp_path: Path) -> None:
    net, x = Net(), torch.randn(3, 8)
    shapes = {"x": {0: tb.Dim("n", min=1, opt=3, max=9)}}
    module = tb.convert(
        net, (x,), {"scale": torch.tensor(2.0)}, dynamic_shapes=shapes, backend="onnxruntime", verify=True
    )
    assert net.training
    report = module.verification
    assert report is not None
    assert report.ok
    assert [output.label for output in report.outputs] == ["y", "mean"]
    assert report.samples == 1
    tb.save(module, tmp_path / "net.trtb")
    assert tb.load(tmp_path / "net.trtb").verification == report
    assert module.program.info["stage_seconds"]["compare"] > 0
    assert tb.convert(net, (x,), backend="onnxruntime").verification is None


def test_tolerances_of_ones_own() -> None:
    x = torch.randn(3, 8)
    tight = tb.Tolerance(atol=1e-12)
    with pytest.raises(tb.AccuracyError, match="allowed: atol 1e-12"):
        tb.convert(Net(), (x,), backend="onnxruntime", precision="bf16", verify=tight)
    module = tb.convert(Net(), (x,), backend="onnxruntime", precision="bf16", verify=True)
    assert module.verification is not None
    assert "rtol 0.1" in str(module.verification), "what rounding to bfloat16 explains"
    limits = {"y": tb.Tolerance(atol=1.0)}
    assert tb.convert(Net(), (x,), backend="onnxruntime", verify=limits).verification is not None
    with pytest.raises(tb.OptionError, match=r"verify=0\.001"):
        tb.convert(Net(), (x,), backend="onnxruntime", verify=0.001)


def test_a_wrong_conversion_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The weights change after the trace, so the engine and the module differ."""
    build = Planner.build
    net = Net()

    def disturbed(self: Planner) -> Any:
        program = build(self)
        with torch.no_grad():
            net.layer.weight.mul_(1.5)
        return program

    monkeypatch.setattr(Planner, "build", disturbed)
    with pytest.raises(
        tb.AccuracyError, match=r"(?s)y: 1 of 1 sample.*mean: 1 of 1 sample.*trtbridge localize"
    ) as caught:
        tb.convert(net, (torch.randn(3, 8),), backend="onnxruntime", verify=True)
    assert not caught.value.report.ok


def test_an_onnx_file_is_compared_with_itself_in_onnxruntime(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    shapes = {"x": {0: tb.Dim("n", min=1, opt=2, max=4)}}
    module = tb.convert(path, dynamic_shapes=shapes, backend="onnxruntime", verify=True)
    assert module.verification is not None
    assert module.verification.samples == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_where_the_engine_cannot_run_it_says_so_before_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(Planner, "build", lambda self: pytest.fail("nothing should be built"))
    with pytest.raises(tb.BackendError, match=r"verify: engines of tensorrt_rtx cannot run.*trtbridge compare"):
        tb.convert(Net(), (torch.randn(3, 8),), backend="tensorrt_rtx", verify=True)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(GRAPH), "net.onnx")
    command = ["convert", "net.onnx", "--dim", "x:0=n:1:2:4", "--backend", "onnxruntime", "--verify"]
    done = CliRunner().invoke(app, [*command, "-o", "good.trtb"])
    assert done.exit_code == 0, done.output
    assert "within tolerance" in done.output

    def off(*args: Any) -> None:
        raise tb.AccuracyError("out of tolerance")

    monkeypatch.setattr(compare_verify, "verify", off)
    failed = CliRunner().invoke(app, [*command, "-o", "bad.trtb"])
    assert failed.exit_code == 1
    assert "AccuracyError" in failed.output
    assert not Path("bad.trtb").exists(), "nothing half-written"
