"""While one thread captures a CUDA graph, no other gives an engine's kernels to a device or makes execution contexts.

TensorRT-RTX 1.6.1 records one event of the process in every enqueue, and a capture makes that event a part of its
graph. CUDA lets one thread at a time work on a graph; a process in which two did ended with a segmentation fault
(docs/runtime.md has what was seen). Captures are rare, so whoever captures is let in first. Whoever has waited for
long goes ahead all the same: an enqueue and a capture may call plugins, and those may wait for just this thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0
"""After so long an enqueue goes ahead beside a capture."""
CAPTURE_PATIENCE_S = 10.0
"""After so long a capture goes ahead beside an enqueue."""
LONG_S = 0.05
"""What enqueues for longer than that compiles kernels, most likely, which may go on for seconds."""
_FIRST_S = 0.1
"""So long at a time a capture that waits is let in first; as long after that it is not: what it waits for may last."""


class CaptureGate:
    """Lets many threads in at once, or one alone; who is in may come in again, either way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._inside: dict[int, int] = {}  # threads that enqueue, and how deep in it they are
        self._since: dict[int, float] = {}  # and when they began
        self._waiting = 0  # captures that are to be let in first
        self._capturer = 0  # thread that is alone; 0: none

    def enter(self) -> None:
        """To be called ahead of what must not run beside a capture in another thread; `leave` after it."""
        me = threading.get_ident()
        with self._lock:
            if self._is_taken() and me not in self._inside and me != self._capturer:
                self._changed.wait_for(lambda: not self._is_taken(), PATIENCE_S)
            depth = self._inside.get(me, 0)
            self._inside[me] = depth + 1
            if not depth:
                self._since[me] = time.monotonic()

    def leave(self) -> None:
        """After what `enter` was called for."""
        me = threading.get_ident()
        with self._lock:
            depth = self._inside.pop(me) - 1
            if depth:
                self._inside[me] = depth
                return
            del self._since[me]
            if self._is_taken():
                self._changed.notify_all()

    def is_busy(self) -> bool:
        """Whether another thread has been in for long, so that a capture would wait."""
        me, before = threading.get_ident(), time.monotonic() - LONG_S
        with self._lock:
            return any(since < before for thread, since in self._since.items() if thread != me)

    def is_mine(self) -> bool:
        """Whether this thread is the one that captures, alone."""
        return self._capturer == threading.get_ident()

    @contextmanager
    def capture(self) -> Iterator[bool]:
        """To be around a capture and the making of its graph.

        Yields:
            Whether no other thread is in, or will be before this one leaves or their patience ends.
        """
        if self.is_mine():
            yield True
            return
        alone = self._let_in(threading.get_ident())
        try:
            yield alone
        finally:
            if alone:
                with self._lock:
                    self._capturer = 0
                    self._changed.notify_all()

    def _let_in(self, me: int) -> bool:
        def is_free() -> bool:
            return not self._capturer and not any(thread != me for thread in self._inside)

        until = time.monotonic() + CAPTURE_PATIENCE_S
        with self._lock:
            while not (found := self._wait_first(is_free) or self._changed.wait_for(is_free, _FIRST_S)):
                if time.monotonic() > until:
                    break
            if found:
                self._capturer = me
        return found

    def _is_taken(self) -> bool:
        return bool(self._waiting or self._capturer)

    def _wait_first(self, is_free: Callable[[], bool]) -> bool:
        self._waiting += 1
        try:
            return self._changed.wait_for(is_free, _FIRST_S)
        finally:
            self._waiting -= 1
            self._changed.notify_all()  # whoever let this one in first


GATE = CaptureGate()
"""That of this process: what captures and enqueues share is the driver's, whatever module or device they are of."""
