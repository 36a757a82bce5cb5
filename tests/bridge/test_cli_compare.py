"""trtbridge compare: what it takes, what it writes, and the exit status for CI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from typer.testing import CliRunner, Result

import trtbridge as tb
from trtbridge.bridge.cli import app
from trtbridge.bridge.compare_report import CompareReport

MODELS = """
import torch
import trtbridge as tb


class Net(torch.nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 3)
        self.factor = factor

    def forward(self, x, mask=None):
        y = self.layer(x) * self.factor
        return {"y": y if mask is None else y * mask, "sum": y.sum(1)}


DIMS = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}


def net():
    return {"model": Net(), "args": (torch.randn(4, 6),), "dynamic_shapes": DIMS}


def off():
    return {"model": Net(1.01), "args": (torch.randn(4, 6),)}


def masked():
    return Net(), (torch.randn(4, 6),), {"mask": torch.ones(3)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models.py, and what it makes: net.trtb and net.onnx."""
    made = tmp_path_factory.mktemp("compare")
    (made / "compared_models.py").write_text(MODELS)
    sys.path.insert(0, str(made))
    try:
        import compared_models
    finally:
        sys.path.remove(str(made))
    request = compared_models.net()
    model, args, shapes = request["model"], request["args"], request["dynamic_shapes"]
    tb.convert(model, args, dynamic_shapes=shapes, backend="onnxruntime").save(made / "net.trtb")
    tb.export(model, args, dynamic_shapes=shapes).save(made / "net.onnx")
    return made


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    before = list(sys.path)
    yield
    sys.path[:] = before


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


NET, OFF = "compared_models.py:net", "compared_models.py:off"


@pytest.mark.parametrize("a", [NET, "net.onnx", "net.trtb"])
@pytest.mark.parametrize("b", [NET, "net.onnx", "net.trtb"])
def test_everything_against_everything(a: str, b: str) -> None:
    done = call(a, b, *(["--samples", "3"] if "net.trtb" in (a, b) else []))
    if a == b == "net.onnx":  # its sizes have no range
        assert done.exit_code == 1
        assert "Give inputs" in done.output
        return
    assert done.exit_code == 0, done.output
    assert "within tolerance" in done.output
    assert ("3 random, seed 0 to 2, batch 4/1/8" in done.output) == ("net.trtb" in (a, b))


def test_out_of_tolerance_is_status_1() -> None:
    failed = call(OFF, "net.trtb")
    assert failed.exit_code == 1
    assert "OUT OF TOLERANCE" in failed.output
    assert "y: allowed rtol 0.001" in failed.output
    assert call(OFF, "net.trtb", "--rtol", "0.02", "--atol", "1e-3").exit_code == 0
    assert call(OFF, "net.trtb", "--cosine", "0.999").exit_code == 0, "only the direction counts"
    assert call(OFF, "net.trtb", "--snr", "60").exit_code == 1
    assert call(OFF, "net.trtb", "--scale", "0.05").exit_code == 0


def test_usage() -> None:
    assert call("net.trtb").exit_code == 2
    assert call("net.trtb", "net.pth").exit_code == 2
    assert call("net.trtb", "net.onnx", "--rtol", "much").exit_code == 2
    both = call("net.trtb", "net.onnx", "--inputs", "x.npz", "--samples", "2")
    assert both.exit_code == 1
    assert "--samples is for random inputs" in both.output
    assert "There is no file gone.trtb" in call("gone.trtb", "net.onnx").output
    assert "negative" in call("net.trtb", "net.trtb", "--rtol", "-1").output


def test_inputs_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    np.savez(file, x=np.full((2, 6), 3.0, np.float32))
    for a, b in ((NET, "net.trtb"), ("net.onnx", "net.trtb"), (NET, NET)):
        done = call(a, b, "--inputs", str(file))
        assert done.exit_code == 0, done.output
        assert "the example" in done.output
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, z=np.zeros(3))
    assert "Unexpected: z" in call(NET, "net.trtb", "--inputs", str(wrong)).output
    junk = tmp_path / "junk.npz"
    junk.write_bytes(b"PK no")
    assert "is no .npz file" in call(NET, NET, "--inputs", str(junk)).output
    masked = tmp_path / "masked.npz"
    np.savez(masked, x=np.ones((2, 6), np.float32), mask=np.zeros(3, np.float32))
    assert call("compared_models.py:masked", OFF, "--inputs", str(masked)).exit_code == 1, "the sum is not masked"


def test_reports_are_written(tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    results, inputs = tmp_path / "out.json", tmp_path / "in.json"
    files = ["--html", str(page), "--json", str(data), "--save-outputs", str(results), "--save-inputs", str(inputs)]
    done = call(OFF, "net.trtb", "--top-k", "--golden", *files)
    assert done.exit_code == 1
    report = CompareReport.from_json(json.loads(data.read_text()))
    assert not report.ok
    assert report.reference == "Net in PyTorch on cpu, in float64"
    assert report.outputs[0].top_k.keys() == {1, 5}
    assert page.read_text() == report.to_html()
    assert [len(iterations) for _, iterations in RunResults.load(str(results)).items()] == [1, 1, 1], "and A itself"
    assert inputs.exists()
    again = call(OFF, "net.trtb", "--html", str(page))
    assert "replace it with --force" in again.output
    assert call(NET, "net.trtb", "--html", str(page), "--force").exit_code == 0
    assert "within tolerance" in page.read_text()


def test_as_a_process(folder: Path) -> None:
    """Nothing of Polygraphy's talk in a pipe; the same seed, the same words."""
    command = [sys.executable, "-c", "from trtbridge.bridge.cli import main; main()", "compare", NET, "net.trtb"]
    done = subprocess.run(
        [*command, "--samples", "2", "--seed", "5"],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "reference Net in PyTorch on cpu"
    assert lines[2].rstrip() == "inputs    2 random, seed 5 to 6, batch 4/1"
    assert lines[-1] == "within tolerance"
    assert "[W]" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
