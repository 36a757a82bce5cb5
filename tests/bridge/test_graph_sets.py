"""Sets of CUDA graphs, one for streams that replay at once: the rules, with a capturer that needs no GPU."""

from __future__ import annotations

import threading
from collections import Counter
from typing import cast

import pytest
import torch
from fake_capturer import FakeCapturer

import trtbridge as tb
from trtbridge.bridge import graph_sets
from trtbridge.bridge.cuda_graphs import GraphCache
from trtbridge.bridge.graph_capture import Capturer
from trtbridge.bridge.graph_sets import GraphSets


class Crowd:
    """Sets over fake capturers, called from streams by number."""

    def __init__(self, most: int | str, measure: bool = False) -> None:
        self.stream = 0
        self.capturers: list[FakeCapturer] = []
        self.measures: list[bool] = []
        self.faster = self.has_room = True
        self._measure = measure
        self.sets = GraphSets(self._make, most, lambda: self.stream, lambda: self.has_room)

    def _make(self, may_measure: bool) -> GraphCache:
        capturer = FakeCapturer()
        capturer.faster = self.faster
        self.capturers.append(capturer)
        self.measures.append(may_measure)
        return GraphCache(cast(Capturer, capturer), 4, may_measure and self._measure, fresh_outputs=True)

    def call(self, stream: int, batch: int = 4, value: float = 1.0) -> bool:
        """Call on a stream, check the numbers, and say whether it was a replay."""
        self.stream = stream
        found = self.sets.call([torch.full((batch, 3), value)])
        if found is not None:
            torch.testing.assert_close(found[0], torch.full((batch, 3), 2 * value))
        return found is not None

    @property
    def captures(self) -> list[int]:
        """Of each set."""
        return [len(capturer.captured) for capturer in self.capturers]


def test_one_set_serves_all_streams() -> None:
    crowd = Crowd(most=1)
    assert [crowd.call(stream) for stream in (1, 2, 3)] == [False, True, True]
    assert (crowd.sets.sets, len(crowd.sets), crowd.captures) == (1, 1, [1])


def test_each_stream_keeps_its_set() -> None:
    crowd = Crowd(most=2)
    calls = [crowd.call(stream, value=value) for value in (1.0, 2.0, 3.0) for stream in (7, 8)]
    assert calls == [False, False, True, True, True, True]
    assert (crowd.sets.sets, len(crowd.sets), crowd.captures) == (2, 2, [1, 1])
    assert crowd.sets.counters == {"graph_replays": 4, "graph_captures": 2, "graph_evictions": 0}


def test_streams_take_the_sets_in_turn() -> None:
    crowd = Crowd(most=2)
    for stream in range(5):
        assert [crowd.call(stream, 4) for _ in range(2)][1]
    assert crowd.sets.sets == 2
    assert crowd.captures == [1, 1], "the third, fourth and fifth found graphs there"


def test_one_stream_makes_one_set() -> None:
    crowd = Crowd(most=8)
    assert [crowd.call(3) for _ in range(4)] == [False, True, True, True]
    assert crowd.sets.sets == 1


def test_the_first_set_alone_measures() -> None:
    crowd = Crowd(most=2, measure=True)
    assert crowd.call(1) + crowd.call(1) == 1
    crowd.faster = False
    assert crowd.call(2) + crowd.call(2) == 1
    assert crowd.measures == [True, False]
    assert crowd.sets.refusal == ""


def test_no_set_has_graphs_where_plain_calls_are_faster() -> None:
    crowd = Crowd(most=3, measure=True)
    crowd.capturers[0].faster = False
    assert not any(crowd.call(stream) for stream in (1, 1, 1, 2, 2, 2, 3, 3, 3))
    assert crowd.sets.refusal == "a plain call was measured to be faster than a replay"
    assert crowd.captures == [1], "and no further set was made"


def test_a_bound_call_replays_in_the_set_of_its_stream() -> None:
    crowd = Crowd(most=2)
    bound = []
    for stream in (1, 2):
        crowd.stream = stream
        x = torch.full((2, 3), float(stream))
        replay = crowd.sets.bind([x])
        assert replay is not None
        bound.append((x, replay))
    assert crowd.captures == [1, 1]
    for x, replay in bound:
        torch.testing.assert_close(replay()[0], 2 * x)
    assert crowd.sets.counters["graph_replays"] == 2


def test_graphs_that_were_forgotten_are_captured_anew() -> None:
    crowd = Crowd(most=2)
    for _ in range(2):
        for stream in (1, 2):
            crowd.call(stream)
    assert len(crowd.sets) == 2
    crowd.sets.clear()
    assert len(crowd.sets) == 0
    assert [crowd.call(2), crowd.call(1), crowd.call(2), crowd.call(1)] == [False, False, True, True]
    assert crowd.captures == [2, 2]
    assert crowd.sets.counters["graph_replays"] == 4, "those of before count"


