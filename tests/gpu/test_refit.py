"""New weights for real engines: refitted, in place where weights are inputs; stripped, streamed; what that costs."""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRY_RUN, Report, compare, leaves
from torch import nn

import trtbridge as tb

COSINE = 0.999
CALLS = 50


class Attentive(nn.Module):
    """A language model with tied weights, in small."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.encoder(self.embedding(ids)) * self.scale)
        return made


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 48, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.lstm(x)[0]
        return made


class Plugins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.cummax(self.first(x), -1).values + torch.cummin(self.weight, 0).values
        made: torch.Tensor = self.last(hidden.relu())
        return made


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.GroupNorm(4, 64)]
    more = [nn.PReLU(64), nn.ConvTranspose2d(64, 64, 2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *more, nn.Linear(64, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "convolutions": (_convolutions, lambda: torch.randn(2, 3, 16, 16)),
    "transformer": (Attentive, lambda: torch.randint(0, 100, (2, 9))),
    "recurrent": (Recurrent, lambda: torch.randn(2, 7, 32)),
    "plugins": (Plugins, lambda: torch.randn(64, 64)),
}


def _pair(case: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A module, another one like it, and an input."""
    torch.manual_seed(0)
    factory, example = CASES[case]
    module = factory().eval().to(device, dtype)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        for name, buffer in other.named_buffers():
            if "running" in name and buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = example().to(device)
    return module, other, x.to(dtype) if x.is_floating_point() else x


def _cosine(converted: tb.EngineModule, module: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(compare(leaves(converted(x)), leaves(module(x)))["cosine"])


def _milliseconds(module: tb.EngineModule, x: torch.Tensor) -> float:
    """Median time of a call, each waited for."""
    times = []
    for turn in range(2 * CALLS):
        started = time.perf_counter()
        module(x)
        if not DRY_RUN:
            torch.cuda.synchronize()
        if turn >= CALLS:
            times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e3, 4)


def _in_place(module: tb.EngineModule) -> bool:
    """Whether it takes other weights while its execution contexts and CUDA graphs stay."""
    engines = module.program.engines
    return module.program.backend != "onnxruntime" and all(engine.info.get("refit") != "engine" for engine in engines)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_refit(
    case: str, dtype: torch.dtype, backend: str, device: torch.device, tmp_path: Path, report: Report
) -> None:
    """New weights, back again, saved and loaded and refitted."""
    module, other, x = _pair(case, dtype, device)
    plain = tb.convert(module, (x,), backend=backend)
    started = time.perf_counter()
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    convert_s = time.perf_counter() - started
    assert _cosine(fast, module, x) > COSINE
    assert _cosine(fast, other, x) < COSINE
    started = time.perf_counter()
    fast.refit(other)
    refit_s = time.perf_counter() - started
    found = _cosine(fast, other, x)
    report(
        "refit", model=case, dtype=str(dtype), cosine=found, convert_s=round(convert_s, 3), refit_s=round(refit_s, 4),
        in_place=_in_place(fast), call_ms=_milliseconds(fast, x), not_refittable_ms=_milliseconds(plain, x),
    )  # fmt: skip
    assert found > COSINE
    tb.save(fast, tmp_path / "new.trtb")
    loaded = tb.load(tmp_path / "new.trtb", device=device)
    assert _cosine(loaded, other, x) > COSINE
    loaded.refit(module.state_dict())
    assert _cosine(loaded, module, x) > COSINE
    fast.refit(module)
    assert _cosine(fast, module, x) > COSINE


@pytest.mark.parametrize("case", CASES)
def test_stripped(case: str, backend: str, device: torch.device, tmp_path: Path, report: Report) -> None:
    """A file without weights is smaller, and takes those of any module of the kind."""
    module, other, x = _pair(case, torch.float32, device)
    sizes = {}
    for name, options in (("whole", {}), ("stripped", {"strip_weights": True})):
        fast = tb.convert(module, (x,), backend=backend, **options)  # type: ignore[arg-type]
        assert _cosine(fast, module, x) > COSINE
        tb.save(fast, tmp_path / f"{name}.trtb")
        sizes[name] = (tmp_path / f"{name}.trtb").stat().st_size
    report("stripped", model=case, **{f"{name}_bytes": size for name, size in sizes.items()})
    empty = tb.load(tmp_path / "stripped.trtb", device=device)
    with pytest.raises(tb.RefitError, match="without weights"):
        empty(x)
    empty.refit(other)
    assert _cosine(empty, other, x) > COSINE
    loaded = tb.load(tmp_path / "stripped.trtb", device=device, weights=module.state_dict())
    assert _cosine(loaded, module, x) > COSINE


