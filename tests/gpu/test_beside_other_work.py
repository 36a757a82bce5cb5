"""Results while other work runs on the device: TensorRT-RTX 1.6.1 gives wrong ones where kernels of a graph overlap.

docs/runtime.md has what was seen; scripts/bench.py counts it on larger runs (`--parts threads`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import zoo
from helpers import DRY_RUN

import trtbridge as tb
from trtbridge.bridge.cuda_driver import wait_for_ends

Call = Callable[[torch.Tensor], torch.Tensor]

IMAGES = 8
CALLS = 20 if DRY_RUN else 400
"""Of each thread."""


@pytest.fixture(scope="module")
def resnet(backend: str, device: torch.device) -> tb.EngineModule:
    """An engine with many kernels, each of which needs what the one ahead made."""
    case = next(case for case in zoo.CASES if case.name == "resnet50")
    if case.missing:
        pytest.skip(f"not installed: {', '.join(case.missing)}")
    dtype = torch.float32 if DRY_RUN else torch.float16
    args, _ = case.example(1, 0, dtype, device)
    return tb.convert(case.module().to(device, dtype), args, backend=backend)


@pytest.fixture(scope="module")
def images(resnet: tb.EngineModule, device: torch.device) -> list[torch.Tensor]:
    (spec,) = resnet.program.signature.inputs
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if DRY_RUN else torch.float16
    shape = [int(size) for size in spec.shape]
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(IMAGES)]


def differing(calls: list[Call], images: list[torch.Tensor]) -> int:
    """Calls that give other bits than alone, of eight threads with a stream each, that also compare there."""
    on_gpu = images[0].is_cuda
    alone = []
    for call in calls:
        for _ in range(3):
            found = [call(image).clone() for image in images]
        alone.append(found)
    if on_gpu:
        torch.cuda.synchronize()

    def work(index: int) -> int:
        differ = 0
        with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
            for turn in range(CALLS):
                which = (index + turn) % len(images)
                result = calls[index](images[which])
                if on_gpu:
                    torch.cuda.current_stream().synchronize()
                differ += not torch.equal(result, alone[index][which])
        return differ

    with ThreadPoolExecutor(len(calls)) as pool:
        return sum(pool.map(work, range(len(calls))))


@pytest.mark.parametrize("graphs", [True, False], ids=["replays", "plain"])
def test_calls_beside_other_work(
    graphs: bool, resnet: tb.EngineModule, images: list[torch.Tensor], device: torch.device
) -> None:
    """With the kernels of plain calls made for these sizes: those that come in the background have other bits."""
    eager = "eager" if resnet.program.backend == "tensorrt_rtx" else None
    options = tb.RuntimeOptions(cuda_graphs=graphs, kernel_specialization=eager)
    modules = [tb.EngineModule(resnet.program, device, options=options) for _ in range(8)]
    assert differing(list(modules), images) == 0
    if graphs and device.type == "cuda":
        assert all(module.stats().graph_replays for module in modules)


def test_callers_graphs_beside_other_work(
    resnet: tb.EngineModule, images: list[torch.Tensor], cuda: torch.device
) -> None:
    """A caller's capture gets no kernels that overlap either, whatever else is captured with them."""
    options = tb.RuntimeOptions(kernel_specialization="eager" if resnet.program.backend == "tensorrt_rtx" else None)

    kept = []  # a graph needs the module's contexts

    def captured() -> Call:
        module = tb.EngineModule(resnet.program, cuda, options=options)
        kept.append(module)
        image = images[0].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(image)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=stream):
            result = module(image * 1) + 0
        if not module.options.overlaps(module.program.backend):
            assert wait_for_ends(graph.raw_cuda_graph()) == 0, "all wait already"
        graph.instantiate()

        def call(given: torch.Tensor) -> torch.Tensor:
            image.copy_(given)
            graph.replay()
            return result.clone()

        return call

    calls = [captured() for _ in range(8)]
    assert differing(calls, images) == 0


def test_kernels_that_may_overlap(resnet: tb.EngineModule, images: list[torch.Tensor], cuda: torch.device) -> None:
    """As asked for, and alone on the device: the same results."""
    module = tb.EngineModule(resnet.program, cuda, options=tb.RuntimeOptions(cuda_graphs=True, overlap_kernels=True))
    waiting = tb.EngineModule(resnet.program, cuda, options=tb.RuntimeOptions(cuda_graphs=True))
    for image in images * 3:
        torch.testing.assert_close(module(image), waiting(image))
        torch.cuda.synchronize()
    assert module.stats().graph_replays
