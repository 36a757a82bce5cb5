"""What a failed capture of a CUDA graph leaves behind."""

from __future__ import annotations

from contextlib import suppress

import torch


def end_failed_capture(device: torch.device) -> None:
    """Put torch's generator right after a capture that failed.

    The generator takes every draw for part of that capture until the end of another one ("Offset increment outside
    graph capture"), so there is another one, of one small tensor.

    Args:
        device: a CUDA device; it is waited for.
    """
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with suppress(RuntimeError), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
