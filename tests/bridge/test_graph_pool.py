"""The memory pool that a module's CUDA graphs share, by torch's rules and without a GPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtbridge.bridge import graph_capture
from trtbridge.bridge.graph_capture import Capturer
from trtbridge.bridge.lanes import LaneMaker

CPU = torch.device("cpu")


class Graph:
    """In the place of an OwnGraph."""

    def __init__(self, keep_graph: bool) -> None: ...

    def instantiate(self) -> None: ...


class Pools:
    """torch's: each with a count of the graphs that use it, which ends for good when it is 0 again."""

    def __init__(self) -> None:
        self.made = 0
        self.using: Counter[int] = Counter()
        self.known: set[int] = set()

    def handle(self) -> int:
        self.made += 1
        return self.made

    @contextmanager
    def capturing(self, graph: Graph, device: torch.device, pool: int, stream: Any) -> Iterator[None]:
        if pool in self.known and not self.using[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.known.add(pool)
        self.using[pool] += 1
        weakref.finalize(graph, self.using.subtract, [pool])
        yield


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    found = Pools()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.handle)
    monkeypatch.setattr(graph_capture, "OwnGraph", Graph)
    monkeypatch.setattr(graph_capture, "capturing", found.capturing)
    monkeypatch.setattr(graph_capture, "StreamOrder", lambda device: SimpleNamespace(memory=None))
    monkeypatch.setattr(graph_capture, "own_stream", lambda device: SimpleNamespace(stream=None))
    return found


def capturer() -> Capturer:
    return Capturer(lambda inputs, lane: [], LaneMaker([], CPU, True), CPU)


def test_graphs_share_a_pool_also_after_all_are_gone(pools: Pools) -> None:
    made = capturer()
    graphs = [made._captured(list, keep=True) for _ in range(3)]
    assert pools.using == {1: 4}, "one of the pool's own"
    del graphs[:2]
    graphs.append(made._captured(list, keep=True))
    assert pools.using == {1: 3}
    graphs.clear()
    again = made._captured(list, keep=True), made._captured(list, keep=True)
    assert pools.using == {1: 3}
    del again, made
    assert pools.using == {1: 0}, "its memory can be given back"


def test_memory_is_given_back_where_all_graphs_are_forgotten(pools: Pools) -> None:
    made = capturer()
    bound, cached = made._captured(list, keep=True), made._captured(list, keep=True)
    del cached
    made.clear()
    assert pools.using == {1: 1}, "what is bound stays"
    other = made._captured(list, keep=True)
    assert pools.using == {1: 1, 2: 2}
    del bound
    assert pools.using == {1: 0, 2: 2}
    del other


def test_a_pool_whose_capture_failed_is_left(pools: Pools) -> None:
    made = capturer()
    kept = made._captured(list, keep=True)

    def fail() -> list[torch.Tensor]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made._captured(fail, keep=True)
    other = made._captured(list, keep=True)
    assert pools.using == {1: 1, 2: 2}
    del kept, other
