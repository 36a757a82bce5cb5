"""Lanes, their bounded pool, and calls that overlap."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import lanes
from trtbridge.bridge.lanes import Lane, LanePool, StreamOrder
from trtbridge.plugins.driver import DriverError

CPU = torch.device("cpu")


def _pool(most: int) -> LanePool:
    return LanePool(lambda: Lane([], CPU), most)


def test_lanes_are_used_again_last_first() -> None:
    pool = _pool(3)
    first, second = pool.take(), pool.take()
    pool.give(first)
    pool.give(second)
    assert pool.take() is second
    assert pool.take() is first
    assert pool.made == 2


def test_who_finds_no_lane_waits_for_one() -> None:
    pool = _pool(1)
    lane = pool.take()
    taken: list[Lane] = []
    thread = threading.Thread(target=lambda: taken.append(pool.take()))
    thread.start()
    thread.join(0.1)
    assert not taken, "there may be one lane only"
    pool.give(lane)
    thread.join(10)
    assert taken == [lane]


def test_a_lane_that_cannot_be_made_takes_no_place() -> None:
    failures = [RuntimeError("no memory")]

    def make() -> Lane:
        if failures:
            raise failures.pop()
        return Lane([], CPU)

    pool = LanePool(make, 1)
    with pytest.raises(RuntimeError, match="no memory"):
        pool.take()
    pool.give(pool.take())
    assert pool.made == 1


def test_a_lane_that_is_kept_leaves_room_for_another() -> None:
    pool = _pool(1)
    assert pool.keep_idle() is None, "nothing is made for it"
    pool.give(pool.take())
    kept = pool.keep_idle()
    assert kept is not None
    assert pool.take() is not kept


def test_all_idle_waits_for_calls_and_holds_new_ones_back() -> None:
    pool = _pool(2)
    busy = pool.take()
    order: list[str] = []
    inside = threading.Event()
    go_on = threading.Event()

    def change() -> None:
        with pool.all_idle():
            order.append("changed")
            inside.set()
            go_on.wait(10)
        order.append("done")

    changing = threading.Thread(target=change)
    changing.start()
    assert not inside.wait(0.1), "a call is under way"
    pool.give(busy)
    assert inside.wait(10)
    calling = threading.Thread(target=lambda: order.append("called") if pool.take() is not busy else None)
    calling.start()
    calling.join(0.1)
    assert order == ["changed"], "a new call waits"
    go_on.set()
    changing.join(10)
    calling.join(10)
    assert order[0] == "changed"
    assert sorted(order[1:]) == ["called", "done"], "and gets new contexts"


def test_all_idle_keeps_lanes_when_told_to() -> None:
    pool = _pool(2)
    first, second = pool.take(), pool.take()
    pool.give(first)
    pool.give(second)
    with pool.all_idle(keep=True):
        pass
    assert pool.made == 2
    assert {pool.take(), pool.take()} == {first, second}


class Slow(torch.nn.Module):
    """An op in the middle that tells how many calls are in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.trtbridge_lane_tests.meet(x * 2) + 1


def test_calls_overlap_up_to_max_contexts() -> None:
    now, most = [0], [0]
    lock = threading.Lock()

    with torch.library._scoped_library("trtbridge_lane_tests", "FRAGMENT") as library:
        library.define("meet(Tensor x) -> Tensor")

        def meet(x: torch.Tensor) -> torch.Tensor:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            threading.Event().wait(0.05)
            with lock:
                now[0] -= 1
            return x.clone()

        library.impl("meet", meet, "CPU")
        torch.library.register_fake("trtbridge_lane_tests::meet", torch.empty_like, lib=library)
        module = tb.convert(Slow(), (torch.ones(3),), backend="onnxruntime", max_contexts=2)
        most[0] = 0
        inputs = [torch.full((3,), float(index)) for index in range(8)]
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(module, inputs))
    assert most[0] == 2
    assert module.stats().contexts == 2
    assert module.stats().calls == 8
    for x, y in zip(inputs, results, strict=True):
        torch.testing.assert_close(y, x * 2 + 1)


def test_a_bound_call_reads_and_writes_the_same_tensors() -> None:
    module = tb.convert(torch.nn.Linear(4, 2), (torch.ones(3, 4),), backend="onnxruntime")
    x = torch.ones(3, 4)
    call = module.bind(x)
    first = call()
    expected_first = module(x)
    torch.testing.assert_close(first, expected_first)
    x.copy_(torch.arange(12.0).view(3, 4))
    second = call()
    assert second.data_ptr() == first.data_ptr()
    torch.testing.assert_close(second, module(x))
    with pytest.raises(tb.InputError, match="expected size 3"):
        module.bind(torch.ones(2, 4))


