"""New weights for real engines: refitted, stripped and streamed. Written without a GPU at hand, and not run yet."""

from __future__ import annotations

import copy
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_refit(
    case: str, dtype: torch.dtype, backend: str, device: torch.device, tmp_path: Path, report: Report
) -> None:
    """New weights, back again, saved and loaded and refitted."""
    module, other, x = _pair(case, dtype, device)
    started = time.perf_counter()
    fast = tb.convert(module, (x,), backend=backend, refittable=True)
    convert_s = time.perf_counter() - started
    assert _cosine(fast, module, x) > COSINE
    assert _cosine(fast, other, x) < COSINE
    started = time.perf_counter()
    fast.refit(other)
    refit_s = time.perf_counter() - started
    found = _cosine(fast, other, x)
    report("refit", model=case, dtype=str(dtype), cosine=found, convert_s=convert_s, refit_s=refit_s)
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
