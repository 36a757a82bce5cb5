"""Plain calls of several threads take turns on the host.

A plain call is hundreds of launches, between which it lets go of Python's lock again and again, and each launch takes
the driver's lock of the device. Threads that do that at once get in each other's way: eight of them made a third to
three quarters of the calls of one thread, and as many as one, or more, in turns (docs/runtime.md). On the device their
work overlaps all the same.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0
"""Then a call goes on beside the other one, which may be waiting for this very call.

Turns go to who is there first, not to who waits for longest: that saves the time of changing threads, and among eight
threads that do nothing else one waits for 0.2 s now and then. What gives up does get in the way of others.
"""

_MOST_SHAPES = 4096

_locks: defaultdict[int, threading.RLock] = defaultdict(threading.RLock)


class HostTurns:
    """The turns of one program.

    Args:
        device: index of the CUDA device, whose programs take turns with one another.
    """

    def __init__(self, device: int) -> None:
        self._lock = _locks[device]
        self._known: set[Hashable] = set()

    @contextmanager
    def turn(self, shapes: Hashable) -> Iterator[None]:
        """Wait until no other thread is at it, but not for good: right are calls without it, too.

        Args:
            shapes: of the inputs. A first call with them compiles kernels, which takes seconds: nobody waits for it.
        """
        mine = shapes in self._known and self._lock.acquire(timeout=PATIENCE_S)
        try:
            yield
        finally:
            if mine:
                self._lock.release()
        if len(self._known) >= _MOST_SHAPES:
            self._known.clear()
        self._known.add(shapes)
