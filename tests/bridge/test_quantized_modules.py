"""Modules that come with quantization in them: their Q/DQ nodes reach the engine as they are."""

from __future__ import annotations

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops that PT2E writes
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import export
from trtbridge.bridge.options import Options
from trtbridge.bridge.planner import Planner

PAIR = {"QuantizeLinear", "DequantizeLinear"}


def _planner(model: nn.Module, x: torch.Tensor, backend: str = "onnxruntime", **options: object) -> Planner:
    return make_planner(model, (x,), None, None, get_backend(backend), Options.make(options))


class Pt2e(nn.Module):
    """What torchao's PT2E leaves: the ops of quantized_decomposed over int8 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        weight = self.layer.weight.detach()
        scale = weight.abs().amax(1) / 127
        self.register_buffer("codes", torch.round(weight / scale[:, None]).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(16, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.quantized_decomposed
        q = ops.quantize_per_tensor(x, 0.03, 0, -128, 127, torch.int8)
        x = ops.dequantize_per_tensor(q, 0.03, 0, -128, 127, torch.int8)
        weight = ops.dequantize_per_channel(self.codes, self.scale, self.zero, 0, -127, 127, torch.int8)
        return torch.relu(nn.functional.linear(x, weight, self.layer.bias))


class FakeQuantized(nn.Module):
    """Quantization-aware training's form, which NVIDIA ModelOpt's int8 layers have, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("scale", self.layer.weight.detach().abs().amax(1) / 127)
        self.register_buffer("zero", torch.zeros(16, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.03, 0, -128, 127)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.scale, self.zero, 0, -128, 127)
        return torch.relu(nn.functional.linear(x, weight, self.layer.bias))


@pytest.mark.parametrize("kind", [Pt2e, FakeQuantized])
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_a_quantized_module_passes_through(kind, precision, caplog):
    model, x = kind().eval(), torch.randn(4, 16)
    planner = _planner(model, x, precision=precision, **({"calibration": [x]} if precision == "int8" else {}))
    plain = export(model, (x,)).proto.graph.node
    (segment,) = planner.plan().segments
    ops = [node.op_type for node in segment.proto.graph.node]
    assert sorted(op for op in ops if op in PAIR) == sorted(n.op_type for n in plain if n.op_type in PAIR)
    assert not planner.calls
    if precision == "int8":
        fast = tb.convert(model, (x,), backend="onnxruntime")
        torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-5, atol=1e-5)
        assert [n.reason for n in planner.precision.unquantized] == ["it reads quantized values already"]


@pytest.mark.rtx
@pytest.mark.parametrize("kind", [Pt2e, FakeQuantized])
def test_engines_take_a_quantized_module(kind):
    pytest.importorskip("tensorrt_rtx")
    program = _planner(kind().eval(), torch.randn(4, 16), "tensorrt_rtx").build()
    assert len(program.engines) == 1
    assert not program.plugin_calls


def test_a_module_of_an_exported_program_converts():
    """PT2E gives one; it refuses eval()."""
    model, x = Pt2e().eval(), torch.randn(4, 16)
    program = torch.export.export(model, (x,)).module()
    with pytest.raises(NotImplementedError):
        program.eval()
    modes = [part.training for part in program.modules()]
    fast = tb.convert(program, (x,), backend="onnxruntime")
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert [part.training for part in program.modules()] == modes, "left as found"
