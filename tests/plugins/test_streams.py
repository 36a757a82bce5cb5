"""Streams with one owner at a time; that the driver makes them is tested in tests/gpu/test_calls.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trtbridge.plugins import streams
from trtbridge.plugins.streams import StreamPool


class Wrapped:
    """In place of torch's object."""

    def __init__(self, handle: int, device: torch.device) -> None:
        self.handle, self.device = handle, device


def test_one_owner_at_a_time() -> None:
    made: list[int] = []

    def create(index: int) -> int:
        made.append(index)
        return 100 * index + len(made)

    pool = StreamPool(create, Wrapped)
    first, second = pool.take(0), pool.take(0)
    assert (first.stream.handle, second.stream.handle) == (1, 2)
    assert first.stream.device == torch.device("cuda", 0)
    torch_has_it = first.stream
    del first
    again, other = pool.take(0), pool.take(1)
    assert again.stream.handle == torch_has_it.handle, "its owner is gone"
    assert other.stream.handle == 103, "another device has streams of its own"
    assert made == [0, 0, 1]


def test_a_new_thread_has_the_context_before_it_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.device leaves a device alone that is the current one already, also where the thread is a new one."""
    log: list[Any] = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        log.append(("on", index))
        yield

    def create(handle: Any, flags: int) -> int:
        log.append(("create", flags))
        handle._obj.value = 77
        return 0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: log.append(("context", index)))
    monkeypatch.setattr(streams, "library", lambda: SimpleNamespace(cuStreamCreate=create))
    assert streams._create(3) == 77
    assert log == [("on", 3), ("context", 3), ("create", 1)]
