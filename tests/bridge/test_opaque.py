"""Functions that torch.export cannot look into, in modules that do something else while they are traced."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import trtbridge as tb


class Masked(torch.nn.Module):
    """As attention of transformers: a mask is made, and made wrong, only while the module is traced."""

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        length = query.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool) if torch.compiler.is_exporting() else None
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)


def test_a_module_that_fails_only_while_it_is_traced_is_refused_with_torchs_words() -> None:
    query, key = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 24, 16)
    assert Masked()(query, key).shape == query.shape, "the module itself runs"
    with pytest.raises(
        tb.ExportError, match=r"(?s)torch\.export cannot trace Masked.*while the module.*\(8, 8\)"
    ) as caught:
        tb.convert(Masked(), (query, key), backend="onnxruntime")
    assert "24" in str(caught.value).partition("gets tensors")[0], "torch's own words tell which sizes do not fit"


def test_what_runs_as_it_is_traced_is_one_call() -> None:
    class Pairs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.combinations(x) * 2

    x = torch.randn(5)
    fast = tb.convert(Pairs(), (x,), backend="onnxruntime")
    assert [call.op for call in fast.program.plugin_calls] == ["python::torch.combinations"]
    torch.testing.assert_close(fast(x), Pairs()(x))
