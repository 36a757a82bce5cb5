"""trtbridge profile and trtbridge inspect."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import trtbridge as tb
from trtbridge.bridge.cli import app

MODELS = """
import torch
import trtbridge as tb


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return torch.cummax(self.second(torch.tanh(self.first(x))), 1).values


def make():
    dims = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    return {"model": Net(), "args": (torch.randn(4, 6),), "dynamic_shapes": dims, "backend": "onnxruntime"}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with models.py and net.trtb."""
    path = tmp_path_factory.mktemp("cli_profile")
    (path / "models.py").write_text(MODELS)
    before = list(sys.path)
    _call("convert", f"{path}/models.py:make", "-o", f"{path}/net.trtb")
    yield path
    sys.path[:] = before
    sys.modules.pop("models", None)


def _call(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def test_profile_of_a_function(made: Path, tmp_path: Path) -> None:
    written = [tmp_path / name for name in ("trace.json", "profile.png", "report.json")]
    result = _call(
        "profile", f"{made}/models.py:make", "-n", "2", "--backend", "onnxruntime",
        "--trace", str(written[0]), "--picture", str(written[1]), "--json", str(written[2]),
    )  # fmt: skip
    for words in ("x (4, 6)", "plugin aten::cummax.default", "models.py:", "second", "module (depth 1)"):
        assert words in result.stdout
    assert json.loads(written[0].read_text())["traceEvents"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    report = tb.ProfileReport.from_json(json.loads(written[2].read_text()))
    assert report.iterations == 2
    again = _call("profile", f"{made}/models.py:make", "--trace", str(written[0]), status=1)
    assert "trace.json" in again.stderr


def test_profile_of_a_file(made: Path, tmp_path: Path) -> None:
    result = _call("profile", f"{made}/net.trtb", "-n", "1", "--size", "batch=7", "--top", "1", "--depth", "1")
    assert "x (7, 6)" in result.stdout
    assert re.search(r"\d+ more", result.stdout)
    np.savez(tmp_path / "in.npz", x=np.zeros((2, 6), np.float32))
    assert "x (2, 6)" in _call("profile", f"{made}/net.trtb", "-n", "1", "-i", str(tmp_path / "in.npz")).stdout


def test_options_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    assert (
        "has been converted already"
        in _call("profile", f"{made}/net.trtb", "--backend", "onnxruntime", status=1).stderr
    )
    given = ("profile", f"{made}/net.trtb", "--size", "batch=2", "-i", str(tmp_path / "in.npz"))
    assert "--size is for random inputs" in _call(*given, status=1).stderr
    assert "no file" in _call("profile", str(tmp_path / "absent.trtb"), status=1).stderr.lower()


def test_inspect(made: Path, tmp_path: Path) -> None:
    text = _call("inspect", f"{made}/net.trtb").stdout
    for words in ("Net on onnxruntime", "nodes: ", "weights: 4", "layers: ", "plugin aten::cummax.default"):
        assert words in text
    assert "layers: " not in _call("inspect", f"{made}/net.trtb", "--no-fusions").stdout
    assert "There is no file" in _call("inspect", str(tmp_path / "absent.trtb"), status=1).stderr
