"""ONNX losses, and activations that TensorRT lacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .onnx_call import Implementation, NodeCall, Result, compute_type


def negative_log_likelihood(call: NodeCall) -> Result:
    """NegativeLogLikelihoodLoss of log-probabilities (N, C, ...)."""
    x = call.tensor(0)
    return _loss(call, x.to(compute_type(x.dtype, x.device))).to(x.dtype)


def softmax_cross_entropy(call: NodeCall) -> Result:
    """SoftmaxCrossEntropyLoss of scores (N, C, ...), and the log-probabilities."""
    x = call.tensor(0)
    logs = torch.log_softmax(x.to(compute_type(x.dtype, x.device)), dim=1)
    return _loss(call, logs).to(x.dtype), logs.to(x.dtype)


def _loss(call: NodeCall, logs: torch.Tensor) -> torch.Tensor:
    target, weight = call.tensor(1).long(), call.maybe(2)
    ignored = call.attribute("ignore_index")
    kept = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != int(ignored)
    index = torch.where(kept, target, torch.zeros_like(target))
    loss = -logs.gather(1, index.unsqueeze(1)).squeeze(1)
    factor = kept.to(logs.dtype) if weight is None else weight.to(logs.dtype)[index] * kept
    loss = torch.where(kept, loss * factor, torch.zeros_like(loss))
    reduction = call.attribute("reduction", "mean")
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / factor.sum()


def swiglu(call: NodeCall) -> Result:
    """SwiGLU (arXiv 2002.05202): Swish of the first input, times the second."""
    x = call.tensor(0)
    work = compute_type(x.dtype, x.device)
    gate, value = x.to(work), call.tensor(1).to(work)
    return (gate * torch.sigmoid(float(call.attribute("alpha", 1.0)) * gate) * value).to(x.dtype)


OPS: Mapping[str, Implementation] = {
    "NegativeLogLikelihoodLoss": negative_log_likelihood,
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy,
    "SwiGLU": swiglu,
}
