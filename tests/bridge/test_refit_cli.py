"""``trtbridge refit`` and the options of ``trtbridge convert`` about weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge.cli import app

X = torch.linspace(-1, 1, 32).view(2, 16)
SOURCE = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(16, 64), (torch.zeros(2, 16),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(SOURCE)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    assert result.exit_code == 1, result.output
    return result.output


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("option", ["--refittable", "--strip-weights"])
def test_a_file_gets_other_weights(folder: Path, suffix: str, option: str) -> None:
    run("convert", "model.py:make", "-b", "onnxruntime", option, "-o", "net.trtb")
    new = nn.Linear(16, 64)
    weights = folder / f"new.{suffix}"
    if suffix == "pt":
        torch.save(new.state_dict(), weights)
    else:
        from safetensors.torch import save_file

        save_file(new.state_dict(), weights)
    assert "2 weights in" in run("refit", "net.trtb", str(weights), "-o", "new.trtb")
    torch.testing.assert_close(tb.load(folder / "new.trtb")(X), new(X).detach())
    assert "choose another name" in fails("refit", "net.trtb", str(weights), "-o", "new.trtb")
    run("refit", "new.trtb", str(weights), "-o", "new.trtb", "--force")  # a refitted one can be refitted


def test_what_cannot_be_refitted(folder: Path) -> None:
    run("convert", "model.py:make", "-b", "onnxruntime", "-o", "plain.trtb")
    run("convert", "model.py:make", "-b", "onnxruntime", "--refittable", "-o", "net.trtb")
    torch.save(nn.Linear(16, 64).state_dict(), folder / "new.pt")
    torch.save(nn.Linear(16, 64), folder / "module.pt")
    torch.save(nn.Linear(8, 64).state_dict(), folder / "narrow.pt")
    torch.save([1], folder / "list.pt")
    (folder / "broken.safetensors").write_bytes(b"no")
    assert "refittable=True" in fails("refit", "plain.trtb", "new.pt", "-o", "out.trtb")
    assert "weight: expected (64, 16) float, got (64, 8)" in fails("refit", "net.trtb", "narrow.pt", "-o", "out.trtb")
    assert "would run code" in fails("refit", "net.trtb", "module.pt", "-o", "out.trtb")
    assert "no state dict" in fails("refit", "net.trtb", "list.pt", "-o", "out.trtb")
    assert "damaged" in fails("refit", "net.trtb", "broken.safetensors", "-o", "out.trtb")
    assert "There is no file" in fails("refit", "net.trtb", "none.pt", "-o", "out.trtb")
    assert not (folder / "out.trtb").exists()


def test_streaming_is_for_tensorrt(folder: Path) -> None:
    words = fails("convert", "model.py:make", "-b", "onnxruntime", "--weight-streaming-mb", "0", "-o", "net.trtb")
    assert "weight_streaming_bytes is for TensorRT" in words
