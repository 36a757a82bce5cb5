"""Captures of CUDA graphs: they may fail, and other threads work meanwhile."""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .capture_gate import GATE
from .streams import own_stream

_one_at_a_time = threading.RLock()
_under_way = threading.Event()  # a capture, in the thread that has the lock
_gone: deque[OwnGraph] = deque()


class OwnGraph(torch.cuda.CUDAGraph):
    """A CUDA graph that goes while none is captured, whatever thread lets go of it.

    torch's generator has a set of all graphs, which each enters when its capture begins and leaves when it goes, and no
    lock for it: two threads that do so at once end the process ("The graph should be registered to the state").

    Attributes:
        event: that its replays record, if any.
    """

    event: object = None

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing():
            _gone.append(self)  # so it is there again, and goes with the next line or when a capture is over
            _let_go()


def _let_go() -> None:
    """Let go of graphs that nobody has, or leave that to the thread that captures; never waits."""
    while _gone and _one_at_a_time.acquire(blocking=False):
        try:
            if _under_way.is_set():  # in this very thread
                return
            _gone.clear()
        finally:
            _one_at_a_time.release()


def wait_for_device(device: torch.device | int | None = None) -> None:
    """torch.cuda.synchronize, when no capture of ours is under way in any thread: it would fail, and spoil that."""
    try:
        with _one_at_a_time:
            torch.cuda.synchronize(device)
    finally:
        _let_go()


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Capture what is given to the device meanwhile; where that fails, torch is right afterwards.

    `torch.cuda.graph` leaves three things behind a capture that fails: the current stream is that of the capture; the
    allocator takes it for one that goes on, and then never gives back memory that another stream has used; and the
    generator takes each draw for a part of it ("Offset increment outside graph capture").

    Args:
        graph: to capture into; an `OwnGraph` where several threads may have graphs.
        device: CUDA device, the current one.
        pool: of `torch.cuda.graph_pool_handle`, for the graph's memory; None for one of its own. After a failure it
            is not to be used again.
        stream: to capture on, which nobody else may work on (`own_stream`); None for a new one.

    Raises:
        Exception: what was raised inside, or a RuntimeError if something in there cannot be captured. The device has
            been waited for.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    own = own_stream(device) if stream is None else None  # kept for as long
    stream = own.stream if own is not None else stream
    with _alone(), torch.cuda.stream(stream):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may allocate
            yield
            graph.capture_end()
        except BaseException:
            with suppress(RuntimeError):  # it says once more that the capture has failed
                graph.capture_end()
            _forget(device, pool)
            raise


@contextmanager
def exclusive_capture() -> Iterator[None]:
    """Around a capture of your own while other threads use modules of this package, which wait meanwhile::

        graph = torch.cuda.CUDAGraph()
        with tb.exclusive_capture():
            module(x)  # with these shapes, so that there is an idle execution context
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                y = module(x)

    Other threads give no engine to a device, capture nothing, and let go of no CUDA graph of a module; Python's garbage
    collector does not run by itself. Whoever waits for longer than a second goes ahead (plugins/capture_gate.py says
    why), as does this thread when a call of another one takes longer than ten. It raises nothing of its own, and
    without CUDA there is nothing to wait for.
    """
    with GATE.capture(), _alone():
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """No other thread captures, and no graph goes."""
    try:
        with _one_at_a_time, _no_garbage_collection():
            inside_another = _under_way.is_set()
            _under_way.set()
            try:
                yield
            finally:
                if not inside_another:
                    _under_way.clear()
    finally:
        _let_go()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """An engine that was part of a cycle would be let go by the thread that captures, where no memory can be freed."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _forget(device: torch.device, pool: Any) -> None:
    """Let allocator and generator know that a capture is over."""
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # it knows
        torch._C._cuda_endAllocateToPool(index, pool)
    # The generator learns it from the end of another capture, of one small tensor.
    own = own_stream(device)
    with suppress(RuntimeError), torch.cuda.stream(own.stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device=device)
        graph.capture_end()
