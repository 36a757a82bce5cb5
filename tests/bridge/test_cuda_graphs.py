"""Which calls become CUDA graphs and which graphs are kept: the rules, with a capturer that needs no GPU.

What the capturer does with CUDA is tested in tests/gpu/test_calls.py.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any, cast

import pytest
import torch
from fake_capturer import FakeCapturer

from trtbridge.bridge import cuda_graphs
from trtbridge.bridge.cuda_graphs import GraphCache
from trtbridge.bridge.graph_capture import Captured, Capturer
from trtbridge.plugins import capture_gate
from trtbridge.plugins.capture_gate import GATE


def _cache(capturer: FakeCapturer, most: int = 2, measure: bool = False, fresh_outputs: bool = True) -> GraphCache:
    return GraphCache(cast(Capturer, capturer), most, measure, fresh_outputs)


def _x(batch: int, value: float = 1.0) -> list[torch.Tensor]:
    return [torch.full((batch, 3), value)]


def _call(cache: GraphCache, batch: int, value: float = 1.0) -> bool:
    """Call, check the numbers, and say whether it was a replay."""
    result = cache.call(_x(batch, value))
    if result is not None:
        torch.testing.assert_close(result[0], torch.full((batch, 3), 2 * value))
    return result is not None


def test_the_second_call_with_a_shape_is_captured() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer)
    assert [_call(cache, 4, value) for value in (1.0, 2.0, 3.0)] == [False, True, True]
    assert capturer.captured == [(4, 3)]
    assert cache.counters == {"graph_replays": 2, "graph_captures": 1, "graph_evictions": 0}
    assert capturer.order.log == ["enter", "leave"] * 2


@pytest.mark.parametrize("fresh", [True, False])
def test_a_replay_that_is_all_notes_by_itself_that_it_was_given_to_the_device(fresh: bool) -> None:
    capturer = FakeCapturer()
    capturer.copies_inside = True
    cache = _cache(capturer, fresh_outputs=fresh)
    assert [_call(cache, batch, 3.0) for batch in (4, 5, 4, 5, 4, 5)] == [False, False, True, True, True, True]
    captured = cache.bind(_x(6))
    assert captured is not None
    for _ in range(2):
        torch.testing.assert_close(cache.replay_bound(captured)[0], torch.full((6, 3), 2.0))
    assert capturer.order.log == ["enter", "replayed"] * 6
    four, five, bound = (capturer.order.graphs[index] for index in (0, 1, 4))
    assert capturer.order.graphs == [four, five, four, five, bound, bound]
    assert len({id(four), id(five), id(bound), id(None)}) == 4


@pytest.mark.parametrize("inside", [True, False])
def test_a_replay_that_is_interrupted(inside: bool) -> None:
    """Copies that were made beside it are waited for; a replay that was not made is not taken for the last user."""
    capturer = FakeCapturer()
    capturer.copies_inside = inside
    cache = _cache(capturer)
    assert [_call(cache, 4) for _ in range(2)] == [False, True]
    (captured,) = cache._graphs.values()
    as_usual, raised = captured.replay, [KeyboardInterrupt]

    def replay() -> None:
        if raised:
            raise raised.pop()
        as_usual()

    captured.replay = replay
    with pytest.raises(KeyboardInterrupt):
        _call(cache, 4)
    assert _call(cache, 4)
    noted = ["enter", "replayed"] if inside else ["enter", "leave"]
    assert capturer.order.log == [*noted, *(["enter"] if inside else noted), *noted]
    assert cache.counters["graph_replays"] == 2


def test_memory_for_results_is_taken_ahead_of_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch lets go of Python's lock meanwhile, and whoever gets that would wait for this one."""
    capturer = FakeCapturer()
    capturer.copies_inside = True
    cache, as_usual, held = _cache(capturer), Captured.prepare, []

    def prepare(self: Captured, inputs: Any) -> Any:
        held.append(cache.lock._is_owned())  # type: ignore[attr-defined]
        return as_usual(self, inputs)

    monkeypatch.setattr(Captured, "prepare", prepare)
    assert [_call(cache, 4) for _ in range(4)] == [False, True, True, True]
    assert held == [True, False, False], "the first is a graph that was captured right now"


