"""Captures of CUDA graphs wait for enqueues of other threads and keep them out; nothing waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trtbridge.bridge import graph_capture
from trtbridge.bridge.backends import trt_run
from trtbridge.bridge.backends.flavour import JitCache
from trtbridge.bridge.graph_capture import Capturer
from trtbridge.bridge.lanes import LaneMaker
from trtbridge.plugins import capture_gate
from trtbridge.plugins.capture_gate import GATE, CaptureGate


class Other:
    """A thread that does what it is told, and how far it is."""

    def __init__(self, *steps: Callable[[], Any]) -> None:
        self.done = 0
        self._changed = threading.Condition()
        self._steps = steps
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for step in self._steps:
            step()
            with self._changed:
                self.done += 1
                self._changed.notify_all()

    def reaches(self, steps: int, seconds: float = 30) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.done >= steps, seconds)


def capture(gate: CaptureGate, inside: Callable[[], Any], alone: list[bool]) -> Callable[[], None]:
    def run() -> None:
        with gate.capture() as found:
            alone.append(found)
            inside()

    return run


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in vain would do so for longer than a test."""
    monkeypatch.setattr(capture_gate, "PATIENCE_S", 1000.0)
    monkeypatch.setattr(capture_gate, "CAPTURE_PATIENCE_S", 1000.0)


def test_a_capture_waits_for_enqueues_and_keeps_them_out(patient: None) -> None:
    gate, go, alone = CaptureGate(), threading.Event(), list[bool]()
    first = Other(gate.enter, lambda: go.wait(30), gate.leave)
    second = Other(gate.enter, gate.leave)
    assert second.reaches(2), "enqueues do not wait for each other"
    assert first.reaches(1)
    end = threading.Event()
    capturer = Other(capture(gate, lambda: end.wait(30), alone))
    time.sleep(0.05)
    assert not alone
    go.set()
    assert first.reaches(3)
    while not alone:
        time.sleep(0.001)
    late = Other(gate.enter, gate.leave)
    assert not late.reaches(1, 0.2)
    end.set()
    assert capturer.reaches(1)
    assert late.reaches(2)
    assert alone == [True]


def test_captures_keep_each_other_out_and_are_let_in_first(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_gate, "_FIRST_S", 30.0)
    gate, alone, log = CaptureGate(), list[bool](), list[str]()
    gate.enter()
    captures = [Other(capture(gate, lambda: log.append("capture"), alone)) for _ in range(3)]
    while gate._waiting < 3:
        time.sleep(0.001)
    enqueue = Other(gate.enter, lambda: log.append("enqueue"), gate.leave)
    assert not enqueue.reaches(1, 0.1)
    gate.leave()
    assert enqueue.reaches(3)
    assert all(one.reaches(1) for one in captures)
    assert alone == [True] * 3
    assert log == ["capture"] * 3 + ["enqueue"]


def test_who_is_in_comes_in_again(patient: None) -> None:
    gate, alone, go = CaptureGate(), list[bool](), threading.Event()
    with gate.capture() as first, gate.capture() as second:
        gate.enter()  # a captured call
        gate.leave()
        assert first
        assert second
    gate.enter()
    waits = Other(capture(gate, go.wait, alone))
    while not gate._waiting:
        time.sleep(0.001)
    gate.enter()  # a plugin's call within an enqueue, while a capture is to be let in first
    gate.leave()
    assert not alone, "the enqueue around it goes on"
    with gate.capture() as own:  # a plugin that captures: the enqueue is its own
        assert own
    gate.leave()
    go.set()
    assert waits.reaches(1)
    assert alone == [True]


def test_other_enqueues_go_on_while_one_takes_long(patient: None) -> None:
    """Kernels are compiled within an enqueue, for seconds: a capture that waits for it keeps others waiting briefly."""
    gate, alone = CaptureGate(), list[bool]()
    gate.enter()
    capturer = Other(capture(gate, lambda: None, alone))
    while not gate._waiting:
        time.sleep(0.001)
    others = Other(*[gate.enter, gate.leave] * 200)
    assert others.reaches(400)
    assert not alone
    gate.leave()
    assert capturer.reaches(1)
    assert alone == [True]


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin's enqueue may wait for a thread that captures, and the other way round."""
    monkeypatch.setattr(capture_gate, "PATIENCE_S", 0.05)
    monkeypatch.setattr(capture_gate, "CAPTURE_PATIENCE_S", 0.05)
    gate, alone = CaptureGate(), list[bool]()
    gate.enter()
    assert Other(capture(gate, lambda: None, alone)).reaches(1)
    assert alone == [False]
    gate.leave()
    with gate.capture():
        assert Other(gate.enter, gate.leave).reaches(2)
    with gate.capture() as again:
        assert again, "nothing is left of it"


def test_what_fails_lets_others_in(patient: None) -> None:
    gate = CaptureGate()
    with pytest.raises(ValueError, match="no"), gate.capture():
        raise ValueError("no")
    assert Other(gate.enter, gate.leave).reaches(2)


