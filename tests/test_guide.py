"""The guides: every file and command in them works as they say. Parts for a GPU run in tests/gpu/test_authoring.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# With the least number of blocks and commands: one that is no longer found would no longer be tested.
PAGES = {
    "passes": (8, 6),
    "plugins": (12, 9),
    "precision": (4, 1),
    "pytorch": (7, 3),
    "refit": (3, 1),
    "runtime": (4, 2),
    "shapes": (4, 2),
    "wrong-results": (10, 8),
}


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, run_guide: Callable[..., Any]) -> None:
    blocks, commands = PAGES[page]
    run_guide(f"{page}.md", blocks=blocks, outputs=commands)


def test_profiling_page(run_guide: Callable[..., Any]) -> None:
    pytest.importorskip("matplotlib")
    folder = run_guide("profiling.md", blocks=7, outputs=3)
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert (Path(__file__).parent.parent / "docs" / "profile-sentence-encoder.png").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```console\n$ echo one two\none ...\n```\n", ""),
        ("```console\n$ echo one\ntwo\n```\n", "line 2: $ echo one\ngave:\none"),
        ("```console\n$ exit 3\n```\n", "status 3 instead of 0"),
        ("```console status=3\n$ echo a\na\n$ exit 3\n```\n", ""),
        ("```console gpu\n$ exit 1\n```\n", ""),
        ("```python file=a.py\nprint(1)\n```\n```console\n$ python a.py\n1\n```\n", ""),
        ("```python\nprint(1)\n```\n", "would not be tested"),
        ("```console\n$ trtbridge --version\ntrtbridge 0...\n```\n", ""),
    ],
)
def test_the_runner_itself(guide: ModuleType, text: str, words: str, tmp_path: Path) -> None:
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [runner.run(block) for block in guide.blocks(text)]
    assert words in problems[-1]
    assert bool(words) == bool(problems[-1])
