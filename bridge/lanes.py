"""Lanes: what one call needs of its own, so that calls may overlap, and the bounded pool that they are taken from."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..plugins.driver import check, library
from .backends.base import Context, Executable

_RECORD_EXTERNAL = 1  # CU_EVENT_RECORD_EXTERNAL: a node of the graph that is captured


class StreamOrder:
    """Puts the work that uses one memory in order, whatever streams it is given to.

    Args:
        device: a CUDA device.
        memory: from torch's allocator, which must not give it away while a stream still uses it.
    """

    def __init__(self, device: torch.device, memory: torch.Tensor | None = None) -> None:
        self.memory = memory
        self._device = device
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None
        self._handle = -1
        self._graph: object = None  # whose replay used it last
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._known_for: set[int] = set()  # streams that the allocator knows the memory is used on; once is enough

    def enter(self, graph: object = None) -> None:
        """Let torch's current stream wait until the memory is free, if another stream used it last.

        Args:
            graph: stands for an executable CUDA graph, where a replay is all the work there is. CUDA lets replays of
                one wait for each other whatever streams they are given to, so nothing is to be done after one of it.
        """
        # The bare handle is known in a tenth of the time that a stream object takes.
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        last, self._graph = self._graph, None
        if handle == self._handle:
            return
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.current_stream(self._device)
        if self._stream is not None and (graph is None or graph is not last):
            stream.wait_event(self._done)
        if self.memory is not None and handle not in self._known_for:
            self.memory.record_stream(stream)
            self._known_for.add(handle)
        self._stream, self._handle = stream, handle

    def leave(self, graph: object = None) -> None:
        """Note that the stream of the last `enter` has been given work that uses the memory.

        Args:
            graph: stands for the one that was replayed, and has noted that by itself (`leave_in_capture`).
        """
        self._graph = graph
        if graph is None:
            self._done.record(self._stream)

    def leave_in_capture(self) -> object:
        """Let replays of the graph that torch's current stream captures do what `leave` does, which was called before.

        Returns:
            What must live as long as the graph.

        Raises:
            DriverError: the driver refuses.
        """
        event, stream = self._done.cuda_event, torch._C._cuda_getCurrentRawStream(self._index)
        check(
            library().cuEventRecordWithFlags(ctypes.c_void_p(event), ctypes.c_void_p(stream), _RECORD_EXTERNAL),
            "cuEventRecordWithFlags",
        )
        return self._done

    def wait(self) -> None:
        """Wait on the host until that work is done; not while torch's current stream is captured, which forbids it."""
        if not torch.cuda.is_current_stream_capturing():
            self._done.synchronize()


class Lane:
    """An execution context of each engine and the scratch memory that they share: for one call at a time.

    When it goes it waits for its work: a module may be dropped right after a call, which its kernels outlast.

    Args:
        executables: the engine of each step, None for a plugin.
        device: where they run.
        workspace: scratch memory for all of them; None lets each context have its own.
        order: of the work in it; None for one of its own.
        reads: what the work in it reads besides, kept as long.
    """

    order: StreamOrder | None = None

    def __init__(
        self,
        executables: Sequence[Executable | None],
        device: torch.device,
        workspace: torch.Tensor | None = None,
        order: StreamOrder | None = None,
        reads: object = None,
    ) -> None:
        if device.type == "cuda":
            self.order = order or StreamOrder(device, workspace)
        self._reads = reads
        self.contexts: list[Context | None] = [
            None if executable is None else executable.new_context(workspace) for executable in executables
        ]

    def wait(self) -> None:
        """Wait on the host until its work is done."""
        if self.order is not None:
            self.order.wait()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            self.wait()


class LaneMaker:
    """Makes lanes over the engines of a program.

    It knows the engines and not the program, which has it: nothing here lives longer than who uses it.

    Args:
        executables: the engine of each step, None for a plugin; looked at each time, as they may be replaced in place.
        device: where they run.
        share_workspace: the engines of a lane share one scratch memory.
        reads: what calls read besides; it is kept as long as the lanes.
    """

    def __init__(
        self,
        executables: Sequence[Executable | None],
        device: torch.device,
        share_workspace: bool,
        reads: object = None,
    ) -> None:
        self._executables = executables
        self._device = device
        self._share_workspace = share_workspace
        self._reads = reads

    def __call__(self) -> Lane:
        """A lane with scratch memory of its own."""
        return self.over(self.workspace())

    def over(self, workspace: torch.Tensor | None, order: StreamOrder | None = None) -> Lane:
        """A lane over scratch memory that `workspace` made, whose work is put in order by that of others."""
        return Lane(self._executables, self._device, workspace, order, self._reads)

    def workspace(self) -> torch.Tensor | None:
        """Scratch memory for lanes that run one after the other; None where each context has its own."""
        if not self._share_workspace or not self.workspace_bytes:
            return None
        return torch.empty(self.workspace_bytes, dtype=torch.uint8, device=self._device)

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory that one lane needs on the device, in bytes."""
        sizes = [executable.workspace_bytes for executable in self._executables if executable is not None]
        return max(sizes, default=0) if self._share_workspace else sum(sizes)


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
        self._closed = False  # somebody waits for all of them
        self._changed = threading.Condition()

    @property
    def made(self) -> int:
        """How many lanes there are."""
        return self._made

    def take(self) -> Lane:
        """A lane for one call; the one used last where several are idle, as its shapes are the most likely to fit."""
        with self._changed:
            while self._closed or (not self._idle and self._made >= self._most):
                self._changed.wait()
            if self._idle:
                return self._idle.pop()
            self._made += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
            raise

    def give(self, lane: Lane) -> None:
        """Put a lane back."""
        with self._changed:
            self._idle.append(lane)
            self._changed.notify_all()

    def keep_idle(self) -> Lane | None:
        """An idle lane that leaves the pool for good, None where there is none; nothing is made."""
        with self._changed:
            if not self._idle:
                return None
            self._made -= 1
            self._changed.notify_all()
            return self._idle.pop()

    @contextmanager
    def all_idle(self, keep: bool = False) -> Iterator[list[Lane]]:
        """Wait until no call is under way, keep new ones from beginning, and unless told to keep forget all lanes.

        Yields:
            The lanes.
        """
        with self._changed:
            while self._closed:
                self._changed.wait()
            self._closed = True
            while len(self._idle) < self._made:
                self._changed.wait()
        try:
            yield list(self._idle)
        finally:
            with self._changed:
                if not keep:
                    self._idle.clear()
                    self._made = 0
                self._closed = False
                self._changed.notify_all()
