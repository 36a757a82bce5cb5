"""Calls as CUDA graphs: replays, their bounded number, streams, threads, bound calls and what cannot be captured."""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from calls_model import BATCH, SLEEP_CYCLES, Make, Net, arguments, close
from helpers import DRY_RUN, Report

import trtbridge as tb
from trtbridge.plugins.streams import own_stream


@pytest.mark.parametrize("mode", [True, "auto", False], ids=str)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
def test_numbers_and_fresh_results(make: Make, eager: Net, device: torch.device, mode: Any, share: bool) -> None:
    module = make(cuda_graphs=mode, share_workspace=share)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for turn in range(6):
        for batch in (1, 4, 33):
            given = arguments(batch, device, turn)
            result = module(*given)
            close(result, eager, given)
            kept.append((result["scores"], result["scores"].clone()))
    for result, as_it_was in kept:
        assert torch.equal(result, as_it_was), "a later call must not change an earlier result"
    if mode is True and not DRY_RUN:
        counted = module.stats()
        assert counted.captured_graphs == counted.graph_captures == 3
        assert counted.graph_replays == 15, "all but the first call with each shape"


def test_results_are_reused_on_request(make: Make, cuda: torch.device) -> None:
    module = make(cuda_graphs=True, reuse_outputs=True)
    given = arguments(4, cuda)
    for _ in range(2):
        module(*given)
    addresses = {module(*arguments(4, cuda, turn))["scores"].data_ptr() for turn in range(4)}
    assert len(addresses) == 1


def test_graphs_are_bounded_and_captured_again(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True, max_graphs=2)
    for batch in (1, 2):
        for turn in range(3):
            given = arguments(batch, cuda, turn)
            close(module(*given), eager, given)
    for turn in range(40):  # longer than two graphs times the patience: the least recently used one goes
        given = arguments(3, cuda, turn)
        close(module(*given), eager, given)
    assert module.stats().graph_evictions == 1
    for turn in range(12):
        for batch in (1, 3):
            given = arguments(batch, cuda, turn)
            close(module(*given), eager, given)
    assert module.stats().captured_graphs == 2


def test_eight_shapes_in_turn_need_no_new_capture(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True)
    for turn in range(6):
        for batch in range(1, 9):
            given = arguments(batch, cuda, turn)
            close(module(*given), eager, given)
        if turn >= 1:
            assert module.stats().graph_captures == 8


@pytest.mark.parametrize("kind", ["default", "side"])
def test_replays_are_ordered_with_the_callers_stream(make: Make, eager: Net, cuda: torch.device, kind: str) -> None:
    module = make(cuda_graphs=True)
    stream = torch.cuda.default_stream() if kind == "default" else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        old, new = arguments(4, cuda, 1), arguments(4, cuda, 2)
        for _ in range(2):
            module(*old)
        x = old[0].clone()
        stream.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(new[0])
        result = module(x, new[1])
        after = result["scores"] * 2
        x.zero_()
        assert not stream.query(), "the call waited for the work before it"
    stream.synchronize()
    with torch.no_grad():
        torch.testing.assert_close(after, eager(*new)["scores"] * 2, rtol=2e-3, atol=4e-3)


