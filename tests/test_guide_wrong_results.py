"""docs/wrong-results.md: every file and command in it works as it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent


def _load() -> ModuleType:
    name = "trtbridge_tests_guide_wrong_results"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_wrong_results_guide(tmp_path: Path) -> None:
    guide = _load()
    found = list(guide.blocks((ROOT / "docs" / "wrong-results.md").read_text()))
    assert len(found) >= 10
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [problem for block in found if (problem := runner.run(block))]
    assert not problems, "\n\n".join(problems)
    assert len(runner.outputs) >= 8
