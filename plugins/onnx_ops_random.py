"""ONNX ops that draw random numbers. They draw from torch's generator, so torch.manual_seed rules, not ``seed``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .onnx_call import Implementation, NodeCall, Result
from .onnx_ops_math import onnx_dtype


def random(call: NodeCall) -> Result:
    """RandomUniform, RandomNormal and their Like forms."""
    if call.op.endswith("Like"):
        like = call.tensor(0)
        shape: list[int] | torch.Size = like.shape
        dtype = onnx_dtype(call.attribute("dtype")) if call.attribute("dtype") else like.dtype
    else:
        shape, dtype = list(call.attribute("shape")), onnx_dtype(call.attribute("dtype", 1))
    if call.op.startswith("RandomUniform"):
        low, high = call.attribute("low", 0.0), call.attribute("high", 1.0)
        return torch.rand(shape, dtype=dtype, device=call.device).mul(high - low).add(low)
    drawn = torch.randn(shape, dtype=dtype, device=call.device)
    return drawn.mul(call.attribute("scale", 1.0)).add(call.attribute("mean", 0.0))


def bernoulli(call: NodeCall) -> Result:
    """Bernoulli: 1 with the probability that the input gives."""
    p = call.tensor(0)
    dtype = onnx_dtype(call.attribute("dtype")) if call.attribute("dtype") else p.dtype
    return torch.bernoulli(p).to(dtype)


def multinomial(call: NodeCall) -> Result:
    """Multinomial: classes drawn by unnormalized log-probabilities, (batch, sample_size)."""
    chances = torch.softmax(call.tensor(0).float(), dim=-1)
    drawn = torch.multinomial(chances, int(call.attribute("sample_size", 1)), replacement=True)
    return drawn.to(onnx_dtype(call.attribute("dtype", 6)))


def dropout(call: NodeCall) -> Result:
    """Dropout: outside of training the input itself; the mask tells what is kept."""
    x = call.tensor(0)
    training = bool(call.ints(2)[0]) if call.opset >= 12 and call.has(2) else False
    ratio = call.number(1, 0.5) if call.opset >= 12 else float(call.attribute("ratio", 0.5))
    if not training or ratio == 0:
        return x.clone(), torch.ones(x.shape, dtype=torch.bool, device=x.device)
    mask = torch.rand(x.shape, device=x.device) >= ratio
    return x * mask * (1.0 / (1.0 - ratio) if ratio < 1 else 0.0), mask


def fake_dropout(call: NodeCall) -> Result:
    """Dropout's results, whatever the ratio and mode are."""
    return torch.empty_like(call.tensor(0)), torch.empty_like(call.tensor(0), dtype=torch.bool)


OPS: Mapping[str, Implementation] = {
    **dict.fromkeys(("RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike"), random),
    "Bernoulli": bernoulli,
    "Multinomial": multinomial,
    "Dropout": dropout,
}

FAKES: Mapping[str, Implementation] = {"Dropout": fake_dropout}
