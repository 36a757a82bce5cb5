"""The pipeline: export, passes, partition, build, run."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, OptionError
from .attention import make_attention
from .backends import choose_backend
from .backends.base import Backend, Refusal
from .cache import resolve_cache_dir
from .export import DEFAULT_OPSET, ExportedModule, trace
from .model import OnnxModel, Signature
from .module import EngineModule, describe_plugin, pick_device, runs_here
from .onnx_file import read_onnx
from .options import Options
from .plan import PluginCall
from .planner import Planner
from .program import Program
from .refit import Weights
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
    resolve_cache_dir(chosen.cache_dir)  # fails now rather than after minutes of building
    device = chosen.device
    if device is None and builder.name == "onnxruntime" and isinstance(model, torch.nn.Module):
        device = _module_device(model) if "cuda" in builder.status().devices else "cpu"
    device = pick_device(builder.name, device)
    if chosen.verify is not False:
        from .compare_verify import require_running_here  # Polygraphy is loaded only where it is used

        require_running_here(builder.name, device)
    planner = make_planner(model, args, kwargs, dynamic_shapes, builder, chosen)
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
    if planner.precision is not None:
        info["precision"] = planner.precision.to_json()
    program = dataclasses.replace(program, info=info)
    # Without a GPU there is nothing to put the weights into yet.
    weights = model if isinstance(model, torch.nn.Module) and runs_here(device) else None
    module = EngineModule(program, device, chosen.cache_dir, weights if program.is_stripped else None)
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


def _module_device(model: torch.nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@dataclass(frozen=True)
class Explanation:
    """What would become of a model, found without building it.

    Attributes:
        backend: the backend that was asked.
        steps: a line a step: segments with their nodes, plugins with their Python lines and reasons.
        refusals: nodes that the backend's parser does not take, by segment.
        passes: a line a pass, and what became of the precision where one was asked for.
        signature: inputs and outputs.
    """

    backend: str
    source: str
    signature: Signature
    steps: tuple[str, ...]
    refusals: Mapping[str, Sequence[Refusal]]
    passes: tuple[str, ...]

    @property
    def converts(self) -> bool:
        """Whether the parser takes everything that is not a plugin."""
        return not any(self.refusals.values())

    def __str__(self) -> str:
        lines = [f"{self.source} on {self.backend}"]
        lines += [f"  input {line}" for line in self.signature.describe_inputs()]
        lines += [f"  {line}" for line in self.passes]
        for step in self.steps:
            lines.append(f"  {step}")
            name = step.partition(":")[0]
            lines += ["    refused: " + str(refusal).replace("\n", "\n    ") for refusal in self.refusals.get(name, ())]
        lines += [f"  output {line}" for line in self.signature.describe_outputs()]
        lines.append("  converts" if self.converts else "  does not convert: the parser refuses the nodes above")
        return "\n".join(lines)


def explain(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    **options: Any,
) -> Explanation:
    """Say what becomes engine, what becomes plugin and why, without building.

    Takes what `convert` takes, and raises the same errors, but `UnsupportedOpError` for what the parser refuses: those
    nodes are in the result.
    """
    chosen = Options.make(options)
    builder, _ = choose_backend(backend)
    builder.check_options(chosen.build)
    planner = make_planner(model, args, kwargs, dynamic_shapes, builder, chosen, may_measure=False)
    plan, refusals = planner.settled_plan()
    lines = []
    for step in plan.steps:
        if isinstance(step, PluginCall):
            lines += describe_plugin(step, "between segments")
            continue
        counts: dict[str, int] = {}
        for node in step.proto.graph.node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        listed = ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), key=lambda item: -item[1]))
        lines.append(f"{step.name}: engine of {sum(counts.values())} nodes ({listed})")
        for call in step.hosted:
            lines += describe_plugin(call, f"inside {step.name}")
    passes = tuple(f"pass {r.name}: {r.rewrites} rewrites, {len(r.refusals)} near misses" for r in planner.passes)
    if planner.precision is not None:
        passes += tuple(str(planner.precision).splitlines())
    if planner.attention_report is not None:
        passes += (planner.attention_report.summary,)
    return Explanation(builder.name, plan.source, plan.signature, tuple(lines), refusals, passes)


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
    weights: Weights | None = None,
) -> EngineModule:
    """Read a module that `save` wrote.

    Args:
        path: the file.
        device: where to run; default the backend's own choice.
        cache_dir: folder for compiled kernels.
        weights: a module or a state dict whose weights the engines take: needed for a file without weights, else as
            `EngineModule.refit` does.

    Raises:
        RefitError: the weights do not fit, or the file takes none.
        ModelFileError: no such file, damaged, or no such program.
        BackendError: the engines cannot run here.
        PluginError: a plugin op is not registered in this process.
    """
    return EngineModule(Program.load(path), device, cache_dir, weights)
