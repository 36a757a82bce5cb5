"""Several optimization profiles on a GPU: numbers in each, errors between them, the original outside; strategies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.bridge.backends import trt_run
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.trt_run import TensorRtExecutable
from trtbridge.bridge.runtime_options import SPECIALIZATIONS

BATCH = tb.Dim("batch", profiles=[(1, 1, 1), (1, 8, 32), (48, 64, 64)])
SEQ = tb.Dim("seq", profiles=[(4, 4, 8), (4, 8, 16), (4, 8, 16)])
SIZES = [(1, 4), (8, 8), (1, 16), (32, 4), (64, 16), (48, 4), (2, 5)]


class Net(torch.nn.Module):
    """A plugin between two engines, a derived dim and a result with a computed size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(16, 32)
        self.drop = torch.nn.Dropout(0.5)
        self.last = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, _ = torch.cummax(F.gelu(self.first(x)), 2)
        return torch.cat([self.drop(self.last(values)), y], 0).softmax(-1), y[1:].tanh()


def arguments(batch: int, length: int, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed * 10_000 + batch * 100 + length)
    shapes = (batch, length, 16), (2 * batch + 1, length, 16)
    return (
        torch.randn(shapes[0], generator=generator).to(device),
        torch.randn(shapes[1], generator=generator).to(device),
    )


SHAPES = {"x": {0: BATCH, 1: SEQ}, "y": {0: 2 * BATCH + 1, 1: SEQ}}


@pytest.fixture(scope="session")
def eager(device: torch.device) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(device)


@pytest.fixture(scope="session", params=["segments", "auto"])
def net(request: pytest.FixtureRequest, eager: Net, backend: str, device: torch.device) -> tb.EngineModule:
    """The plugin between engines, and inside one where the library takes it."""
    return tb.convert(eager, arguments(8, 8, device), dynamic_shapes=SHAPES, backend=backend, plugin_host=request.param)


