"""Attention as one node on the GPU: the numbers of every form against eager float32, and the clock of "auto"."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import DRY_RUN, Report, compare, leaves

import trtbridge as tb
from trtbridge.bridge import attention_judge
from trtbridge.bridge.attention_judge import FUSED, ONE_NODE

sys.path.insert(0, str(Path(__file__).parents[1] / "bridge"))

from attention_forms import FORMS, HEADS, SIZE, Attention, Form, masked

BATCH = tb.Dim("batch", min=1, opt=2, max=4)
LENGTH = tb.Dim("length", min=2, opt=10, max=64)


def _shapes(form: Form) -> dict[str, object]:
    masks = {"masks": ({0: BATCH, 2: LENGTH, 3: LENGTH},)} if form.mask else {}
    return {"x": {0: BATCH, 1: LENGTH}, **masks}


def _cast(args: tuple[torch.Tensor, ...], dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(device, dtype if t.is_floating_point() else None) for t in args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMS)
def test_one_node_computes_what_the_form_does(
    name: str, dtype: torch.dtype, backend: str, device: torch.device, report: Report
) -> None:
    form = FORMS[name]
    module = form.module().to(device, dtype)
    args = _cast(form.example(), dtype, device)
    fast = tb.convert(module, args, dynamic_shapes=_shapes(form), backend=backend, attention="fused")
    info = fast.program.info["attention"]
    (group,) = info["groups"]
    # TensorRT-RTX 1.6.1 on an H200 has no kernel for shared heads: there keys and values are repeated.
    allowed = ONE_NODE if form.kv_heads < HEADS else (FUSED,)
    assert group["form"] in allowed, info
    assert not fast.program.plugin_calls
    full = form.module().to(device)
    full.load_state_dict({key: value.float() for key, value in module.state_dict().items()})
    for batch, length in ((2, 10), (4, 64), (1, 2), (3, 37)):
        args = _cast(form.example(batch, length), dtype, device)
        with torch.no_grad():
            expected = leaves(full(*_cast(args, torch.float32, device)))
        numbers = compare([t.float() for t in leaves(fast(*args))], expected)
        row = {"form": name, "node": group["form"], "dtype": str(dtype), "batch": batch, "length": length}
        report("attention", **row, **numbers)
        assert numbers["cosine"] > (0.9999 if dtype is torch.float16 else 0.999), (batch, length)


def test_rows_without_a_key(backend: str, device: torch.device) -> None:
    """torch gives zeros for a row that a mask hides altogether, or a mean; never NaN, and no other row changes."""
    module = Attention(masked).eval().to(device, torch.float16)
    x = torch.randn(2, 10, HEADS * SIZE).to(device, torch.float16)
    keep = torch.ones(2, 1, 10, 10, dtype=torch.bool, device=device)
    fast = tb.convert(module, (x, keep), backend=backend, attention="fused")
    keep[1, 0, 3] = False
    mine, wanted = fast(x, keep), module(x, keep)
    assert torch.isfinite(mine).all()
    others = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    torch.testing.assert_close(mine[:, others], wanted[:, others], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["sdpa", "sdpa grouped"])
def test_auto_times_both_forms_once(
    name: str, backend: str, cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    form = FORMS[name]
    module = form.module().to(cuda, torch.float16)
    args = _cast(form.example(), torch.float16, cuda)
    first = tb.convert(module, args, backend=backend, cache_dir=tmp_path, attention="auto")
    (group,) = first.program.info["attention"]["groups"]
    assert group["fused_ms"] > 0
    assert group["decomposed_ms"] > 0
    assert (group["form"] in ONE_NODE) == (group["fused_ms"] <= group["decomposed_ms"])
    report("attention auto", model=name, **{key: value for key, value in group.items() if key != "count"})

    def never(*_: object) -> list[float]:
        raise AssertionError("what is in the cache is measured again")

    monkeypatch.setattr(attention_judge, "cuda_clock", never)
    again = tb.convert(module, args, backend=backend, cache_dir=tmp_path, attention="auto")  # nothing is timed again
    assert again.program.info["attention"] == first.program.info["attention"]
    with torch.no_grad():
        torch.testing.assert_close(again(*args), module(*args), rtol=1e-2, atol=1e-2)


def test_a_mixed_model_has_its_attention_in_halves(backend: str, device: torch.device) -> None:
    form = FORMS["eager"]
    module = form.module().to(device)
    args = _cast(form.example(), torch.float32, device)
    fast = tb.convert(module, args, backend=backend, precision="fp16", attention="fused")
    (group,) = fast.program.info["attention"]["groups"]
    assert (group["form"], group["kind"].split(" ")[0]) == ("fused", "float16")
    with torch.no_grad():
        assert compare(leaves(fast(*args)), leaves(module(*args)))["cosine"] > 0.9999
    assert DRY_RUN or fast(*args).device.type == "cuda"
