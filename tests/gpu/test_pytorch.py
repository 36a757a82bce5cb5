"""Engines inside torch.compile and torch.export, and made by torch.compile, on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import trtbridge as tb


class Around(nn.Module):
    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine, self.head = engine, nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.engine(x).relu())


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair(backend: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with its first part as an engine."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16)).eval().to(device)
    shapes = {"input": {0: tb.Dim("batch", min=1, opt=8, max=64)}}
    engine = tb.convert(first, (torch.randn(8, 32, device=device),), dynamic_shapes=shapes, backend=backend)
    model, fast = Around(first).to(device).eval(), Around(engine).to(device).eval()
    fast.head = model.head
    return model, fast


def test_compiled_and_exported(pair: tuple[nn.Module, nn.Module], device: torch.device) -> None:
    model, fast = pair
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fast, (torch.randn(8, 32, device=device),), dynamic_shapes=({0: batch},))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        for rows in (8, 3, 64):
            x = torch.randn(rows, 32, device=device)
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(program.module()(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # inductor's own, when it is imported
def test_compiled_under_a_cuda_graph(pair: tuple[nn.Module, nn.Module], cuda: torch.device) -> None:
    model, fast = pair
    compiled = torch.compile(fast, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(4):  # warm up, capture, replay
            x = torch.randn(8, 32, device=cuda)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=1e-3, atol=1e-3)


def test_the_backend_of_torch_compile(backend: str, device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trtbridge.bridge.dynamo")
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval().to(device)
    compiled = torch.compile(model, backend="trtbridge", options={"backend": backend})
    with torch.inference_mode():
        for rows in (8, 3, 5, 12):
            x = torch.randn(rows, 3, 8, 8, device=device)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)
    lines = [record for record in caplog.records if record.name == "trtbridge.bridge.dynamo"]
    assert [record.levelno for record in lines] == [logging.INFO] * 2
