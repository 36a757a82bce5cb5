"""Graphs that TensorRT-RTX 1.6.1 computed wrongly without a word; bridge/backends/rtx_faults.py says what was wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import trtbridge as tb


class Router(torch.nn.Module):
    """Attention, then the experts of each token: the rows of the indices came out by sequence, not by batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(100, 64)
        self.query, self.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.key, self.value = torch.nn.Linear(64, 32), torch.nn.Linear(64, 32)
        self.gate = torch.nn.Linear(64, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        query, key, value = (
            layer(x).reshape(2, 16, -1, 16).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        key, value = (part[:, :, None].expand(2, 2, 2, 16, 16).reshape(2, 4, 16, 16) for part in (key, value))
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(2, 16, 64))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        weights, experts = torch.topk(self.gate(x.reshape(-1, 64)).softmax(-1), 2)
        return weights, experts


def test_indices_of_a_top_k_behind_attention(backend: str, device: torch.device) -> None:
    module = Router().eval().to(device)
    ids = torch.randint(0, 100, (2, 16), device=device)
    converted = tb.convert(module, (ids,), backend=backend)
    for _ in range(3):
        ids = torch.randint(0, 100, (2, 16), device=device)
        with torch.no_grad():
            expected = module(ids)
        torch.testing.assert_close(converted(ids)[0], expected[0], rtol=1e-4, atol=1e-4)
        assert float((converted(ids)[1] == expected[1]).float().mean()) > 0.9, "all but those of even weights"


class Clip(torch.nn.Module):
    """Boxes in two forms that are one tensor to a compiler: the first was never written."""

    def forward(self, boxes: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = boxes[keep[:20]]
        return chosen, torch.cat([chosen[:, :1], chosen[:, 1:2], chosen[:, 2:3], chosen[:, 3:4]], 1)


def test_a_result_that_is_joined_again(backend: str, device: torch.device) -> None:
    module = Clip().eval()
    boxes, keep = torch.rand(87, 4, device=device), torch.randperm(87, device=device)[:79]
    converted = tb.convert(module, (boxes, keep), backend=backend)
    for _ in range(3):
        boxes, keep = torch.rand(87, 4, device=device), torch.randperm(87, device=device)[:79]
        for got, expected in zip(converted(boxes, keep), module(boxes, keep), strict=True):
            assert torch.equal(got, expected)


class Twice(torch.nn.Module):
    """A result, and the same in the shape that it has."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = F.layer_norm(x, (64,))[:, 0] * 2
        return first, first.reshape(-1, 64), first.reshape(-1, 64) @ first.T


def test_a_result_in_the_same_shape(backend: str, device: torch.device) -> None:
    module, x = Twice(), torch.randn(2, 17, 64, device=device)
    converted = tb.convert(module, (x,), backend=backend)
    for _ in range(3):
        x = torch.randn(2, 17, 64, device=device)
        for got, expected in zip(converted(x), module(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
