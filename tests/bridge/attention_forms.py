"""Attention as people write it, for the tests of ``convert(attention=...)``; each form with its example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

BATCH, HEADS, LENGTH, SIZE = 2, 4, 10, 16


class Attention(nn.Module):
    """Projections around one of the functions below, as in a model."""

    def __init__(self, form: Callable[..., torch.Tensor], kv_heads: int = HEADS) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.form, self.kv_heads = form, kv_heads
        self.query = nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, kv_heads * SIZE) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = self.query(x).view(batch, length, HEADS, SIZE).transpose(1, 2)
        k = self.key(x).view(batch, length, self.kv_heads, SIZE).transpose(1, 2)
        v = self.value(x).view(batch, length, self.kv_heads, SIZE).transpose(1, 2)
        return self.out(self.form(q, k, v, *masks).transpose(1, 2).reshape(batch, length, width))


def plain(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


def masked(q, k, v, mask):
    return functional.scaled_dot_product_attention(q, k, v, mask)


def causal(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def eager(q, k, v, mask):
    """transformers' eager attention."""
    scores = torch.matmul(q, k.transpose(2, 3)) * SIZE**-0.5 + mask
    return torch.matmul(functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def repeated(q, k, v):
    """transformers' repeat_kv ahead of its eager attention."""

    def repeat(t):
        batch, heads, length, size = t.shape
        return t[:, :, None].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)

    return torch.matmul((torch.matmul(q, repeat(k).transpose(2, 3)) / math.sqrt(SIZE)).softmax(-1), repeat(v))


def gpt2(q, k, v):
    """A triangle that chooses the least float."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(SIZE)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return torch.where(keep, scores, torch.finfo(scores.dtype).min).softmax(-1) @ v


def filled(q, k, v, mask):
    scores = torch.einsum("bhid,bhjd->bhij", q * SIZE**-0.5, k)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def alibi(q, k, v):
    """Press et al., arXiv:2108.12409: a bias that falls with the distance."""
    places = torch.arange(q.shape[2], device=q.device)
    slopes = torch.tensor([2.0 ** -(2 * head + 2) for head in range(HEADS)], device=q.device)
    bias = -slopes[:, None, None] * (places[None, :] - places[:, None]).abs()
    return functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype)[None])


def rotary(q, k, v):
    """Su et al., arXiv:2104.09864: positions as angles of queries and keys."""
    places = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    angles = places[:, None] * 100.0 ** (-torch.arange(SIZE // 2, device=q.device) / (SIZE // 2))
    cos, sin = (torch.cat([part] * 2, -1).to(q.dtype) for part in (angles.cos(), angles.sin()))

    def turn(t):
        return t * cos + torch.cat([-t[..., SIZE // 2 :], t[..., : SIZE // 2]], -1) * sin

    return functional.scaled_dot_product_attention(turn(q), turn(k), v)


@dataclass(frozen=True)
class Form:
    """A form and what its node is like.

    Attributes:
        function: of queries, keys, values and masks.
        kind: what the report says behind the shapes; for dynamic shapes of the same.
        mask: "" for none, "bool" or "float".
        kv_heads: heads of keys and values.
    """

    function: Callable[..., torch.Tensor]
    kind: str = ""
    mask: str = ""
    kv_heads: int = HEADS

    def module(self) -> nn.Module:
        return Attention(self.function, self.kv_heads).eval()

    def example(self, batch: int = BATCH, length: int = LENGTH) -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, length, HEADS * SIZE)
        if not self.mask:
            return (x,)
        keep = (torch.rand(batch, 1, length, length) < 0.6) | torch.eye(length, dtype=torch.bool)
        return (x, keep if self.mask == "bool" else torch.randn(batch, 1, length, length))


FORMS = {
    "sdpa": Form(plain),
    "sdpa bool": Form(masked, "mask", "bool"),
    "sdpa float": Form(masked, "mask", "float"),
    "sdpa causal": Form(causal, "causal"),
    "sdpa grouped": Form(grouped, kv_heads=2),
    "eager": Form(eager, "mask", "float"),
    "repeat_kv": Form(repeated, kv_heads=2),
    "gpt2": Form(gpt2, "causal"),
    "masked_fill": Form(filled, "mask", "bool"),
    "alibi": Form(alibi, "mask"),
    "rotary": Form(rotary),
}
