"""Ways of the package that a soak takes by force, to find out what a failure hangs on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest import mock

from soak_actions import Soak

from trtbridge.bridge.backends.trt_run import TensorRtExecutable, _Context
from trtbridge.bridge.graph_capture import Capturer
from trtbridge.bridge.host_thread import HostCalls
from trtbridge.bridge.runtime import RunningProgram


@contextmanager
def loads(options: Mapping[str, Any]) -> Iterator[None]:
    """All modules are made and loaded with these options, in place of what is theirs by chance."""
    by_chance, convert = Soak.runtime_options, Soak.convert

    def forced(self: Soak, pick: Random) -> dict[str, Any]:
        return {**by_chance(self, pick), **options}

    def convert_so(self: Soak, **others: Any) -> Any:
        return convert(self, **options, **others)

    with mock.patch.object(Soak, "runtime_options", forced), mock.patch.object(Soak, "convert", convert_so):
        yield


@contextmanager
def handing_over(when: str) -> Iterator[None]:
    """Calls that come at once are made by one thread: "auto" where that is so by itself, "never", or "always", on a
    CPU, too."""
    load = RunningProgram.__init__

    def load_and_share(self: RunningProgram, *args: Any, **options: Any) -> None:
        load(self, *args, **options)
        self._host = self._host or HostCalls(0)

    def call(self: HostCalls, shapes: object, work: Callable[[], Any], stream: object = None) -> Any:
        return work()

    with ExitStack() as stack:
        if when == "never":
            stack.enter_context(mock.patch.object(HostCalls, "__call__", call))
        if when == "always":
            stack.enter_context(mock.patch.object(RunningProgram, "__init__", load_and_share))
        yield


@contextmanager
def captures_alone() -> Iterator[None]:
    """While a CUDA graph is captured, changed and instantiated, no other thread calls TensorRT or makes contexts."""
    gate = _Gate()

    def within(function: Callable[..., Any], mode: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with mode():
                return function(*args, **options)

        return call

    with ExitStack() as stack:
        for owner, name, mode in (
            (Capturer, "_captured", gate.alone),
            (_Context, "_run", gate.together),
            (TensorRtExecutable, "new_context", gate.together),
        ):
            stack.enter_context(mock.patch.object(owner, name, within(getattr(owner, name), mode)))
        yield


class _Gate:
    """Many threads at once or one alone, which may also go through as one of many."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._owner = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._owner == threading.get_ident():
            yield
            return
        with self._changed:
            while self._owner:
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            while self._owner or self._inside:
                self._changed.wait()
            self._owner = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._owner = 0
                self._changed.notify_all()
