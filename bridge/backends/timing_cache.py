"""TensorRT's timing cache on disk: how long kernels took in earlier builds, so that the next need not time them again.

One file for each version of the library and kind of GPU, shared by all processes. TensorRT-RTX has none: it times
nothing ahead of time, and its timing cache does nothing (1.6.1 says so itself). Nothing here imports torch: the process
that builds uses it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import read_checked, write_checked
from ..locks import locked

if TYPE_CHECKING:
    import tensorrt as trt

FOLDER = "timing"
"""Folder of these files in the cache folder."""

MOST_BYTES = 256 << 20
"""A file that is larger is begun anew."""

_MOST_WAIT_S = 60.0


def timing_file(folder: Path, version: str, gpu: str) -> Path:
    """The file for a version of TensorRT and a GPU's name."""
    return folder / FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '_', f'{version}-{gpu}')}.bin"


def use_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Let a build start from what earlier ones timed; what does not fit the library or the GPU is left out by it."""
    known = config.create_timing_cache(read_timings(path))
    # The bindings give None for bytes that they cannot read, and False for a cache of another GPU or version.
    if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timings(config: trt.IBuilderConfig, path: Path) -> str:
    """Keep what a build timed, with what other processes have kept meanwhile; returns what went wrong, or ""."""
    timed = config.get_timing_cache()
    if timed is None:
        return ""
    try:
        with locked(path.with_suffix(".lock"), _MOST_WAIT_S):
            others = config.create_timing_cache(read_timings(path))
            if others is not None:
                timed.combine(others, ignore_mismatch=False)
            data = bytes(memoryview(timed.serialize()))
            write_checked(path, data)
    except OSError as error:  # a full disk must not fail a build that has succeeded
        return f"the times of kernels are not kept: {error}"
    return ""


def read_timings(path: Path) -> bytes:
    """The content of a file; nothing where there is none, or it is damaged or too large to go on with."""
    return read_checked(path, MOST_BYTES) or b""