@pytest.mark.parametrize("then", ["none", "another"])
def test_a_graph_that_goes_while_memory_is_taken_for_it(then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capturer = FakeCapturer()
    capturer.copies_inside = True
    cache, as_usual = _cache(capturer), Captured.prepare
    assert [_call(cache, 4) for _ in range(2)] == [False, True]

    def prepare(self: Captured, inputs: Any) -> Any:
        found = as_usual(self, inputs)
        monkeypatch.setattr(Captured, "prepare", as_usual)
        cache.clear()  # as a refit in another thread does
        if then == "another":
            assert [_call(cache, 4) for _ in range(2)] == [False, True]
        return found

    monkeypatch.setattr(Captured, "prepare", prepare)
    assert _call(cache, 4, 7.0) is (then == "another")
    assert [_call(cache, 4, 8.0) for _ in range(2)] == [True, True]


def test_nothing_is_captured_while_another_thread_compiles_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, entered, over = _cache(FakeCapturer()), threading.Event(), threading.Event()

    def compile_kernels() -> None:
        GATE.enter()
        time.sleep(2 * capture_gate.LONG_S)
        entered.set()
        assert over.wait(60)
        GATE.leave()

    compiling = threading.Thread(target=compile_kernels)
    compiling.start()
    assert entered.wait(60)
    assert [_call(cache, 4) for _ in range(3)] == [False, False, False]
    assert [_call(cache, 5) for _ in range(2)] == [False, False]
    monkeypatch.setattr(cuda_graphs, "_MOST_DEFERRED_S", 0.0)
    assert _call(cache, 5), "not for ever"
    over.set()
    compiling.join(60)
    assert _call(cache, 4)


def test_a_short_enqueue_does_not_keep_from_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_gate, "LONG_S", 1000.0)
    cache, entered, over = _cache(FakeCapturer()), threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (GATE.enter(), entered.set(), over.wait(60), GATE.leave()))
    other.start()
    assert entered.wait(60)
    assert [_call(cache, 4) for _ in range(2)] == [False, True]
    over.set()
    other.join(60)
    GATE.enter()  # this thread itself, as a plugin that calls a module
    try:
        monkeypatch.setattr(capture_gate, "LONG_S", -1.0)
        assert [_call(cache, 5) for _ in range(2)] == [False, True]
    finally:
        GATE.leave()


def test_results_are_fresh_or_reused() -> None:
    for fresh in (True, False):
        cache = _cache(FakeCapturer(), fresh_outputs=fresh)
        cache.call(_x(4))
        first, second = cache.call(_x(4)), cache.call(_x(4))
        assert first is not None
        assert second is not None
        assert (first[0].data_ptr() == second[0].data_ptr()) is not fresh


def test_inputs_that_want_gradients_leave_no_trace() -> None:
    cache = _cache(FakeCapturer())
    x = [torch.ones(4, 3, requires_grad=True)]
    for _ in range(3):
        result = cache.call(x)
    assert result is not None
    assert not result[0].requires_grad


def test_memory_that_a_graph_cannot_copy_from_is_copied_outside_of_graphs() -> None:
    capturer = FakeCapturer()
    capturer.copies_inside = True
    cache = _cache(capturer, most=4)
    assert [_call(cache, batch) for batch in (4, 4, 5, 5)] == [False, True] * 2
    capturer.refuses = True
    assert [_call(cache, batch) for batch in (6, 6)] == [False, False]
    assert not capturer.copies_inside
    assert len(cache) == 0, "all of them copy inside"
    assert [_call(cache, batch) for batch in (6, 6, 5, 5)] == [False, True] * 2
    assert cache.refusal == ""
    assert capturer.order.log == ["enter", "replayed"] * 2 + ["enter", "leave"] * 2, (
        "nothing where nothing was launched"
    )


def test_shapes_that_fit_are_never_captured_again() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer, most=8)
    for _ in range(5):
        for batch in range(1, 9):
            _call(cache, batch)
    assert len(capturer.captured) == 8
    assert cache.counters["graph_evictions"] == 0


