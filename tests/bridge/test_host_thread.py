"""Calls that come at once are made by one thread: one at a time, never for good, as if the caller had made them."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trtbridge as tb
from trtbridge.bridge import host_thread
from trtbridge.bridge.cache import JitCacheFile
from trtbridge.bridge.host_thread import HostCalls, HostThread, about_to_launch


@contextmanager
def _busy(one: HostThread) -> Iterator[None]:
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


def _until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(1e-3)


def _handed(one: HostThread, work: Callable[[], Any]) -> Any:
    """What comes of it in the thread of its own, asked for by one that has set what this one has."""
    before = one.handed_over
    release = threading.Event()

    def first() -> None:
        _until(lambda: one._queue)
        release.wait(30)

    thread = threading.Thread(target=one.call, args=(first,))
    thread.start()
    _until(lambda: one._busy)
    release.set()
    try:
        return one.call(work)
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
    with _busy(one):
        for number, thread in enumerate(crowd):
            monkeypatch.setattr(host_thread, "PATIENCE_S", 0.01 if number == 2 else 30.0)
            thread.start()
            if number == 2:
                thread.join(10)
            else:
                _until(lambda number=number: len(one._queue) == number + (number < 2))  # type: ignore[misc]
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
        with _busy(one):
            threading.Timer(0.1, interrupts).start()
            with pytest.raises(KeyboardInterrupt):
                one.call(lambda: made.append(1))
        _until(lambda: not one._busy)
        assert not made, "nobody asks for it any more"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert one.call(lambda: 4) == 4


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


def test_nothing_of_a_call_is_kept_behind_it() -> None:
    """Memory of a device would be."""
    one = HostThread()

    def work(given: _Made) -> _Made:
        assert given
        return _Made()

    gc.disable()  # nothing leads in a circle
    try:
        given = _Made()
        result = _handed(one, lambda: work(given))  # noqa: F821
        seen = weakref.ref(given), weakref.ref(result)
        del given, result
        assert [each() for each in seen] == [None, None]
    finally:
        gc.enable()


class _Made:
    """Anything that can be referred to weakly."""


class _Two:
    """A call that is over, and one behind it that goes on until `end`, in the thread of its own."""

    def __init__(self, one: HostThread, second: Callable[[Callable[[], None]], object]) -> None:
        """second: the work of the second call; what it is given waits for `end`."""
        began, self.end = threading.Event(), threading.Event()

        def wait() -> None:
            began.set()
            self.end.wait(30)

        held = _Made()
        self.held = weakref.ref(held)
        """What the first call holds."""
        self.first = threading.Thread(target=one.call, args=(partial(id, held),))
        del held
        self.second = threading.Thread(target=one.call, args=(lambda: second(wait),))
        with _busy(one):
            for number, thread in enumerate((self.first, self.second), 1):
                thread.start()
                _until(lambda number=number: len(one._queue) == number)  # type: ignore[misc]
        assert began.wait(10)

    def finish(self) -> None:
        self.end.set()
        self.first.join(10)
        self.second.join(10)
        assert not self.first.is_alive()
        assert not self.second.is_alive()


def _launches(wait: Callable[[], None]) -> None:
    about_to_launch()
    wait()


def test_a_result_is_told_where_the_next_call_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: who is woken takes Python's lock. Nor later than he is patient, and at once if no call is next."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    one = HostThread()
    two = _Two(one, _launches)
    two.first.join(10)
    assert not two.first.is_alive()
    two.finish()

    two = _Two(one, lambda wait: wait())
    two.first.join(0.1)
    assert two.first.is_alive()
    two.finish()

    monkeypatch.setattr(host_thread, "PATIENCE_S", 1.0)
    two = _Two(one, lambda wait: wait())
    two.first.join(10)
    assert not two.first.is_alive()
    assert two.held() is None
    two.finish()


def test_whoever_launches_in_another_thread_tells_nobody() -> None:
    one = HostThread()
    two = _Two(one, lambda wait: wait())
    try:
        about_to_launch()
        two.first.join(0.1)
        assert two.first.is_alive()
    finally:
        two.finish()


def test_a_plugin_keeps_no_other_result_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for whoever made the call before."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    waits: list[Callable[[], None]] = []

    @tb.plugin("trtbridge_tests_host::waits", fake=torch.empty_like)
    def waits_op(x: torch.Tensor) -> torch.Tensor:
        for wait in waits:
            wait()
        return x + 1

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_tests_host.waits(x)

    module = tb.convert(Net(), (torch.zeros(2),), backend="onnxruntime", device="cpu", check_export=False)

    def second(wait: Callable[[], None]) -> None:
        waits.append(wait)
        module(torch.zeros(2))

    two = _Two(HostThread(), second)
    two.first.join(10)
    assert not two.first.is_alive()
    two.finish()


def test_a_call_that_waits_for_a_compiler_keeps_no_other_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    kernels = JitCacheFile(tmp_path, b"an engine", "1")

    def second(wait: Callable[[], None]) -> None:
        with kernels.watch((1,), lambda: b""):
            wait()

    two = _Two(HostThread(), second)
    two.first.join(10)
    assert not two.first.is_alive()
    two.finish()


SHAPES = (1, 3)


def _passes(calls: HostCalls, shapes: object = SHAPES) -> bool:
    """Whether another thread's call is made beside the one that is under way, or soon enough."""
    done = threading.Event()
    thread = threading.Thread(target=calls, args=(shapes, done.set), daemon=True)
    thread.start()
    return done.wait(0.2)


def test_programs_of_a_device_share_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    one, other, elsewhere = HostCalls(101), HostCalls(101), HostCalls(102)
    for calls in (one, other, elsewhere):
        calls(SHAPES, lambda: None)
    assert not one(SHAPES, lambda: _passes(other))
    assert one(SHAPES, lambda: _passes(elsewhere))


def test_a_first_call_with_some_shapes_waits_for_nobody_and_nobody_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles kernels, for seconds."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    calls = HostCalls(103)
    calls(SHAPES, lambda: None)
    assert calls((7, 7), lambda: _passes(calls))
    assert not calls((7, 7), lambda: _passes(calls))
    assert calls(SHAPES, lambda: _passes(calls, shapes=(8, 8)))
    with pytest.raises(ZeroDivisionError):
        calls((9, 9), lambda: 1 // 0)
    assert not calls((9, 9), lambda: _passes(calls)), "a call that failed was no first call"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [_Mode, lambda: torch.device("meta"), lambda: torch.autocast("cpu"), tb.annotate, torch.profiler.profile],
    ids=["dispatch", "function", "autocast", "annotate", "profiler"],
)
def test_a_call_in_a_mode_stays_in_its_thread(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not carried over to another one, or sees one thread alone."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    calls = HostCalls(104)
    calls(SHAPES, lambda: None)
    with _busy(calls.thread), mode():
        assert calls(SHAPES, threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("inference", [False, True])
def test_calls_of_a_module_are_handed_over(inference: bool) -> None:
    """On a CPU they are not by themselves; here, too, the results are the caller's."""
    module = tb.convert(torch.nn.Linear(4, 4), (torch.randn(2, 4),), backend="onnxruntime", device="cpu")
    given = torch.randn(2, 4)
    with torch.inference_mode(inference):
        expected = module(given)
        assert module._running is not None
        host = module._running._host = HostCalls(105)

        def ask(_: int) -> bool:
            with torch.inference_mode(inference):
                result = module(given)
                return torch.equal(result, expected) and result.is_inference() == expected.is_inference()

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(ask, range(200)))
    assert host.thread.handed_over
    assert module.stats().contexts <= 4
