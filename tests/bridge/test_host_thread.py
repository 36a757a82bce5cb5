"""One thread makes calls that come at once: one at a time, never for good, as if whoever asked had made them."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from host_threads import Made, busy, until

from trtbridge.bridge import host_thread
from trtbridge.bridge.host_thread import HostThread


def _handed(one: HostThread, work: Callable[[], Any], stream: Any = None) -> Any:
    """What comes of it in the thread of its own, asked for by one that has set what this one has."""
    before = one.handed_over
    release = threading.Event()

    def first() -> None:
        until(lambda: one._queue)
        release.wait(30)

    thread = threading.Thread(target=one.call, args=(first,))
    thread.start()
    until(lambda: one._busy)
    release.set()
    try:
        return one.call(work, stream)
    finally:
        thread.join(10)
        assert one.handed_over == before + 1


def test_it_does_what_is_asked_for_at_once_one_after_the_other() -> None:
    """And whoever asks gets what came of it."""
    one = HostThread()
    busy: list[int] = []

    def work(number: int) -> int:
        busy.append(number)
        assert busy == [number]
        time.sleep(1e-4)
        busy.remove(number)
        if number % 10 == 3:
            raise ValueError(str(number))
        return number

    def ask(thread: int) -> None:
        for number in range(thread, 400, 8):
            if number % 10 == 3:
                with pytest.raises(ValueError, match=f"^{number}$"):
                    one.call(lambda number=number: work(number))  # type: ignore[misc]
            else:
                assert one.call(lambda number=number: work(number)) == number  # type: ignore[misc]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert one.handed_over > 200, "nearly all ask while another one is at it"


def test_whoever_is_alone_does_it_himself() -> None:
    one = HostThread()
    for _ in range(3):
        assert one.call(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        one.call(lambda: 1 // 0)
    assert one.call(threading.get_ident) == threading.get_ident(), "a failure keeps nobody out"
    other = _handed(one, threading.get_ident)
    assert other != threading.get_ident()
    assert _handed(one, threading.get_ident) == other
    assert one.call(threading.get_ident) == threading.get_ident(), "nobody is at it any more"


def test_calls_come_in_the_order_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who go on by themselves are passed over."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    one = HostThread()
    order: list[int] = []
    crowd = [threading.Thread(target=one.call, args=(lambda n=n: order.append(n),)) for n in range(6)]
    with busy(one):
        for number, thread in enumerate(crowd):
            monkeypatch.setattr(host_thread, "PATIENCE_S", 0.01 if number == 2 else 30.0)
            thread.start()
            if number == 2:
                thread.join(10)
            else:
                until(lambda number=number: len(one._queue) == number + (number < 2))  # type: ignore[misc]
    for thread in crowd:
        thread.join(10)
    assert order == [2, 0, 1, 3, 4, 5]
    assert one.handed_over == 5


def test_a_call_within_a_call_and_one_that_waits_for_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_thread, "PATIENCE_S", 0.05)
    one = HostThread()

    def waits() -> int:
        """For a call of another thread, as a plugin may."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(one.call, lambda: 1).result(10) + one.call(lambda: 1)

    def fails() -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
            pool.submit(one.call, lambda: 1 // 0).result(10)

    assert one.call(waits) == 2
    one.call(fails)
    assert not one.handed_over, "who has waited for long does it himself"

    def patient() -> int:
        monkeypatch.setattr(host_thread, "PATIENCE_S", 0.05)
        return waits()

    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    assert _handed(one, patient) == 2
    assert one.call(lambda: 3) == 3
    assert one.handed_over == 1, "nobody is at it"


def test_what_is_under_way_is_over_when_who_asked_is_interrupted() -> None:
    one = HostThread()
    over = threading.Event()

    def interrupts() -> None:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    def slow() -> None:
        interrupts()
        time.sleep(0.2)
        over.set()

    # As Ctrl-C does, which a process in the background ignores.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _handed(one, slow)
        assert over.is_set()
        made: list[int] = []
        with busy(one):
            threading.Timer(0.1, interrupts).start()
            with pytest.raises(KeyboardInterrupt):
                one.call(lambda: made.append(1))
        until(lambda: not one._busy)
        assert not made, "nobody asks for it any more"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert one.call(lambda: 4) == 4


class _Interrupted:
    """A lock whose next holder is interrupted when it has let go."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.still_to_come = True

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        if self.still_to_come:
            self.still_to_come = False
            raise KeyboardInterrupt


def test_an_interrupt_before_anything_is_done_keeps_nobody_out() -> None:
    one = HostThread()
    made: list[int] = []
    one._guard = _Interrupted(one._guard)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        one.call(lambda: made.append(1))
    assert not made
    assert not one._busy
    assert one.call(threading.get_ident) == threading.get_ident()


def test_an_interrupt_while_asking_takes_the_request_back() -> None:
    """What it works on is the caller's, who takes it away."""
    one = HostThread()
    made: list[int] = []

    class Interrupted(deque[Any]):
        def append(self, request: Any) -> None:
            super().append(request)
            raise KeyboardInterrupt

    with busy(one):
        one._queue = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            one.call(lambda: made.append(1))
        assert not one._queue
        one._queue = deque()
    assert not made
    assert one.call(threading.get_ident) == threading.get_ident()


def test_what_the_caller_has_set_goes_along() -> None:
    one = HostThread()
    variable: ContextVar[int] = ContextVar("variable", default=0)
    variable.set(7)
    assert _handed(one, variable.get) == 7
    with torch.inference_mode():
        assert _handed(one, lambda: torch.zeros(1)).is_inference()
    assert not _handed(one, lambda: torch.zeros(1)).is_inference()
    _handed(one, lambda: variable.set(8))
    assert variable.get() == 7


def test_its_thread_has_the_stream_of_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(current, "stream", stream))
    one, streams = HostThread(), [object(), object()]
    current.stream = "mine"
    for stream in (*streams, streams[0]):
        assert _handed(one, lambda: current.stream, stream) is stream
    assert current.stream == "mine"
    assert one.call(lambda: current.stream, streams[1]) == "mine", "whoever makes the call himself has it already"


def test_nothing_of_a_call_is_kept_behind_it() -> None:
    """Memory of a device would be."""
    one = HostThread()

    def work(given: Made) -> Made:
        assert given
        return Made()

    gc.disable()  # nothing leads in a circle
    try:
        given = Made()
        result = _handed(one, lambda: work(given))  # noqa: F821
        seen = weakref.ref(given), weakref.ref(result)
        del given, result
        assert [each() for each in seen] == [None, None]
    finally:
        gc.enable()
