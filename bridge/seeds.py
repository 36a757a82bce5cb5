"""Random numbers that are the same in every run, and the user's own generators left as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .tracing import alone


@contextmanager
def seeded(devices: Sequence[int] = (), seed: int = 0) -> Iterator[None]:
    """The generators of the CPU and of some CUDA devices begin from a seed, and are put back in the end.

    They are the process's, so that no other thread does the same meanwhile. `torch.manual_seed` would seed devices that
    are not put back, too, and fails now and then while another thread exports: torch notes such calls in one place for
    all threads.

    Args:
        devices: indices of CUDA devices.
        seed: where they begin.
    """
    with alone(), torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
