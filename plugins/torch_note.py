"""A note that torch loses where threads run custom ops at once, or one runs some while another exports.

Torch notes in one dict for all threads that it runs an op of `torch.library.custom_op` or traces something (from 2.13
on, only while something is exported), and takes the note out again: two at once end in a KeyError of 'custom'. Whatever
failed so is right when it is made again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

TRIES = 5
"""How often something that failed so is made again."""


def patiently(function: Callable[[], T]) -> T:
    """What a function returns or raises; it is called again where the note was lost.

    Args:
        function: may be called several times; a call that fails so leaves nothing behind.
    """
    for _ in range(TRIES):
        try:
            return function()
        except Exception as error:
            if not is_lost(error):
                raise
    return function()


def is_lost(error: BaseException) -> bool:
    """Whether an error, or what it came of, is that torch's note was missing."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, KeyError) and one.args == ("custom",) and _raised_by(one.__traceback__) == "annotate":
            return True
        todo += [one.__cause__, one.__context__]
    return False


def _raised_by(last: TracebackType | None) -> str:
    """Name of the function that raised."""
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "" if last is None else last.tb_frame.f_code.co_name
