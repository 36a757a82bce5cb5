"""Seeds: the same numbers every time, the user's generators as they were, and one thread at a time."""

from __future__ import annotations

import threading

import pytest
import torch

from trtbridge.bridge.seeds import seeded


def test_the_same_numbers_and_the_generator_as_it_was() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    with seeded():
        first = torch.rand(4)
    with seeded(seed=1):
        other = torch.rand(4)
    with seeded():
        assert torch.equal(torch.rand(4), first)
    with pytest.raises(RuntimeError, match="negative dimension"), seeded():
        torch.rand(-1)
    assert not torch.equal(first, other)
    assert torch.equal(torch.rand(4), expected)


def test_threads_wait_for_one_another() -> None:
    begun, drawn = threading.Event(), threading.Event()
    found: list[torch.Tensor] = []

    def draw() -> None:
        begun.set()
        with seeded():
            found.append(torch.rand(4))
        drawn.set()

    thread = threading.Thread(target=draw)
    with seeded():
        first = torch.rand(2)
        thread.start()
        assert begun.wait(30)
        assert not drawn.wait(0.3)
        rest = torch.rand(2)
    thread.join(30)
    assert torch.equal(found[0], torch.cat([first, rest]))


def test_it_does_not_fail_while_something_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(seed: int) -> None:
        raise KeyError("custom")  # as it is now and then, where two threads call it

    monkeypatch.setattr(torch, "manual_seed", refused)
    with seeded():
        assert torch.rand(1).item() == pytest.approx(0.4962566, abs=1e-6)
