"""Ranges around a call, its segments and its plugins, for Nsight Systems and torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch


class Mark:
    """Makes ranges: of torch.profiler always, of NVTX where there is CUDA."""

    def __init__(self) -> None:
        self._nvtx = torch.cuda.is_available()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A range around what stands in the ``with``."""
        text = f"trtbridge: {name}"
        with ExitStack() as stack:
            if self._nvtx:
                stack.enter_context(torch.cuda.nvtx.range(text))
            stack.enter_context(torch.profiler.record_function(text))
            yield

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function with a range around it."""

        def marked(*args: Any) -> Any:
            with self(name):
                return function(*args)

        return marked


_current: ContextVar[Mark | None] = ContextVar("trtbridge_mark", default=None)


def current_mark() -> Mark | None:
    """What makes ranges in this thread now; None where nobody asked for them."""
    return _current.get()


@contextmanager
def annotate() -> Iterator[None]:
    """Put a named range around each call, each segment and each plugin call of this thread.

    They are NVTX ranges, which Nsight Systems shows, where there is CUDA, and ranges of ``torch.profiler`` everywhere:
    "trtbridge: BertModel", "trtbridge: segment0", "trtbridge: plugin aten::cummax.default". Outside of it a call only
    looks whether it is on.

    Example::

        with tb.annotate(), torch.profiler.profile() as profiler:
            fast(x)
    """
    token = _current.set(Mark())
    try:
        yield
    finally:
        _current.reset(token)
