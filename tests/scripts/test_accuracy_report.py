"""scripts/accuracy_report.py: the example page, and pictures of it where there is a browser."""

from __future__ import annotations

import importlib.util
import re
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
    assert "Error by layer" in page
    assert page.count("<svg") == 3, "layers, and the errors of logits and energy"
    assert page.count('class="wrong"') == page.count('class="wrong-layer"') >= 1
    assert re.search(r"accuracy_report.py:\d+ \(blocks\.\d\.conv\)", page)
    assert "OUT OF TOLERANCE" in capsys.readouterr().out


@pytest.mark.skipif(not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), reason="no Chromium")
def test_screenshots(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    # Words that need more lines in a narrow window, and a policy as strict as that of a report.
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    page.write_text(f"<!DOCTYPE html>{policy}<style>body {{ margin: 0 }}</style><p>{'words ' * 2000}</p><div>end</div>")
    script.take_screenshots(page, tmp_path, "shot")
    heights = {}
    for wanted in script.WIDTHS:
        data = (tmp_path / f"shot-{wanted}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        width, heights[wanted] = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert width == wanted
    assert heights[400] > 2.5 * heights[1280] > 1000, "each picture is as high as its page"


def test_no_browser(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install chromium"):
        script.take_screenshots(tmp_path / "page.html", tmp_path, "shot")
