"""Plain calls that threads make at once: one thread makes them, as if each caller had."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import Report

import trtbridge as tb
from trtbridge.bridge import host_thread
from trtbridge.bridge.backends import trt_run
from trtbridge.plugins import streams
from trtbridge.plugins.streams import own_stream

THREADS, CALLS = 8, 40
SOAK = Path(__file__).parents[2] / "scripts" / "soak_fast.py"
_seen: list[tuple[str, int, bool, int]] = []


@tb.plugin("trtbridge_gpu_threads::noted", fake=torch.empty_like)
def noted(x: torch.Tensor) -> torch.Tensor:
    """Notes in which thread, on which stream and device, and in which mode it runs."""
    stream = torch.cuda.current_stream().cuda_stream
    _seen.append(
        (threading.current_thread().name, stream, torch.is_inference_mode_enabled(), torch.cuda.current_device())
    )
    if x.shape[0] == 3:
        raise ValueError("not three")
    return x + 1


class Noted(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):  # launches, between which others get Python's lock
            x = torch.ops.trtbridge_gpu_threads.noted(x * 2)
        return x


@pytest.fixture(scope="module")
def module(backend: str, device: torch.device) -> tb.EngineModule:
    x = torch.ones(4, 8, device=device)
    return tb.convert(
        Noted(),
        (x,),
        dynamic_shapes={"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}},
        backend=backend,
        plugin_host="segments",
        check_export=False,
        cuda_graphs=False,
    )


def test_calls_are_handed_over_with_stream_and_mode(
    module: tb.EngineModule, cuda: torch.device, report: Report
) -> None:
    ready = threading.Barrier(THREADS)
    expected = Noted()(torch.ones(2, 8, device=cuda)), Noted()(torch.full((2, 8), 2.0, device=cuda))
    with pytest.raises(tb.ExecutionError, match="not three"):
        module(torch.ones(3, 8, device=cuda))  # no first call any more
    module(torch.ones(2, 8, device=cuda))
    _seen.clear()

    def work(thread: int) -> tuple[int, bool]:
        stream, inference = torch.cuda.Stream(), thread % 2 == 0
        with torch.cuda.stream(stream), torch.inference_mode(inference):
            given = torch.full((2, 8), 1.0 + thread % 2, device=cuda)
            wrong = torch.ones(3, 8, device=cuda)
            ready.wait()
            results = []
            for turn in range(CALLS):
                results.append(module(given))
                if turn % 8 == thread:
                    with pytest.raises(tb.ExecutionError, match="not three"):
                        module(wrong)
            stream.synchronize()
        for result in results:
            torch.testing.assert_close(result, expected[thread % 2])
            assert result.is_inference() == inference
        return stream.cuda_stream, inference

    with ThreadPoolExecutor(THREADS) as pool:
        callers = list(pool.map(work, range(THREADS)))
    name = f"trtbridge cuda:{cuda.index or 0}"
    where = Counter("handed over" if seen[0] == name else "caller's" for seen in _seen)
    report("threads", **{kind.replace(" ", "_").replace("'", ""): count for kind, count in where.items()})
    assert where["handed over"] > len(_seen) / 2
    expected_calls: Counter[tuple[int, bool]] = Counter()
    for caller in callers:  # torch may hand a stream out twice
        expected_calls[caller] += 6 * CALLS + CALLS // 8  # of a call that fails the first plugin alone
    assert Counter((stream, inference) for _, stream, inference, _ in _seen) == expected_calls
    assert {device for *_, device in _seen} == {cuda.index or 0}


def test_whoever_is_alone_or_in_a_mode_calls_himself(module: tb.EngineModule, cuda: torch.device) -> None:
    x = torch.ones(2, 8, device=cuda)
    module(x)
    _seen.clear()
    module(x)
    with tb.annotate():
        module(x)
    here = threading.current_thread().name
    assert {seen[0] for seen in _seen} == {here}


def test_results_are_told_where_engines_launch(
    backend: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(2, 8, device=cuda)
    module = tb.convert(torch.nn.Linear(8, 8).to(cuda), (x,), backend=backend, cuda_graphs=False)
    module(x)
    launches: list[str] = []
    monkeypatch.setattr(trt_run, "about_to_launch", lambda: launches.append("told"))
    module(x)
    assert launches == ["told"]


def test_a_plugin_may_wait_for_another_threads_call(
    backend: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_thread, "PATIENCE_S", 0.1)
    x = torch.ones(2, 8, device=cuda)
    linear = torch.nn.Linear(8, 8).to(cuda)
    # Without plugins: before 2.13 of torch, custom ops wait for one another.
    inner = tb.convert(linear, (x,), backend=backend, cuda_graphs=False)
    inner(x)

    @tb.plugin("trtbridge_gpu_threads::waits", fake=torch.empty_like)
    def waits(x: torch.Tensor) -> torch.Tensor:
        def call() -> torch.Tensor:
            result = inner(x)
            torch.cuda.current_stream().synchronize()
            return result

        torch.cuda.current_stream().synchronize()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result(60)

    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.trtbridge_gpu_threads.waits(x * 2) * 3

    outer = tb.convert(Waits(), (x,), backend=backend, plugin_host="segments", check_export=False, cuda_graphs=False)
    with torch.no_grad():
        expected = linear(x * 2) * 3
    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(lambda _: outer(x), range(9)):
            torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_captures_beside_calls_of_other_threads(cuda: torch.device, report: Report, tmp_path: Path) -> None:
    """Without plugins/capture_gate.py TensorRT-RTX 1.6.1 ends such a process, mostly within 15 seconds, and without
    `OwnGraph` torch does now and then: in a process of its own."""
    found = tmp_path / "found.json"
    kinds = "plain,plain,captures,captures"
    command = [sys.executable, str(SOAK), "--seconds", "20", "--kinds", kinds, "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = json.loads(found.read_text())["done"]
    report("captures beside calls", **counts)
    assert counts["captures"] > 100
    assert counts["plain"] > 100


def test_a_stream_of_our_own_in_a_new_thread(cuda: torch.device) -> None:
    """It has no CUDA context yet, and torch's current stream gives it none."""
    with ThreadPoolExecutor(1) as pool:
        handles = [pool.submit(streams._create, cuda.index).result(60) for _ in range(2)]
    assert len({0, *handles}) == 3


def test_captures_of_the_callers_own_beside_calls_of_other_threads(backend: str, cuda: torch.device) -> None:
    linear = torch.nn.Linear(64, 64).to(cuda)
    x = torch.randn(8, 64, device=cuda)
    module = tb.convert(linear, (x,), backend=backend, cuda_graphs=False)
    captured = copy.deepcopy(module)  # no other thread takes the context that a call leaves for the capture
    with torch.no_grad():
        expected = linear(x)
    torch.cuda.synchronize()
    stop = threading.Event()

    def calls() -> int:
        made, own = 0, own_stream(cuda)  # torch has few streams, and one of them is that of captures
        with torch.cuda.stream(own.stream):
            while not stop.is_set():
                torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2)
                made += 1
        return made

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(calls) for _ in range(2)]
        try:
            for _ in range(30):
                graph = torch.cuda.CUDAGraph()
                with tb.exclusive_capture():
                    captured(x)
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        result = captured(x)
                result.zero_()
                graph.replay()
                torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)
        finally:
            stop.set()
        assert all(caller.result(60) for caller in callers)
