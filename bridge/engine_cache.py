"""Engines on disk by content: one file each under their `engine_key`, for any number of processes at once.

What is found there is never trusted blindly: a file that is damaged, of another format or under a wrong name is
removed, and the engine is built. Nothing that goes wrong with the cache ends a conversion: it is logged, and listed in
``program.info["cache"]``.

Removing a file that another process reads does no harm: on POSIX it keeps what it has opened, and on Windows the system
refuses to remove it, so that it stays until the next time.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ModelFileError, PluginError
from .archive import engine_from_json, engine_to_json, parse_manifest, read_archive, read_manifest, write_archive
from .atomic import remove_unfinished
from .backends.base import Backend, BuildOptions, Engine, Progress, Segment
from .engine_key import KEY_FORMAT, TensorDigests, digest, key_facts
from .locks import locked

logger = logging.getLogger(__name__)

FORMAT = "trtbridge-engine"
SUFFIX = ".engine"
FOLDER = "engines"
"""Folder of the engines in the cache folder."""

_WHAT = "cached engine"


@dataclass
class CacheReport:
    """What the cache did for one conversion.

    Attributes:
        hits: engines that came from it.
        misses: engines that were built.
        seconds_saved: that the hits took to build, less what reading them took.
        bytes_read: of the engines that came from it.
        bytes_written: of those that went into it.
        learned: whether it knew what the backend refuses of this model.
        problems: what went wrong with it, in words.
    """

    hits: int = 0
    misses: int = 0
    seconds_saved: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    learned: bool = False
    problems: list[str] = field(default_factory=list)

    _lock = threading.Lock()  # segments of one plan are built in several threads

    def note(self, problem: str) -> None:
        """Log a problem and keep it."""
        logger.warning("%s", problem)
        self.problems.append(problem)

    def add(self, **amounts: float) -> None:
        """Add to numbers by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds_saved": round(self.seconds_saved, 3), "problems": list(self.problems)}


@dataclass(frozen=True)
class CachedEngine:
    """An engine in the cache, for people.

    Attributes:
        path: its file.
        size_bytes: of the file.
        used: when it was last used, seconds since the epoch.
        backend: that built it; "" where the file cannot be read.
        version: of that backend's library.
        source: what it was a part of ("ResNet").
        segment: which segment of that.
        build_seconds: what it took to build.
    """

    path: Path
    size_bytes: int
    used: float
    backend: str = ""
    version: str = ""
    source: str = ""
    segment: str = ""
    build_seconds: float = 0.0


