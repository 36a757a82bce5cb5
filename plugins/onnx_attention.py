"""ONNX Attention (opset 23 to 25) of all forms, of which TensorRT takes few."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from .onnx_call import Implementation, NodeCall, Result


def attention(call: NodeCall) -> Result:
    """Attention: output, present key, present value, and scores as qk_matmul_output_mode asks for.

    A query that may attend to no key gives 0. With torch's fused kernel where no scores are asked for and none are
    capped.
    """
    query, key, value = call.tensor(0), call.tensor(1), call.tensor(2)
    flat = query.dim() == 3
    if flat:
        query = _split(query, int(call.attribute("q_num_heads")))
        key, value = (_split(t, int(call.attribute("kv_num_heads"))) for t in (key, value))
    past = call.maybe(4)
    if past is not None:
        key, value = torch.cat((past, key), 2), torch.cat((call.tensor(5), value), 2)
    present = key, value
    scale = float(call.attribute("scale", 0.0)) or 1 / math.sqrt(query.shape[-1])
    bias = _bias(call, query, key)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    softcap = float(call.attribute("softcap", 0.0))
    attends = None if bias is None else (bias > -math.inf).any(-1, keepdim=True)
    if call.outputs < 4 and not softcap and not call.attribute("softmax_precision", 0):
        output = functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
        if attends is not None:
            output = torch.where(attends, output, torch.zeros_like(output))
        return _joined(output) if flat else output, *present
    scores = torch.matmul(query * math.sqrt(scale), key.transpose(-1, -2) * math.sqrt(scale))
    mode = int(call.attribute("qk_matmul_output_mode", 0))
    shown = scores
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
        shown = scores  # as the reference of the standard does, for mode 0 too
    biased = scores if bias is None else scores + bias
    chances = torch.softmax(biased.float() if biased.dtype.itemsize < 4 else biased, -1)
    if attends is not None:
        chances = torch.where(attends, chances, torch.zeros_like(chances))
    chances = chances.to(query.dtype)
    shown = biased if mode == 2 else chances if mode == 3 else shown
    output = torch.matmul(chances, value)
    return _joined(output) if flat else output, *present, shown.to(query.dtype)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, length, heads * size) → (batch, heads, length, size)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    batch, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * size)


def _bias(call: NodeCall, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores: the mask, and -infinity where a query may not attend; None where nothing is."""
    mask, lengths = call.maybe(3), call.maybe(6)
    queries, keys = query.shape[2], key.shape[2]
    left, right = int(call.attribute("left_window_size", -1)), int(call.attribute("right_window_size", -1))
    causal = bool(call.attribute("is_causal", 0))
    bias: torch.Tensor = torch.zeros((1, 1, queries, keys), dtype=query.dtype, device=query.device)
    if mask is not None:
        short = keys - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
        bias = bias + functional.pad(mask, (0, short), value=-math.inf)
    elif lengths is None and not causal and left < 0 and right < 0:
        return None
    # The absolute place of the first query: what the cache holds before it.
    past = call.maybe(4)
    column = torch.arange(keys, device=query.device)
    row = torch.arange(queries, device=query.device)[:, None]
    if past is not None:
        row = row + past.shape[2]
    elif lengths is not None:
        row = row + (lengths.reshape(-1, 1, 1, 1) - queries)
    allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=query.device)
    if causal:
        allowed = allowed & (column <= row)
    if left >= 0:
        allowed = allowed & (row - column <= left)
    if right >= 0:
        allowed = allowed & (column - row <= right)
    if lengths is not None:
        allowed = allowed & (column < lengths.reshape(-1, 1, 1, 1))
    return torch.where(allowed, bias, torch.full_like(bias, -math.inf))


def fake_attention(call: NodeCall) -> Result:
    """The shapes of Attention's results."""
    query, key, value = call.tensor(0), call.tensor(1), call.tensor(2)
    flat = query.dim() == 3
    if flat:
        query = _split(query, int(call.attribute("q_num_heads")))
        key, value = (_split(t, int(call.attribute("kv_num_heads"))) for t in (key, value))
    past = call.maybe(4)
    total = key.shape[2] if past is None else key.shape[2] + past.shape[2]
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, heads, queries, value.shape[3])
    return (
        _joined(output) if flat else output,
        key.new_empty(*key.shape[:2], total, key.shape[3]),
        value.new_empty(*value.shape[:2], total, value.shape[3]),
        query.new_empty(batch, heads, queries, total),
    )


OPS: Mapping[str, Implementation] = {"Attention": attention}
FAKES: Mapping[str, Implementation] = {"Attention": fake_attention}
