"""Streams with one owner at a time; that the driver makes them is tested in tests/gpu/test_calls.py."""

from __future__ import annotations

from typing import Any

import torch

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

    pool: Any = StreamPool(create, Wrapped)  # type: ignore[arg-type]
    first, second = pool.take(0), pool.take(0)
    assert (first.handle, second.handle) == (1, 2)
    assert first.device == torch.device("cuda", 0)
    del first
    again, other = pool.take(0), pool.take(1)
    assert again.handle == 1, "its owner is gone"
    assert other.handle == 103, "another device has streams of its own"
    assert made == [0, 0, 1]
