"""The network of test_calls.py and test_calls_memory.py; conftest.py converts it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

import trtbridge as tb

BATCH = tb.Dim("batch", min=1, opt=4, max=64)
SLEEP_CYCLES = 200_000_000  # some 0.1 s

Make = Callable[..., tb.EngineModule]
"""The fixture ``make``: ``make(cuda_graphs=True)`` is the converted program with these options of the runtime."""


class Net(torch.nn.Module):
    """Two engines with a plugin between them, two inputs, two results in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.last = torch.nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        values, indices = torch.cummax(F.gelu(self.first(x * scale)), 1)
        return {"scores": self.last(values), "sum": indices.sum(1)}


def arguments(batch: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for the same batch and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + batch)
    return (
        torch.randn(batch, 16, generator=generator).to(device),
        torch.rand(batch, 1, generator=generator).to(device),
    )


def close(got: dict[str, torch.Tensor], eager: Net, given: tuple[torch.Tensor, ...]) -> None:
    """Assert that a result is what eager gives."""
    with torch.no_grad():
        expected = eager(*given)
    torch.testing.assert_close(got["scores"], expected["scores"], rtol=2e-3, atol=2e-3)
    assert got["sum"].dtype == torch.int64