def test_exclusive_replaces_an_engine_under_calls() -> None:
    """What a refit does: calls see the old engine or the new one, never a mixture."""
    module = tb.convert(torch.nn.Linear(4, 4), (torch.ones(3, 4),), backend="onnxruntime")
    other = tb.convert(torch.nn.Linear(4, 4), (torch.ones(3, 4),), backend="onnxruntime")
    x = torch.ones(3, 4)
    old, new = module(x), other(x)
    running, donor = module._running, other._running
    assert running is not None
    assert donor is not None
    stop = threading.Event()
    seen: list[torch.Tensor] = []

    def work() -> None:
        while not stop.is_set():
            seen.append(module(x))

    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(work) for _ in range(3)]
        while len(seen) < 20:
            threading.Event().wait(0.01)
        with donor.exclusive() as theirs, running.exclusive() as ours:
            ours[:] = theirs
        count = len(seen)
        while len(seen) < count + 20:
            threading.Event().wait(0.01)
        stop.set()
        for future in futures:
            future.result()
    torch.testing.assert_close(module(x), new)
    assert all(torch.equal(y, old) or torch.equal(y, new) for y in seen)


def test_memory_belongs_to_a_stream_as_long_as_it_works_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With streams that are numbers."""
    log: list[tuple[Any, ...]] = []
    current = [1]

    class Event:
        def record(self, stream: int) -> None:
            log.append(("done on", stream))

        def synchronize(self) -> None:
            log.append(("host waits",))

    class Memory:
        def record_stream(self, stream: int) -> None:
            log.append(("in use on", stream))

    capturing = [False]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(current[0], log))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0], raising=False)
    order = StreamOrder(torch.device("cuda", 0), cast(Any, Memory()))
    for stream in (1, 1, 2, 1):
        current[0] = stream
        order.enter()
        order.leave()
    order.wait()
    capturing[0] = True
    order.wait()
    assert log == [
        ("in use on", 1), ("done on", 1), ("done on", 1),
        (2, "waits"), ("in use on", 2), ("done on", 2), (1, "waits"), ("done on", 1), ("host waits",),
    ], "torch's allocator keeps what it was told until the memory is free"  # fmt: skip
    made_later = StreamOrder(torch.device("cuda", 0))
    made_later.enter()
    made_later.memory = cast(Any, Memory())
    log.clear()
    for stream in (2, 1):
        current[0] = stream
        made_later.enter()
    assert [entry for entry in log if entry[0] == "in use on"] == [("in use on", 2), ("in use on", 1)]


def test_replays_of_one_graph_wait_for_each_other_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[Any, ...]] = []
    current, four, five = [1], object(), object()
    event = SimpleNamespace(cuda_event=77, record=lambda stream: log.append(("done on", stream)))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(current[0], log))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: current[0], raising=False)
    order = StreamOrder(torch.device("cuda", 0))
    waited = []
    for stream, graph in (
        (1, four),
        (2, four),
        (1, four),
        (2, five),
        (2, four),
        (1, four),
        (2, None),
        (1, four),
        (2, four),
    ):
        current[0] = stream
        order.enter(graph)
        waited.append(bool(log))
        order.leave(graph)
        log.clear()
    #       four on 1  on 2   on 1   five on 2 four on 2, on 1  a call   four   four
    assert waited == [False, False, False, True, False, False, True, True, False]
    current[0] = 3
    order.enter(four)  # and no replay, as after an interrupt
    assert not log
    current[0] = 4
    order.enter(four)
    assert log == [(4, "waits")]

    status = [0]
    calls: list[list[int]] = []

    def record(*arguments: Any) -> int:
        calls.append([getattr(each, "value", each) for each in arguments])
        return status[0]

    monkeypatch.setattr(lanes, "library", lambda: SimpleNamespace(cuEventRecordWithFlags=record))
    current[0] = 9
    assert order.leave_in_capture() is event, "a graph that records it must not outlive it"
    assert calls == [[77, 9, 1]], "the event, the stream that is captured, and that it is for those outside"
    status[0] = 801
    with pytest.raises(DriverError, match="cuEventRecordWithFlags failed with CUresult 801"):
        order.leave_in_capture()


class _Stream(int):
    log: list[tuple[Any, ...]]

    def __new__(cls, number: int, log: list[tuple[Any, ...]]) -> _Stream:
        made = super().__new__(cls, number)
        made.log = log
        return made

    def wait_event(self, event: object) -> None:
        self.log.append((int(self), "waits"))
