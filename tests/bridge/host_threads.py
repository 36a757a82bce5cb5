"""A HostThread that somebody is at, for test_host_thread.py and test_host_calls.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from trtbridge.bridge.host_thread import HostThread


class Made:
    """Anything that can be referred to weakly."""


@contextmanager
def busy(one: HostThread) -> Iterator[None]:
    """Somebody else is at it."""
    began, end = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        end.wait(30)

    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(one.call, work)
        began.wait(10)
        try:
            yield
        finally:
            end.set()
            waited.result(10)


def until(condition: Callable[[], object]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)
