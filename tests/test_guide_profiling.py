"""docs/profiling.md: every file and command in it works as it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_profiling_guide(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "trtbridge_tests_guide_profiling"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    guide = importlib.util.module_from_spec(spec)
    sys.modules[name] = guide
    spec.loader.exec_module(guide)
    text = (ROOT / "docs" / "profiling.md").read_text()
    found = [block for block in guide.blocks(text) if block.words[0] != "text"]  # that is one run, not each
    assert len(found) >= 7
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [problem for block in found if (problem := runner.run(block))]
    assert not problems, "\n\n".join(problems)
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (ROOT / "docs" / "profile-sentence-encoder.png").exists()