def test_the_graph_that_was_not_used_for_longest_makes_room() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer, most=2)
    for batch in (1, 1, 2, 2):
        _call(cache, batch)
    replays = [_call(cache, 3) for _ in range(40)]
    assert replays.index(True) > 1, "not while both may still be in use"
    assert all(replays[replays.index(True) :])
    assert len(cache) == 2
    assert _call(cache, 2), "the more recent one has stayed"
    assert not _call(cache, 1)
    assert cache.counters["graph_evictions"] == 1
    assert capturer.recycled == 1
    cache.clear()
    assert capturer.recycled == 0, "not with other weights"


def test_twice_as_many_shapes_as_graphs_at_random() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer, most=16)
    pick = random.Random(0)
    replays = sum(cache.call(_x(pick.randint(1, 32))) is not None for _ in range(3000))
    assert len(capturer.captured) <= 20, "a capture takes as long as hundreds of calls"
    assert replays > 1300


def test_more_shapes_than_graphs_do_not_thrash() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer, most=2)
    for _ in range(50):
        for batch in (1, 2, 3):
            _call(cache, batch)
    assert len(capturer.captured) == 2, "the third runs plainly"


def test_shapes_that_come_once_are_forgotten() -> None:
    cache = _cache(FakeCapturer(), most=2)
    for batch in range(1, 1000):
        _call(cache, batch)
    assert len(cache._seen) <= 32
    assert len(cache) == 0


def test_empty_inputs_are_not_captured() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer)
    assert [cache.call([torch.ones(0, 3)]) for _ in range(3)] == [None] * 3
    assert not capturer.captured


def test_a_shape_that_cannot_be_captured_runs_plainly_and_others_do_not() -> None:
    capturer = FakeCapturer()
    capturer.failing = {3}
    cache = _cache(capturer)
    assert not any(_call(cache, 3) for _ in range(4))
    assert [_call(cache, 4) for _ in range(3)] == [False, True, True]
    assert cache.refusal == ""


def test_a_capture_that_another_thread_spoilt_is_made_again() -> None:
    """By torch.cuda.synchronize, say; one that fails twice is not tried again."""
    capturer = FakeCapturer()
    cache = _cache(capturer)
    capturer.failing = {3, 5}
    assert [_call(cache, batch) for batch in (3, 3, 5, 5, 5)] == [False] * 5
    capturer.failing = set()
    assert [_call(cache, batch) for batch in (5, 3, 3)] == [False, True, True]


def test_after_three_shapes_in_a_row_nothing_is_tried_any_more(caplog: pytest.LogCaptureFixture) -> None:
    capturer = FakeCapturer()
    capturer.failing = {1, 2, 3}
    cache = _cache(capturer)
    for batch in (1, 1, 2, 2, 3, 3, 4, 4):
        assert not _call(cache, batch)
    assert "operation not permitted when stream is capturing" in cache.refusal
    assert "calls run without CUDA graphs" in caplog.text
    assert cache.bind(_x(4)) is None


@pytest.mark.parametrize("faster", [True, False])
def test_auto_measures_once(faster: bool) -> None:
    capturer = FakeCapturer()
    capturer.faster = faster
    cache = _cache(capturer, measure=True)
    assert [_call(cache, 4) for _ in range(3)] == [False, faster, faster]
    assert [_call(cache, 5) for _ in range(3)] == [False, faster, faster]
    assert bool(cache.refusal) is not faster


def test_a_bound_call_reads_the_callers_own_tensors() -> None:
    cache = _cache(FakeCapturer())
    x = _x(4)
    captured = cache.bind(x)
    assert captured is not None
    x[0].fill_(5.0)
    torch.testing.assert_close(cache.replay_bound(captured)[0], torch.full((4, 3), 10.0))
    assert len(cache) == 0, "it takes no place of the others"


def test_clear_lets_go_of_all() -> None:
    capturer = FakeCapturer()
    cache = _cache(capturer)
    for _ in range(2):
        _call(cache, 4)
    cache.clear()
    assert [_call(cache, 4), _call(cache, 4)] == [False, True]
    assert len(capturer.captured) == 2
