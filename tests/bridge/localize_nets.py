"""What the tests of localize share: a small model, and ways to spoil its graph."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import onnx
import torch
from torch import nn

from trtbridge.bridge.model import OnnxModel


class Net(nn.Module):
    """x: (N, 8) to (N, 3)."""

    def __init__(self, approximate: str = "none", more: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)
        self.approximate, self.more = approximate, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.more:
            x = (x + 1.0) - 1.0
        y = self.norm(x)
        y = nn.functional.gelu(self.up(y), approximate=self.approximate)
        x = x + self.down(y)
        return self.head(torch.tanh(x))


def spoil(model: onnx.ModelProto, op_type: str = "Tanh", to: str = "Sigmoid") -> None:
    next(node for node in model.graph.node if node.op_type == op_type).op_type = to


def spoiled(model: OnnxModel, op_type: str = "Tanh", to: str = "Sigmoid") -> OnnxModel:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    spoil(proto, op_type, to)
    return dataclasses.replace(model, proto=proto)


def run_repro(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, str(folder / "run.py")], capture_output=True, text=True, env=environment, cwd="/"
    )
