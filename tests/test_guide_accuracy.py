"""docs/accuracy.md: every file and command in it works as it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent


def _load() -> ModuleType:
    name = "trtbridge_tests_guide_accuracy"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_accuracy_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The metadata that installing makes: what is installed here may be older than pyproject.toml.
    metadata = tmp_path / "site" / "trtbridge_entry_points-0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trtbridge-entry-points\nVersion: 0.0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["polygraphy.run.plugins"]
    lines = ["[polygraphy.run.plugins]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(metadata.parent))
    guide = _load()
    found = list(guide.blocks((ROOT / "docs" / "accuracy.md").read_text()))
    assert len(found) >= 7
    folder = tmp_path / "guide"
    folder.mkdir()
    runner = guide.Guide(folder, gpu=False)
    runner._program(
        folder / ".bin" / "polygraphy", '-c "import sys; from polygraphy.tools import main; sys.exit(main())" "$@"'
    )
    problems = [problem for block in found if (problem := runner.run(block))]
    assert not problems, "\n\n".join(problems)
    assert (folder / "report.html").exists()
    assert len(runner.outputs) >= 6
