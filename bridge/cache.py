"""What is kept on disk between processes: kernels that TensorRT-RTX compiles when an engine first runs; and elsewhere
engines (`engine_cache`), what backends refuse (`learned`), TensorRT's times of kernels (`backends.timing_cache`) and
which form of attention was faster (`attention_judge`).

The folder is ``cache_dir`` of convert() and load(), else ``$TRTBRIDGE_CACHE_DIR``, else the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import platformdirs
import torch

from ..errors import CacheError
from .atomic import checked_size, read_checked, write_checked
from .host_thread import about_to_launch

__all__ = ["ENVIRONMENT_VARIABLE", "JIT_FOLDER", "JitCacheFile", "resolve_cache_dir"]

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "TRTBRIDGE_CACHE_DIR"
JIT_FOLDER = "jit"
"""Folder of compiled kernels in the cache folder."""

_CALLS_LOOKED_AT = 2
_MOST_SHAPES = 256  # of one engine; kernels for further ones are compiled again in the next process


def resolve_cache_dir(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder to keep things in, made if need be.

    Args:
        cache_dir: the folder asked for; None for the default one.

    Returns:
        The folder; None where nobody asked for one and the default cannot be written (a read-only home).

    Raises:
        CacheError: the folder asked for, by argument or environment, cannot be made or written.
    """
    asked = cache_dir if cache_dir is not None else os.environ.get(ENVIRONMENT_VARIABLE)
    folder = Path(asked) if asked else Path(platformdirs.user_cache_dir("trtbridge", appauthor=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if asked:
            raise CacheError(
                f"The cache folder {folder} cannot be written: {error}. Choose another with cache_dir= or "
                f"${ENVIRONMENT_VARIABLE}."
            ) from error
        logger.info("no cache: %s cannot be written (%s)", folder, error)
        return None


class JitCacheFile:
    """The file of one engine's compiled kernels.

    Args:
        folder: the cache folder; None keeps nothing.
        plan: the engine; its content and the GPU name the file.
        version: library and version.
    """

    def __init__(self, folder: Path | None, plan: bytes | bytearray | memoryview, version: str) -> None:
        self._path: Path | None = None
        self._lock = threading.RLock()
        self._calls: dict[Hashable, int] = {}  # by input shapes
        if folder is not None:
            digest = hashlib.sha256(plan)
            digest.update(f"{version}|{torch.cuda.get_device_name()}".encode())
            self._path = folder / JIT_FOLDER / f"{digest.hexdigest()}.bin"
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def read(self) -> bytes | None:
        """The kernels kept, None where there are none, or they are damaged: the library would take them as they are."""
        if self._path is None:
            return None
        data = read_checked(self._path)
        if data is None and self._path.exists():
            logger.warning("%s is damaged, and is made anew", self._path)
            self._path.unlink(missing_ok=True)
        return data

    def watch(self, shapes: Hashable, serialize: Callable[[], bytes]) -> AbstractContextManager[None]:
        """Keep what was compiled in a call of the engine; to be around each.

        Kernels are compiled when shapes are new, some of them in the background, so the first two calls of each are
        looked at, and a file is written where there is something new. These calls wait for one another: nothing says
        that kernels may be read while another thread compiles more of them.

        Args:
            shapes: of the call's inputs.
            serialize: gives everything compiled so far.
        """
        calls = self._calls.get(shapes, 0)
        if self._path is None or calls == _CALLS_LOOKED_AT or (not calls and len(self._calls) >= _MOST_SHAPES):
            return nullcontext()
        return self._watched(self._path, shapes, serialize)

    @contextmanager
    def _watched(self, path: Path, shapes: Hashable, serialize: Callable[[], bytes]) -> Iterator[None]:
        about_to_launch()
        with self._lock:
            yield
            self._calls[shapes] = min(self._calls.get(shapes, 0) + 1, _CALLS_LOOKED_AT)
            data = serialize()
            if data and checked_size(path) != len(data):
                try:
                    write_checked(path, data)
                except OSError as error:  # a full disk must not fail a call that has succeeded
                    logger.warning("compiled kernels were not kept: %s", error)
