"""What is left behind a capture of a CUDA graph that fails, with a torch.cuda that notes what it is asked for."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.plugins import capture_gate, captures
from trtbridge.plugins.capture_gate import GATE
from trtbridge.plugins.captures import OwnGraph, capturing, wait_for_device

DEVICE = torch.device("cuda", 0)


class Cuda:
    """One device: its current stream, the pools that the allocator takes for open, and captures."""

    def __init__(self) -> None:
        self.stream = "default"
        self.open: set[Any] = set()
        self.captures: list[tuple[str, Any]] = []
        self.invalid = False  # something that cannot be captured was given to the device

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def forget(self, index: int, pool: Any) -> None:
        if pool not in self.open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.open.remove(pool)


class Graph:
    cuda: Cuda

    def capture_begin(self, pool: Any = (0, 9), capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        self.pool = pool
        self.cuda.open.add(pool)
        self.cuda.captures.append((self.cuda.stream, pool))

    def capture_end(self) -> None:
        invalid, self.cuda.invalid = self.cuda.invalid, False
        if invalid:  # as torch: the allocator is not told
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.forget(0, self.pool)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    monkeypatch.setattr(Graph, "cuda", found, raising=False)
    for name, value in {
        "CUDAGraph": Graph,
        "stream": found.on,
        "synchronize": lambda device: None,
        "graph_pool_handle": lambda: (0, 1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captures, "own_stream", lambda device: SimpleNamespace(stream="new"))
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: None)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.forget)
    return found


def capture(graph: Any, **options: Any) -> Any:
    return capturing(graph, DEVICE, **options)


def test_a_capture_that_succeeds(cuda: Cuda) -> None:
    with capture(Graph(), pool=(0, 5), stream="mine"):
        assert cuda.stream == "mine"
        assert cuda.open == {(0, 5)}
        assert not gc.isenabled(), "an engine that it finds could not be let go"
    assert gc.isenabled()
    assert cuda.captures == [("mine", (0, 5))]
    assert (cuda.stream, cuda.open) == ("default", set())


def fail(cuda: Cuda, by: str) -> None:
    cuda.invalid = by != "an error of the caller"
    if by == "an error of torch":
        raise RuntimeError("operation not permitted when stream is capturing")
    if by == "an error of the caller":
        raise KeyError("mine")


@pytest.mark.parametrize("by", ["an error of torch", "an error of the caller", "what nobody noticed"])
def test_a_capture_that_fails_leaves_nothing_behind(cuda: Cuda, by: str) -> None:
    words = {"an error of the caller": "mine"}.get(by, "previous error|operation not permitted")
    with pytest.raises((RuntimeError, KeyError), match=words), capture(Graph()):
        fail(cuda, by)
    assert (cuda.stream, cuda.open, gc.isenabled()) == ("default", set(), True)
    assert cuda.captures[0] == ("new", (0, 1))
    assert len(cuda.captures) == 2, "the generator learns from another one that it is over"
    with capture(Graph()):
        pass


def test_the_device_is_not_waited_for_while_another_thread_captures(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(bool(cuda.open)))
    with ThreadPoolExecutor(1) as pool:
        with capture(Graph()):
            waiting = pool.submit(wait_for_device, DEVICE)
            time.sleep(0.05)
            assert not waited
        waiting.result(10)
    assert waited == [False]


class Kept(Graph):
    """In the place of an `OwnGraph`."""

    __del__ = OwnGraph.__del__


def test_a_graph_goes_at_once_where_none_is_captured(cuda: Cuda) -> None:
    graph = Kept()
    ref = weakref.ref(graph)
    with capture(graph):
        pass
    del graph
    assert ref() is None


def test_a_graph_waits_for_the_end_of_a_capture_in_its_own_thread(cuda: Cuda) -> None:
    graph = Kept()
    ref = weakref.ref(graph)
    with capture(Graph()):
        del graph
        assert len(captures._gone) == 1
    assert ref() is None
    assert not captures._gone


@pytest.mark.parametrize("fails", [False, True])
def test_a_graph_that_another_thread_lets_go_of_waits_for_the_end_of_a_capture(cuda: Cuda, fails: bool) -> None:
    found: list[int] = []

    def live() -> None:
        Kept()
        found.append(len(captures._gone))

    with suppress(KeyError), capture(Graph()):
        other = threading.Thread(target=live)
        other.start()
        other.join(30)
        assert not other.is_alive(), "it does not wait"
        assert found == [1]
        if fails:
            raise KeyError
    assert not captures._gone


def test_a_graph_that_another_thread_lets_go_of_waits_for_the_device(cuda: Cuda, monkeypatch: Any) -> None:
    seen: list[int] = []

    def synchronize(device: Any) -> None:
        other = threading.Thread(target=Kept)
        other.start()
        other.join(30)
        seen.append(len(captures._gone))

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    wait_for_device(DEVICE)
    assert seen == [1]
    assert not captures._gone


def test_a_capture_of_the_callers_own_is_alone(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enqueues and captures of other threads wait for its end, and so do graphs that they let go of."""
    monkeypatch.setattr(capture_gate, "PATIENCE_S", 1000.0)
    log: list[str] = []

    def enqueue() -> None:
        GATE.enter()
        log.append("enqueue")
        GATE.leave()

    def capture_too() -> None:
        with GATE.capture(), capture(Graph()):
            log.append("capture")

    others = [threading.Thread(target=work) for work in (enqueue, capture_too)]
    lets_go = threading.Thread(target=Kept)
    with tb.exclusive_capture():
        assert not gc.isenabled()
        with capture(Graph()):  # a module of this thread may capture, too
            GATE.enter()  # and calls
            GATE.leave()
        lets_go.start()
        lets_go.join(30)
        assert len(captures._gone) == 1, "also after the capture inside"
        for other in others:
            other.start()
        others[0].join(0.2)
        log.append("end")
    for other in others:
        other.join(30)
    assert log[0] == "end"
    assert sorted(log) == ["capture", "end", "enqueue"]
    assert not captures._gone
    assert gc.isenabled()


def test_a_capture_of_the_callers_own_that_fails_is_over(cuda: Cuda) -> None:
    with pytest.raises(KeyError, match="mine"), tb.exclusive_capture():
        raise KeyError("mine")
    Kept()
    assert not captures._gone
    other = threading.Thread(target=lambda: (GATE.enter(), GATE.leave()))
    other.start()
    other.join(30)
    assert not other.is_alive()
