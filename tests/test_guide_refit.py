"""docs/refit.md: every file and command in it works as it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_refit_guide(tmp_path: Path) -> None:
    name = "trtbridge_tests_guide_refit"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    guide = importlib.util.module_from_spec(spec)
    sys.modules[name] = guide
    spec.loader.exec_module(guide)
    found = [block for block in guide.blocks((ROOT / "docs" / "refit.md").read_text()) if len(block.words) > 1 or
             block.words == ("console",)]  # fmt: skip
    assert len(found) == 3
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [problem for block in found if (problem := runner.run(block))]
    assert not problems, "\n\n".join(problems)
