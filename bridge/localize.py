"""The first place where a converted model parts from the original: the layer, the node, the line of Python."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import InputError, OptionError
from .activations import NOT_FINITE, excess, layer_error
from .backends import choose_backend, get_backend
from .backends.base import Backend
from .cache import resolve_cache_dir
from .cli_run import RandomInputs, why_not_here
from .convert import load
from .dtypes import to_torch
from .export import DEFAULT_OPSET, ExportedModule, trace
from .localize_engine import EngineCheck
from .localize_points import Examined, align, examine
from .localize_reference import OUTPUT, GraphReference, Reference, TorchReference
from .localize_report import LocalizeReport, Stage, Suspect
from .localize_stage import GraphCheck, Limits
from .localize_stages import check_inputs, dynamic_shapes_of, model_of, models_by_pass, plan_of
from .model import OnnxModel, Signature, iterate_nodes, origin_of
from .module import EngineModule, pick_device
from .onnx_file import read_onnx
from .options import Options
from .partition import is_plugin
from .planner import Planner
from .repro import Repro
from .stages import Stages
from .structure import flatten

logger = logging.getLogger(__name__)

Converted = EngineModule | OnnxModel | str | os.PathLike[str]


def localize(
    model: torch.nn.Module | OnnxModel | str | os.PathLike[str],
    converted: Converted | None = None,
    inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    golden: bool = False,
    tolerance: float | None = None,
    repro: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    **options: Any,
) -> LocalizeReport:
    """Find the first place where a converted model parts from the original.

    The stages are compared in order: torch against the exported graph, the graph after the passes (and, where that is
    wrong, after each of them), in another precision, and the engine. In each stage every layer is measured twice: in a
    run of the whole stage, and alone, given the original's values of what it reads. The first layer that is wrong alone
    is to blame. Graphs run in ONNX Runtime on the CPU; engines run where they can, with inner tensors marked as
    outputs, in three builds at most.

    Args:
        model: the original: a module, or an .onnx file.
        converted: what came of it: what `convert` returned or `save` wrote, or a graph (what `export` returned, or an
            .onnx file). None converts the model here, with ``backend`` and ``options``.
        inputs: arguments of one call: a tuple, a dict by name, or a tuple of both: ``((x,), {"mask": m})``. None makes
            up random ones that fit ``converted``.
        dynamic_shapes: as `convert` takes them; None for those that ``converted`` has.
        golden: compare with the original in float64 instead of its own dtype.
        tolerance: largest relative error (L2 norm) of one layer alone; None for what its precision explains.
        repro: folder for a standalone repro of what is found: a graph of a few nodes, their inputs, and a script.
        backend: what to convert with, where ``converted`` is None.
        options: those of `convert`; for a converted module, those that it does not tell itself, such as ``passes``.

    Returns:
        What was found. It prints as a table.

    Raises:
        TrtBridgeError: the model cannot be traced or run on the inputs, or is another one than was converted; with
            the subclasses that `convert` raises.
    """
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise OptionError(f"tolerance={tolerance!r}: must be a positive number, the largest relative error of a layer.")
    given = _read(converted)
    report = _Search.start(model, given, inputs, dynamic_shapes, golden, tolerance, backend, options).run()
    if repro is not None and report.repro is not None:
        report = dataclasses.replace(report, repro_dir=report.save_repro(Path(repro)))
    return report


def _read(converted: Converted | None) -> EngineModule | OnnxModel | None:
    if isinstance(converted, (str, os.PathLike)):
        path = Path(converted)
        return read_onnx(path) if path.suffix == ".onnx" else load(path)
    if converted is None or isinstance(converted, (EngineModule, OnnxModel)):
        return converted
    raise InputError(
        f"localize() takes what convert() or export() returned, or a file, not a {type(converted).__name__}."
    )


@dataclass(frozen=True)
class _Search:
    """One search: the source, the reference, and what was converted."""

    source: ExportedModule | OnnxModel
    reference: Reference
    given: EngineModule | OnnxModel | None
    backend: Backend
    options: Options
    limits: Limits
    base: OnnxModel | None = None  # an export with the reference's names of calls, where the source has its own

    @classmethod
    def start(
        cls,
        model: Any,
        given: EngineModule | OnnxModel | None,
        inputs: Any,
        dynamic_shapes: Any,
        golden: bool,
        tolerance: float | None,
        backend: str,
        options: Mapping[str, Any],
    ) -> _Search:
        signature = None if given is None else _signature(given)
        if isinstance(given, EngineModule):
            options = {**given.program.info.get("options", {}), **options}
            builder = get_backend(given.program.backend)
        elif isinstance(given, OnnxModel):
            builder = get_backend("onnxruntime")
        else:
            builder = choose_backend(backend)[0]
        chosen = Options.make(options)
        limits = Limits(tolerance, chosen.tf32)
        if isinstance(model, (str, os.PathLike, OnnxModel)):
            if golden:
                raise OptionError("golden=True is for modules: an .onnx file has no float64 form.")
            shapes = dynamic_shapes or (dynamic_shapes_of(signature) if signature else None)
            source = model if isinstance(model, OnnxModel) else read_onnx(model, shapes)
            tensors = _flat(inputs, source.signature) if inputs is not None else RandomInputs().make(source.signature)
            reference = GraphReference(source, [tensor.detach().cpu() for tensor in tensors])
            return cls(source, reference, given, builder, chosen, limits)
        if not isinstance(model, torch.nn.Module):
            raise InputError(f"localize() takes a torch.nn.Module or an .onnx file, got {type(model).__name__}.")
        if inputs is None:
            if signature is None:
                raise InputError("Give inputs=(x, ...): nothing converted is given that tells what the model takes.")
            args, kwargs = _random_call(signature, model)
        else:
            args, kwargs = _call(inputs)
        shapes = dynamic_shapes if dynamic_shapes is not None or signature is None else dynamic_shapes_of(signature)
        opset = chosen.opset or DEFAULT_OPSET
        traced = trace(model, args, kwargs, dynamic_shapes=shapes, opset=opset)
        original = TorchReference(traced, golden)
        dtype = None
        if isinstance(given, EngineModule):
            dtype = _other_dtype(given.program.signature, TorchReference(traced) if golden else original)
        if dtype is None:
            return cls(traced, original, given, builder, chosen, limits)
        logger.info("the model was converted in %s, so its stages are those of a copy in that dtype", dtype)
        args, kwargs = pytree.tree_map(lambda one: _in_dtype(one, dtype), (args, kwargs))
        copied = trace(copy.deepcopy(model).to(dtype), args, kwargs, dynamic_shapes=shapes, opset=opset)
        return cls(copied, original, given, builder, chosen, limits, traced.to_onnx({})[0])

    def run(self) -> LocalizeReport:
        if isinstance(self.given, OnnxModel):
            return self._graphs(self.given)
        return self._conversion()

    # A graph

    def _graphs(self, given: OnnxModel) -> LocalizeReport:
        check_inputs(given.signature, self.reference.inputs, "the converted graph")
        if isinstance(self.source, OnnxModel):
            return self._stages([("given graph", given)], self.source, self.source)
        problems = self.source.plugin_problems(calls := _plugin_calls(given))
        export, _ = self.source.to_onnx({call: "" for call in calls if call not in problems})
        return self._stages([("export", export), ("given graph", given)], export, None)

    def _stages(
        self, models: Sequence[tuple[str, OnnxModel]], export: OnnxModel, before: OnnxModel | None
    ) -> LocalizeReport:
        """Compare graphs in order, up to the first that is wrong."""
        stages: list[Stage] = []
        for name, model in models:
            check = self._check(name, model, export)
            stage, suspect, repro = self._compare(check, before)
            stages.append(stage)
            if suspect is not None:
                return LocalizeReport(self.reference.words, tuple(stages), suspect, repro=repro)
            before = model
        return LocalizeReport(self.reference.words, tuple(stages))

    def _check(self, name: str, model: OnnxModel, export: OnnxModel) -> GraphCheck:
        calls = None if isinstance(self.source, OnnxModel) else align(model, self.base or export)
        before = None if isinstance(self.source, OnnxModel) else self.base or export
        return GraphCheck(name, examine(model, self.reference, calls, before), self.reference, self.limits)

    def _compare(self, check: GraphCheck, before: OnnxModel | None) -> tuple[Stage, Suspect | None, Repro | None]:
        stage = check.run()
        layer = next(check.suspects(stage), None)
        if layer is None:
            return stage, None, None
        previous = None if before is None else Examined(before, ())
        return stage, check.blame(layer, previous), check.repro(layer)

    # A conversion

    def _conversion(self) -> LocalizeReport:
        planner = Planner(self.source, self.backend, self.options, Stages(progress=self.options.progress))
        module, builds = self.given, 0
        if isinstance(module, EngineModule):
            planner.recall(module.program.info.get("learned", {}))
            plan, _ = planner.settled_plan()
            theirs = [entry["name"] for entry in module.program.info.get("passes", ())]
            if theirs and theirs != [report.name for report in planner.passes]:
                logger.warning("it was converted with the passes %s: give them as passes=", ", ".join(theirs))
        else:
            program = planner.build()
            builds = 1
            device = pick_device(self.backend.name, self.options.device)
            module = EngineModule(program, device, self.options.cache_dir)
            plan = planner.plan()
        check_inputs(module.program.signature, self.reference.inputs, "the converted module")
        export = planner.models["export"]
        report = self._stages([("export", export), ("passes", planner.models["passes"])], export, None)
        if report.suspect is not None and report.suspect.stage == "passes":
            report = self._by_pass(report, export)
        if report.suspect is None and "precision" in planner.models:
            name = f"precision {self.options.precision}"
            more = self._stages([(name, planner.models["precision"])], export, planner.models["passes"])
            report = dataclasses.replace(more, stages=(*report.stages, *more.stages))
        if report.suspect is not None:
            return dataclasses.replace(report, builds=builds)
        last = next(planner.models[s] for s in ("attention", "precision", "passes") if s in planner.models)
        return self._engine(report, module, plan, last, export, builds)

    def _by_pass(self, report: LocalizeReport, export: OnnxModel) -> LocalizeReport:
        """The first pass after which the model is wrong, found by halving."""
        models = list(models_by_pass(export, self.options.pipeline))
        good, bad, found = -1, len(models), report
        while bad - good > 1:
            middle = (good + bad) // 2
            before = export if middle == 0 else models[middle - 1][1]
            name, model = models[middle]
            check = self._check(f"pass {name}", model, export)
            stage, suspect, repro = self._compare(check, before)
            if suspect is None:
                good = middle
            else:
                bad = middle
                found = LocalizeReport(report.source, (report.stages[0], stage), suspect, repro=repro)
        if bad == len(models):  # the passes are right, so it is what rewrites nodes for the backend
            assert report.suspect is not None
            name = "rewrites for the backend"
            stages = (report.stages[0], dataclasses.replace(report.stages[1], name=name))
            return dataclasses.replace(report, stages=stages, suspect=dataclasses.replace(report.suspect, stage=name))
        return found

    def _engine(
        self, report: LocalizeReport, module: EngineModule, plan: Any, last: OnnxModel, export: OnnxModel, builds: int
    ) -> LocalizeReport:
        name = f"engine {self.backend.name}"
        if reason := why_not_here(module):
            stage = Stage(name, notes=(f"not run: {reason}",))
            # A stage that was not compared is no result: what came before stands.
            return dataclasses.replace(report, stages=(*report.stages[:-1], stage, report.stages[-1]), builds=builds)
        own = plan_of(module.program)
        if own is not None:
            plan = own
            last = model_of(own) or last
        check = self._check(name, last, export)
        # What holds a value in another form, which the stages before have found, would be taken for wrong here. A form
        # is finite where the value is: infinity is no form.
        layers = [layer for stage in report.stages for layer in stage.layers if layer.wrong not in ("", NOT_FINITE)]
        odd = {layer.tensor for layer in layers}
        points = tuple(point for point in check.examined.points if point.tensor not in odd)
        check = dataclasses.replace(check, examined=Examined(check.examined.model, points))
        folder = resolve_cache_dir(self.options.cache_dir)
        engine = EngineCheck(name, check, plan, self.backend, self.options.build, module.device, folder, builds)
        stage, suspect, repro = engine.run(self._given_errors(module, check))
        if suspect is not None and own is not None and model_of(own) is not None:
            suspect = dataclasses.replace(check.blame(suspect.layer, Examined(export, ())), stage=name)
        stages = (*report.stages, stage)
        return LocalizeReport(report.source, stages, suspect, engine.builds, repro=repro)

    def _given_errors(self, module: EngineModule, check: GraphCheck) -> dict[str, tuple[float, str]]:
        """The errors of a converted module's results, as it is."""
        inputs = [tensor.to(module.device) for tensor in check.inputs.values()]
        args, kwargs = module.program.signature.input_structure.unflatten(_as_called(inputs, module.program.signature))
        results = [torch.view_as_real(t) if t.is_complex() else t for t in flatten(module(*args, **kwargs))[0]]
        wanted = self.reference.values({f"{OUTPUT}{index}" for index in range(len(results))})
        limit = self.limits.whole(set(check.examined.dtypes.values()))
        found = {}
        for index, (spec, mine) in enumerate(zip(module.program.signature.outputs, results, strict=True)):
            value = wanted[f"{OUTPUT}{index}"]
            is_free = self.reference.is_random or check.is_free(spec.name)
            found[spec.name] = layer_error(mine, value), "" if is_free else excess(mine, value, limit, 1e-2 * limit)
        return found


