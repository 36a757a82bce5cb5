"""The CUDA driver, by ctypes: functions of cuda.h that torch does not hand out."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


class DriverError(RuntimeError):
    """The driver refuses, or is another one than this was written for."""


@functools.cache
def library() -> Any:
    """The driver. Its calls keep Python's lock: they are short, and to give it away and wait for it is not."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.PyDLL(name)
    except OSError as error:
        raise DriverError(f"{name} cannot be loaded: {error}") from error


def check(status: int, function: str) -> None:
    """Raise where a function of the driver did not succeed.

    Args:
        status: the CUresult that it returned.
        function: its name.

    Raises:
        DriverError: it is not 0.
    """
    if status:
        raise DriverError(f"{function} failed with CUresult {status}")
