"""What the tests of memory that is freed at once share; nothing of ours waits for Python's garbage collector."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

import trtbridge as tb

CPU = torch.device("cpu")
BATCH = tb.Dim("batch", min=1, opt=2, max=8)


@torch.library.custom_op("trtbridge_freed::moody", mutates_args=())
def moody(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 3:
        raise ValueError("not this batch")
    return x * 2


moody.register_fake(torch.empty_like)


@torch.library.custom_op("trtbridge_freed::repeated", mutates_args=())
def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    return x * times


@repeated.register_fake
def _(x: torch.Tensor, times: int) -> torch.Tensor:
    return torch.empty_like(x)


class Net(torch.nn.Module):
    """Two engines with a plugin between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.ops.trtbridge_freed.moody(self.first(x)))


class Decides(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else x * 2


class Pairs(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.combinations(x) * 2


def convert(**options: Any) -> tb.EngineModule:
    shapes = {"x": {0: BATCH}}
    return tb.convert(Net().eval(), (torch.ones(2, 4),), dynamic_shapes=shapes, backend="onnxruntime", **options)


@functools.cache
def _warm_up() -> None:
    """Modules of torch that are first imported in a conversion leave its frames in cycles, once in a process."""
    convert()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, for modules that name it as a fixture that they use."""
    _warm_up()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def parts(module: tb.EngineModule) -> list[Callable[[], Any]]:
    """Weak references to a module and all that takes memory below it."""
    running = module._running
    assert running is not None
    lane = running._lanes._idle[0]
    return [
        *map(weakref.ref, (module, module.program, running, running._run, lane)),
        *(weakref.ref(executable) for executable in running._executables if executable is not None),
        *map(weakref.ref, running._constants.values()),
    ]


class Holder:
    """Stands for what callers have in their frames."""


def caller_of(call: Callable[[], Any], kind: type[Exception]) -> Callable[[], Any]:
    """What was in the frame that made a call which failed."""
    holder = Holder()
    with pytest.raises(kind):
        call()
    return weakref.ref(holder)


def alive(found: Sequence[Callable[[], Any]]) -> list[str]:
    return [type(value).__name__ for ref in found if (value := ref()) is not None]
