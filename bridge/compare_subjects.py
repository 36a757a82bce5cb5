"""What `compare` takes on either side, made ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from ..errors import BackendError, InputError, ModelFileError, OptionError
from ..passes.pipeline import Pipeline
from .backends import get_backend
from .cli_run import why_not_here
from .dims import Dim
from .model import OnnxModel, Signature
from .module import EngineModule
from .onnx_file import read_onnx
from .options import Options
from .planner import Planner
from .program import Program
from .runners import EngineRunner, Layout, ModuleRunner, module_device
from .stages import Stages
from .tolerances import coarser

Subject = torch.nn.Module | OnnxModel | str | os.PathLike[str]

_NO_RANGE = (1 << 31) - 1
"""Largest size of a dimension of an .onnx file that nothing bounds."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: what it is, for people: "Net in PyTorch", "Net on tensorrt_rtx".
        runs: a torch module, or engines.
        signature: how it is called; None for a module, which tells that of itself only with an example.
        computed_in: the coarsest float dtype that it is known to compute in; "" where none is known.
        bounded: whether the ranges of the signature mean something; False for those of an .onnx file's free dimensions.
    """

    name: str
    runs: torch.nn.Module
    signature: Signature | None
    computed_in: str
    bounded: bool = True

    def runner(self, name: str, layout: Layout, golden: bool = False) -> EngineRunner | ModuleRunner:
        """A runner that takes its inputs under the labels of a layout.

        Raises:
            InputError: it takes other inputs.
            OptionError: ``golden`` is asked of something that is no torch module.
        """
        if isinstance(self.runs, EngineModule):
            if golden:
                raise OptionError(f'golden="float64" is for a torch module as the first argument, not for {self.name}.')
            own = self.runs.program.signature.labels
            if not set(own) <= set(layout.labels) and len(own) != len(layout.labels):
                raise InputError(f"{self.name} takes {', '.join(own)}, but the inputs are {', '.join(layout.labels)}.")
            return EngineRunner(self.runs, name, layout)
        return ModuleRunner(self.runs, layout, name, golden, _own_dtype(self.runs))


def make_side(subject: Subject | Side, device: torch.device | str | None = None) -> Side:
    """Make one side ready.

    Args:
        subject: a torch module, what trtbridge converted, an ONNX model, the path of an .onnx file or of a saved one.
        device: where files and ONNX models run; None for the CPU or, for a saved program, the backend's choice.

    Raises:
        OptionError: it is none of these.
        ModelFileError: a file is missing, damaged, or of another kind.
        BackendError: it cannot run on this machine.
    """
    if isinstance(subject, Side):
        return subject
    if isinstance(subject, (str, os.PathLike)):
        return _file_side(Path(subject), device)
    if isinstance(subject, EngineModule):
        return _engine_side(subject, f"{subject.program.source} on {subject.program.backend}")
    if isinstance(subject, OnnxModel):
        return _onnx_side(subject, f"{subject.source or 'ONNX model'} as ONNX", device)
    if isinstance(subject, torch.nn.Module):
        name = f"{type(subject).__name__} in PyTorch"
        return Side(f"{name} on {module_device(subject)}", subject, None, _module_dtype(subject))
    raise OptionError(
        "compare() takes a torch module, what convert(), export() or load() returned, or the path of an .onnx or saved "
        f"file, got {type(subject).__name__}."
    )


_ROUNDS_AS = {"auto": "fp16", "int8": "fp8"}
"""Precisions that name no float dtype, with the one that rounds about as much."""


def _file_side(path: Path, device: torch.device | str | None) -> Side:
    if path.suffix.lower() != ".onnx":
        return _engine_side(EngineModule(Program.load(path), device), path.name)
    dims, free = _free_dims(path)
    side = _onnx_side(read_onnx(path, dims), path.name, device)
    return Side(side.name, side.runs, side.signature, side.computed_in, not free)


def _engine_side(module: EngineModule, name: str) -> Side:
    if reason := why_not_here(module):
        raise BackendError(f"{name} cannot run here, so it cannot be compared here: {reason}")
    program = module.program
    computed_in = _signature_dtype(program.signature)
    for part in filter(None, (program.info.get("precision") or {}).get("precision", "").split("+")):
        computed_in = coarser(computed_in, _ROUNDS_AS.get(part, part))
    for engine in program.engines:
        for spec in (*engine.inputs, *engine.outputs):
            computed_in = coarser(computed_in, spec.dtype)
        if engine.info.get("tf32"):
            computed_in = coarser(computed_in, "tf32")
    on = f" on {module.device}" if module.device.type == "cuda" else ""
    return Side(f"{name}{on}", module, program.signature, computed_in)


def _onnx_side(model: OnnxModel, name: str, device: torch.device | str | None) -> Side:
    """The graph as it stands, no pass over it, in ONNX Runtime; what that does not take runs as plugins."""
    options = Options.make({"passes": Pipeline(()), "check_export": False})
    program = Planner(model, get_backend("onnxruntime"), options, Stages(progress=None)).build()
    module = EngineModule(program, device or "cpu")
    computed_in = _signature_dtype(model.signature)
    for value in (*model.proto.graph.value_info, *model.proto.graph.initializer):
        kind = value.data_type if isinstance(value, onnx.TensorProto) else value.type.tensor_type.elem_type
        if kind:
            computed_in = coarser(computed_in, ir.DataType(kind))
    return Side(f"{name} in ONNX Runtime", module, model.signature, computed_in)


def _free_dims(path: Path) -> tuple[Mapping[str, Any] | None, bool]:
    """A range without bound for each dimension of an .onnx file that has no size, and whether there is any."""
    if not path.is_file():
        raise ModelFileError(f"There is no file {path}.")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:
        return None, False  # reading it properly says what is wrong
    names: dict[str, str] = {}
    found: dict[str, dict[int, Dim]] = {}
    constants = {tensor.name for tensor in graph.initializer}
    for number, value in enumerate(graph.input):
        if value.name in constants:
            continue
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if not size.HasField("dim_value"):
                own = size.dim_param if size.dim_param.isidentifier() else ""
                name = names.setdefault(size.dim_param or f"{number} {axis}", own or f"size{number}_{axis}")
                found.setdefault(value.name, {})[axis] = Dim(name, min=1, opt=1, max=_NO_RANGE)
    return found or None, bool(found)


def _signature_dtype(signature: Signature) -> str:
    found = ""
    for spec in (*signature.inputs, *signature.outputs):
        found = coarser(found, spec.dtype)
    return found


def _module_dtype(module: torch.nn.Module) -> str:
    found = ""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            found = coarser(found, tensor.dtype)
    return found


def _own_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights, where they have one in common: inputs made for the other side are cast to it."""
    dtypes = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    return next(iter(dtypes)) if len(dtypes) == 1 else None
