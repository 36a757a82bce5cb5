"""What holds memory of a GPU is freed at once, without a GPU: contexts, graphs, and what TensorRT calls back into."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from freed import (
    CPU,
    Holder,
    alive,
    convert,
    no_collector,  # noqa: F401  (a fixture)
    parts,
)

import trtbridge as tb
from trtbridge.bridge import graph_capture
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.trt_outputs import SizedByData
from trtbridge.bridge.backends.trt_run import _raise_failure
from trtbridge.bridge.cuda_graphs import GraphCache
from trtbridge.bridge.graph_capture import Captured, Capturer
from trtbridge.bridge.graph_sets import GraphSets
from trtbridge.bridge.lanes import LaneMaker
from trtbridge.plugins.tensorrt_v3 import PluginHost

pytestmark = pytest.mark.usefixtures("no_collector")


# What needs CUDA, without CUDA


class Order:
    """A `StreamOrder` that orders nothing, and keeps what that keeps."""

    def __init__(self, device: torch.device) -> None:
        self.memory: torch.Tensor | None = None
        self._graph: object = None

    def enter(self, graph: object = None) -> None: ...

    def wait(self) -> None: ...

    def leave(self, graph: object = None) -> None:
        self._graph = graph


class OneStream(Capturer):
    """The capturer with its lanes; a graph of its is a call."""

    def capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True, fresh_outputs: bool = False) -> Captured:
        lane = self._make_lane()
        lane.order = self.order  # as on a GPU
        static = [t.clone() for t in inputs] if own_inputs else list(inputs)
        run, outputs = self._run, self._run(static, lane)

        def replay() -> None:
            for target, source in zip(outputs, run(static, lane), strict=True):
                target.copy_(source)

        return Captured(replay, static, outputs, lane, is_whole=True)


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Capturer` can be made."""
    monkeypatch.setattr(graph_capture, "StreamOrder", Order)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graph_capture, "own_stream", lambda device: SimpleNamespace(stream=None))


@pytest.mark.usefixtures("_no_cuda")
def test_graphs_hold_their_lanes_and_not_the_program() -> None:
    module = convert()
    running = module._running
    assert running is not None
    cache = GraphCache(OneStream(running._run, running._make_lane, CPU), 4, False, True)
    made = [cache]
    running._graphs = GraphSets(lambda _: made.pop(), 1, lambda: 0, lambda: True)
    x = torch.ones(2, 4)
    expected = module(x)
    for _ in range(3):
        result = running._graphs.call([x])
    assert result is not None
    torch.testing.assert_close(result[0], expected)
    (graph,) = cache._graphs.values()
    call = module.bind(x)
    torch.testing.assert_close(call(), expected)
    found = [*parts(module), *map(weakref.ref, (running._graphs, graph, graph.lane))]
    del module, running, graph, cache
    assert len(alive(found)) == len(found), "the bound call has them"
    torch.testing.assert_close(call(), expected)
    del call
    assert alive(found) == []


@pytest.mark.usefixtures("_no_cuda")
def test_graphs_share_one_scratch_memory() -> None:
    given: list[torch.Tensor | None] = []

    class Engine:
        device, workspace_bytes = CPU, 100

        def new_context(self, workspace: torch.Tensor | None = None) -> Any:
            given.append(workspace)

    for share, sizes in ((True, 100), (False, 200)):
        given.clear()
        lanes = LaneMaker([Engine(), None, Engine()], CPU, share)
        assert lanes.workspace_bytes == sizes
        capturer = Capturer(lambda inputs, lane: [], lanes, CPU)
        capturer._make_lane()
        capturer._make_lane()
        lanes()
        pointers = [None if memory is None else memory.data_ptr() for memory in given]
        if share:
            assert len(set(pointers[:4])) == 1, "of all graphs"
            assert pointers[4] == pointers[5] != pointers[0], "a lane for plain calls has its own"
            assert capturer.order.memory is given[0], "streams are put in order by it"
        else:
            assert pointers == [None] * 6


def test_a_lane_waits_for_its_work_before_it_goes() -> None:
    log: list[str] = []

    class Waits(Order):
        def wait(self) -> None:
            log.append("waits")

    class Context:
        def __del__(self) -> None:
            log.append("context gone")

    class Constant:
        def __del__(self) -> None:
            log.append("constant gone")

    class Engine:
        device, workspace_bytes = CPU, 0

        def new_context(self, workspace: torch.Tensor | None = None) -> Any:
            return Context()

    order = cast(Any, Waits(CPU))
    make = LaneMaker([Engine()], torch.device("cuda", 0), True, reads=Constant())
    lanes = [make.over(None, order), make.over(None, order)]
    del make
    lanes.pop()
    assert log == ["waits", "context gone"]
    lanes.pop()
    assert sorted(log[2:]) == ["constant gone", "context gone", "waits"]
    assert log[2] == "waits"


# TensorRT's callbacks


class Context:
    """Keeps allocators as TensorRT does."""

    def __init__(self) -> None:
        self.allocators: dict[str, Any] = {}

    def set_output_allocator(self, name: str, allocator: Any) -> None:
        self.allocators[name] = allocator


def test_memory_of_outputs_sized_by_data() -> None:
    pytest.importorskip("tensorrt_rtx")
    context = Context()
    sized = SizedByData(FLAVOURS["tensorrt_rtx"], cast(Any, context), {"y": torch.float32}, CPU)
    allocator = context.allocators["y"]
    assert allocator.reallocate_output_async("y", 0, 64, 256, 0) != 0
    allocator.notify_shape("y", (4, 3))
    result = sized.take("y")
    assert result is not None
    assert result.shape == (4, 3)
    memory = weakref.ref(sized._run.memory["y"])
    found = [weakref.ref(sized), memory]
    context.allocators.clear()
    del sized, allocator, result
    assert alive(found) == []


def test_a_lack_of_memory_is_raised_once_and_keeps_nothing() -> None:
    pytest.importorskip("tensorrt_rtx")
    context = Context()
    sized = SizedByData(FLAVOURS["tensorrt_rtx"], cast(Any, context), {"y": torch.float32}, CPU)
    assert context.allocators["y"].reallocate_output("y", 0, 1 << 60, 256) == 0
    with pytest.raises(RuntimeError) as caught:
        sized.raise_failure()
    sized.raise_failure()
    found = [weakref.ref(sized)]
    del caught, sized
    assert alive(found) == []


@pytest.mark.parametrize("error", [ValueError("a"), tb.ExecutionError("b")], ids=["wrapped", "as it is"])
def test_a_failure_of_a_plugin_in_an_engine_keeps_nothing(error: Exception) -> None:
    def fail(host: PluginHost) -> Callable[[], Any]:
        holder = Holder()
        try:
            raise type(error)(str(error))
        except Exception as raised:
            host.keep_failure(raised)
        with pytest.raises(tb.ExecutionError):
            _raise_failure(host)
        return weakref.ref(holder)

    host = PluginHost()
    assert fail(host)() is None
    assert host.take_failure() is None
