"""What becomes a plugin runs on the GPU as the module does: empty results, random numbers, sorts with ties."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trtbridge as tb

pytestmark = pytest.mark.gpu


def _module(function: Callable[..., Any]) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    return Model()


@pytest.mark.parametrize("shift", [-10.0, 0.0, 10.0], ids=["none", "some", "all"])
def test_data_dependent_sizes(shift: float) -> None:
    """A segment behind a selection runs on whatever number of rows there is, none among them."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x[x.sum(1) > 0]
        return rows.relu() @ torch.ones(6, 2, device=x.device), rows.sum(0), torch.nonzero(x > 1)

    shapes = {"args": ({0: tb.Dim("n", min=1, opt=4, max=8)},)}
    x = torch.randn(4, 6, device="cuda")
    fast = tb.convert(_module(function), (x,), dynamic_shapes=shapes, backend="tensorrt_rtx")
    x = torch.randn(7, 6, device="cuda") + shift
    for mine, wanted in zip(fast(x), function(x), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_random_numbers_are_torchs() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) + torch.rand_like(x)

    x = torch.randn(64, 64, device="cuda")
    fast = tb.convert(_module(function), (x,), backend="tensorrt_rtx")
    torch.manual_seed(7)
    expected = function(x)
    torch.manual_seed(7)
    torch.testing.assert_close(fast(x), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_sorting_many_equal_values_gives_a_permutation(dtype: torch.dtype) -> None:
    """As routers of mixtures of experts do: the order of equal values is free, but each index comes once."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.sort(x)
        return values * 2, indices + 0

    x = torch.randint(0, 8, (64,), device="cuda").to(dtype)
    values, indices = tb.convert(_module(function), (x,), backend="tensorrt_rtx")(x)
    assert torch.equal(values, torch.sort(x).values * 2)
    assert torch.equal(indices.sort().values, torch.arange(64, device="cuda"))
    assert torch.equal(x[indices] * 2, values)


def _route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, experts = torch.topk(x.softmax(-1), 2)
    return weights / weights.sum(-1, keepdim=True), experts


def _undo_a_sort(x: torch.Tensor) -> torch.Tensor:
    order = torch.argsort(x)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return (x[order] * 2)[inverse]


# The parts of a mixture of experts, one by one: the whole one came out wrong on TensorRT-RTX 1.6.1.
PARTS: dict[str, tuple[Callable[..., Any], Callable[[], torch.Tensor]]] = {
    "normalized top-k weights": (_route, lambda: torch.randn(32, 8)),
    "a sort and its inverse": (_undo_a_sort, lambda: torch.randint(0, 8, (64,))),
    "where each expert's rows end": (lambda x: x.cumsum(0, dtype=torch.int32), lambda: torch.randint(0, 9, (8,)).int()),
    "how many rows each expert has": (lambda x: torch.histc(x, 8, 0, 7) + 1, lambda: torch.randint(0, 8, (64,)).int()),
    "rows by expert": (
        lambda x: x.reshape(32, -1)[torch.argsort(x.reshape(-1)[:64].abs().mul(8).long() % 8) // 2],
        lambda: torch.randn(32, 16),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_mixture_of_experts(part: str) -> None:
    function, example = PARTS[part]
    fast = tb.convert(_module(function), (example().cuda(),), backend="tensorrt_rtx")
    for _ in range(3):
        x = example().cuda()
        mine, wanted = fast(x), function(x)
        if part == "rows by expert":  # the order of equal experts is free
            mine, wanted = mine.sort(0).values, wanted.sort(0).values
        torch.testing.assert_close(mine, wanted)


def test_a_small_mixture_of_experts() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval().cuda()
    wrapped = _module(lambda ids: model(input_ids=ids, use_cache=False).last_hidden_state)
    wrapped.inner = model
    ids = torch.randint(0, 100, (2, 16), device="cuda")
    fast = tb.convert(wrapped, (ids,), backend="tensorrt_rtx")
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), wrapped(ids), rtol=1e-3, atol=1e-3)


def test_arithmetic_of_8_bits_wraps_around(record_property: Callable[[str, object], None]) -> None:
    """As in torch, whether the engine computes in int8 or, where there are constants, in int32.

    TensorRT-RTX 1.6.1 builds one engine of this for other GPUs; for an H200 its builder was seen to refuse the `where`,
    and what is refused runs in PyTorch.
    """

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chosen = torch.where(y > 3, (x & 15) << 4, x)
        return x + y, x * y, x - 100, x * 3, ~(x >> 4) ^ y, x // 3, chosen

    x = torch.arange(-128, 128, dtype=torch.int8, device="cuda").reshape(4, 64)
    fast = tb.convert(_module(function), (x, x.flip(1)), backend="tensorrt_rtx")
    for mine, wanted in zip(fast(x, x.flip(1)), function(x, x.flip(1)), strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted)
    plugins = ", ".join(call.op for call in fast.program.plugin_calls)
    row = {"table": "fallbacks", "backend": "tensorrt_rtx", "of": "arithmetic of 8 bits", "plugins": plugins}
    record_property("row", json.dumps(row))
