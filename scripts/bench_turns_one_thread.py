"""A way to share a host that scripts/bench_turns.py tries: one thread does for all what they ask for at once.

Changing to a thread on another core costs its first calls half of their speed (docs/records/turns.txt). A thread that
does nothing else keeps its core and what is in the caches of it, and those who ask prepare their next call meanwhile.
It is no part of the package before a GPU has shown what it brings.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch

from trtbridge.bridge import turns
from trtbridge.bridge.backends import trt_run
from trtbridge.bridge.runtime import RunningProgram

Work = Callable[[], Any]


@contextmanager
def _no_turn(self: turns.HostTurns, shapes: object) -> Iterator[None]:
    yield


def no_turns() -> AbstractContextManager[Any]:
    """Plain calls wait for no others."""
    return mock.patch.object(turns.HostTurns, "turn", _no_turn)


class _Request:
    """Something to do, and what came of it."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.done = threading.Lock()
        self.done.acquire()
        self.is_over = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self.work()
        except BaseException as error:
            self._error = error
        self.is_over = True
        self.done.release()

    def result(self) -> Any:
        """Of a request that is done."""
        if self._error is None:
            return self._result
        try:
            raise self._error
        finally:
            self._error = None  # it has this frame in its traceback


class OneThread:
    """Does one thing at a time: in the thread that asks where nobody else does, else in a thread of its own.

    Attributes:
        handed_over: how many things its own thread has done.
    """

    def __init__(self) -> None:
        self.handed_over = 0
        self._guard = threading.Lock()
        self._busy = False
        self._runner = 0  # thread that is at it
        self._queue: deque[_Request] = deque()
        self._begin = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def call(self, work: Work) -> Any:
        """What `work` returns, or raises.

        It may call again, and wait for another thread that does: whoever has waited for `turns.PATIENCE_S` does it
        himself, beside what is under way.
        """
        me = threading.get_ident()
        if self._runner == me:
            return work()
        with self._guard:
            alone = not self._busy
            if alone:
                self._busy, self._runner = True, me
            else:
                request = _Request(work)
                self._queue.append(request)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name="trtbridge", daemon=True)
                    self._thread.start()
        if not alone:
            return self._result(request)
        try:
            return work()
        finally:
            with self._guard:
                self._runner = 0
                self._busy = bool(self._queue)
                if self._busy:
                    self._begin.release()

    def _result(self, request: _Request) -> Any:
        if not self._wait(request, turns.PATIENCE_S):
            if self._withdraw(request):
                return request.work()
            self._wait(request, -1)
        return request.result()

    def _wait(self, request: _Request, timeout_s: float) -> bool:
        """Whether it is done by then; -1: whenever that is."""
        try:
            return request.done.acquire(timeout=timeout_s)
        except BaseException:  # Ctrl-C: what is under way must not outlive those who asked for it
            if not self._withdraw(request):
                while not request.is_over:
                    request.done.acquire(timeout=0.1)
            raise

    def _withdraw(self, request: _Request) -> bool:
        """Whether nobody is at it yet; then nobody will be."""
        with self._guard:
            if request in self._queue:
                self._queue.remove(request)
                return True
        return False

    def _serve(self) -> None:
        me = threading.get_ident()
        while True:
            self._begin.acquire()
            while True:
                with self._guard:
                    self._runner = me if self._queue else 0
                    self._busy = bool(self._queue)
                    if not self._queue:
                        break
                    request = self._queue.popleft()
                self.handed_over += 1
                request.run()
                del request  # and what it holds


@contextmanager
def whole_calls(one: OneThread) -> Iterator[None]:
    """Whole plain calls, plugins and all, are handed over, with the stream and the mode of who asks.

    Not the check of arguments: with it a program with plugins on a CPU was no faster.
    """
    original = RunningProgram._run_in_lane

    def handed(self: RunningProgram, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        inference = torch.is_inference_mode_enabled()

        def work() -> list[torch.Tensor]:
            with torch.inference_mode(inference), torch.cuda.stream(stream):
                return original(self, inputs)

        return one.call(work)

    with no_turns(), mock.patch.object(RunningProgram, "_run_in_lane", handed):
        yield


@contextmanager
def enqueues(one: OneThread) -> Iterator[None]:
    """What TensorRT does with an engine's kernels is handed over, and nothing else."""
    run = trt_run._Context._run
    active = [True]

    def handed(self: Any, *args: Any) -> Any:
        if not isinstance(self._context, _Handing):
            self._context = _Handing(self._context, one, active, self._device)
        return run(self, *args)

    with no_turns(), mock.patch.object(trt_run._Context, "_run", handed):
        try:
            yield
        finally:
            active[0] = False  # contexts that were wrapped stay so


class _Handing:
    """An execution context whose enqueues go elsewhere."""

    def __init__(self, context: Any, one: OneThread, active: Sequence[bool], device: torch.device) -> None:
        self._context, self._one, self._active, self._device = context, one, active, device
        for name in ("set_tensor_address", "set_input_shape", "infer_shapes", "get_tensor_shape"):
            setattr(self, name, getattr(context, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def execute_async_v3(self, stream: int) -> bool:
        if not self._active[0]:
            return bool(self._context.execute_async_v3(stream))
        return bool(self._one.call(lambda: self._enqueue(stream)))

    def _enqueue(self, stream: int) -> bool:
        torch.cuda.set_device(self._device)
        return bool(self._context.execute_async_v3(stream))
