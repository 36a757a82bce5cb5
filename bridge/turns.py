"""Plain calls of several threads take turns on the host.

A plain call is hundreds of launches, between which it lets go of Python's lock again and again, and each launch takes
the driver's lock of the device. Threads that do that at once get in each other's way: eight of them made 0.4 of the
calls of one thread, and 0.5 to 0.7 where the turn changed with every call, as changing to a thread on another core
takes as long as a call or two. So a thread that calls again at once keeps its turn for a while: 0.8 (docs/runtime.md).
On the device their work overlaps all the same.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0
"""Then a call goes on beside the other one, which may be waiting for this very call. It does get in the way then."""
TURN_S = 0.04
"""How long a thread keeps its turn while others wait, if it calls again at once; less where many wait. Changing threads
took 1 to 3 ms on an H200's host: 0.2 until the next one is at it, and on another core its first calls are slower."""
AT_ONCE_S = 0.001
"""Between the end of a call and the next one of its thread: whoever stays away for longer loses the turn. It is about
what changing threads costs."""
LOOK_S = 0.002
"""How often the first of those who wait looks whether whoever has the turn stays away. Looking takes Python's lock."""

_MOST_SHAPES = 4096


class _Habits(threading.local):
    """Of a thread, on one device."""

    left = 0.0  # when its last call ended
    kept = False  # whether it kept its turn then
    returns = True  # whether it is taken to call again at once


class _Device:
    """The turns on one device, which all its programs share."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # around what follows, for moments; the first who waits does so in it
        self._queue: deque[threading.Lock] = deque()  # of those who wait; all but the first one's are locked
        self._owner = 0  # thread that has the turn, within calls and between them
        self._depth = 0  # its calls, one within the other; 0 between two of them
        self._began = 0.0
        self._left = 0.0
        self._mine = _Habits()

    def enter(self) -> bool:
        """Take the turn; False where nobody gave it up in time."""
        me, now = threading.get_ident(), time.perf_counter()
        with self._changed:
            if self._owner == me and self._depth:  # a call within a call
                self._depth += 1
                return True
            if now - self._mine.left < AT_ONCE_S:
                self._mine.returns = True
            elif self._mine.kept:
                self._mine.returns = False
            # Who is late and had given the turn up was in the way of the next one's beginning: that says nothing.
            if self._owner == me:
                self._depth = 1
                return True
            if not self._owner and not self._queue:
                self._take(me)
                return True
        return self._wait(me, now + PATIENCE_S)

    def leave(self) -> None:
        """The end of a call that has the turn."""
        now = time.perf_counter()
        with self._changed:
            self._depth -= 1
            if self._depth:
                return
            self._left = self._mine.left = now
            most = min(TURN_S, PATIENCE_S / 2 / max(len(self._queue), 1))
            self._mine.kept = bool(self._queue) and self._mine.returns and now - self._began <= most
            if not self._mine.kept:
                self._owner = 0
                self._changed.notify()

    def _wait(self, me: int, deadline: float) -> bool:
        mine = threading.Lock()
        with self._changed:
            if self._queue:
                mine.acquire()
            self._queue.append(mine)
        try:
            if not mine.acquire(timeout=max(0.0, deadline - time.perf_counter())):  # until this one is the first
                return False
            with self._changed:
                while self._owner and (self._depth or time.perf_counter() - self._left < AT_ONCE_S):
                    if time.perf_counter() > deadline:
                        return False
                    self._changed.wait(LOOK_S)
                self._take(me)
                return True
        finally:
            with self._changed:
                first = self._queue[0] is mine
                self._queue.remove(mine)
                if first and self._queue:
                    self._queue[0].release()

    def _take(self, me: int) -> None:
        self._owner, self._depth, self._began = me, 1, time.perf_counter()


_devices: dict[int, _Device] = {}


class HostTurns:
    """The turns of one program.

    Args:
        device: index of the CUDA device, whose programs take turns with one another.
    """

    def __init__(self, device: int) -> None:
        self._device = _devices.setdefault(device, _Device())  # one step, whatever threads load programs
        self._known: set[Hashable] = set()

    @contextmanager
    def turn(self, shapes: Hashable) -> Iterator[None]:
        """Wait until no other thread is at it, but not for good: right are calls without it, too.

        Args:
            shapes: of the inputs. A first call with them compiles kernels, which takes seconds: nobody waits for it.
        """
        mine = shapes in self._known and self._device.enter()
        try:
            yield
        finally:
            if mine:
                self._device.leave()
        if len(self._known) >= _MOST_SHAPES:
            self._known.clear()
        self._known.add(shapes)
