"""Parses and builds one engine with TensorRT or TensorRT-RTX; the body of the process that `tensorrt.py` starts.

Both libraries can take the whole process down on some graphs, so this runs as
``python -m trtbridge.bridge.backends.trt_build JOB_FOLDER`` and talks in lines of JSON on standard output. It imports
no torch: it starts quickly and returns all memory when done.

The job folder holds ``job.json`` (`Job`), ``model.onnx`` and ``weights.bin``; ``result.json`` (`Outcome`) and
``engine.plan`` are left in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import TrtBridgeError
from ...plugins.tensorrt_v3 import PluginHost, describe_failure, plugin_host
from .flavour import FLAVOURS, Flavour, target_gpus
from .plugin_library import require_library
from .trt_refusals import find_all, weights_in

if TYPE_CHECKING:
    import tensorrt as trt

Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Job:
    """What to build.

    Attributes:
        flavour: "tensorrt" or "tensorrt_rtx".
        parse_only: ask the parser alone.
        weights: (name, offset, size) of each weight in weights.bin, in bytes.
        profiles: for each profile the ranges of every input: name → [min, opt, max] of each dimension.
        tf32, optimization_level, workspace_bytes, compute_capabilities: as in `BuildOptions`.
        gpu_present: whether a CUDA device can be used.
        plugins: the graph has plugin nodes.
        timings: file of how long kernels took (`timing_cache`), "" for none.
        refittable: the weights that may be exchanged later; the engine is built for that where there are any.
        strip_weights: leave those out of the engine.
        weight_inputs: the inputs of the network that are weights, of fixed shapes and in no profile.
        stream_weights: weights may lie on the host while the engine runs.
    """

    flavour: str
    parse_only: bool
    weights: list[tuple[str, int, int]]
    profiles: list[dict[str, list[tuple[int, int, int]]]]
    tf32: bool
    optimization_level: int | None
    workspace_bytes: int | None
    compute_capabilities: list[tuple[int, int]]
    gpu_present: bool
    plugins: bool = False
    timings: str = ""
    refittable: list[str] = field(default_factory=list)
    strip_weights: bool = False
    weight_inputs: list[str] = field(default_factory=list)
    stream_weights: bool = False


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        refusals: the parser's errors, each with node index, name, op and words.
        error: why there is no engine, "" where there is one.
        messages: the library's warnings and errors, the last hundred.
        layers: name, type and output dtypes of each layer of the network as parsed.
        version: of the library.
        graph_at_fault: the error may have to do with what is in the graph.
    """

    refusals: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    messages: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    version: str = ""
    graph_at_fault: bool = True


def run_job(folder: Path, report: Report) -> Outcome:
    """Parse, and unless the job says otherwise build; the engine is left in ``folder / "engine.plan"``.

    Args:
        folder: the job folder.
        report: called with (phase, fraction done) while building.
    """
    job = Job(**json.loads((folder / "job.json").read_text()))
    outcome = Outcome()
    try:
        host = _host(FLAVOURS[job.flavour]) if job.plugins else None
        _run(job, folder, report, outcome)
        failure = host.take_failure() if host is not None else None
    except TrtBridgeError as error:
        outcome.error = str(error)
        return outcome
    if failure is not None:
        # The library's own words ("could not create the plugin") only follow from it.
        outcome.refusals = []
        outcome.error = f"a plugin failed while building: {describe_failure(failure)}"
        (folder / "engine.plan").unlink(missing_ok=True)
    return outcome


def _host(flavour: Flavour) -> PluginHost:
    """Make this process ready to import plugin nodes."""
    flavour.module()
    require_library(flavour)
    host = plugin_host(flavour.module)
    host.take_failure()  # one from before, in a process that goes on
    return host


