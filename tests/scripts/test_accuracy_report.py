"""scripts/accuracy_report.py: the example page, and pictures of it where there is a browser."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "accuracy_report.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accuracy_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_shows_all_parts(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["accuracy_report.py", "example", "--backend", "onnxruntime", "--out", str(tmp_path)]
    )
    script.main()
    page = (tmp_path / "accuracy-example.html").read_text()
    assert page.count("within tolerance</span>") == 2, "logits and label"
    assert page.count("out of tolerance</span>") == 2, "energy, and the whole"
    assert "<svg" in page
    assert "OUT OF TOLERANCE" in capsys.readouterr().out


@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no Chromium")
def test_screenshots(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>x</title><p>words")
    script.take_screenshots(page, tmp_path, "shot")
    for width, height in script.SIZES.items():
        data = (tmp_path / f"shot-{width}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [width, height]
