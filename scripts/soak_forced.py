"""Ways of the package that a soak takes by force, to find out what a failure hangs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest import mock

from soak_actions import Soak

from trtbridge.bridge.host_thread import HostCalls
from trtbridge.bridge.runtime import RunningProgram
from trtbridge.plugins.capture_gate import CaptureGate


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
def without_gate() -> Iterator[None]:
    """Captures and enqueues of several threads at once, which the package keeps apart (plugins/capture_gate.py)."""

    @contextmanager
    def capture(self: CaptureGate) -> Iterator[bool]:
        yield False

    def nothing(self: CaptureGate) -> None: ...

    with mock.patch.multiple(CaptureGate, capture=capture, enter=nothing, leave=nothing):
        yield