def test_who_holds_the_sets_keeps_all_streams_waiting() -> None:
    crowd = Crowd(most=2)
    for stream in (1, 1, 2, 2):
        crowd.call(stream)
    done = threading.Event()

    def call() -> None:
        crowd.call(2)
        done.set()

    waiting = threading.Thread(target=call)
    with crowd.sets.held():
        waiting.start()
        assert not done.wait(0.2)
        assert crowd.sets.counters["graph_replays"] == 2
    waiting.join(10)
    assert crowd.sets.counters["graph_replays"] == 3


def test_streams_that_take_turns_have_sets_by_themselves() -> None:
    crowd = Crowd(most="auto")
    for _ in range(graph_sets._AUTO_TURNS):
        for stream in range(6):
            crowd.call(stream)
    assert (crowd.sets.sets, crowd.captures) == (1, [1]), "until then they share one"
    for _ in range(2):
        calls = [crowd.call(stream) for stream in range(6)]
    assert (crowd.sets.sets, crowd.captures) == (4, [1, 1, 1, 1])
    assert all(calls)
    assert sorted(Counter(map(id, crowd.sets._of_stream.values())).values()) == [1, 1, 2, 2]


def test_streams_share_the_sets_that_there_is_room_for() -> None:
    crowd = Crowd(most="auto")

    def turns(streams: range) -> None:
        for _ in range(graph_sets._AUTO_TURNS + 3):
            for stream in streams:
                crowd.call(stream)

    turns(range(2))
    crowd.has_room = False
    turns(range(8))
    assert (crowd.sets.sets, crowd.captures) == (2, [1, 1])
    assert sorted(Counter(map(id, crowd.sets._of_stream.values())).values()) == [4, 4]
    crowd.has_room = True
    turns(range(8, 12))
    assert (crowd.sets.sets, crowd.captures) == (4, [1, 1, 1, 1]), "there is room again"
    late = Crowd(most="auto")
    late.has_room = False
    turns_of = [late.call(stream) for _ in range(graph_sets._AUTO_TURNS + 3) for stream in (1, 2)]
    assert all(turns_of[1:])
    late.has_room = True
    for _ in range(graph_sets._AUTO_TURNS + 3):
        for stream in (3, 1):
            late.call(stream)
    assert late.captures == [1, 1], "whoever has a set made takes it"
    asked_for = Crowd(most=3)
    asked_for.has_room = False
    for stream in (1, 1, 2, 2, 3, 3):
        asked_for.call(stream)
    assert asked_for.sets.sets == 3


def test_a_stream_that_warms_up_makes_no_set() -> None:
    crowd = Crowd(most="auto")
    for stream in (5, 1, 6, 1):
        for _ in range(50):
            crowd.call(stream)
    assert (crowd.sets.sets, crowd.captures) == (1, [1])
    assert not crowd.sets._of_stream


def test_one_stream_among_many_that_come_once_has_no_set() -> None:
    crowd = Crowd(most="auto")
    for stream in range(3 * graph_sets._MOST_STREAMS):
        crowd.call(stream)
    assert crowd.sets.sets == 1
    assert len(crowd.sets._turns) <= graph_sets._MOST_STREAMS + 1


def test_the_first_set_is_there_where_another_can_have_no_graphs() -> None:
    crowd = Crowd(most=2)
    assert [crowd.call(1), crowd.call(1), crowd.call(2)] == [False, True, False]
    second = crowd.sets._of_stream[2]
    second._give_up("no memory")
    assert crowd.call(2), "a replay, in the first one"
    assert crowd.captures == [1, 0]
    assert crowd.sets.refusal == ""


@pytest.mark.parametrize(("free", "expected"), [(51, True), (50, False), (RuntimeError("captures"), False)])
def test_there_is_room_while_half_of_the_memory_is_free(
    free: int | Exception, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", 1)

    def ask(about: torch.device) -> tuple[int, int]:
        assert about is device
        if isinstance(free, Exception):
            raise free
        return free, 100

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    assert graph_sets.half_is_free(device) is expected


def test_the_option() -> None:
    assert tb.RuntimeOptions().parallel_replays == "auto"
    assert tb.RuntimeOptions(parallel_replays=3).parallel_replays == 3
    for value in (0, True, "two", None):
        with pytest.raises(tb.OptionError, match=f'parallel_replays={value!r}: must be an int above 0 or "auto"'):
            tb.RuntimeOptions(parallel_replays=value)  # type: ignore[arg-type]
