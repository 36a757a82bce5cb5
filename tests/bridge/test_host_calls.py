"""Plain calls of modules that come at once: whose results are told when, and which calls are handed over at all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from host_threads import Made, busy, until
from torch.utils._python_dispatch import TorchDispatchMode

import trtbridge as tb
from trtbridge.bridge import host_thread
from trtbridge.bridge.cache import JitCacheFile
from trtbridge.bridge.host_thread import HostCalls, HostThread, about_to_launch


class _Two:
    """A call that is over, and one behind it that goes on until `end`, in the thread of its own."""

    def __init__(self, one: HostThread, second: Callable[[Callable[[], None]], object]) -> None:
        """second: the work of the second call; what it is given waits for `end`."""
        began, self.end = threading.Event(), threading.Event()

        def wait() -> None:
            began.set()
            self.end.wait(30)

        held = Made()
        self.held = weakref.ref(held)
        """What the first call holds."""
        self.first = threading.Thread(target=one.call, args=(partial(id, held),))
        del held
        self.second = threading.Thread(target=one.call, args=(lambda: second(wait),))
        with busy(one):
            for number, thread in enumerate((self.first, self.second), 1):
                thread.start()
                until(lambda number=number: len(one._queue) == number)  # type: ignore[misc]
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
    [
        _Mode,
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu"),
        tb.annotate,
        torch.profiler.profile,
        tb.exclusive_capture,
    ],
    ids=["dispatch", "function", "autocast", "annotate", "profiler", "capture"],
)
def test_a_call_in_a_mode_stays_in_its_thread(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not carried over to another one, or sees one thread alone, or keeps the other one waiting."""
    monkeypatch.setattr(host_thread, "PATIENCE_S", 30.0)
    calls = HostCalls(104)
    calls(SHAPES, lambda: None)
    with busy(calls.thread), mode():
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
