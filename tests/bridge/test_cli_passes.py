"""trtbridge passes, and the options --check-passes and --dump-graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner, Result

import trtbridge as tb
from trtbridge.bridge.cli import app

MINE = '''
from dataclasses import dataclass

import torch

from trtbridge.passes import DEFAULT, Pass, RemoveDeadNodes


@dataclass(frozen=True)
class SwapRelu(Pass):
    """Make Abs of every Relu.

    That is wrong.
    """

    factor: float = 2.0

    def apply(self, graph, notes):
        found = [node for node in graph.nodes if node.op == "Relu"]
        for node in found:
            node.op = "Abs"
        return len(found)


def make():
    passes = DEFAULT.insert(SwapRelu(), before=RemoveDeadNodes)
    return {"model": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), "args": (torch.ones(1, 4),),
            "passes": passes, "check_export": False}
'''


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments])


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "my_passes.py"
    path.write_text(MINE)
    return str(path)


def test_list(mine: str) -> None:
    result = invoke("passes", "--import", mine)
    assert result.exit_code == 0, result.output
    lines = [line.strip() for line in result.stdout.splitlines()]
    others = next(index for index, line in enumerate(lines) if line.startswith("Other passes"))
    assert [line.split()[0] for line in lines[1:others]] == list(dict.fromkeys(item.name for item in tb.DEFAULT))
    assert "FoldConstants" in lines[1]
    assert lines[1].endswith("Fold nodes whose inputs are constants, and shapes that are fixed.")
    rest = [line.split()[0] for line in lines[others + 1 :]]
    assert {"RewriteToPlugin", "SwapRelu"} <= set(rest)
    assert rest == sorted(rest)
    for line in (*lines[1:others], *lines[others + 1 :]):
        assert len(line.split()) > 2, f"no description: {line}"


def test_one_pass(mine: str) -> None:
    result = invoke("passes", "SwapRelu", "--import", mine)
    assert result.exit_code == 0
    assert result.stdout.startswith("SwapRelu(factor: ")
    assert "Make Abs of every Relu.\n\nThat is wrong." in result.stdout
    result = invoke("passes", "RemoveNoOps")
    assert "x -> Cast(to=float) -> Relu -> y" in result.stdout
    assert "Comes after FoldConstants, NarrowTypes" in result.stdout
    assert "May change the dtypes" in invoke("passes", "NarrowTypes").stdout


def test_an_unknown_pass() -> None:
    result = invoke("passes", "RemoveNoOp")
    assert result.exit_code == 1
    assert "no pass 'RemoveNoOp'. Did you mean RemoveNoOps?" in result.stderr


def test_torch_is_not_needed() -> None:
    code = "import sys\nfrom trtbridge.bridge.cli import app\napp(['passes'], standalone_mode=False)\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FoldConstants" in done.stdout


def test_check_and_dump(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "graphs"
    command = ("convert", f"{mine}:make", "-o", "net.trtb", "--backend", "onnxruntime", "--dump-graphs", str(folder))
    result = invoke(*command, "--check-passes")
    assert result.exit_code == 1
    assert "SwapRelu changed the model's numbers" in result.stderr
    assert str(folder) in result.stderr
    assert not Path("net.trtb").exists()
    result = invoke(*command)
    assert result.exit_code == 0, result.stderr
    assert not list(folder.glob("*before*")), "what the failed conversion left is gone"
    (swapped,) = folder.glob("*_SwapRelu.onnx")
    assert "Abs" in [node.op_type for node in onnx.load(swapped).graph.node]
    assert "op: Relu -> Abs" in swapped.with_suffix(".diff").read_text()
