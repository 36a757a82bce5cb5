"""Plugins inside engines, run: the same numbers as between engines and as PyTorch, under graphs, threads and failures.

Needs a TensorRT whose parser takes plugins. On a GPU that TensorRT-RTX 1.7 refuses, its parser on the 1.6.1 runtime
does: put that pair first in PYTHONPATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRY_RUN, Report, leaves
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions
from trtbridge.bridge.backends.plugin_nodes import probe_segment

BATCH = tb.Dim("batch", min=1, opt=4, max=16)
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _hosting(backend: str) -> None:
    """Skips where the backend's parser takes no plugins."""
    if DRY_RUN:
        pytest.skip("dry run on a CPU: ONNX Runtime has no torch ops")
    refusals = get_backend(backend).check(probe_segment(), BuildOptions())
    if refusals:
        pytest.skip(f"{backend} holds no plugins inside engines: {refusals[0].reason}")


class Fn(torch.nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, fn: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(x)


@torch.library.custom_op("trtbridge_host_gpu_tests::split", mutates_args=())
def split(x: torch.Tensor, mask: torch.Tensor, scale: float, note: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A user's op with a bool input, a bool result and attributes."""
    kept = torch.where(mask, x * scale, x.new_zeros(()))
    return kept, kept > (1.0 if note == "high" else 0.0)


@split.register_fake
def _(x: torch.Tensor, mask: torch.Tensor, scale: float, note: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(mask)


@torch.library.custom_op("trtbridge_host_gpu_tests::moody", mutates_args=())
def moody(x: torch.Tensor) -> torch.Tensor:
    """Takes every batch but three."""
    if x.shape[0] == 3:
        raise ValueError("not three")
    return x.clone()


moody.register_fake(torch.empty_like)


def cummax(x: torch.Tensor) -> torch.Tensor:
    values, indices = torch.cummax(F.relu(x @ x.transpose(1, 2)), 2)
    return torch.tanh(values) + indices.to(values.dtype) * 0.1


def stable_sort(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.sort((x * 2).round(), stable=True, dim=-1)
    return found.values * 2, found.indices


def several(x: torch.Tensor) -> torch.Tensor:
    """Plugins after, beside and before layers and each other."""
    a, b = torch.sin(x), torch.cos(x)
    return torch.hypot(torch.erfinv(a * 0.9), torch.erfinv(b * 0.9)) + torch.hypot(a, b).sum(-1, keepdim=True)


def users_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept, high = split(x * 2, x > 0, 1.5, "high")
    return kept + 1, high.logical_not()


def complex_roots(x: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(torch.complex(torch.tanh(x), x * 2)).abs() * 2


def integers(x: torch.Tensor) -> torch.Tensor:
    whole = (x * 5).to(torch.int64)
    return torch.cummax(whole, -1).values + torch.gcd(whole, whole.flip(-1))


def found(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A size that depends on data, read by layers behind it and returned."""
    places = torch.nonzero(x > 0.5)
    picked = x[places[:, 0], places[:, 1], places[:, 2]]
    return torch.exp(picked).sum(), places.to(x.dtype) * 2


def selected(x: torch.Tensor) -> torch.Tensor:
    return torch.masked_select(torch.tanh(x), x > 0) + 1


def behind_data(x: torch.Tensor) -> torch.Tensor:
    """A plugin that reads a tensor whose size depends on data."""
    picked = torch.masked_select(x, x > 0)
    return torch.cummax(picked * 2, 0).values + 1


CASES: dict[str, tuple[Callable[[torch.Tensor], Any], torch.dtype, float]] = {
    "cummax": (cummax, torch.float32, 1e-4),
    "cummax float16": (cummax, HALF, 2e-2),
    "cummax bfloat16": (cummax, BRAIN, 1e-1),
    "stable sort": (stable_sort, torch.float32, 1e-5),
    "stable sort float16": (stable_sort, HALF, 1e-3),
    "several plugins": (several, torch.float32, 1e-4),
    "user's op with bools": (users_op, torch.float32, 1e-5),
    "user's op with bools bfloat16": (users_op, BRAIN, 1e-2),
    "complex results": (complex_roots, torch.float32, 1e-4),
    "int64": (integers, torch.float32, 0.0),
    "size from data among layers": (found, torch.float32, 1e-4),
    "size from data float16": (selected, HALF, 1e-2),
}


def close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    ours, theirs = leaves(got), leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        scale = max(1.0, float(b.abs().max())) if b.is_floating_point() and b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def convert(fn: Callable[[torch.Tensor], Any], x: torch.Tensor, backend: str, host: str) -> tb.EngineModule:
    converted = tb.convert(Fn(fn), (x,), dynamic_shapes={"x": {0: BATCH}}, backend=backend, plugin_host=host)
    inside = [plugin for engine in converted.program.engines for plugin in engine.info["plugins"]]
    if host == "engine":
        assert inside
        assert len(converted.program.steps) == 1, "everything is in one engine"
    else:
        assert not inside
        assert converted.program.plugin_calls
    return converted


@pytest.fixture(scope="module")
def hosted(backend: str) -> tb.EngineModule:
    """A module with a plugin among layers, in one engine."""
    return convert(cummax, torch.randn(4, 8, 8, device="cuda"), backend, "engine")


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_in_the_engine_as_between_engines(name: str, backend: str, report: Report) -> None:
    fn, dtype, tolerance = CASES[name]
    example = torch.randn(4, 8, 8, device="cuda").to(dtype)
    modules = {host: convert(fn, example, backend, host) for host in ("engine", "segments")}
    for batch in (4, 1, 16, 5, 5):
        x = torch.randn(batch, 8, 8, device="cuda").to(dtype)
        expected = fn(x)
        results = {host: module(x) for host, module in modules.items()}
        for result in results.values():
            close(result, expected, tolerance)
        close(results["engine"], results["segments"], tolerance)
    times = {}
    for host, module in modules.items():
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(50):
            module(example)
        torch.cuda.synchronize()
        times[f"{host}_us"] = round((time.perf_counter() - started) / 50 * 1e6)
    report("plugin_hosts", case=name, **times)


def test_a_triton_kernel_inside_an_engine(backend: str) -> None:
    pytest.importorskip("triton")
    from triton_ops import double_plus_one

    example = torch.randn(4, 8, device="cuda")
    converted = convert(lambda x: torch.tanh(double_plus_one(x * 3)), example, backend, "engine")
    for batch in (7, 1):
        x = torch.randn(batch, 8, device="cuda")
        close(converted(x), torch.tanh(x * 6 + 1))


def test_nothing_found_is_an_empty_tensor(backend: str) -> None:
    converted = convert(found, torch.randn(4, 8, 8, device="cuda"), backend, "engine")
    x = torch.zeros(3, 8, 8, device="cuda")
    total, places = converted(x)
    assert float(total) == 0
    assert places.shape == (0, 3)
    ones = torch.ones(16, 8, 8, device="cuda")
    close(converted(ones), found(ones))
    assert converted(ones)[1].shape == (16 * 64, 3), "everything found fills all the room"


def test_what_may_be_empty_stays_outside(backend: str) -> None:
    """TensorRT does not run on empty tensors, and an engine with plugins has no other way."""
    example = torch.randn(4, 8, 8, device="cuda")
    with pytest.raises(tb.UnsupportedOpError, match=r"cummax[\s\S]*may be empty"):
        convert(behind_data, example, backend, "engine")
    converted = tb.convert(
        Fn(behind_data), (example,), dynamic_shapes={"x": {0: BATCH}}, backend=backend, max_data_size=16 * 64
    )
    inside = [plugin["op"] for engine in converted.program.engines for plugin in engine.info["plugins"]]
    assert inside == ["aten::masked_select.default"]
    (call,) = converted.program.plugin_calls  # torch 2.11 calls it python::torch.cummax
    assert "cummax" in call.op
    for x in (example, torch.randn(7, 8, 8, device="cuda"), torch.zeros(3, 8, 8, device="cuda")):
        close(converted(x), behind_data(x))


def test_a_bound_that_is_exceeded_is_an_error(backend: str) -> None:
    converted = tb.convert(
        Fn(found),
        (torch.randn(4, 8, 8, device="cuda"),),
        dynamic_shapes={"x": {0: BATCH}},
        backend=backend,
        plugin_host="engine",
        output_shapes={1: {0: tb.Dim("found", max=40)}},
    )
    few = torch.zeros(4, 8, 8, device="cuda")
    few[0, 0] = 1
    close(converted(few), found(few))
    with pytest.raises(tb.ExecutionError, match=r"40"):
        converted(torch.ones(4, 8, 8, device="cuda"))
    close(converted(few), found(few))


# CUDA graphs


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call as PyTorch's documentation says: warm up on a side stream, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("name", ["cummax", "stable sort", "several plugins", "user's op with bools bfloat16"])
def test_a_cuda_graph_replays_plugins(name: str, backend: str, report: Report) -> None:
    fn, dtype, tolerance = CASES[name]
    static = torch.randn(4, 8, 8, device="cuda").to(dtype)
    converted = convert(fn, static, backend, "engine")
    graph, outputs = capture(lambda: converted(static))
    for _ in range(3):
        x = torch.randn(4, 8, 8, device="cuda").to(dtype)
        static.copy_(x)
        graph.replay()
        close(outputs, fn(x), tolerance)
        converted(torch.randn(9, 8, 8, device="cuda").to(dtype))  # must not disturb the graph
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(200):
        graph.replay()
    torch.cuda.synchronize()
    report("plugin_hosts_graph", case=name, replay_us=round((time.perf_counter() - started) / 200 * 1e6, 1))


def test_a_size_from_data_cannot_be_captured_and_says_so(backend: str) -> None:
    x = torch.randn(4, 8, 8, device="cuda")
    converted = convert(selected, x, backend, "engine")
    expected = converted(x).clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        converted(x)
    torch.cuda.synchronize()
    with pytest.raises(tb.ExecutionError, match="cannot be captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        converted(x)
    close(converted(x), expected)


# Threads, streams and failures


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads(hosted: tb.EngineModule, own_streams: bool) -> None:
    inputs = [torch.randn(1 + index, 8, 8, device="cuda") for index in range(16)]
    expected = [cummax(x) for x in inputs]
    torch.cuda.synchronize()

    def work(thread: int) -> None:
        stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for index in range(30):
                pick = (thread * 5 + index) % 16
                result = hosted(inputs[pick])
                stream.synchronize()
                close(result, expected[pick])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_work_is_ordered_with_the_callers_stream(hosted: tb.EngineModule) -> None:
    """The op must run on the engine's stream: its input is not there yet when the call returns."""
    late = torch.zeros(4, 8, 8, device="cuda")
    x = torch.randn(4, 8, 8, device="cuda")
    hosted(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        result = hosted(late)
    side.synchronize()
    close(result, cummax(x))


def test_grad_mode_and_autocast_do_not_reach_the_op(hosted: tb.EngineModule) -> None:
    x = torch.randn(4, 8, 8, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=HALF):
        result = hosted(x)
    assert not result.requires_grad
    close(result, cummax(x.detach()))


@dataclass(frozen=True)
class Failure:
    """A failing module, and a batch that it takes."""

    module: tb.EngineModule
    good: torch.Tensor


@pytest.fixture(scope="module")
def failing(backend: str) -> Failure:
    good = torch.randn(4, 8, 8, device="cuda")
    return Failure(convert(lambda x: moody(x * 2) + 1, good, backend, "engine"), good)


def test_an_exception_in_an_op_names_it_and_does_no_harm(failing: Failure) -> None:
    words = r"trtbridge_host_gpu_tests::moody.*\(3, 8, 8\)(.|\n)*not three"
    with pytest.raises(tb.ExecutionError, match=words) as caught:
        failing.module(torch.ones(3, 8, 8, device="cuda"))
    assert "test_plugin_host.py" in str(caught.value), "the Python line of the call"
    cause = caught.value.__cause__
    assert isinstance(cause, ValueError)
    frames = []
    trace = cause.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert "moody" in frames, f"the traceback reaches the op: {frames}"
    close(failing.module(failing.good), failing.good * 2 + 1)


def test_exceptions_stay_in_their_threads(failing: Failure) -> None:
    bad = torch.ones(3, 8, 8, device="cuda")

    def work(thread: int) -> int:
        failures = 0
        for _ in range(20):
            if thread % 2:
                with pytest.raises(tb.ExecutionError, match="not three"):
                    failing.module(bad)
                failures += 1
            else:
                close(failing.module(failing.good), failing.good * 2 + 1)
        return failures

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0, 20, 0, 20]


# Files

LOAD = """
import json, sys, torch
import trtbridge as tb
path, register = sys.argv[1:]
if register == "yes":
    @torch.library.custom_op("trtbridge_host_gpu_tests::saved", mutates_args=())
    def saved(x: torch.Tensor) -> torch.Tensor:
        return x * 10
try:
    module = tb.load(path, "cuda")
except tb.TrtBridgeError as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    print(json.dumps(["loaded", float(module(torch.ones(2, 8, device="cuda")).sum())]))
"""


@torch.library.custom_op("trtbridge_host_gpu_tests::saved", mutates_args=())
def saved(x: torch.Tensor) -> torch.Tensor:
    """The process that loads has another body for it, so it is the one that runs."""
    return x + 10


saved.register_fake(torch.empty_like)


def test_save_and_load_in_another_process(backend: str, tmp_path: Path) -> None:
    converted = convert(lambda x: saved(x * 2) + 1, torch.randn(4, 8, device="cuda"), backend, "engine")
    path = tmp_path / "model.trtb"
    tb.save(converted, path)
    assert "trtbridge_host_gpu_tests::saved" in json.dumps(dict(tb.load(path, "cuda").program.engines[0].info))

    def load(register: str) -> list[Any]:
        command = [sys.executable, "-c", LOAD, str(path), register]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout.splitlines()[-1]))

    assert load("yes") == ["loaded", 16 * 21.0]
    kind, words = load("no")
    assert kind == "PluginError"
    assert "trtbridge_host_gpu_tests::saved" in words
