"""What a backend refuses of a model, kept on disk, so that the next conversion of it begins where this one ended.

It is a hint and no more: `Planner.recall` begins with it, and whatever else is refused is found as ever. It is kept
under a key of the model as it was before anything of it became a plugin, with its weights and example, and of all
versions: what a new release of a library takes is asked of it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..passes.pipeline import Pipeline
from ..plugins.op_version import function_version, op_version
from ..plugins.registry import op_name
from .atomic import remove_unfinished, write_atomically
from .backends.base import Backend
from .engine_cache import CacheReport
from .engine_key import KEY_FORMAT, TensorDigests, build_facts, canonical, digest
from .export import ExportedModule
from .model import OnnxModel
from .options import Options

FOLDER = "learned"
"""Folder of these files in the cache folder."""

MOST_FILES = 1024
"""Models that are kept; those that were not converted for longest go."""

IRRELEVANT_OPTIONS = (
    "progress", "cache", "cache_size_bytes", "cache_dir", "isolate", "timeout_s", "device", "dump_graphs", "verify",
    "check_passes", "calibration",
)  # fmt: skip
_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


class UnstableError(Exception):
    """Something has no text that is the same in another process."""


def learned_key(
    source: ExportedModule | OnnxModel, backend: Backend, options: Options, digests: TensorDigests
) -> str | None:
    """The key of a model that nothing of is a plugin yet.

    Args:
        source: a traced module, or the model of an .onnx file.
        backend: that is to build it.
        options: of the conversion.
        digests: keep those of the module's tensors, which the engine's key asks for again.

    Returns:
        None where it has none: what precision was measured on is not looked at, and a function or an object in the
        options may be another one in every process.
    """
    from .. import __version__  # the package imports this module before it says

    if options.calibration is not None:
        return None
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    try:
        facts = {
            "format": KEY_FORMAT,
            "versions": {"trtbridge": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
            "backend": [backend.name, dict(backend.identity(options.build)), build_facts(options.build)],
            "options": {name: _text(value) for name, value in given.items() if name not in IRRELEVANT_OPTIONS},
            "model": _file_facts(source, digests) if isinstance(source, OnnxModel) else _module_facts(source, digests),
        }
    except (UnstableError, importlib.metadata.PackageNotFoundError):
        return None
    return digest(facts)


@dataclass(frozen=True)
class LearnedFile:
    """The file of one model.

    Attributes:
        folder: of all such files.
        key: of the model.
    """

    folder: Path
    key: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.key}.json"

    def read(self, report: CacheReport) -> dict[str, Any]:
        """What is known; nothing where there is no file, or one that is damaged, which is removed."""
        try:
            content = json.loads(self.path.read_bytes())
            learned: dict[str, Any] = content["learned"]
            if content["key"] != self.key or content["sha256"] != _checksum(learned):
                raise ValueError("it does not match its checksum")
        except FileNotFoundError:
            return {}
        except OSError as error:
            report.note(f"The cache cannot be read: {error}")
            return {}
        except (ValueError, KeyError, TypeError) as error:
            report.note(f"What was learned of this model cannot be used and is removed: {self.path}: {error}")
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            return {}
        with suppress(OSError):
            self.path.touch()
        return learned

    def write(self, learned: Mapping[str, Any], report: CacheReport) -> None:
        """Keep what was learned."""
        content = {"key": self.key, "sha256": _checksum(learned), "learned": learned}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(json.dumps(content).encode()))
        except OSError as error:
            report.note(f"What was learned of this model is not kept: {error}")
        clear(self.folder, keep=MOST_FILES)


def clear(folder: Path, keep: int = 0) -> int:
    """Remove all files but those that were used last; how many."""
    remove_unfinished(folder)
    ages = []
    with suppress(OSError):
        for path in folder.glob("*.json"):
            with suppress(OSError):  # removed by another process in between
                ages.append((path.stat().st_mtime_ns, path))
    old = sorted(ages)[: max(0, len(ages) - keep)]
    for _, path in old:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return len(old)


def _checksum(learned: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()


def _file_facts(model: OnnxModel, digests: TensorDigests) -> dict[str, Any]:
    return {
        "graph": hashlib.sha256(canonical(model.proto)).hexdigest(),
        "weights": digests.of(model.weights),
        "signature": model.signature.to_json(),
        "data": {name: list(sizes) for name, sizes in model.data_dims.items()},
    }


def _module_facts(traced: ExportedModule, digests: TensorDigests) -> dict[str, Any]:
    program, arguments = traced.program, traced.arguments
    tensors = {**program.state_dict, **program.constants}
    return {
        "opset": traced.opset,
        "graph": hashlib.sha256("\n".join(_lines(program)).encode()).hexdigest(),
        "ops": {name: op_version(name) for name in sorted(set(_custom_ops(program)))},
        "ranges": {name: list(sizes) for name, sizes in arguments.ranges.items()},
        "sizes": sorted(f"{symbol} {bounds}" for symbol, bounds in program.range_constraints.items()),
        "labels": list(arguments.labels),
        "complex": [list(arguments.complex_inputs), list(traced.complex_outputs)],
        "tensors": {
            name: digests.pin(tensor) if isinstance(tensor, torch.Tensor) else _stable(repr(tensor))
            for name, tensor in sorted(tensors.items())
        },
        "example": [digests.pin(tensor) for tensor in arguments.tensors],
    }


def _graphs(program: torch.export.ExportedProgram) -> Iterator[tuple[str, torch.fx.Graph]]:
    for name, module in program.graph_module.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            yield name, module.graph


def _lines(program: torch.export.ExportedProgram) -> Iterator[str]:
    """The traced graph as text, with what is known of each value."""
    for name, graph in _graphs(program):
        yield name
        for node in graph.nodes:
            yield _stable(f"{node.format_node()} {_meta(node.meta.get('val'))}")


def _meta(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(map(str, value.shape))} {value.device}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_meta, value))})"
    return "" if value is None else str(value)


def _custom_ops(program: torch.export.ExportedProgram) -> Iterator[str]:
    for _, graph in _graphs(program):
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace != "aten":
                yield op_name(node.target)


def _text(value: Any) -> Any:
    """An option as JSON that is the same in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Pipeline):
        # Those that come along have this package's version.
        own = {one: type(one).__module__.partition(".")[0] == __name__.partition(".")[0] for one in value}
        return [[_stable(repr(one)), "" if own[one] else function_version(type(one))] for one in value]
    if isinstance(value, types.FunctionType):
        return function_version(value)
    if isinstance(value, (tuple, list)):
        return [_text(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_text(entry)) for entry in value)
    if isinstance(value, Mapping):
        return sorted([str(key), _text(entry)] for key, entry in value.items())
    return _stable(repr(value))


def _stable(text: str) -> str:
    """A text that names no object by its address.

    Raises:
        UnstableError: it does.
    """
    if " at 0x" in text:
        raise UnstableError(text)
    return text
