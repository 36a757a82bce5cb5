"""A custom op that runs in another thread may make torch fail while it traces or translates: that is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import trace as bridge_trace

X = torch.ones(2, 8)


class Net(torch.nn.Module):
    """A call that is translated, and one that becomes a plugin."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.trtbridge_test_note.double(self.linear(x).relu())


@torch.library.custom_op("trtbridge_test_note::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def annotate() -> None:
    """As torch.fx.traceback.annotate ends when the note is gone."""
    del {}["custom"]


def losing(function: Callable[..., Any], times: int, wrapped: bool = False) -> tuple[Callable[..., Any], list[int]]:
    """A function that fails so for some times, and what counts its calls."""
    calls: list[int] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > times:
            return function(*args, **kwargs)
        try:
            annotate()
        except KeyError as error:
            if not wrapped:
                raise
            raise RuntimeError("torch.export failed") from error

    return call, calls


@pytest.mark.parametrize("place", ["export.export", "onnx.export"], ids=["trace", "translation"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "cause"])
def test_a_lost_note_is_no_failure(monkeypatch: pytest.MonkeyPatch, place: str, wrapped: bool) -> None:
    blamed: list[object] = []
    monkeypatch.setattr(bridge_trace, "_make_opaque", lambda opaque, *others: blamed.append(opaque))
    home = getattr(torch, place.split(".")[0])
    failing, calls = losing(home.export, 2, wrapped)
    monkeypatch.setattr(home, "export", failing)
    model = Net()
    module = tb.convert(model, (X,), backend="onnxruntime", device="cpu")
    assert len(calls) >= 3
    assert blamed == [], "no function is taken for the cause"
    assert [call.op for call in module.program.plugin_calls] == ["trtbridge_test_note::double.default"], "no other one"
    assert torch.allclose(module(X), model(X), atol=1e-6)


def test_one_that_is_lost_each_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing, calls = losing(torch.onnx.export, 100)
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(tb.ExportError, match=r"torch\.onnx cannot translate Net:\n.*'custom'"):
        tb.convert(Net(), (X,), backend="onnxruntime", device="cpu")
    assert len(calls) == 6


def test_a_key_error_of_the_modules_own_is_the_modules() -> None:
    calls: list[int] = []

    class Lacking(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x * {}["custom"]  # type: ignore[no-any-return]

    with pytest.raises(tb.ExportError, match="custom"):
        tb.convert(Lacking(), (X,), backend="onnxruntime", device="cpu")
    assert len(calls) <= 2
