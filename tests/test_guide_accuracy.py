"""docs/accuracy.md: every file and command in it works as it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_accuracy_guide(run_guide: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The metadata that installing makes: what is installed here may be older than pyproject.toml.
    metadata = tmp_path / "site" / "trtbridge_entry_points-0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: trtbridge-entry-points\nVersion: 0.0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["polygraphy.run.plugins"]
    lines = ["[polygraphy.run.plugins]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(metadata.parent))

    def prepare(runner: Any) -> None:
        runner._program(
            runner.folder / ".bin" / "polygraphy",
            '-c "import sys; from polygraphy.tools import main; sys.exit(main())" "$@"',
        )

    folder = run_guide("accuracy.md", blocks=7, outputs=6, prepare=prepare)
    assert (folder / "report.html").exists()
