"""trtbridge localize: what it prints and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner, Result

import trtbridge as tb
from trtbridge.bridge.cli import app

MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 3)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return y * 2


def net():
    return Net().eval(), (torch.randn(4, 6),)


def small():
    return {"model": Net().eval(), "args": (torch.randn(4, 6),), "backend": "onnxruntime", "precision": "fp16"}
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["localize", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_localize.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wrong(folder: Path) -> Path:
    """The model as an .onnx file in which Tanh is Sigmoid."""
    from trtbridge.bridge.cli_source import Source

    request = Source.parse("models_of_localize.py:net").load()
    tb.export(request.model, request.args).save(folder / "net.onnx")
    graph = onnx.load(folder / "net.onnx")
    next(node for node in graph.graph.node if node.op_type == "Tanh").op_type = "Sigmoid"
    onnx.save(graph, folder / "wrong.onnx")
    return folder / "wrong.onnx"


def test_wrong_is_status_1_and_named(wrong: Path, folder: Path) -> None:
    done = run("models_of_localize.py:net", wrong, "--repro", "repro")
    assert done.exit_code == 1, done.output
    assert "first wrong: Sigmoid" in done.stdout
    assert "models_of_localize.py" in done.stdout
    assert (folder / "repro" / "run.py").is_file()
    as_json = run("models_of_localize.py:net", wrong, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["suspect"]["op_type"] == "Sigmoid"


def test_right_is_status_0(wrong: Path, folder: Path) -> None:
    done = run("models_of_localize.py:net", folder / "net.onnx", "--golden")
    assert done.exit_code == 0, done.output
    assert "nothing wrong in export, given graph" in done.stdout
    converted = run("models_of_localize.py:small")
    assert converted.exit_code == 0, converted.output
    assert "precision fp16" in converted.stdout
    # A tolerance that nothing meets.
    assert run("models_of_localize.py:net", folder / "net.onnx", "--golden", "-t", "1e-12").exit_code == 1


def test_inputs_of_a_file(wrong: Path, folder: Path) -> None:
    np.savez(folder / "zeros.npz", x=np.zeros((4, 6), np.float32))
    for source in ("models_of_localize.py:net", folder / "net.onnx"):
        assert run(source, wrong, "--inputs", "zeros.npz").exit_code == 1
    np.savez(folder / "other.npz", z=np.zeros((4, 6), np.float32))
    done = run("models_of_localize.py:net", wrong, "--inputs", "other.npz")
    assert done.exit_code == 2
    assert "Missing: x" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("models_of_localize.py",), "models_of_localize.py:FUNCTION"),
        (("models_of_localize.py:none",), "has no 'none'"),
        (("models_of_localize.py:net", "missing.trtb"), "There is no file missing.trtb"),
        (("models_of_localize.py:net", "net.onnx", "--precision", "fp16"), "has been converted already"),
        (("models_of_localize.py:net", "net.onnx", "-t", "-1"), "must be a positive number"),
    ],
)
def test_no_answer_is_status_2(folder: Path, wrong: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_a_saved_program(folder: Path) -> None:
    from trtbridge.bridge.cli_source import Source

    request = Source.parse("models_of_localize.py:net").load()
    tb.save(tb.convert(request.model, request.args, backend="onnxruntime"), folder / "net.trtb")
    done = run("models_of_localize.py:net", "net.trtb")
    assert done.exit_code == 0, done.output
    assert "engine onnxruntime" in done.stdout
    assert torch.is_grad_enabled()
