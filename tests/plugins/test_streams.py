"""Streams with one owner at a time; that the driver makes them is tested in tests/gpu/test_calls.py."""

from __future__ import annotations

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
