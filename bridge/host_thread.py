"""Plain calls that come at once from several threads are made by one thread, one after the other.

A plain call is hundreds of launches, each of which takes the driver's lock of the device and lets go of Python's, and
threads that do that at once get in each other's way. If they take turns, each turn begins on another core, where the
first calls take half as long again, and turns that last keep the others waiting. One thread keeps its core and what is
in the caches of it, and those who wait for it prepare their next call meanwhile (docs/runtime.md has what was
measured). Who finds nobody at it makes the call himself. On the device the work of several streams overlaps all the
same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

import torch

from ..plugins.capture_gate import GATE
from .annotation import current_mark

PATIENCE_S = 1.0
"""Whoever has waited for so long makes the call himself, beside what is under way, which may be waiting for it."""

_MOST_SHAPES = 4096

T = TypeVar("T")


class _Request(Generic[T]):
    """Something to do with what the asking thread has set, and what came of it."""

    def __init__(self, work: Callable[[], T], stream: torch.cuda.Stream | None) -> None:
        self._work: Callable[[], T] | None = work  # None when it was done
        self._stream = stream
        self._context: Context = copy_context()
        self._inference = torch.is_inference_mode_enabled()
        self._result: T | None = None
        self._error: BaseException | None = None
        self.is_settled = False  # nobody is at it, nor will be
        self.told = threading.Lock()  # released by `tell`
        self.told.acquire()

    def run(self) -> None:
        """Do it in this thread, whose current stream of torch stays that of the work; once."""
        try:
            if self._stream is not None:
                torch.cuda.set_stream(self._stream)
            with torch.inference_mode() if self._inference else nullcontext():
                self._result = self._context.run(self._do)
        except BaseException as error:  # whatever it is, it is for whoever asked
            self._error = error
        self._work = None  # what it holds goes with the thread that asked
        self.is_settled = True

    def tell(self) -> None:
        """Wake whoever asked for it; once."""
        self.told.release()

    def _do(self) -> T:
        assert self._work is not None
        return self._work()

    def result(self) -> T:
        """Of a request that is done; once."""
        result, error = self._result, self._error
        self._result = self._error = None  # whoever did it may let go of this object later than the one who asked
        if error is None:
            return cast("T", result)
        try:
            raise error
        finally:
            del error  # it has this frame in its traceback


class HostThread:
    """Does one thing at a time: in the thread that asks where nobody else is at it, else in a thread of its own.

    Args:
        name: of that thread, which is made when it is first needed, and does not keep the process from ending.

    Attributes:
        handed_over: how many things its own thread has done.
    """

    def __init__(self, name: str = "trtbridge") -> None:
        self.handed_over = 0
        self._name = name
        self._guard = threading.Lock()  # around what follows, for moments
        self._busy = False
        self._runner = 0  # thread that is at it
        self._queue: deque[_Request[object]] = deque()
        self._begin: SimpleQueue[None] = SimpleQueue()  # something in it: the thread's time has come
        self._thread: threading.Thread | None = None
        self._last: _Request[object] | None = None  # is over, and whoever asked was not told

    def call(self, work: Callable[[], T], stream: torch.cuda.Stream | None = None) -> T:
        """What `work` returns or raises.

        It may call again, and wait for another thread that does. Whoever is interrupted while waiting, as by Ctrl-C,
        goes when nobody is at his work any more.

        Args:
            work: is done with the asking thread's context variables and inference mode, and without gradients or modes
                of torch that it does not set itself, once or not at all.
            stream: current one for it; None where there is no CUDA.
        """
        me = threading.get_ident()
        if self._runner == me:
            return work()
        request: _Request[T] | None = None
        try:
            with self._guard:
                if self._busy:
                    request = _Request(work, stream)
                    self._queue.append(cast("_Request[object]", request))
                    self._start()
                else:
                    self._busy, self._runner = True, me
            if request is None:
                return work()
            while not request.is_settled:
                if not request.told.acquire(timeout=PATIENCE_S) and self._withdraw(request):
                    return work()
            return request.result()
        finally:  # an interrupt, as by Ctrl-C, may come anywhere above
            if self._runner == me:
                with self._guard:
                    self._runner = 0
                    if self._queue:
                        self._begin.put(None)
                    else:
                        self._busy = False
            elif request is not None:
                while not (request.is_settled or self._withdraw(request)):
                    request.told.acquire(timeout=0.1)  # what the caller may take away is in use

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()

    def _withdraw(self, request: _Request[T]) -> bool:
        """Whether nobody is at it yet; then nobody will be."""
        with self._guard:
            try:
                self._queue.remove(cast("_Request[object]", request))
            except ValueError:
                return False
            request.is_settled = True
            return True

    def _serve(self) -> None:
        _serving.thread = self
        me = threading.get_ident()
        while True:
            self._begin.get()
            while True:
                with self._guard:
                    request = self._queue.popleft() if self._queue else None
                    self._busy = request is not None
                    self._runner = me if self._busy else 0
                if request is None:
                    self.tell_last()
                    break
                self.handed_over += 1
                request.run()
                self.tell_last()
                self._last, request = request, None

    def tell_last(self) -> None:
        """Wake whoever asked for what was done last, if nobody has; in the thread of its own."""
        last, self._last = self._last, None
        if last is not None:
            last.tell()


_serving = threading.local()  # thread: the HostThread whose own thread this is


def about_to_launch() -> None:
    """To be called ahead of what lets go of Python's lock for long, as launching an engine's kernels, or may wait.

    Whoever waits for the call before is woken only now. Woken at its end, he would take Python's lock whenever this one
    lets go of it for a moment on its way here, and keep it waiting each time; now he has the time of the launches.
    """
    thread: HostThread | None = getattr(_serving, "thread", None)
    if thread is not None:
        thread.tell_last()


_threads: dict[int, HostThread] = {}


class HostCalls:
    """Plain calls of one program.

    Args:
        device: index of the CUDA device, whose programs share one thread.
    """

    def __init__(self, device: int) -> None:
        # One step, whatever threads load programs.
        self.thread = _threads.setdefault(device, HostThread(f"trtbridge cuda:{device}"))
        self._known: set[Hashable] = set()

    def __call__(self, shapes: Hashable, work: Callable[[], T], stream: torch.cuda.Stream | None = None) -> T:
        """Make a call, at once or when it is its turn.

        Args:
            shapes: of the inputs. A first call with them compiles kernels, which takes seconds: nobody waits for it.
            work: the call; `HostThread.call` says what it may do.
            stream: torch's current one.
        """
        if shapes in self._known:
            return self.thread.call(work, stream) if _can_change_threads() else work()
        try:
            return work()
        finally:
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            self._known.add(shapes)


def _can_change_threads() -> bool:
    """Whether a plugin finds in another thread what it would find in this one: modes are not carried over, and ranges
    and profilers see one thread. Where this one captures, all others wait for it."""
    return not (
        GATE.is_mine()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
        or current_mark() is not None
    )
