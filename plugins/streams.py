"""CUDA streams that nobody else works on.

Those of ``torch.cuda.Stream()`` come from a pool of 32 and are handed out again and again, so that two owners may have
the same one without knowing. Where one of them captures a CUDA graph, what the other one does on its stream becomes a
part of that graph, or fails ("operation not permitted when stream is capturing"); replays then repeat work on memory
that is long gone.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from .driver import check, library

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: in no order with the default stream, as torch's are


class OwnStream:
    """A stream that nobody else has while this object is kept.

    Not a kind of torch's stream, nor found out about by a weak reference to one: torch frees its streams without a word
    to those who refer to them weakly, and the process dies of that at its end.

    Attributes:
        stream: for torch.
    """

    def __init__(self, stream: Any, give_back: Callable[[], None]) -> None:
        self.stream = stream
        self._give_back = give_back

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self._give_back()


class StreamPool:
    """Streams of the driver, each with one owner at a time.

    They are never destroyed, as torch's allocator may still have to record an event on one: whose owner is gone goes
    to the next one, behind what is under way on it.

    Args:
        create: makes a stream on a device, by its index, and returns the handle.
        wrap: makes torch's object of a handle and a device.
    """

    def __init__(self, create: Callable[[int], int], wrap: Callable[[int, torch.device], Any]) -> None:
        self._create = create
        self._wrap = wrap
        self._free: dict[int, list[int]] = {}
        self._lock = threading.RLock()  # an owner may go at any time, also while one is taken

    def take(self, index: int) -> OwnStream:
        """A stream on a device, by its index."""
        with self._lock:
            free = self._free.setdefault(index, [])
            handle = free.pop() if free else self._create(index)
        return OwnStream(self._wrap(handle, torch.device("cuda", index)), lambda: self._give(index, handle))

    def _give(self, index: int, handle: int) -> None:
        with self._lock:
            self._free[index].append(handle)


def _create(index: int) -> int:
    with torch.cuda.device(index):
        torch.cuda.set_device(index)  # makes torch's context that of this thread, also of a new one
        handle = ctypes.c_void_p()
        check(library().cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING), "cuStreamCreate")
    assert handle.value is not None
    return handle.value


_pool = StreamPool(_create, torch.cuda.ExternalStream)


def own_stream(device: torch.device | int | None = None) -> OwnStream:
    """A stream that nobody else has while the object is kept.

    Args:
        device: CUDA device; None for the current one.

    Raises:
        DriverError: the driver makes none.
    """
    if isinstance(device, torch.device):
        device = device.index
    return _pool.take(torch.cuda.current_device() if device is None else device)
