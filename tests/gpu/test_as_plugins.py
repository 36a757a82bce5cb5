"""What a user wants as plugins (`as_plugins`): PyTorch's own kernels between engines, all of it in one CUDA graph."""

from __future__ import annotations

import pytest
import torch
from helpers import DRY_RUN
from torch import nn
from torch.nn import functional as F

import trtbridge as tb

BATCH = tb.Dim("batch", min=1, opt=4, max=8)


class Net(nn.Module):
    """A convolution, a norm, attention over the pixels and a linear layer: (N, 3, 16, 16) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.qkv = nn.Linear(64, 192)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.stem(x).flatten(2).mT)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("aten::scaled_dot_product_attention", 1),
        (["aten::conv2d", "aten::layer_norm"], 2),
        (["stem", "norm", "qkv", torch.ops.aten.scaled_dot_product_attention, "head"], 5),
    ],
    ids=["attention", "two", "five"],
)
def test_plugins_by_wish(backend: str, device: torch.device, dtype: torch.dtype, names: object, count: int) -> None:
    torch.manual_seed(0)
    model = Net().eval().to(device, dtype)
    x = torch.randn(4, 3, 16, 16, device=device, dtype=dtype)
    module = tb.convert(
        model, (x,), dynamic_shapes={"x": {0: BATCH}}, backend=backend, cuda_graphs=not DRY_RUN, as_plugins=names,
        plugin_host="segments",
    )  # fmt: skip
    assert len(module.program.plugin_calls) == count
    limit = 1e-3 if dtype is torch.float32 else 2e-2
    for _ in range(3):
        for batch in (4, 1, 7):
            given = torch.randn(batch, 3, 16, 16, device=device, dtype=dtype)
            with torch.no_grad():
                torch.testing.assert_close(module(given), model(given), rtol=limit, atol=limit)
    if not DRY_RUN:
        assert module.stats().graph_replays >= 6, "two of three calls with each of three sizes"
