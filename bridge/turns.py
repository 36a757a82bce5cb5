"""Plain calls of several threads take turns on the host.

A plain call is hundreds of launches, between which it lets go of Python's lock again and again, and each launch takes
the driver's lock of the device. Threads that do that at once get in each other's way: eight of them made a third to
three quarters of the calls of one thread, and as many as one, or more, in turns (docs/runtime.md). On the device their
work overlaps all the same.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 0.02
"""Then a call goes on beside the other one, which compiles kernels, waits for the device or even for this call."""

_locks: defaultdict[int, threading.RLock] = defaultdict(threading.RLock)


@contextmanager
def host_turn(device: int) -> Iterator[None]:
    """Wait until no other thread is at it, but not for long: right are calls without it, too.

    Args:
        device: index of the CUDA device.
    """
    lock = _locks[device]
    mine = lock.acquire(timeout=PATIENCE_S)
    try:
        yield
    finally:
        if mine:
            lock.release()
