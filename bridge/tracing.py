"""torch traces one thing at a time: while it does, it changes state that all threads of the process share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from ..plugins import torch_note

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """No other thread traces meanwhile: for what changes such state around a trace, such as warning filters."""
    with _lock:
        yield


def one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """A function that traces, exports or decomposes with torch: of several threads one after the other runs it.

    Conversions in threads wait for one another so. Other calls of torch modules need the caller's care: torch.export
    gives the module that it traces other parameters meanwhile, and replaces torch.nn.Module.__call__. Calls of custom
    ops go on, and may make torch fail here (plugins/torch_note.py): then it runs again.
    """

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with _lock:
            return torch_note.patiently(lambda: function(*args, **kwargs))

    return locked