def _run(job: Job, folder: Path, report: Report, outcome: Outcome) -> None:
    flavour = FLAVOURS[job.flavour]
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    outcome.version = trt.__version__
    logger = _make_logger(flavour, outcome)
    builder = trt.Builder(logger)
    # The weights must outlive the build: TensorRT reads them where they lie.
    weights = np.memmap(folder / "weights.bin", np.uint8, "r") if job.weights else np.empty(0, np.uint8)
    model = (folder / "model.onnx").read_bytes()
    report("Parsing", 0.0)

    def parse(candidate: bytes) -> tuple[trt.INetworkDefinition | None, trt.OnnxParser, list[dict[str, Any]]]:
        own = job.weights if candidate is model else weights_in(candidate, job.weights)
        return _parse(flavour, builder, logger, candidate, own, weights.ctypes.data)

    network, _parser, refusals = parse(model)
    if network is None:
        outcome.refusals = find_all(model, refusals, lambda part: parse(part)[2])
        outcome.error = "the parser refuses the graph"
        return
    if job.parse_only:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        dtypes = [layer.get_output(i).dtype.name for i in range(layer.num_outputs)]
        outcome.layers.append({"name": layer.name, "type": layer.type.name, "dtypes": dtypes})

    lost = _lost_weights(network, model, job.refittable, outcome)
    if lost:
        outcome.graph_at_fault = False
        outcome.error = f"it takes these weights in and could not exchange them later: {', '.join(lost)}"
        return
    config = builder.create_builder_config()
    if job.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if job.optimization_level is not None:
        config.builder_optimization_level = job.optimization_level
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    # Layers keep the names of the nodes in them, for profiles and the inspector; RTX's engines are of the same size.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    target_gpus(flavour, config, job.compute_capabilities, job.gpu_present)
    config.progress_monitor = _make_monitor(flavour, report)
    if job.stream_weights:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if job.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if job.refittable and job.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    problem = _shaped_by_weights(network, job.weight_inputs)
    if problem:
        outcome.error, outcome.graph_at_fault = problem, False
        return
    problem = _add_profiles(builder, network, config, job.profiles, job.weight_inputs)
    if problem:
        outcome.error = problem
        return
    engine = _build(builder, network, config, job, outcome)
    if engine is None:
        outcome.error = "the builder failed"
        if job.refittable:
            for flag in (trt.BuilderFlag.REFIT, trt.BuilderFlag.STRIP_PLAN):
                config.clear_flag(flag)
            if builder.build_serialized_network(network, config) is not None:
                outcome.graph_at_fault = False
                outcome.error = "it builds this engine, but not a refittable one"
        return
    with (folder / "engine.plan").open("wb") as file:
        file.write(memoryview(engine))


def _build(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, job: Job, outcome: Outcome
) -> trt.IHostMemory | None:
    """The engine, with what earlier builds timed and for later ones to go on from; None where the builder fails."""
    if not job.timings:
        return builder.build_serialized_network(network, config)
    from .timing_cache import keep_timings, use_timings  # TensorRT-RTX does without

    use_timings(config, Path(job.timings))
    engine = builder.build_serialized_network(network, config)
    problem = keep_timings(config, Path(job.timings))
    if problem:
        outcome.messages.append(f"WARNING: {problem}")
    return engine


def _lost_weights(network: trt.INetworkDefinition, model: bytes, names: list[str], outcome: Outcome) -> list[str]:
    """Weights that the network has not under their names: the parser computed something of them."""
    if not names:
        return []
    messages = len(outcome.messages)
    lost = []
    for name in names:
        if network.mark_weights_refittable(name):
            network.unmark_weights_refittable(name)  # this was but to ask; all of them are
        else:
            lost.append(name)
    del outcome.messages[messages:]  # it complains about names that it does not know
    if lost:
        import onnx  # here alone: a build that succeeds does without

        # Batch norms become a scale and a shift; OnnxParserRefitter computes those.
        graph = onnx.ModelProto.FromString(model).graph
        known = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[1:]}
        lost = [name for name in lost if name not in known]
    return lost


