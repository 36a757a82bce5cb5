"""What is dropped is freed at once: nothing of ours waits for Python's garbage collector, which these tests disable.

torch.export leaves cycles of its own behind, which hold the module that was converted, and not what came of it.
"""

from __future__ import annotations

import copy
import gc
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import graph_capture, planner
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.plugin_nodes import require_ops
from trtbridge.bridge.backends.trt_outputs import SizedByData
from trtbridge.bridge.backends.trt_run import _raise_failure
from trtbridge.bridge.cuda_graphs import GraphCache
from trtbridge.bridge.dynamo import trtbridge_backend
from trtbridge.bridge.graph_capture import Captured, Capturer
from trtbridge.bridge.lanes import Lane, LaneMaker
from trtbridge.bridge.model import OnnxModel
from trtbridge.bridge.runtime import RunningProgram
from trtbridge.plugins.tensorrt_v3 import PluginHost

CPU = torch.device("cpu")
BATCH = tb.Dim("batch", min=1, opt=2, max=8)


@torch.library.custom_op("trtbridge_freed::moody", mutates_args=())
def moody(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 3:
        raise ValueError("not this batch")
    return x * 2


moody.register_fake(torch.empty_like)


@torch.library.custom_op("trtbridge_freed::repeated", mutates_args=())
def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * times


@repeated.register_fake
def _(x: torch.Tensor, times: int) -> torch.Tensor:
    return torch.empty_like(x)


class Net(torch.nn.Module):
    """Two engines with a plugin between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.ops.trtbridge_freed.moody(self.first(x)))


class Decides(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else x * 2


class Pairs(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.combinations(x) * 2


def convert(**options: Any) -> tb.EngineModule:
    shapes = {"x": {0: BATCH}}
    return tb.convert(Net().eval(), (torch.ones(2, 4),), dynamic_shapes=shapes, backend="onnxruntime", **options)


@pytest.fixture(scope="module", autouse=True)
def _warmed_up() -> None:
    """Modules of torch that are first imported in a conversion leave its frames in cycles, once in a process."""
    convert()


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parts(module: tb.EngineModule) -> list[Callable[[], Any]]:
    """Weak references to a module and all that takes memory below it."""
    running = module._running
    assert running is not None
    lane = running._lanes._idle[0]
    return [
        *map(weakref.ref, (module, module.program, running, running._run, lane)),
        *(weakref.ref(executable) for executable in running._executables if executable is not None),
        *map(weakref.ref, running._constants.values()),
    ]


class Holder:
    """Stands for what callers have in their frames."""


def caller_of(call: Callable[[], Any], kind: type[Exception]) -> Callable[[], Any]:
    """What was in the frame that made a call which failed."""
    holder = Holder()
    with pytest.raises(kind):
        call()
    return weakref.ref(holder)


def alive(found: Sequence[Callable[[], Any]]) -> list[str]:
    return [type(value).__name__ for ref in found if (value := ref()) is not None]


def test_converted_and_called() -> None:
    module = convert()
    found = parts(module)
    module(torch.ones(2, 4))
    assert len(alive(found)) == len(found)
    del module
    assert alive(found) == []


class Counts(torch.nn.Module):
    """A plugin that is given a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.trtbridge_freed.repeated(x + 1, 2 * x.shape[0] + 1)


@pytest.mark.parametrize("network", [Net, Counts])
def test_calls_leave_nothing_behind(network: type[torch.nn.Module]) -> None:
    module = tb.convert(network().eval(), (torch.ones(2, 4),), dynamic_shapes={"x": {0: BATCH}}, backend="onnxruntime")
    assert module.program.plugin_calls
    module(torch.ones(2, 4))
    gc.collect()
    before = tensors()
    for batch in (1, 2, 2, 4):
        module(torch.ones(batch, 4))
    assert tensors() == before, "they would be kept until the collector comes by"


def tensors() -> int:
    """How many there are."""
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_loaded_and_copied(tmp_path: Path) -> None:
    tb.save(convert(), tmp_path / "m.trtb")
    module = tb.load(tmp_path / "m.trtb")
    copied = copy.deepcopy(module)
    found, others = parts(module), parts(copied)
    del module
    assert alive(found) == ["Program"], "engines are shared"
    copied(torch.ones(2, 4))
    del copied
    assert alive([*found, *others]) == []


def test_a_bound_call_keeps_what_it_runs() -> None:
    module = convert()
    x = torch.ones(2, 4)
    expected = module(x)
    found = parts(module)
    call = module.bind(x)
    call()
    del module
    assert len(alive(found)) == len(found)
    torch.testing.assert_close(call(), expected)
    del call
    assert alive(found) == []


def test_what_a_refit_replaces() -> None:
    module = convert(refittable=True)
    old = [ref for ref in parts(module) if ref() is not module]
    module(torch.ones(2, 4))
    module.refit(Net())
    assert alive(old) == []
    module(torch.ones(2, 4))
    found = parts(module)
    with pytest.raises(tb.RefitError):
        module.refit({"first.weight": torch.ones(1)})
    del module
    assert alive(found) == []


@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 4), torch.ones(9, 4), torch.ones(2, 4, dtype=torch.int64)],
    ids=["plugin fails", "out of range", "dtype"],
)
def test_after_a_call_that_failed(x: torch.Tensor) -> None:
    module = convert()
    found = parts(module)
    with pytest.raises(tb.TrtBridgeError) as caught:
        module(x)
    del caught, module
    assert alive(found) == []


