"""A program: a plan whose segments are engines. It serializes to one file: a JSON manifest and raw bytes, no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ModelFileError
from .archive import Blob, engine_from_json, engine_to_json, parse_manifest, read_archive, write_archive
from .backends import BACKENDS
from .backends.base import Engine
from .dtypes import from_torch, to_torch
from .model import Signature
from .plan import PluginCall
from .recipes import Recipes

FORMAT = "trtbridge-program"
FORMAT_VERSION = 1


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
        info: JSON-ready facts of the conversion: versions, options, seconds a stage; ``refitted`` counts the times that
            the weights were exchanged.
        recipes: how weights and constants come from the module; None where they cannot be exchanged.
    """

    backend: str
    steps: tuple[Step, ...]
    signature: Signature
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)
    recipes: Recipes | None = None

    @property
    def is_stripped(self) -> bool:
        """Whether it lacks its weights: it cannot run before it is refitted."""
        between = self.recipes.constants if self.recipes is not None else ()
        lost = any(name not in self.constants for name in between)
        return lost or any(engine.info.get("stripped") for engine in self.engines)

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
        parts: dict[str, Blob] = {}
        steps: list[dict[str, Any]] = []
        for index, step in enumerate(self.steps):
            if isinstance(step, PluginCall):
                steps.append(step.to_json())
                continue
            entry, blobs = engine_to_json(step.engine, f"engines/{index}/")
            steps.append({"engine": step.name, **entry})
            parts |= blobs
        constants = {}
        for index, (name, tensor) in enumerate(self.constants.items()):
            constants[name] = {
                "part": f"constants/{index}",
                "dtype": from_torch(tensor.dtype).name,
                "shape": list(tensor.shape),
            }
            parts[f"constants/{index}"] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        recipes = None
        if self.recipes is not None:
            own = {f"recipes/{index}": part for index, part in enumerate(self.recipes.parts)}
            parts |= own
            recipes = {**self.recipes.to_json(), "parts": list(own)}
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
            "recipes": recipes,
        }
        write_archive(path, manifest, parts, durable=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Program:
        """Read a program that `save` wrote.

        Raises:
            ModelFileError: no such file, not such a file, damaged, or of a newer format.
        """
        path = Path(path)
        manifest, parts = read_archive(path, FORMAT, FORMAT_VERSION, "trtbridge program")
        return parse_manifest(path, lambda: cls._from_json(path, manifest, parts))

    @classmethod
    def _from_json(cls, path: Path, manifest: Mapping[str, Any], parts: Mapping[str, bytes]) -> Program:
        backend = manifest["backend"]
        if backend not in BACKENDS:
            raise ModelFileError(
                f"{path} holds engines of the backend {backend!r}, which this trtbridge does not know; it knows "
                f"{', '.join(BACKENDS)}. Update trtbridge, or convert again."
            )
        return cls(
            backend=backend,
            steps=tuple(_read_step(step, parts, backend) for step in manifest["steps"]),
            signature=Signature.from_json(manifest["signature"]),
            constants={name: _read_constant(entry, parts) for name, entry in manifest["constants"].items()},
            aliases=manifest["aliases"],
            source=manifest["source"],
            info=manifest["info"],
            recipes=_read_recipes(manifest.get("recipes"), parts),
        )


def _read_step(data: Mapping[str, Any], parts: Mapping[str, bytes], backend: str) -> Step:
    if "plugin" in data:
        return PluginCall.from_json(data)
    return EngineStep(data["engine"], engine_from_json(data, parts, backend))


def _read_recipes(data: Mapping[str, Any] | None, parts: Mapping[str, bytes]) -> Recipes | None:
    return None if data is None else Recipes.from_json(data, [parts[name] for name in data["parts"]])


def _read_constant(entry: Mapping[str, Any], parts: Mapping[str, bytes]) -> torch.Tensor:
    dtype = to_torch(ir.DataType[entry["dtype"]])
    data = bytearray(parts[entry["part"]])
    if not data:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry["shape"])
