"""A warning, once a process, where replays of engines whose kernels overlap may be wrong (docs/runtime.md)."""

from __future__ import annotations

import logging
import threading

import torch

logger = logging.getLogger(__name__)


class ReplayStreams:
    """The streams on which such engines were replayed, of all modules of a process, by device."""

    def __init__(self) -> None:
        self._seen: dict[int, set[int]] = {}
        self._lock = threading.Lock()
        self._has_warned = False

    def note(self, device: torch.device) -> None:
        """A module is replayed on torch's current stream of a device, after another stream or for the first time."""
        index = torch.cuda.current_device() if device.index is None else device.index
        handle = torch._C._cuda_getCurrentRawStream(index)
        with self._lock:
            seen = self._seen.setdefault(index, set())
            seen.add(handle)
            if len(seen) < 2 or self._has_warned:
                return
            self._has_warned = True
        logger.warning(
            "CUDA graphs are replayed on several streams of cuda:%d. TensorRT-RTX 1.6.1 was seen to give wrong results "
            "now and then while other work runs on the device (docs/runtime.md); overlap_kernels=False is meant to "
            "prevent that.",
            index,
        )


OVERLAPPING = ReplayStreams()
