"""The guides: every file and command in them works as they say. Parts for a GPU run in tests/gpu/test_authoring.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_plugins_guide(run_guide: Callable[..., Any]) -> None:
    run_guide("plugins.md", blocks=12, outputs=9)


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
