"""Lanes: what one call needs of its own, so that calls may overlap, and the bounded pool that they are taken from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .backends.base import Context, Executable


class StreamOrder:
    """Puts the work that uses one memory in order, whatever streams it is given to.

    Attributes:
        memory: from torch's allocator, which must not give it away while a stream still uses it.
    """

    def __init__(self, memory: torch.Tensor | None = None) -> None:
        self.memory = memory
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None

    def enter(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait until the memory is free, if another stream used it last."""
        if self._stream is None or self._stream == stream:
            return
        stream.wait_event(self._done)
        if self.memory is not None:
            self.memory.record_stream(stream)

    def leave(self, stream: torch.cuda.Stream) -> None:
        """Note that a stream has been given work that uses the memory."""
        self._done.record(stream)
        self._stream = stream


class Lane:
    """An execution context of each engine and the scratch memory that they share: for one call at a time.

    Args:
        executables: the engine of each step, None for a plugin.
        device: where they run.
        workspace: scratch memory for all of them; None lets each context have its own.
    """

    def __init__(
        self, executables: Sequence[Executable | None], device: torch.device, workspace: torch.Tensor | None = None
    ) -> None:
        self.contexts: list[Context | None] = [
            None if executable is None else executable.new_context(workspace) for executable in executables
        ]
        self.order = StreamOrder(workspace) if device.type == "cuda" else None


class LanePool:
    """At most so many lanes, made when they are needed; who finds none waits.

    Args:
        make: makes one.
        most: how many there may be.
    """

    def __init__(self, make: Callable[[], Lane], most: int) -> None:
        self._make = make
        self._most = most
        self._made = 0
        self._idle: list[Lane] = []
        self._changed = threading.Condition()

    @property
    def made(self) -> int:
        """How many lanes there are."""
        return self._made

    def take(self) -> Lane:
        """A lane for one call; the one used last where several are idle, as its shapes are the most likely to fit."""
        with self._changed:
            while not self._idle and self._made >= self._most:
                self._changed.wait()
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify()
            raise

    def give(self, lane: Lane) -> None:
        """Put a lane back."""
        with self._changed:
            self._idle.append(lane)
            self._changed.notify()

    def keep_idle(self) -> Lane | None:
        """An idle lane that leaves the pool for good, None where there is none; nothing is made."""
        with self._changed:
            if not self._idle:
                return None
            self._made -= 1
            self._changed.notify()
            return self._idle.pop()

    @contextmanager
    def all_idle(self) -> Iterator[None]:
        """Wait until no call is under way, keep new ones from beginning, and forget all lanes in the end."""
        with self._changed:
            while len(self._idle) < self._made:
                self._changed.wait()
            try:
                yield
            finally:
                self._idle.clear()
                self._made = 0
                self._changed.notify_all()