# Who goes through it


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the gate, and what was done meanwhile."""
    log: list[str] = []

    @contextmanager
    def captured() -> Iterator[bool]:
        log.append("capture")
        yield True
        log.append("end")

    monkeypatch.setattr(GATE, "capture", captured)
    monkeypatch.setattr(GATE, "enter", lambda: log.append("enter"))
    monkeypatch.setattr(GATE, "leave", lambda: log.append("leave"))
    return log


@pytest.mark.parametrize("own_inputs", [True, False])
def test_graphs_are_captured_changed_and_made_within_it(
    asked: list[str], own_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph:
        def __init__(self, keep_graph: bool) -> None: ...

        def raw_cuda_graph(self) -> int:
            return 1

        def instantiate(self) -> None:
            asked.append("instantiate")

        def replay(self) -> None: ...

    @contextmanager
    def capturing(graph: Graph, *ignored: Any) -> Iterator[None]:
        asked.append("begin")
        yield

    def wait_for_ends(graph: int) -> int:
        asked.append("change")
        return 1

    def copy_nodes(graph: Graph, ends: list[tuple[int, int]]) -> list[Any]:
        asked.append("ask")
        return []

    order = SimpleNamespace(
        memory=None,
        leave=lambda: asked.append("note"),
        leave_in_capture=lambda: asked.append("note each replay") or "event",
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 1)
    monkeypatch.setattr(Capturer, "_on_own_stream", lambda self: nullcontext())
    for name, value in (
        ("OwnGraph", Graph),
        ("capturing", capturing),
        ("wait_for_ends", wait_for_ends),
        ("copy_nodes", copy_nodes),
        ("StreamOrder", lambda device: order),
        ("own_stream", lambda device: SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None))),
    ):
        monkeypatch.setattr(graph_capture, name, value)
    cpu = torch.device("cpu")

    def run(inputs: Any, lane: Any) -> list[torch.Tensor]:
        asked.append("run")
        return []

    made = Capturer(run, LaneMaker([], cpu, True), cpu, overlap=False)
    made.copies_inside = own_inputs
    made._pools_own = Graph(keep_graph=True)  # type: ignore[assignment]
    captured = made.capture([], own_inputs)
    copies = ["ask"] if own_inputs else []
    inside = ["begin", "run", "note each replay"]
    # A plain call first, which compiles kernels and may take long, and one at the end, which unties the graph.
    assert asked == ["run", "note", "capture", *inside, "change", "instantiate", *copies, "run", "end"]
    assert captured.is_whole
    assert captured.replay.__self__.event == "event", "it lives as long"  # type: ignore[attr-defined]


def test_a_replay_that_copies_outside_of_its_graph_is_not_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    order = SimpleNamespace(memory=None, leave=lambda: None)  # and no `leave_in_capture`
    monkeypatch.setattr(graph_capture, "StreamOrder", lambda device: order)
    monkeypatch.setattr(graph_capture, "capturing", lambda *ignored: nullcontext())
    monkeypatch.setattr(graph_capture, "OwnGraph", lambda keep_graph: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(
        graph_capture,
        "own_stream",
        lambda device: SimpleNamespace(stream=SimpleNamespace(synchronize=lambda: None)),
    )
    monkeypatch.setattr(Capturer, "_on_own_stream", lambda self: nullcontext())
    cpu = torch.device("cpu")
    made = Capturer(lambda inputs, lane: [inputs[0] + 1], LaneMaker([], cpu, True), cpu)
    made.copies_inside, made._pools_own = False, cast(Any, object())
    captured = made.capture([torch.ones(2)], fresh_outputs=True)
    assert not captured.is_whole
    torch.testing.assert_close(captured.call(captured.prepare([torch.ones(2)]), True)[0], torch.full((2,), 2.0))


def test_contexts_are_made_within_it(asked: list[str]) -> None:
    class Engine:
        def create_execution_context(self, what: object) -> None:
            asked.append("make")

    cache = JitCache.__new__(JitCache)
    strategies = SimpleNamespace(USER_MANAGED=1, STATIC=2)
    module = SimpleNamespace(ExecutionContextAllocationStrategy=strategies)
    cache._flavour, cache._config, cache._engine = SimpleNamespace(module=lambda: module), None, Engine()  # type: ignore[assignment]
    assert cache.create_context(user_managed=False) is None
    assert asked == ["enter", "make", "leave"]


@pytest.mark.parametrize("works", [True, False])
def test_kernels_are_given_to_the_device_within_it(
    asked: list[str], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        def execute_async_v3(self, stream: int) -> bool:
            asked.append(f"enqueue on {stream}")
            return works

    one = trt_run._Context.__new__(trt_run._Context)
    one._shapes, one._output_shapes, one._outputs, one._addresses = (), [], [], []
    one._sized, one._weights, one._context = None, None, Context()  # type: ignore[assignment]
    one._device = torch.device("cpu")
    failed: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(one, "_fail", failed.append)
    assert one._run([], (), False) == []
    assert asked == ["enter", "enqueue on 7", "leave"]
    assert bool(failed) is not works