def check(module: tb.EngineModule, eager: Net, args: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        expected = eager(*args)
    for mine, wanted in zip(module(*args), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_numbers_in_every_profile_and_after_every_switch(
    net: tb.EngineModule, eager: Net, device: torch.device
) -> None:
    for engine in net.program.engines:
        assert len(engine.info["profiles"]) == 3
    for first in SIZES:
        for second in SIZES:  # every switch, there and back
            check(net, eager, arguments(*first, device))
            check(net, eager, arguments(*second, device, seed=1))


def test_the_profile_is_chosen_by_the_sizes_alone(
    net: tb.EngineModule, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    real = trt_run.select_profile

    def spy(context: Any, *args: Any) -> bool:
        switched = real(context, *args)
        chosen.append(context.active_optimization_profile)
        return switched

    monkeypatch.setattr(trt_run, "select_profile", spy)
    module = tb.EngineModule(net.program, cuda, options=tb.RuntimeOptions(max_contexts=1))
    for sizes, profile in (((1, 4), 0), ((8, 8), 1), ((1, 5), 0), ((1, 16), 1), ((64, 8), 2), ((1, 4), 0)):
        chosen.clear()
        module(*arguments(*sizes, cuda))
        assert chosen == [profile] * len(net.program.engines), sizes


@pytest.mark.parametrize("sizes", [(33, 8), (47, 8), (65, 8), (8, 17), (8, 3)])
def test_sizes_in_no_profile_are_errors(net: tb.EngineModule, eager: Net, device: torch.device, sizes: Any) -> None:
    with pytest.raises(tb.OutOfRangeError):
        net(*arguments(*sizes, device))
    check(net, eager, arguments(8, 8, device))


def test_threads_share_profiles(net: tb.EngineModule, eager: Net, device: torch.device) -> None:
    """Contexts of several calls have the same profile at a time."""

    def work(number: int) -> None:
        for index in range(12):
            check(net, eager, arguments(*SIZES[(index + number) % len(SIZES)], device, seed=number))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


def test_sizes_that_depend_on_data(backend: str, device: torch.device) -> None:
    class Rows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x.sum(1) > 0].relu() @ torch.ones(6, 2, device=x.device)

    shapes = {"x": {0: tb.Dim("rows", profiles=[(1, 1, 1), (8, 16, 32)])}}
    example = torch.randn(8, 6, device=device)
    module = tb.convert(Rows(), (example,), dynamic_shapes=shapes, backend=backend, max_data_size=32)
    for rows in (1, 32, 8, 1):
        for shift in (-10.0, 0.0, 10.0):
            x = torch.randn(rows, 6, device=device) + shift
            torch.testing.assert_close(module(x), Rows()(x))


def test_graphs_of_several_profiles(net: tb.EngineModule, eager: Net, cuda: torch.device) -> None:
    module = tb.EngineModule(net.program, cuda, options=tb.RuntimeOptions(cuda_graphs=True))
    for seed in range(4):
        for sizes in SIZES:
            check(module, eager, arguments(*sizes, cuda, seed))
    counted = module.stats()
    assert (counted.graph_captures, counted.captured_graphs) == (len(SIZES), len(SIZES))
    assert counted.graph_replays == 3 * len(SIZES)


def test_a_capture_by_the_caller_keeps_its_profile(net: tb.EngineModule, eager: Net, cuda: torch.device) -> None:
    stream = torch.cuda.Stream()
    args = arguments(64, 8, cuda)
    with torch.cuda.stream(stream):
        net(*args)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = net(*args)
    check(net, eager, arguments(1, 4, cuda))  # another profile, in another context
    for target, source in zip(args, arguments(64, 8, cuda, seed=5), strict=True):
        target.copy_(source)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    with torch.no_grad():
        for mine, wanted in zip(results, eager(*args), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_a_profile_does_not_change_within_a_capture(net: tb.EngineModule, eager: Net, cuda: torch.device) -> None:
    module = tb.EngineModule(net.program, cuda, options=tb.RuntimeOptions(max_contexts=1))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(*arguments(64, 8, cuda))
        stream.synchronize()
        other = arguments(1, 4, cuda)
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(tb.ExecutionError, match="cannot change during a CUDA graph capture")
        with refused, torch.cuda.graph(graph, stream=stream):
            module(*other)
    torch.cuda.synchronize()
    check(module, eager, arguments(1, 4, cuda))


def test_the_original_runs_outside(eager: Net, net: tb.EngineModule, device: torch.device) -> None:
    eager.train()
    try:
        module = tb.EngineModule(net.program, device, eager=eager)
        assert list(module.state_dict()) == []
        for count, sizes in enumerate([(33, 8), (65, 3), (8, 17)], 1):
            args = arguments(*sizes, device)
            results = module(*args)
            assert module.eager_calls == count
            assert eager.training
            assert eager.drop.training
            with torch.no_grad():
                expected = eager.eval()(*args)
            eager.train()
            for mine, wanted in zip(results, expected, strict=True):
                torch.testing.assert_close(mine, wanted)
        module(*arguments(8, 8, device))
        assert module.eager_calls == 3
        x, y = arguments(33, 8, device)
        with pytest.raises(tb.InputError, match=r"expected torch.float32"):
            module(x.half(), y)
        with pytest.raises(tb.InputError, match="rank"):
            module(x[0], y)
    finally:
        eager.eval()


def test_an_original_elsewhere_is_refused(eager: Net, cuda: torch.device, backend: str) -> None:
    module = Net().eval()
    with pytest.raises(tb.OptionError, match=r"run on cuda:\d, and the original Net is on cpu"):
        tb.convert(
            module,
            arguments(8, 8, torch.device("cpu")),
            dynamic_shapes=SHAPES,
            backend=backend,
            device=cuda,
            out_of_range="eager",
        )


@pytest.mark.parametrize("strategy", [None, *SPECIALIZATIONS])
def test_strategies_of_kernel_specialization(
    net: tb.EngineModule, backend: str, cuda: torch.device, strategy: str | None
) -> None:
    """Each runs every size right, at its first call and after it: "lazy" changes kernels in between."""
    if backend != "tensorrt_rtx":
        pytest.skip("TensorRT compiles no kernels when an engine runs")
    engine = net.program.engines[-1]
    executable = TensorRtExecutable(FLAVOURS[backend], engine, cuda, None, kernel_specialization=strategy)
    reference = TensorRtExecutable(FLAVOURS[backend], engine, cuda, None, kernel_specialization="none")
    with torch.cuda.stream(torch.cuda.Stream()):
        mine, wanted = executable.new_context(), reference.new_context()
        for batch, length in SIZES:
            sizes = {"x": (batch, length, 16), "y": (2 * batch + 1, length, 16)}
            inputs = [torch.randn(sizes.get(s.name, (batch, length, 32)), device=cuda) for s in engine.inputs]
            expected = wanted(inputs)
            for _ in range(5):
                for a, b in zip(mine(inputs), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.cuda.synchronize()
