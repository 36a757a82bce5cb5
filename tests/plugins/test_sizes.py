"""plugins.sizes: reading size expressions while other threads parse, too."""

from __future__ import annotations

import ast
import threading
from typing import Any

import pytest

from trtbridge.errors import DynamicShapeError
from trtbridge.plugins import sizes


def test_threads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    real, inside, most = ast.parse, 0, 0
    guard = threading.Lock()

    def parse(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.002)
        with guard:
            inside -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(sizes.ast, "parse", parse)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(sizes.names_in("2*a + Max(b, 1)"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [frozenset({"a", "b"})] * 6
    assert most == 1


def test_what_threads_of_others_break_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = ast.parse, [SystemError("AST constructor recursion depth mismatch (before=48, after=46)")] * 3

    def parse(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(sizes.ast, "parse", parse)
    assert sizes.evaluate("2*a + 1", {"a": 3}) == 7
    assert not failures
    failures.extend([SystemError("for ever")] * 100)
    with pytest.raises(SystemError, match="for ever"):
        sizes.evaluate("a", {"a": 1})


def test_no_expression() -> None:
    assert sizes.names_in("2*") == frozenset()
    with pytest.raises(DynamicShapeError, match="not a shape expression"):
        sizes.evaluate("2*", {})
