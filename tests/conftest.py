"""Fixtures for all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.structure import flatten

# A busy machine is no failure of the code.
hypothesis.settings.register_profile("trtbridge", deadline=None)
hypothesis.settings.load_profile("trtbridge")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("TRTBRIDGE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def guide() -> ModuleType:
    """tests/gpu/guide.py, which runs the code of a Markdown guide."""
    name = "trtbridge_tests_guide"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_guide(guide: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Run a page of docs/: every file and command in it works as it says."""

    def run(page: str, blocks: int, outputs: int, prepare: Callable[[Any], None] | None = None) -> Path:
        """The folder that it ran in; it must have at least so many blocks, and commands whose output was compared."""
        text = (Path(__file__).parent.parent / "docs" / page).read_text()
        # "text" is what was seen once, "py" a line or two out of a program.
        found = [block for block in guide.blocks(text) if block.words[0] not in ("text", "py")]
        assert len(found) >= blocks
        folder = tmp_path / "guide"
        folder.mkdir()
        runner = guide.Guide(folder, gpu=False)
        if prepare is not None:
            prepare(runner)
        problems = [problem for block in found if (problem := runner.run(block))]
        assert not problems, "\n\n".join(problems)
        assert len(runner.outputs) >= outputs
        return folder

    return run


Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compare two nested results: same structure, dtypes, shapes, and values within a tolerance."""

    def check(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        actual_tensors, actual_structure = flatten(actual)
        expected_tensors, expected_structure = flatten(expected)
        assert actual_structure == expected_structure
        for mine, theirs in zip(actual_tensors, expected_tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)

    return check


@pytest.fixture
def convert_both(assert_same: Callable[..., None]) -> Callable[..., tuple[tb.EngineModule, tb.EngineModule]]:
    """Convert for ONNX Runtime and for TensorRT-RTX, and compare the former with PyTorch on several calls."""

    def convert(
        model: torch.nn.Module,
        calls: Sequence[Call],
        dynamic_shapes: Any = None,
        tolerance: float = 1e-4,
        **options: Any,
    ) -> tuple[tb.EngineModule, tb.EngineModule]:
        pytest.importorskip("tensorrt_rtx")
        args, kwargs = calls[0]
        options.setdefault("plugin_host", "segments")  # else where plugins run hangs on the version of TensorRT-RTX
        on_cpu, built = (
            tb.convert(model, args, kwargs, dynamic_shapes=dynamic_shapes, backend=name, **options)
            for name in ("onnxruntime", "tensorrt_rtx")
        )
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for call_args, call_kwargs in calls:
                expected = model(*call_args, **call_kwargs)
                assert_same(on_cpu(*call_args, **call_kwargs), expected, rtol=tolerance, atol=tolerance)
        model.train(was_training)
        for engine in built.program.engines:
            assert engine.backend == "tensorrt_rtx"
            assert engine.size_bytes > 1000
            assert engine.info["layers"], "the network that was parsed has layers"
        return on_cpu, built

    return convert
