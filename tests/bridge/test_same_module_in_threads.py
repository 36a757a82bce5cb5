"""One module in two threads: while torch traces it, it has other parameters, which nobody may take for its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import trtbridge as tb

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """While it is traced, `pause` is called."""

    pause: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            Scaled.pause()
        return self.linear(x) * self.scale


@pytest.fixture
def tracing() -> Iterator[threading.Event]:
    """Set when a trace has begun, which then lasts until others had time to begin."""
    begun = threading.Event()

    def pause() -> None:
        if not begun.is_set():
            begun.set()
            threading.Event().wait(0.5)

    Scaled.pause = staticmethod(pause)
    yield begun
    Scaled.pause = staticmethod(lambda: None)


def convert(model: nn.Module) -> tb.EngineModule:
    return tb.convert(model, (X,), backend="onnxruntime", refittable=True)


@pytest.mark.parametrize("other", ["convert", "compare", "refit", "convert_submodules"])
def test_it_keeps_its_parameters(other: str, request: pytest.FixtureRequest) -> None:
    model, outer = Scaled().train(), nn.Sequential()
    outer.append(model)
    built = convert(Scaled())
    expected = model(X).detach()
    before = model.state_dict(keep_vars=True)
    tracing: threading.Event = request.getfixturevalue("tracing")

    def then() -> tb.EngineModule | None:
        assert tracing.wait(30)
        if other == "convert":
            return convert(model)
        if other == "refit":
            built.refit(model)
            return built
        if other == "compare":
            assert tb.compare(model, built, (X,)).outputs
            return None
        parts = tb.convert_submodules(outer, "0", (X,), backend="onnxruntime")
        return parts.submodules_report.converted["0"]

    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(convert, model), threads.submit(then)]
        modules = [call.result() for call in calls]
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items()), "the same tensors as before"
    assert model.training
    for module in filter(None, modules):
        torch.testing.assert_close(module(X), expected)