def _other(module: nn.Module) -> nn.Module:
    """A module like it whose results differ."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return made


def test_graphs_stay_where_weights_are_exchanged_in_place(backend: str, cuda: torch.device) -> None:
    """Bound calls and a caller's CUDA graph have the new weights, and nothing is captured anew."""
    module, other, x = _pair("convolutions", torch.float32, cuda)
    fast = tb.convert(module, (x,), backend=backend, refittable=True, cuda_graphs=True)
    for _ in range(4):
        fast(x)
    bound = fast.bind(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fast(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast(x)
    for weights in (other, module, other):
        before = fast.stats()
        fast.refit(weights)
        with torch.no_grad():
            expected = leaves(weights(x))
        assert compare(leaves(fast(x)), expected)["cosine"] > COSINE
        assert compare(leaves(bound()), expected)["cosine"] > COSINE
        if not _in_place(fast):
            continue
        graph.replay()
        assert compare(leaves(result), expected)["cosine"] > COSINE
        after = fast.stats()
        assert (after.contexts, after.graph_captures) == (before.contexts, before.graph_captures)


def test_calls_never_see_some_weights_of_each(backend: str, device: torch.device) -> None:
    """While other threads call, each result is that of one set of weights or of the other."""
    module, other, x = _pair("transformer", torch.float32, device)
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    expected = [fast(x).clone()]
    fast.refit(other)
    expected.append(fast(x).clone())
    stop, wrong, counts = threading.Event(), [], [0, 0]

    def call() -> None:
        while not stop.is_set():
            found = fast(x)
            near = [torch.allclose(found, one, rtol=1e-3, atol=1e-4) for one in expected]
            counts[near.index(True) if any(near) else 0] += 1
            if near.count(True) != 1:
                wrong.append(found)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(20):
            fast.refit((module, other)[turn % 2])
            time.sleep(0.02)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert min(counts) > 0


def test_a_copy_keeps_its_weights(backend: str, device: torch.device) -> None:
    module, other, x = _pair("convolutions", torch.float32, device)
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    copied = copy.deepcopy(fast)
    fast.refit(other)
    assert _cosine(copied, module, x) > COSINE
    assert _cosine(fast, other, x) > COSINE


def test_every_profile_has_the_new_weights(backend: str, device: torch.device) -> None:
    module = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval().to(device)
    other = _other(module)
    batch = tb.Dim("batch", profiles=[(1, 1, 1), (2, 8, 32)])
    x = torch.randn(8, 64, device=device)
    fast = tb.convert(module, (x,), dynamic_shapes=({0: batch},), backend=backend, refittable=True)
    for weights in (module, other, module):
        fast.refit(weights)
        for size in (8, 1, 32, 1, 2):  # the profile changes, and with it what TensorRT knows of addresses
            assert _cosine(fast, weights, torch.randn(size, 64, device=device)) > COSINE


class SumOfChosen(nn.Module):
    """Has a result of nothing where nothing is chosen: an engine on the GPU, ONNX Runtime for empty inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.last(self.first(x)[x[:, 0] > 0].sum(0, keepdim=True))
        return made


def test_sizes_that_depend_on_data(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    module = SumOfChosen().eval().to(device)
    other = _other(module)
    x = torch.randn(12, 16, device=device)
    fast = tb.convert(module, (x,), backend=backend, refittable=True, max_data_size=12)
    for weights in (other, module):
        fast.refit(weights)
        for given in (x, x[:, :1].abs() * -1 + x * 0, torch.ones_like(x)):  # some, none and all of them
            assert _cosine(fast, weights, given) > COSINE


def test_layers_are_timed(backend: str, device: torch.device) -> None:
    """A profile binds the weights too: its calls give what the module gives, layers have times."""
    module, other, x = _pair("convolutions", torch.float32, device)
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    fast.refit(other)
    found = fast.profile((x,), iterations=5)
    assert found.layers
    assert all(step.time_ms > 0 for step in found.steps)


def test_misfits_leave_the_engine_alone(backend: str, device: torch.device) -> None:
    module, other, x = _pair("convolutions", torch.float32, device)
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    before = fast(x).clone()
    state: dict[str, Any] = other.state_dict()
    state["0.weight"] = state["0.weight"][:, :2]
    with pytest.raises(tb.RefitError, match=r"0\.weight"):
        fast.refit(state)
    assert torch.equal(fast(x), before)


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_weight_streaming(part: float, backend: str, device: torch.device, cuda: torch.device, report: Report) -> None:
    if DRY_RUN:
        pytest.skip("ONNX Runtime streams no weights")
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).eval().to(device).half()
    x = torch.randn(4, 1024, device=device).half()
    budget = int(part * 8 * 1024 * 1024 * 2)
    fast = tb.convert(module, (x,), backend=backend, weight_streaming_bytes=budget)
    found = _cosine(fast, module, x)
    report("weight streaming", budget_bytes=budget, cosine=found)
    assert found > COSINE
