"""Fixtures for the tests of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge import convert as convert_module
from trtbridge.bridge import localize as localize_module
from trtbridge.bridge.export import ExportedModule
from trtbridge.bridge.model import OnnxModel

sys.path.insert(0, str(Path(__file__).parent))  # for localize_nets.py

from localize_nets import Net

_CACHE: dict[Any, Any] = {}


@pytest.fixture
def export_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """localize() and convert() trace and export a module once for all calls alike: that is what takes the time."""
    real_trace, real_export = localize_module.trace, ExportedModule.to_onnx

    def trace(model: torch.nn.Module, args: Any, kwargs: Any, **options: Any) -> Any:
        tensors = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        values = tuple((one.dtype, one.double().numpy().tobytes(), tuple(one.shape)) for one in tensors)
        return _kept((id(model), values, repr(options)), real_trace, model, args, kwargs, **options)

    def to_onnx(self: ExportedModule, plugins: Mapping[str, str]) -> Any:
        return _kept((id(self), tuple(plugins)), real_export, self, plugins)

    monkeypatch.setattr(localize_module, "trace", trace)
    monkeypatch.setattr(convert_module, "trace", trace)
    monkeypatch.setattr(ExportedModule, "to_onnx", to_onnx)


def _kept(key: Any, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if key not in _CACHE:
        _CACHE[key] = make(*args, **kwargs), args  # the arguments are kept, so that ids stay their own
    return _CACHE[key][0]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8) * 2


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> OnnxModel:
    return tb.export(net, (torch.randn(4, 8),))


@pytest.fixture(scope="module")
def converted(net: nn.Module) -> tb.EngineModule:
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    return tb.convert(net, (torch.randn(4, 8),), dynamic_shapes=shapes, backend="onnxruntime")
