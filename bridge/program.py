"""A program: a plan whose segments are engines. It serializes to one file: a JSON manifest and raw bytes, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch

from ..errors import ModelFileError
from .backends.base import Engine
from .cache import write_atomically
from .dtypes import from_torch, to_torch
from .model import Signature, TensorSpec
from .plan import PluginCall

FORMAT = "trtbridge-program"
FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class EngineStep:
    """A segment, built."""

    name: str
    engine: Engine


Step = EngineStep | PluginCall


@dataclass(frozen=True)
class Program:
    """What runs: engines and plugin calls in order.

    Attributes:
        backend: name of the backend that built the engines.
        steps: in order.
        signature: how the original is called.
        constants: tensors that plugin calls read or that are results themselves, on the CPU.
        aliases: results that are other tensors: result → tensor.
        source: what was converted.
        info: JSON-ready facts of the conversion: versions, options, seconds a stage.
    """

    backend: str
    steps: tuple[Step, ...]
    signature: Signature
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engines(self) -> tuple[Engine, ...]:
        return tuple(step.engine for step in self.steps if isinstance(step, EngineStep))

    @property
    def plugin_calls(self) -> tuple[PluginCall, ...]:
        return tuple(step for step in self.steps if isinstance(step, PluginCall))

    @property
    def size_bytes(self) -> int:
        """Size of all engines, in bytes."""
        return sum(engine.size_bytes for engine in self.engines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the program as one file, whole or not at all.

        Raises:
            ModelFileError: the file cannot be written, or a constant argument has no JSON form.
        """
        path = Path(path)
        parts: dict[str, bytes | bytearray | memoryview] = {}
        steps: list[dict[str, Any]] = []
        for index, step in enumerate(self.steps):
            if isinstance(step, PluginCall):
                steps.append(step.to_json())
                continue
            names = {part: f"engines/{index}/{part}" for part in step.engine.parts}
            parts |= {names[part]: data for part, data in step.engine.parts.items()}
            steps.append(
                {
                    "engine": step.name,
                    "parts": names,
                    "info": dict(step.engine.info),
                    "inputs": [spec.to_json() for spec in step.engine.inputs],
                    "outputs": [spec.to_json() for spec in step.engine.outputs],
                }
            )
        constants = {}
        for index, (name, tensor) in enumerate(self.constants.items()):
            constants[name] = {
                "part": f"constants/{index}",
                "dtype": from_torch(tensor.dtype).name,
                "shape": list(tensor.shape),
            }
            parts[f"constants/{index}"] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "backend": self.backend,
            "source": self.source,
            "signature": self.signature.to_json(),
            "steps": steps,
            "constants": constants,
            "aliases": dict(self.aliases),
            "info": dict(self.info),
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()},
        }
        text = json.dumps(manifest, indent=1)

        def write(file: BinaryIO) -> None:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_MANIFEST, text)
                for name, data in parts.items():
                    with archive.open(name, "w", force_zip64=True) as entry:
                        entry.write(data)

        try:
            write_atomically(path, write)
        except OSError as error:
            raise ModelFileError(f"Cannot write {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read a program that `save` wrote.

        Raises:
            ModelFileError: no such file, not such a file, damaged, or of a newer format.
        """
        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                manifest = json.loads(archive.read(_MANIFEST))
                if manifest.get("format") != FORMAT:
                    raise ModelFileError(f"{path} is a zip file, but no trtbridge program.")
                if manifest["version"] > FORMAT_VERSION:
                    raise ModelFileError(
                        f"{path} has format version {manifest['version']}; this trtbridge reads up to {FORMAT_VERSION}."
                    )
                parts = {name: archive.read(name) for name in manifest["sha256"]}
        except FileNotFoundError as error:
            raise ModelFileError(f"There is no file {path}.") from error
        except ModelFileError:
            raise
        except Exception as error:  # over damage zipfile raises nearly anything, such as NotImplementedError
            raise ModelFileError(f"{path} is no trtbridge program, or is damaged: {error}. Save it again.") from error
        for name, digest in manifest["sha256"].items():
            if hashlib.sha256(parts[name]).hexdigest() != digest:
                raise ModelFileError(f"{path} is damaged: {name} does not match its checksum. Save it again.")
        return cls(
            backend=manifest["backend"],
            steps=tuple(_read_step(step, parts, manifest["backend"]) for step in manifest["steps"]),
            signature=Signature.from_json(manifest["signature"]),
            constants={name: _read_constant(entry, parts) for name, entry in manifest["constants"].items()},
            aliases=manifest["aliases"],
            source=manifest["source"],
            info=manifest["info"],
        )


def _read_step(data: Mapping[str, Any], parts: Mapping[str, bytes], backend: str) -> Step:
    if "plugin" in data:
        return PluginCall.from_json(data)
    return EngineStep(
        data["engine"],
        Engine(
            backend,
            {part: parts[name] for part, name in data["parts"].items()},
            data["info"],
            tuple(TensorSpec.from_json(spec) for spec in data["inputs"]),
            tuple(TensorSpec.from_json(spec) for spec in data["outputs"]),
        ),
    )


def _read_constant(entry: Mapping[str, Any], parts: Mapping[str, bytes]) -> torch.Tensor:
    dtype = to_torch(ir.DataType[entry["dtype"]])
    data = bytearray(parts[entry["part"]])
    if not data:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry["shape"])