def test_two_streams_do_not_collide(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True)
    a, b = arguments(64, cuda, 1), arguments(64, cuda, 2)
    for _ in range(2):
        module(*a)
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream, given in zip(streams, (a, b), strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(100_000)
                results.append(module(*given))
        torch.cuda.synchronize()
        close(results[0], eager, a)
        close(results[1], eager, b)


@pytest.mark.parametrize("mode", [True, False], ids=str)
@pytest.mark.parametrize("own_streams", [True, False], ids=["own streams", "one stream"])
def test_eight_threads(make: Make, eager: Net, cuda: torch.device, mode: bool, own_streams: bool) -> None:
    module = make(cuda_graphs=mode, max_contexts=3)
    given = [arguments(batch, cuda, batch) for batch in range(1, 9)]

    def work(thread: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for turn in range(30):
                these = given[(thread + turn) % 8]
                result = module(*these)
                stream.synchronize()
                close(result, eager, these)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert module.stats().contexts <= 3


@pytest.mark.parametrize("sizes", [(4, 4), (4, 9)], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("most", [1, 2])
def test_streams_wait_for_one_another_or_not(
    make: Make, eager: Net, cuda: torch.device, most: int, sizes: tuple[int, int]
) -> None:
    """Replays of one graph by CUDA itself, those of two by an event that each graph records."""
    module = make(cuda_graphs=True, parallel_replays=most)
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    a, b = arguments(sizes[0], cuda, 1), arguments(sizes[1], cuda, 2)
    for stream, given in ((slow, a), (quick, b)):
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(*given)
    torch.cuda.synchronize()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(SLEEP_CYCLES)
        late = module(*a)
    with torch.cuda.stream(quick):
        early = module(*b)
    quick.synchronize()
    assert slow.query() is (most == 1)
    slow.synchronize()
    close(late, eager, a)
    close(early, eager, b)
    assert module.stats().captured_graphs == max(most, len(set(sizes)))


def test_bound_calls_wait_for_other_graphs(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True, parallel_replays=1)
    a, b = arguments(4, cuda, 1), arguments(9, cuda, 2)
    call = module.bind(*b)
    for _ in range(3):
        module(*a)
        call()
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for first, second in ((lambda: module(*a), call), (call, lambda: module(*a))):
        with torch.cuda.stream(slow):
            torch.cuda._sleep(SLEEP_CYCLES)
            late = first()
        with torch.cuda.stream(quick):
            early = second()
        quick.synchronize()
        assert slow.query()
        for result, given in ((late, a), (early, b)) if second is call else ((late, b), (early, a)):
            close(result, eager, given)


@pytest.mark.parametrize("streams", [2, 6])
def test_streams_that_take_turns_have_sets_by_themselves(
    make: Make, eager: Net, cuda: torch.device, streams: int
) -> None:
    module = make(cuda_graphs=True)
    calls = [(torch.cuda.Stream(), arguments(4, cuda, seed)) for seed in range(streams)]
    torch.cuda.synchronize()
    for turn in range(14):
        for stream, given in calls:
            with torch.cuda.stream(stream):
                result = module(*given)
                stream.synchronize()
                close(result, eager, given)
        if turn == 6:
            assert module.stats().captured_graphs == 1, "they may have met by chance"
    assert module.stats().captured_graphs == module.stats().graph_captures == min(streams, 4)


def test_eight_threads_on_four_sets_of_graphs(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True, parallel_replays=4)
    given = [arguments(batch, cuda, batch) for batch in (1, 2, 3)]
    for one in given:
        module(*one)  # nothing is captured while kernels are compiled

    def work(thread: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(40):
                these = given[(thread + turn) % 3]
                result = module(*these)
                stream.synchronize()
                close(result, eager, these)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    found = module.stats()
    assert found.graph_captures == found.captured_graphs == 4 * len(given)
    call = module.bind(*given[0])
    close(call(), eager, given[0])


@pytest.mark.parametrize("mode", [True, False], ids=str)
def test_eight_modules_in_eight_threads(backend: str, device: torch.device, mode: bool, report: Report) -> None:
    """Copies of one module that are first called together give what each gives alone, bit by bit, and all the same."""
    torch.manual_seed(3)
    layers = [torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU()) for _ in range(8)]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), *layers, torch.nn.Conv2d(32, 4, 3)).to(device)
    network = network if DRY_RUN else network.half()
    given = [torch.randn(1, 3, 96, 96, device=device, dtype=next(network.parameters()).dtype) for _ in range(8)]
    first = tb.convert(network.eval(), (given[0],), backend=backend, cuda_graphs=mode)
    modules = [first, *(copy.deepcopy(first) for _ in range(7))]

    def stream() -> Any:
        return nullcontext() if DRY_RUN else torch.cuda.stream(torch.cuda.Stream())

    def work(thread: int) -> list[torch.Tensor]:
        with stream():
            results = [modules[thread](given[(thread + turn) % 8]) for turn in range(24)]
            if not DRY_RUN:
                torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    alone = [[module(x) for x in given] for module in modules]
    different = sum(
        not torch.equal(result, alone[thread][(thread + turn) % 8])
        for thread, results in enumerate(together)
        for turn, result in enumerate(results)
    )
    others = sum(not torch.equal(a, b) for results in alone[1:] for a, b in zip(results, alone[0], strict=True))
    report("eight modules", cuda_graphs=mode, together_unlike_alone=different, unlike_the_first_module=others)
    assert not different
    assert not others


def test_bound_call(make: Make, eager: Net, device: torch.device) -> None:
    for mode in (True, False):
        module = make(cuda_graphs=mode)
        given = arguments(4, device)
        call = module.bind(*given)
        first = call()
        addresses = [t.data_ptr() for t in first.values()]
        for turn in range(3):
            fresh = arguments(4, device, turn)
            for target, source in zip(given, fresh, strict=True):
                target.copy_(source)
            result = call()
            assert [t.data_ptr() for t in result.values()] == addresses
            close(result, eager, fresh)
            close(module(*fresh), eager, fresh)


def test_a_callers_capture_goes_by_the_graphs_of_the_module(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True)
    given = arguments(4, cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            module(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = module(*given)
    for turn in range(3):
        fresh = arguments(4, cuda, turn)
        for target, source in zip(given, fresh, strict=True):
            target.copy_(source)
        graph.replay()
        close(result, eager, fresh)
        close(module(*fresh), eager, fresh)


def test_modes_and_layouts(make: Make, eager: Net, device: torch.device) -> None:
    module = make(cuda_graphs=True)
    given = arguments(6, device)
    for _ in range(3):
        with torch.inference_mode():
            close(module(*given), eager, given)
        close(module(given[0].clone().requires_grad_(), given[1]), eager, given)
        with torch.autocast(device.type, torch.bfloat16):
            result = module(*given)
        close(result, eager, given)
        strided = (torch.stack([given[0]] * 2, -1)[..., 0], given[1].expand(6, 1))
        close(module(*strided), eager, given)
    assert not result["scores"].requires_grad


def test_what_depends_on_data_runs_plainly(backend: str, cuda: torch.device) -> None:
    class Pick(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x[:, 0] > 0] * 2

    x = torch.randn(9, 4, device=cuda)
    module = tb.convert(Pick(), (x,), backend=backend, max_data_size=9, cuda_graphs=True)
    for _ in range(3):
        torch.testing.assert_close(module(x), x[x[:, 0] > 0] * 2)
    assert module.stats().graph_captures == 0


def test_a_call_that_fails_leaves_the_next_one_right(backend: str, cuda: torch.device) -> None:
    @torch.library.custom_op("trtbridge_gpu_calls::moody", mutates_args=())
    def moody(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:
            raise ValueError("not three")
        return x.clone()

    moody.register_fake(torch.empty_like)

    class Moody(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_gpu_calls.moody(x * 2) + 1

    x = torch.ones(4, 3, device=cuda)
    module = tb.convert(
        Moody(), (x,), dynamic_shapes={"x": {0: BATCH}}, backend=backend, cuda_graphs=True, plugin_host="segments"
    )
    for _ in range(3):
        torch.testing.assert_close(module(x), x * 2 + 1)
        with pytest.raises(tb.ExecutionError, match="not three"):
            module(x[:3])
    assert module.stats().captured_graphs == 1


def test_a_plugin_that_cannot_be_captured_runs_plainly(
    make: Make, backend: str, cuda: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """It draws, then waits for the GPU: after the captures that fail, torch's generator draws as before.

    And its allocator gives memory back that other streams have used, as the inputs and results of plain calls.
    """

    @torch.library.custom_op("trtbridge_gpu_calls::waits", mutates_args=())
    def waits(x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(x)
        return x + 1 if float(noise.sum()) >= 0 else noise

    waits.register_fake(torch.empty_like)

    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_gpu_calls.waits(x * 2) * 3

    x = torch.ones(4, 3, device=cuda)
    module = tb.convert(
        Waits(), (x,), dynamic_shapes={"x": {0: BATCH}}, backend=backend, plugin_host="segments", cuda_graphs="auto"
    )
    for batch in (1, 2, 3, 4):
        for _ in range(3):
            torch.testing.assert_close(module(x[:batch]), x[:batch] * 6 + 3)
            assert torch.rand(8, device=cuda).std() > 0
    assert module.stats().graph_captures == 0
    assert "a call cannot be captured" in caplog.text
    plain, seen = make(cuda_graphs=False), []
    for _ in range(3):
        for _ in range(20):
            plain(*arguments(4, cuda))
        torch.cuda.synchronize()
        torch.empty(1, device=cuda)  # the allocator looks for such memory when it is asked for some
        seen.append(torch.cuda.memory_allocated())
    assert seen[1] == seen[2]


def test_an_op_whose_python_code_must_run_each_time(backend: str, device: torch.device) -> None:
    calls: list[int] = []

    @tb.plugin("trtbridge_gpu_calls::counted", fake=torch.empty_like, cuda_graphs=False)
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape[0])
        return x + len(calls)

    class Counted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_gpu_calls.counted(x * 2) * 3

    x = torch.ones(4, 3, device=device)
    module = tb.convert(Counted(), (x,), backend=backend, plugin_host="segments", check_export=False)
    before = len(calls)
    for turn in range(1, 5):
        torch.testing.assert_close(module(x), (x * 2 + before + turn) * 3)
    assert len(calls) == before + 4


def test_a_replay_is_no_slower_than_a_plain_call(make: Make, cuda: torch.device, report: Report) -> None:
    """Numbers for the report alone."""
    given = arguments(4, cuda)
    for name, options in (
        ("plain", {"cuda_graphs": False}),
        ("graph", {"cuda_graphs": True}),
        ("graph, results reused", {"cuda_graphs": True, "reuse_outputs": True}),
    ):
        module = make(**options)
        call = lambda module=module: module(*given)  # noqa: E731
        report("host time", call=name, us_per_call=round(_host_us(call), 1))
    report("host time", call="bound", us_per_call=round(_host_us(make(cuda_graphs=True).bind(*given)), 1))


def _host_us(call: Callable[[], Any]) -> float:
    """Microseconds that a call takes the host, over 1,000 calls without a synchronization."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(1000):
            call()
        best = min(best, (time.perf_counter() - started) / 1000)
        torch.cuda.synchronize()
    return best * 1e6


def test_a_copy_has_graphs_of_its_own(make: Make, eager: Net, cuda: torch.device) -> None:
    module = make(cuda_graphs=True)
    given = arguments(4, cuda)
    for _ in range(2):
        module(*given)
    copied = copy.deepcopy(module)
    del module
    gc.collect()
    for _ in range(3):
        close(copied(*given), eager, given)


def test_captures_have_a_stream_of_their_own(make: Make, eager: Net, cuda: torch.device) -> None:
    """Torch hands out 32 streams again and again: whoever had the one of a capture would be captured with it."""
    of_torch = {torch.cuda.Stream(cuda).cuda_stream for _ in range(64)}
    own = [own_stream(cuda) for _ in range(40)]
    handles = {each.stream.cuda_stream for each in own}
    assert len(handles) == 40
    assert of_torch.isdisjoint(handles)
    own.clear()
    assert own_stream(cuda).stream.cuda_stream in handles, "its owner is gone"
    given = [arguments(batch, cuda) for batch in range(1, 17)]
    with torch.no_grad():
        expected = [eager(*one) for one in given]
    torch.cuda.synchronize()
    over = threading.Event()

    def others() -> int:
        """Work on streams of torch, waited for, for as long as there are captures."""
        turns = 0
        while not over.is_set():
            with torch.cuda.stream(torch.cuda.Stream(cuda)):
                assert float((torch.ones(64, device=cuda) * turns).sum()) == 64 * turns
            turns += 1
        return turns

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(others) for _ in range(2)]
        try:
            for _ in range(3):
                module = make(cuda_graphs=True)
                for one, right in zip(given * 3, expected * 3, strict=True):
                    found = module(*one)
                    torch.testing.assert_close(found["scores"], right["scores"], rtol=2e-3, atol=2e-3)
                assert module.stats().graph_captures == len(given)
        finally:
            over.set()
        assert all(each.result() for each in waiting)


def test_a_graph_of_one_kernel(backend: str, cuda: torch.device) -> None:
    """Nothing in it waits for anything: the driver takes a question for its dependencies for a mistake."""
    layer, x = torch.nn.Linear(64, 64).to(cuda), torch.randn(8, 64, device=cuda)
    module = tb.convert(layer, (x,), backend=backend, cuda_graphs=True)
    call = module.bind(x)
    with torch.no_grad():
        torch.testing.assert_close(call(), layer(x), rtol=1e-2, atol=1e-2)  # TF32
    assert module.stats().graph_replays == 1
