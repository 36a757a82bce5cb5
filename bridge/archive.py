"""One file of named blobs under a JSON manifest, each with its checksum: how programs and cached engines are kept.

It is a zip file whose entries are stored as they are. ``manifest.json`` holds the SHA-256 of every other entry, the
file's comment that of the manifest. What is damaged is told from what is whole; nothing in it is ever run or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ..errors import ModelFileError, TrtBridgeError
from .atomic import write_atomically
from .backends.base import Engine
from .model import TensorSpec

T = TypeVar("T")
Blob = bytes | bytearray | memoryview

_MANIFEST = "manifest.json"
_COMMENT = b"sha256:"


def write_archive(path: Path, manifest: Mapping[str, Any], parts: Mapping[str, Blob], durable: bool = False) -> None:
    """Write a file, whole or not at all.

    Args:
        path: the file.
        manifest: JSON-ready; ``format`` and ``version`` say what it is.
        parts: the blobs by name.
        durable: as for `write_atomically`.

    Raises:
        ModelFileError: it cannot be written.
    """
    checksums = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    text = json.dumps({**manifest, "sealed": True, "sha256": checksums}, indent=1).encode()

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = _COMMENT + hashlib.sha256(text).hexdigest().encode()
            archive.writestr(_MANIFEST, text)
            for name, data in parts.items():
                with archive.open(name, "w", force_zip64=True) as entry:
                    entry.write(data)

    try:
        write_atomically(path, write, durable)
    except OSError as error:
        raise ModelFileError(f"Cannot write {path}: {error}.") from error


def read_archive(path: Path, form: str, version: int, what: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read what `write_archive` wrote: the manifest and the blobs.

    Args:
        path: the file.
        form: ``format`` of the manifest.
        version: the newest ``version`` that can be read.
        what: what such a file is, for errors.

    Raises:
        ModelFileError: no such file, not such a file, damaged, or of a newer version.
    """
    with _open(path, what) as archive:
        manifest = _read_manifest(archive, path, form, version, what)
        parts = {}
        for name, checksum in manifest["sha256"].items():
            parts[name] = archive.read(name)
            if hashlib.sha256(parts[name]).hexdigest() != checksum:
                raise ModelFileError(f"{path} is damaged: {name} does not match its checksum. Save it again.")
        return manifest, parts


def read_manifest(path: Path, form: str, version: int, what: str) -> dict[str, Any]:
    """The manifest alone; raises what `read_archive` does, but for damage to the blobs, which it does not see."""
    with _open(path, what) as archive:
        return _read_manifest(archive, path, form, version, what)


@contextmanager
def _open(path: Path, what: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("its entries are larger than the file")
            yield archive
    except (TrtBridgeError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ModelFileError(f"There is no file {path}.") from error
    except Exception as error:  # over damage zipfile raises nearly anything
        raise ModelFileError(f"{path} is no {what}, or is damaged: {error}. Save it again.") from error


def _read_manifest(archive: zipfile.ZipFile, path: Path, form: str, version: int, what: str) -> dict[str, Any]:
    text = archive.read(_MANIFEST)
    checksum = _COMMENT + hashlib.sha256(text).hexdigest().encode()
    damaged = f"{path} is damaged: its manifest does not match its checksum. Save it again."
    if archive.comment and archive.comment != checksum:
        raise ModelFileError(damaged)
    manifest: dict[str, Any] = json.loads(text)
    if isinstance(manifest, dict) and manifest.get("sealed") and not archive.comment:
        raise ModelFileError(damaged)  # files of before there was such a checksum are not sealed
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise ModelFileError(f"{path} is a zip file, but no {what}.")
    if manifest["version"] > version:
        raise ModelFileError(
            f"{path} has format version {manifest['version']}; this trtbridge reads up to {version}. It was written by "
            "a newer one: update trtbridge, or convert again."
        )
    return manifest


def parse_manifest(path: Path, parse: Callable[[], T]) -> T:
    """What is made of a manifest, where a manifest that lacks something or has it otherwise ends as an error of ours.

    Raises:
        ModelFileError: it is not as this version writes it.
    """
    try:
        return parse()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, TrtBridgeError):
            raise
        raise ModelFileError(
            f"{path} has a manifest that this version of trtbridge cannot read ({type(error).__name__}: {error}): it "
            "was written by another one, or changed. Convert again."
        ) from error


def engine_to_json(engine: Engine, prefix: str) -> tuple[dict[str, Any], dict[str, Blob]]:
    """An engine as an entry of a manifest, and its blobs.

    Args:
        engine: the engine.
        prefix: begins the names of its blobs.
    """
    names = {part: f"{prefix}{part}" for part in engine.parts}
    entry = {
        "parts": names,
        "info": dict(engine.info),
        "inputs": [spec.to_json() for spec in engine.inputs],
        "outputs": [spec.to_json() for spec in engine.outputs],
    }
    return entry, {names[part]: data for part, data in engine.parts.items()}


def engine_from_json(entry: Mapping[str, Any], parts: Mapping[str, Blob], backend: str) -> Engine:
    """The inverse of `engine_to_json`."""
    return Engine(
        backend,
        {part: parts[name] for part, name in entry["parts"].items()},
        dict(entry["info"]),
        tuple(TensorSpec.from_json(spec) for spec in entry["inputs"]),
        tuple(TensorSpec.from_json(spec) for spec in entry["outputs"]),
    )