def _parse(
    flavour: Flavour,
    builder: trt.Builder,
    logger: trt.ILogger,
    model: bytes,
    weights: list[tuple[str, int, int]],
    weights_address: int,
) -> tuple[trt.INetworkDefinition | None, trt.OnnxParser, list[dict[str, Any]]]:
    """The network of a model, or None and what the parser refuses. The parser must live as long as the network."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.load_model_proto(model)
    for name, offset, size in weights:
        parsed = parsed and parser.load_initializer(name, weights_address + offset, size)
    if parsed and parser.parse_model_proto():
        return network, parser, []
    refusals = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        refusals.append(
            {
                "index": error.node(),
                "name": error.node_name(),
                "op": error.node_operator(),
                "reason": f"{error.desc()} [{error.code().name}, {error.func()}]",
            }
        )
    return None, parser, refusals


def _shaped_by_weights(network: trt.INetworkDefinition, names: list[str]) -> str:
    """What is wrong with weights that are inputs, or "": sizes have to be constants."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)] if names else []
    shapes = [tensor.name for tensor in inputs if tensor.name in names and tensor.is_shape_tensor]
    return (
        f"sizes are computed of these weights, which cannot be exchanged later: {', '.join(shapes)}" if shapes else ""
    )


def _add_profiles(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    profiles: list[dict[str, list[tuple[int, int, int]]]],
    fixed: Sequence[str] = (),
) -> str:
    """Give every dynamic input its range in every profile, in order; returns what is wrong, or ""."""
    dynamic = []
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in fixed:
            continue
        if tensor.is_shape_tensor:
            return f"input {tensor.name!r} is used as a shape, whose values have no range; make it a Python number"
        # An input may be fixed within each profile and differ between them.
        if len({tuple(bounds) for profile in profiles for bounds in zip(*profile[tensor.name], strict=True)}) > 1:
            dynamic.append(tensor.name)
    for number, ranges in enumerate(profiles if dynamic else []):
        profile = builder.create_optimization_profile()
        for name in dynamic:
            low, opt, high = (tuple(size[i] for size in ranges[name]) for i in range(3))
            profile.set_shape(name, low, opt, high)
        if config.add_optimization_profile(profile) != number:
            return f"profile {number} is refused: {ranges}"
    return ""


def _make_logger(flavour: Flavour, outcome: Outcome) -> trt.ILogger:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                outcome.messages.append(f"{severity.name}: {msg}")
                del outcome.messages[:-100]

    return Logger()


def _make_monitor(flavour: Flavour, report: Report) -> trt.IProgressMonitor:
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = flavour.module()

    class Monitor(trt.IProgressMonitor):
        """Nested phases with steps, made into one fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, list[Any]] = {}  # name → [parent, steps, done]

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: Any) -> None:
            self.phases[phase_name] = [parent_phase, max(1, int(num_steps)), 0]
            report(phase_name, self.fraction(phase_name))

        def phase_finish(self, phase_name: str) -> None:
            parent = self.phases.pop(phase_name, [None])[0]
            report(parent or "Finishing", self.fraction(parent) if parent else 1.0)

        def step_complete(self, phase_name: str, step: Any) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][2] = int(step) + 1
                report(phase_name, self.fraction(phase_name))
            return True

        def fraction(self, phase_name: str | None) -> float:
            done = 0.0
            while phase_name in self.phases:
                parent, steps, finished = self.phases[phase_name]
                done = min(1.0, (finished + done) / steps)
                phase_name = parent
            return done

    return Monitor()


def main() -> None:
    """Run the job folder named on the command line."""
    folder = Path(sys.argv[1])
    # The libraries print where they like: what they write to standard output goes to standard error.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report(phase: str, fraction: float) -> None:
        print(json.dumps([phase, round(fraction, 4)]), file=lines)

    outcome = run_job(folder, report)
    (folder / "result.json").write_text(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main()
