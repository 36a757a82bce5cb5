"""The pipeline: export, passes, partition, build, run."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, OptionError
from .attention import make_attention
from .backends import choose_backend
from .backends.base import Backend
from .cache import resolve_cache_dir
from .conversion_cache import ConversionCache
from .export import DEFAULT_OPSET, ExportedModule, trace
from .model import OnnxModel
from .module import EngineModule, pick_device, runs_here
from .onnx_file import read_onnx
from .options import Options
from .out_of_range import Original, check_choice
from .planner import Planner
from .program import Program
from .refit import Weights
from .runtime_options import RuntimeOptions
from .stages import Stages

Model = torch.nn.Module | str | os.PathLike[str]


def convert(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    **options: Any,
) -> EngineModule:
    """Turn a module, or an .onnx file, into engines that are called as the original was.

    The module is exported in eval mode and left as it was found. What ``args`` and ``kwargs`` hold beside tensors is
    fixed at its value. What ONNX cannot express, or the backend does not take, runs as plugins (`Options.fallback`).

    Args:
        model: an nn.Module on CPU or CUDA, in any floating dtype, or the path of an .onnx file.
        args: example positional arguments: tensors of shapes within ``dynamic_shapes``; none for a file.
        kwargs: example keyword arguments; none for a file.
        dynamic_shapes: which dimensions vary, as for torch.export: by argument name, or in order, following nested
            arguments; ``{"x": {0: Dim("batch", min=1, opt=8, max=32)}}``. All others are static.
        backend: "tensorrt", "tensorrt_rtx", "onnxruntime", or "auto" for the first of these that is installed and can
            build here.
        options: see `Options`.

    Returns:
        A module that runs the engines. Its ``program.info`` tells the seconds of each stage and the backend's version.

    Raises:
        TrtBridgeError: with subclasses `OptionError`, `InputError`, `DynamicShapeError`, `ExportError`,
            `ModelFileError`, `PassError`, `UnsupportedOpError`, `BuildError`, `BackendError`, `CacheError` and
            `AccuracyError`.
    """
    chosen = Options.make(options)
    builder, reason = choose_backend(backend)
    builder.check_options(chosen.build)
    builder.check_runtime(chosen.runtime)
    eager = _original(model, chosen)
    resolve_cache_dir(chosen.cache_dir)  # fails now rather than after minutes of building
    device = chosen.device
    if device is None and builder.name == "onnxruntime" and isinstance(model, torch.nn.Module):
        device = _module_device(model) if "cuda" in builder.status().devices else "cpu"
    device = pick_device(builder.name, device)
    if chosen.verify is not False:
        from .compare_verify import require_running_here  # Polygraphy is loaded only where it is used

        require_running_here(builder.name, device)
    if eager is not None:
        Original(eager, device)  # fails now rather than after minutes of building
    planner = make_planner(model, args, kwargs, dynamic_shapes, builder, chosen)
    cache = None
    if chosen.cache:
        with planner.stages.stage("cache"):
            cache = ConversionCache.begin(planner, chosen)
    program = planner.build()
    info = {
        "backend_choice": reason,
        "stage_seconds": planner.stages.seconds,
        "passes": [{"name": r.name, "rewrites": r.rewrites, "seconds": round(r.seconds, 4)} for r in planner.passes],
        **({"attention": report.to_json()} if (report := planner.attention_report) is not None else {}),
        "opset": planner.opset,
        "options": chosen.recorded,
        "learned": planner.learned,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if cache is not None:
        info["cache"] = cache.end(planner)
    if planner.precision is not None:
        info["precision"] = planner.precision.to_json()
    program = dataclasses.replace(program, info=info)
    # Without a GPU there is nothing to put the weights into yet.
    weights = model if isinstance(model, torch.nn.Module) and runs_here(device) else None
    module = EngineModule(
        program, device, chosen.cache_dir, chosen.runtime, eager, weights if program.is_stripped else None
    )
    if chosen.verify is not False:
        from .compare_verify import verify

        with planner.stages.stage("compare"):
            original = model if isinstance(model, torch.nn.Module) else planner.source
            assert isinstance(original, (torch.nn.Module, OnnxModel)), "a traced module is made of a torch module"
            verify(original, module, (args, kwargs), None if chosen.verify is True else chosen.verify)
    return module


def make_planner(
    model: Model,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    backend: Backend,
    options: Options,
    may_measure: bool = True,
) -> Planner:
    """Trace a module, or read an .onnx file, for plans to be made of it; `may_measure`: on a GPU, what is faster."""
    stages = Stages(progress=options.progress)
    with stages.stage("read" if isinstance(model, (str, os.PathLike)) else "trace"):
        if isinstance(model, (str, os.PathLike)):
            if args or kwargs:
                raise InputError("An .onnx file brings its own shapes and dtypes: leave args and kwargs out.")
            if dynamic_shapes is not None and not isinstance(dynamic_shapes, Mapping):
                raise OptionError("For an .onnx file dynamic_shapes is a dict by input name.")
            if options.opset is not None:
                raise OptionError(f"opset={options.opset}: an .onnx file has its own opset; leave the option out.")
            if options.can_be_refitted:
                raise OptionError("Refitting is for torch modules: an .onnx file does not say what its weights are.")
            source: ExportedModule | OnnxModel = read_onnx(model, dynamic_shapes)
        else:
            source = trace(
                model,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                opset=options.opset or DEFAULT_OPSET,
                refittable=options.can_be_refitted,
            )
    return Planner(source, backend, options, stages, attention=make_attention(options, backend, may_measure))


def _original(model: Model, options: Options) -> torch.nn.Module | None:
    """What runs outside every profile, where that is asked for."""
    if options.out_of_range == "error":
        return None
    if not isinstance(model, torch.nn.Module):
        raise OptionError(
            'out_of_range="eager" runs the original module, and an .onnx file is none: leave it out, or load the saved '
            "program with tb.load(path, eager=module) where there is a module that does the same."
        )
    return model


def _module_device(model: torch.nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def save(module: EngineModule, path: str | os.PathLike[str]) -> None:
    """Write a converted module to one file: a JSON manifest and raw bytes, no pickle, whole or not at all.

    Raises:
        ModelFileError: the file cannot be written.
    """
    if not isinstance(module, EngineModule):
        raise InputError(f"save() takes what convert() returned, got {type(module).__name__}.")
    module.save(path)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    out_of_range: str | None = None,
    eager: torch.nn.Module | None = None,
    weights: Weights | None = None,
    **options: Any,
) -> EngineModule:
    """Read a module that `save` wrote.

    Args:
        path: the file.
        device: where to run; default the backend's own choice.
        cache_dir: folder for compiled kernels.
        out_of_range: what happens to sizes outside every profile: "error", or "eager", which needs ``eager``. Default:
            "eager" where ``eager`` is given. A file holds no original, so that what was converted with "eager" is
            loaded with "error" unless it is given again.
        eager: the original, or a module that does the same, to run on such sizes; see `Options.out_of_range`.
        weights: a module or a state dict whose weights the engines take: needed for a file without weights, else as
            `EngineModule.refit` does.
        options: how calls run; see `RuntimeOptions`.

    Raises:
        OptionError: an option is unknown or has an impossible value, ``out_of_range`` and ``eager`` do not go together,
            or ``eager`` is no module on that device.
        RefitError: the weights do not fit, or the file takes none.
        ModelFileError: no such file, damaged, or no such program.
        BackendError: the engines cannot run here.
        PluginError: a plugin op is not registered in this process.
    """
    runtime = RuntimeOptions.make(options)
    check_choice(out_of_range, eager)
    return EngineModule(Program.load(path), device, cache_dir, runtime, eager, weights)
