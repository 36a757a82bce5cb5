"""A custom op with a Triton kernel, as a user would register it; imported where Triton is installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _double_kernel(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=inside) * 2 + 1, mask=inside)


@torch.library.custom_op("trtbridge_gpu_tests::double_plus_one", mutates_args=())
def double_plus_one(x: torch.Tensor) -> torch.Tensor:
    """``2 * x + 1``."""
    x = x.contiguous()
    result = torch.empty_like(x)
    _double_kernel[(triton.cdiv(x.numel(), 128),)](x, result, x.numel(), BLOCK=128)
    return result


double_plus_one.register_fake(torch.empty_like)
