"""The guides: every file and command in them works as they say. Parts for a GPU run in tests/gpu/test_authoring.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def _load() -> ModuleType:
    name = "trtbridge_tests_guide"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / "guide.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


guide = _load()


# With the least number of blocks and commands: one that is no longer found would no longer be tested.
PAGES = {
    "passes": (8, 6),
    "plugins": (12, 9),
    "precision": (4, 1),
    "runtime": (4, 2),
    "shapes": (4, 2),
    "wrong-results": (10, 8),
}


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path) -> None:
    found = list(guide.blocks((ROOT / "docs" / f"{page}.md").read_text()))
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [problem for block in found if (problem := runner.run(block))]
    assert not problems, "\n\n".join(problems)
    assert len(found) >= PAGES[page][0]
    assert len(runner.outputs) >= PAGES[page][1]


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
def test_the_runner_itself(text: str, words: str, tmp_path: Path) -> None:
    runner = guide.Guide(tmp_path, gpu=False)
    problems = [runner.run(block) for block in guide.blocks(text)]
    assert words in problems[-1]
    assert bool(words) == bool(problems[-1])