def _signature(given: EngineModule | OnnxModel) -> Signature:
    return given.program.signature if isinstance(given, EngineModule) else given.signature


def _plugin_calls(model: OnnxModel) -> list[str]:
    """The calls that are plugin nodes in a graph."""
    return [call for node in iterate_nodes(model.proto.graph) if is_plugin(node) and (call := origin_of(node).call)]


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call, as (args, kwargs)."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if not isinstance(inputs, (tuple, list)):
        raise InputError(f"inputs must be a tuple of arguments or a dict by name, got {type(inputs).__name__}.")
    if len(inputs) == 2 and isinstance(inputs[0], (tuple, list)) and isinstance(inputs[1], Mapping):
        return tuple(inputs[0]), dict(inputs[1])
    return tuple(inputs), {}


def _flat(inputs: Any, signature: Signature) -> list[torch.Tensor]:
    """The tensors of a call of an .onnx file in its order."""
    args, kwargs = _call(inputs)
    found = [*args, *(kwargs[name] for name in signature.parameters[len(args) :] if name in kwargs)]
    if len(found) != len(signature.inputs) or not all(isinstance(one, torch.Tensor) for one in found):
        raise InputError(f"The file takes tensors for {', '.join(signature.parameters)}.")
    return found


def _random_call(signature: Signature, model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random arguments in the module's dtype, on its device; integers are 0 or 1."""
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.empty(0))
    tensors = [
        t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for t in RandomInputs().make(signature)
    ]
    args, kwargs = signature.input_structure.unflatten(_as_called(tensors, signature))
    return tuple(args), dict(kwargs)


def _other_dtype(signature: Signature, reference: Reference) -> torch.dtype | None:
    """The dtype that a module was converted in, where its results say that it was not that of the original."""
    for index, spec in enumerate(signature.outputs):
        theirs, ours = to_torch(spec.dtype), reference.types[f"{OUTPUT}{index}"][1]
        if theirs.is_floating_point and ours.is_floating_point:
            return theirs if theirs is not ours else None
    return None


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _as_called(tensors: Sequence[torch.Tensor], signature: Signature) -> list[torch.Tensor]:
    """Tensors of the graph as the user gives them: complex where they are."""
    return [
        torch.view_as_complex(t.contiguous()) if i in signature.complex_inputs else t for i, t in enumerate(tensors)
    ]
