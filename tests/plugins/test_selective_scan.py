"""The selective scan: the reference against plain loops and closed forms, its registration, and a converted model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import trtbridge as tb
from trtbridge.errors import InputError
from trtbridge.plugins import selective_scan as module
from trtbridge.plugins.selective_scan import selective_scan, selective_scan_with_state


def arguments(n: int, dim: int, states: int, length: int, full: bool = True) -> dict[str, Any]:
    """Random arguments, as a trained model has them."""
    call = {
        "u": torch.randn(n, dim, length),
        "delta": torch.randn(n, dim, length) if full else torch.rand(n, dim, length),
        "A": -torch.rand(dim, states) * 4,
        "B": torch.randn(n, states, length),
        "C": torch.randn(n, states, length),
    }
    if not full:
        return call
    extra = {"D": torch.randn(dim), "z": torch.randn(n, dim, length), "delta_bias": torch.randn(dim) - 3}
    return call | extra | {"delta_softplus": True}


def with_loops(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, number by number, in Python's float64."""
    u, delta, a, b, c = (call[name].tolist() for name in ("u", "delta", "A", "B", "C"))
    n, dim, length = call["u"].shape
    states = len(a[0]) if a else 0
    y = torch.zeros(n, dim, length, dtype=torch.float64)
    last = torch.zeros(n, dim, states, dtype=torch.float64)
    for i in range(n):
        for d in range(dim):
            h = [0.0] * states
            for t in range(length):
                step = delta[i][d][t] + (float(call["delta_bias"][d]) if "delta_bias" in call else 0.0)
                if call.get("delta_softplus"):
                    step = math.log1p(math.exp(step))
                h = [math.exp(step * a[d][s]) * h[s] + step * b[i][s][t] * u[i][d][t] for s in range(states)]
                out = sum(c[i][s][t] * h[s] for s in range(states))
                out += float(call["D"][d]) * u[i][d][t] if "D" in call else 0.0
                if "z" in call:
                    gate = float(call["z"][i, d, t])
                    out *= gate / (1 + math.exp(-gate))
                y[i, d, t] = out
            last[i, d] = torch.tensor(h)
    return y, last


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 16, 33), (1, 7, 5, 7), (1, 2, 1, 100)])
def test_it_agrees_with_the_definition(sizes: tuple[int, int, int, int], full: bool) -> None:
    call = arguments(*sizes, full)
    expected, expected_state = with_loops(call)
    y, state = selective_scan_with_state(**call)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(selective_scan(**call), y, rtol=0, atol=0)


def test_without_decay_it_is_a_running_sum() -> None:
    call = arguments(2, 4, 1, 50, full=False)
    call["A"] = torch.zeros_like(call["A"])
    expected = (call["delta"] * call["u"] * call["B"]).cumsum(2) * call["C"]
    torch.testing.assert_close(selective_scan(**call), expected, rtol=1e-4, atol=1e-5)


def test_with_constant_parameters_it_is_a_convolution() -> None:
    """Equation 3 of the paper: y = u * K with K_t = C exp(ΔA)^t ΔB."""
    call = arguments(1, 1, 3, 20, full=False)
    b, c, step = torch.randn(3), torch.randn(3), 0.3
    call |= {
        "delta": torch.full((1, 1, 20), step),
        "B": b[None, :, None].expand(1, 3, 20),
        "C": c[None, :, None].expand(1, 3, 20),
    }
    powers = torch.exp(step * call["A"][0][:, None] * torch.arange(20))
    kernel = (c[:, None] * powers * step * b[:, None]).sum(0)
    expected = F.conv1d(F.pad(call["u"], (19, 0)), kernel.flip(0)[None, None])
    torch.testing.assert_close(selective_scan(**call), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_rounded_at_the_end(dtype: torch.dtype) -> None:
    call = arguments(2, 3, 16, 64)
    half = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.dim() == 3 else v for k, v in call.items()}
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in half.items()}
    y, state = selective_scan_with_state(**half)
    expected, expected_state = selective_scan_with_state(**exact)
    assert (y.dtype, state.dtype, expected_state.dtype) == (dtype, torch.float32, torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-6)


def test_empty() -> None:
    y, state = selective_scan_with_state(**arguments(2, 3, 4, 0))
    assert y.shape == (2, 3, 0)
    assert not state.any()
    assert selective_scan(**arguments(0, 3, 4, 5)).shape == (0, 3, 5)
    call = arguments(1, 3, 0, 5)
    expected = call["D"][:, None] * call["u"] * F.silu(call["z"])
    torch.testing.assert_close(selective_scan(**call), expected)


def test_registration() -> None:
    """Schemas and fake kernels say what the ops do."""
    utils = ("test_schema", "test_faketensor")
    for op in (torch.ops.trtbridge.selective_scan.default, torch.ops.trtbridge.selective_scan_with_state.default):
        for full in (False, True):
            call = arguments(2, 3, 4, 9, full)
            torch.library.opcheck(op, (), call, test_utils=utils)
            call["u"] = call["u"].transpose(1, 2).contiguous().transpose(1, 2)
            torch.library.opcheck(op, (), call, test_utils=utils)
    assert (module.OP, module.STATE_OP) == ("trtbridge::selective_scan", "trtbridge::selective_scan_with_state")


def test_wrong_arguments_are_named() -> None:
    call = arguments(2, 3, 4, 9)
    for change, words in (
        ({"u": call["u"][0]}, "u has shape"),
        ({"A": call["A"][0]}, "A has shape"),
        ({"B": call["B"][:, 1:]}, "B has shape"),
        ({"delta": call["delta"][..., 1:]}, "delta has shape"),
        ({"D": call["D"][1:]}, "D has shape"),
        ({"z": call["z"].long()}, r"z is torch\.int64"),
    ):
        with pytest.raises(InputError, match=words):
            selective_scan(**call | change)


class Mixer(torch.nn.Module):
    """The part of a Mamba block around the scan."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = torch.nn.Linear(6, 16), torch.nn.Linear(8, 6)
        self.parameters_of_x, self.steps = torch.nn.Linear(8, 2 + 8), torch.nn.Linear(2, 8)
        self.a_log, self.d = torch.nn.Parameter(torch.rand(8, 4)), torch.nn.Parameter(torch.randn(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, gate = self.inner(tokens).chunk(2, -1)
        low, b, c = self.parameters_of_x(x).split([2, 4, 4], -1)
        args = (x.mT, (low @ self.steps.weight.T).mT, -self.a_log.exp(), b.mT, c.mT, self.d, gate.mT, self.steps.bias)
        return self.out(torch.ops.trtbridge.selective_scan(*args, True).mT)


def test_converted() -> None:
    model = Mixer().eval()
    shapes = ({0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=1, opt=9, max=64)},)
    fast = tb.convert(model, (torch.randn(2, 9, 6),), dynamic_shapes=shapes, backend="onnxruntime")
    for n, length in ((2, 9), (1, 1), (4, 64)):
        tokens = torch.randn(n, length, 6)
        torch.testing.assert_close(fast(tokens), model(tokens).detach(), rtol=1e-4, atol=1e-5)
