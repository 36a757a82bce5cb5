"""Files that are there whole or not at all, whatever happens to the process that writes them.

A file is written under another name beside its place and then moved there. A writer holds a lock on what it writes,
which the system takes back when the process ends, however it ends: so what a killed writer left can be told from what
another one is writing, and the next write removes it. Nothing here imports torch: the process that builds engines uses
it too.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: that tells as well
    fcntl = None  # type: ignore[assignment]

_DIGEST_BYTES = 32
_UNFINISHED = re.compile(r"\.(.+)-[0-9a-f]{8}\.tmp", re.DOTALL)
_ATTEMPTS = 10
_SURELY_DEAD_S = 3600.0
"""Where there are no locks an unfinished file that nobody has written to for so long has no writer any more."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object], durable: bool = False) -> None:
    """Write a file so that readers see the old content or the whole new one.

    Args:
        path: the file.
        write: puts the content into an open file.
        durable: come back only when it is on the disk, for a file that must outlive the end of the system as well.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    remove_unfinished(path.parent, path.name)
    new, file = _create(path)
    try:
        with file:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if fcntl is not None:
                new.replace(path)  # while the lock is held
        if fcntl is None:
            new.replace(path)
        if durable:
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def write_checked(path: Path, data: bytes) -> None:
    """Write a file that `read_checked` reads, and its folder if need be.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(hashlib.sha256(data).digest() + data))


def read_checked(path: Path, most_bytes: int | None = None) -> bytes | None:
    """The content of a file of `write_checked`: for what a library would take as it is, and crash.

    Args:
        path: the file.
        most_bytes: a larger file is not read.

    Returns:
        The content; None where there is no file, or it is damaged, too large, or not of `write_checked`.
    """
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    data = content[_DIGEST_BYTES:]
    return data if hashlib.sha256(data).digest() == content[:_DIGEST_BYTES] else None


def checked_size(path: Path) -> int:
    """Bytes of content of a file of `write_checked`, -1 where there is no file; the content is not looked at."""
    try:
        return path.stat().st_size - _DIGEST_BYTES
    except OSError:
        return -1


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder, as far as that is possible.

    Args:
        folder: where to look, not below.
        name: of the file that they were writing; None for any.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if _is_unfinished(entry.name, name)]
    except OSError:
        return
    for path in found:
        with suppress(OSError):
            _remove_if_dead(Path(path))


def _is_unfinished(name: str, wanted: str | None) -> bool:
    match = _UNFINISHED.fullmatch(name)
    return match is not None and wanted in (None, match[1])


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside a path, locked where that is possible."""
    for _ in range(_ATTEMPTS):
        new = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
        file = new.open("xb")  # with the permissions that any new file gets, unlike those of tempfile
        if fcntl is None:
            return new, file
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink:
                return new, file
        except BlockingIOError:
            pass  # another process takes it for one that a killed writer left: between open and flock it looks so
        except OSError:
            return new, file  # no locks here
        file.close()
    raise OSError(f"other processes remove what is written beside {path}")


def _remove_if_dead(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if time.time() - os.fstat(file.fileno()).st_mtime < _SURELY_DEAD_S:
                return
        path.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    with suppress(OSError):  # some file systems cannot, and the file itself is on the disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