def test_with_an_original() -> None:
    eager = Net().eval()
    module = tb.EngineModule(convert().program, CPU, eager=eager)
    module(torch.ones(9, 4))
    found = [*parts(module), weakref.ref(eager)]
    del module
    assert alive(found) == ["Net"]
    del eager
    assert alive(found) == []


def test_what_a_failed_load_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for contexts, and an op that nobody registered."""
    module = convert()
    program = module.program
    found: list[Callable[[], Any]] = []

    class Fails(Lane):
        def __init__(self, executables: Sequence[Any], *others: Any) -> None:
            found.extend(weakref.ref(executable) for executable in executables if executable is not None)
            raise tb.ExecutionError("no memory")

    monkeypatch.setattr("trtbridge.bridge.lanes.Lane", Fails)
    with pytest.raises(tb.ExecutionError, match="no memory"):
        RunningProgram(program, CPU, None)
    assert found
    assert alive(found) == []


def test_errors_keep_no_frames(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.trtb"
    tb.save(convert(), damaged)
    with zipfile.ZipFile(damaged, "a") as archive:
        archive.comment = b"sha256:" + bytes(64)
    assert caller_of(lambda: tb.load(damaged), tb.ModelFileError)() is None
    assert caller_of(lambda: require_ops([{"op": "nobody::knows"}]), tb.PluginError)() is None
    complain = trtbridge_backend(cast(Any, None), [], options={"nothing": 1})
    assert caller_of(lambda: complain(), tb.OptionError)() is None
    assert caller_of(lambda: complain(), tb.OptionError)() is None, "the second time"


def test_a_function_that_cannot_be_traced_keeps_no_frames() -> None:
    assert caller_of(lambda: tb.convert(Decides(), (torch.ones(2),), backend="onnxruntime"), tb.ExportError)() is None


def test_a_conversion_lets_go_of_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Callable[[], Any]] = []
    export = planner.Planner._export

    def noted(self: planner.Planner, source: Any) -> OnnxModel:
        model = export(self, source)
        found.extend(map(weakref.ref, (self, source, source.program, model)))
        return model

    monkeypatch.setattr(planner.Planner, "_export", noted)
    for options in ({}, {"refittable": True}, {"check_export": False}):
        module = convert(**options)
        assert alive(found) == []
        del module
    assert len(found) >= 12


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Callable[[], Any]] = []

    def fails(self: planner.Planner) -> Any:
        self.plan()
        found.extend(map(weakref.ref, (self, self.source, *self.models.values())))
        raise tb.BuildError("no")

    monkeypatch.setattr(planner.Planner, "build", fails)
    with pytest.raises(tb.BuildError) as caught:
        convert()
    del caught
    assert found
    assert alive(found) == []


def test_a_function_that_becomes_one_call_keeps_no_frames() -> None:
    """The error of the first trace, which failed, is needed during the second one."""

    def caller() -> Callable[[], Any]:
        holder = Holder()
        tb.convert(Pairs(), (torch.randn(5),), backend="onnxruntime")
        return weakref.ref(holder)

    caller()  # modules of torch are imported
    gc.collect()
    assert caller()() is None


# What needs CUDA, without CUDA


class Order:
    """A `StreamOrder` that orders nothing."""

    def __init__(self, device: torch.device) -> None:
        self.memory: torch.Tensor | None = None

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class OneStream(Capturer):
    """The capturer with its lanes; a graph of its is a call."""

    def capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True, fresh_outputs: bool = False) -> Captured:
        lane = self._make_lane()
        static = [t.clone() for t in inputs] if own_inputs else list(inputs)
        run, outputs = self._run, self._run(static, lane)

        def replay() -> None:
            for target, source in zip(outputs, run(static, lane), strict=True):
                target.copy_(source)

        return Captured(replay, static, outputs, lane)


@pytest.fixture
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Capturer` can be made."""
    monkeypatch.setattr(graph_capture, "StreamOrder", Order)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)


@pytest.mark.usefixtures("_no_cuda")
def test_graphs_hold_their_lanes_and_not_the_program() -> None:
    module = convert()
    running = module._running
    assert running is not None
    running._graphs = GraphCache(OneStream(running._run, running._make_lane, CPU), 4, False, True)
    x = torch.ones(2, 4)
    expected = module(x)
    for _ in range(3):
        result = running._graphs.call([x])
    assert result is not None
    torch.testing.assert_close(result[0], expected)
    (graph,) = running._graphs._graphs.values()
    call = module.bind(x)
    torch.testing.assert_close(call(), expected)
    found = [*parts(module), *map(weakref.ref, (running._graphs, graph, graph.lane))]
    del module, running, graph
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