@dataclass
class EngineCache:
    """The engines in a folder.

    Attributes:
        folder: where they are; made when something is kept.
        most_bytes: bound of the sizes of all files; those that were not used for longest go. An engine that is larger
            is not kept at all.
        source: what is converted, noted in the files.
        report: what was done so far.
        digests: of tensors that stay alive during the conversion.
    """

    folder: Path
    most_bytes: int
    source: str = ""
    report: CacheReport = field(default_factory=CacheReport)
    digests: TensorDigests = field(default_factory=TensorDigests)
    # Keys of the segments of the last plan by id, with the segments so that ids stay theirs.
    _keys: dict[int, tuple[Segment, str, dict[str, Any]]] = field(default_factory=dict)

    def build(
        self, segment: Segment, backend: Backend, options: BuildOptions, progress: Progress | None = None
    ) -> Engine:
        """An engine for a segment: from the cache, else built and kept.

        Of several processes that want the same one builds it and the others wait for that.

        Raises:
            UnsupportedOpError, BuildError, BackendError: as `Backend.build`.
        """
        report = progress or (lambda phase, fraction: None)
        try:
            key, facts = self._key(segment, backend, options)
        except PluginError as error:
            self.report.note(f"{segment.name} is not looked up in the cache: {error}")
            self.report.add(misses=1)
            return backend.build(segment, options, progress)
        engine = self._read(key, segment, backend)
        if engine is None:
            lock = self.folder / "locks" / f"{key[:2]}.lock"  # so that there are 256 at most
            with locked(lock, options.timeout_s, lambda: report("waiting for another process", 0.0)):
                engine = self._read(key, segment, backend)
                if engine is None:
                    started = time.perf_counter()
                    engine = backend.build(segment, options, progress)
                    self.report.add(misses=1)
                    self._keep(key, facts, engine, segment, time.perf_counter() - started)
                    return engine
        report("from the cache", 1.0)
        return engine

    def has_all(self, segments: Sequence[Segment], backend: Backend, options: BuildOptions) -> bool:
        """Whether there is a file for each of some segments."""
        self._keys.clear()
        try:
            return all(self._path(self._key(segment, backend, options)[0]).is_file() for segment in segments)
        except PluginError:
            return False

    def list(self) -> Iterator[CachedEngine]:
        """What is there, last used first."""
        for path, stat in sorted(self._files(), key=lambda entry: -entry[1].st_mtime_ns):
            try:
                manifest = read_manifest(path, FORMAT, KEY_FORMAT, _WHAT)
                facts = manifest["facts"]
                yield CachedEngine(
                    path,
                    stat.st_size,
                    stat.st_mtime,
                    backend=str(manifest["backend"]),
                    version=str(facts["library"].get("version", "")),
                    source=str(manifest["source"]),
                    segment=str(manifest["segment"]),
                    build_seconds=float(manifest["build_seconds"]),
                )
            except (ModelFileError, KeyError, TypeError, ValueError, AttributeError):
                yield CachedEngine(path, stat.st_size, stat.st_mtime)

    def clear(self) -> tuple[int, int]:
        """Remove all engines; how many and their bytes."""
        remove_unfinished(self.folder)
        count = size = 0
        for path, stat in self._files():
            if self._remove(path):
                count, size = count + 1, size + stat.st_size
        return count, size

    def _key(self, segment: Segment, backend: Backend, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        if id(segment) not in self._keys:
            facts = key_facts(segment, backend, options, self.digests)
            key = digest(facts)
            # One digest in place of those of thousands of weights.
            self._keys[id(segment)] = segment, key, {**facts, "weights": digest(facts["weights"])}
        _, key, facts = self._keys[id(segment)]
        return key, facts

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _read(self, key: str, segment: Segment, backend: Backend) -> Engine | None:
        path = self._path(key)
        if not path.exists():
            return None
        started = time.perf_counter()
        try:
            manifest, parts = read_archive(path, FORMAT, KEY_FORMAT, _WHAT)
            if (manifest.get("key"), manifest["version"], manifest.get("backend")) != (key, KEY_FORMAT, backend.name):
                raise ModelFileError(f"{path} holds another engine than its name says.")
            engine = parse_manifest(path, lambda: engine_from_json(manifest["engine"], parts, backend.name))
            engine = parse_manifest(path, lambda: backend.revive(engine, segment))
            saved = parse_manifest(path, lambda: float(manifest["build_seconds"]))
        except ModelFileError as error:
            if not path.exists():
                return None  # removed by another process in between
            if isinstance(error.__cause__, OSError):
                self.report.note(f"The cache cannot be read, and the engine is built again: {error}")
                return None
            self.report.note(f"A cached engine cannot be used, is removed and built again: {error}")
            self._remove(path)
            return None
        with suppress(OSError):  # a folder that cannot be written
            os.utime(path)  # not left to the access time, which most systems keep once a day at best
        gained = saved - (time.perf_counter() - started)
        self.report.add(hits=1, seconds_saved=gained, bytes_read=engine.size_bytes)
        logger.info("%s comes from the cache: %s", segment.name, path)
        return engine

    def _keep(self, key: str, facts: dict[str, Any], engine: Engine, segment: Segment, seconds: float) -> None:
        if engine.size_bytes > self.most_bytes:
            self.report.note(
                f"{segment.name} is not kept in the cache: its engine of {engine.size_bytes} bytes is larger than "
                f"cache_size_bytes={self.most_bytes}."
            )
            return
        entry, parts = engine_to_json(engine, "")
        manifest = {
            "format": FORMAT,
            "version": KEY_FORMAT,
            "key": key,
            "backend": engine.backend,
            "source": self.source,
            "segment": segment.name,
            "build_seconds": round(seconds, 3),
            "facts": facts,
            "engine": entry,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_archive(self._path(key), manifest, parts)
            self.report.add(bytes_written=engine.size_bytes)
        except (ModelFileError, OSError) as error:
            self.report.note(f"The engine of {segment.name} is not kept in the cache: {error}")
        self._evict(keep=self._path(key))

    def _evict(self, keep: Path) -> None:
        """Remove what was not used for longest, until the rest is within the bound."""
        remove_unfinished(self.folder)
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if total <= self.most_bytes:
                return
            if path != keep and self._remove(path):
                logger.info("%s leaves the cache, which is full", path)
                total -= stat.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            paths = [path for path in self.folder.iterdir() if path.suffix == SUFFIX]
        except OSError:
            return
        for path in paths:
            with suppress(OSError):  # removed by another process in between
                yield path, path.stat()

    def _remove(self, path: Path) -> bool:
        try:
            path.unlink()
            return True
        except FileNotFoundError:
            return True
        except OSError as error:  # on Windows another process may have it open
            logger.info("%s cannot be removed: %s", path, error)
            return False
