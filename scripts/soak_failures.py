"""The failures that scripts/soak.py provokes: each must end with an error of ours, and leave everything else right."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from soak_actions import FAILING_BATCH, MOST_BATCH, Action, Soak

import trtbridge as tb

SCRIPT = Path(__file__).with_name("soak.py")
SMALL_DISK_BYTES = 16 << 10


class NoErrorError(Exception):
    """Something that should have failed went through."""


@contextlib.contextmanager
def must_raise(*kinds: type[Exception]) -> Iterator[list[str]]:
    """What is inside must raise one of these; the list then holds its name. Anything else goes on as it is."""
    seen: list[str] = []
    try:
        yield seen
    except kinds as error:
        if not str(error):
            raise NoErrorError(f"{type(error).__name__} has no words") from error
        seen.append(type(error).__name__)
        return
    raise NoErrorError(f"no {' or '.join(kind.__name__ for kind in kinds)}")


def bad_shape(soak: Soak, pick: Random) -> str:
    entry = soak.entry(pick)
    x, scale = soak.arguments(4, pick)
    bad: list[tuple[torch.Tensor, ...]] = [
        soak.arguments(MOST_BATCH + 1, pick), (x[:0], scale[:0]), (x, scale[:2]), (x[0], scale), (x[:, :7], scale),
        (x,),
    ]  # fmt: skip
    with must_raise(tb.InputError) as seen:
        entry.module(*pick.choice(bad))
    soak.check_shared(entry, pick)
    return seen[0]


def wrong_dtype(soak: Soak, pick: Random) -> str:
    entry = soak.entry(pick)
    x, scale = soak.arguments(4, pick)
    with must_raise(tb.InputError) as seen:
        entry.module(x.to(pick.choice([torch.float16, torch.float64, torch.int64])), scale)
    soak.check_shared(entry, pick)
    return seen[0]


def failing_plugin(soak: Soak, pick: Random) -> str:
    entry = soak.entry(pick)
    with must_raise(tb.ExecutionError) as seen:
        entry.module(*soak.arguments(FAILING_BATCH, pick))
    soak.check_shared(entry, pick)
    return seen[0]


def damaged_file(soak: Soak, pick: Random) -> str:
    """A file with a few bytes changed, cut off or added: it is refused, or means the same as before."""
    path = soak.work / f"damaged-{threading.get_ident()}.trtb"
    path.write_bytes(damage(soak.file.read_bytes(), pick))
    try:
        module = soak.load(path, pick)
    except tb.ModelFileError as error:
        return type(error).__name__
    finally:
        path.unlink()
    soak.check(module, pick)
    return "harmless"


def damage(data: bytes, pick: Random) -> bytes:
    """Bytes that are no longer as they were."""
    kind = pick.choice(["flip", "flip", "end", "cut", "zeros", "empty", "more"])
    changed = bytearray(data)
    if kind in ("flip", "end"):
        for _ in range(pick.randint(1, 4)):
            # The directory at the end of a zip file is small, and damage there is of other kinds.
            first = max(0, len(data) - 600) if kind == "end" else 0
            changed[pick.randrange(first, len(data))] ^= 1 << pick.randrange(8)
    elif kind == "cut":
        del changed[pick.randrange(len(data)) :]
    elif kind == "zeros":
        start = pick.randrange(len(data))
        changed[start : start + 4096] = bytes(len(changed[start : start + 4096]))
    elif kind == "more":
        changed += bytes(pick.getrandbits(8) for _ in range(100))
    else:
        changed.clear()
    return bytes(changed)


def save_killed(soak: Soak, pick: Random) -> str:
    """A process that does nothing but save over one file is killed: the file is whole; `litter` looks beside it."""
    path = soak.work / "killed.trtb"
    shutil.copyfile(soak.file, path)
    command = [sys.executable, str(SCRIPT), "--child", str(soak.file), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()  # it has begun
            time.sleep(pick.random() * 0.1)
        finally:
            child.send_signal(signal.SIGKILL)
    if child.returncode != -signal.SIGKILL:
        raise NoErrorError(f"the process that saves ended by itself with status {child.returncode}")
    module = soak.load(path, pick)
    soak.check(module, pick)
    left = sum(other.name.startswith(f".{path.name}") for other in soak.work.iterdir())
    tb.save(module, path)
    path.unlink()
    return f"whole file ({left} unfinished beside it)"


def save_for_ever(source: Path, target: Path) -> None:
    """The child that is killed."""
    module = tb.load(source)
    print("saving", flush=True)
    while True:
        tb.save(module, target)


def full_disk(soak: Soak, pick: Random) -> str:
    """Saving where there is no room: an error, the old file as it was, nothing beside it."""
    module = soak.load(soak.file, pick)
    with small_disk(soak) as (folder, how):
        path = folder / "model.trtb"
        path.write_bytes(b"as it was")
        with must_raise(tb.ModelFileError) as seen:
            tb.save(module, path)
        if path.read_bytes() != b"as it was":
            raise NoErrorError("a save that failed has changed the old file")
        beside = [other.name for other in folder.iterdir() if other != path]
        if beside:
            raise NoErrorError(f"a save that failed has left {beside}")
    soak.check(module, pick)
    return f"{seen[0]} ({how})"


@contextlib.contextmanager
def small_disk(soak: Soak) -> Iterator[tuple[Path, str]]:
    """A folder with little room: a small tmpfs where mounting is allowed, else a disk that is said to be full."""
    folder = soak.work / "small"
    folder.mkdir()
    size = f"size={SMALL_DISK_BYTES}"
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
        )
        is_mounted = mounted.returncode == 0
    except OSError:
        is_mounted = False
    try:
        if is_mounted:
            yield folder, "tmpfs"
        else:
            with pretended(folder):
                yield folder, "pretended"
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def pretended(folder: Path) -> Iterator[None]:
    """Let moving a finished file within a folder fail, as it does on a disk that is full, for this thread alone."""
    thread, real = threading.get_ident(), Path.replace

    def replace(self: Path, target: Any) -> Path:
        if threading.get_ident() == thread and folder in self.parents:
            raise OSError(28, "No space left on device")
        return real(self, target)

    Path.replace = replace  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.replace = real  # type: ignore[method-assign]


def damaged_cache(soak: Soak, pick: Random) -> str:
    """All files of the cache damaged (kernels that were compiled, engines): a conversion and a load are right."""
    for path in [path for path in soak.cache.rglob("*") if path.is_file()]:
        with contextlib.suppress(FileNotFoundError):  # another thread has written it anew
            path.write_bytes(damage(path.read_bytes() or b"x", pick))
    soak.check(soak.load(soak.file, pick), pick)
    if not soak.has_cache:
        return "right (no engine cache)"
    made = soak.convert(cache=True)
    soak.check(made, pick)
    found = soak.convert(cache=True)
    soak.check(found, pick)
    info = found.program.info["cache"]
    return f"right ({info['hits']} from the cache, {info['misses']} built)"


QUICK: tuple[tuple[float, Action], ...] = ((3, bad_shape), (3, wrong_dtype), (3, failing_plugin), (3, damaged_file))
SLOW: tuple[tuple[float, Action], ...] = ((0.5, save_killed), (1, full_disk), (0.3, damaged_cache))


def litter(soak: Soak) -> list[str]:
    """What lies in the folder that should not, after one more save of what a killed process was writing."""
    left = [path for path in soak.work.iterdir() if path.name not in soak.known]
    hidden = list(soak.cache.rglob(".*")) if soak.cache.exists() else []
    return sorted(f"{os.path.relpath(path, soak.work)}" for path in [*left, *hidden] if path.name != ".lock")
