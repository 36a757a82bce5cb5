"""Locks between processes, which a crash of the holder sets free. Nothing here imports torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows, where filelock locks in another way
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_POLL_S = 1.0


@contextmanager
def locked(path: Path, most_s: float | None = None, waiting: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold a lock while the body runs, or go on without where there can be none.

    Args:
        path: the lock file; it is made, stays, and is empty.
        most_s: wait so long at most for another holder; None for as long as it takes.
        waiting: called about once a second while another one holds it.

    Yields:
        Whether it is held: False on a file system without locks, in a folder that cannot be written, and after
        ``most_s``.
    """
    lock = _acquire(path, most_s, waiting)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquire(path: Path, most_s: float | None, waiting: Callable[[], object]) -> FileLock | None:
    started = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_locks(path)
        lock = FileLock(path)
    except (OSError, NotImplementedError) as error:
        logger.info("no lock at %s: %s", path, error)
        return None
    while True:
        try:
            lock.acquire(timeout=_POLL_S)
            return lock
        except Timeout:
            if most_s is not None and time.monotonic() - started >= most_s:
                logger.info("%s is held by another process for longer than %.0f s", path, most_s)
                return None
        except (OSError, NotImplementedError) as error:
            logger.info("no lock at %s: %s", path, error)
            return None
        waiting()


def _require_locks(path: Path) -> None:
    """Raise OSError where the file system has no locks: some releases of filelock take that for a held one."""
    if fcntl is None:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)
