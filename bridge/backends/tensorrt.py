"""The backends ``tensorrt`` and ``tensorrt_rtx``: engines built in a child process and run on torch's CUDA streams."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import onnx
import onnx_ir as ir
import torch

from ...errors import (
    BackendError,
    BuildError,
    DynamicShapeError,
    OptionError,
    PluginError,
    TrtBridgeError,
    UnsupportedOpError,
)
from ..cache import resolve_cache_dir
from ..graph_facts import read_nodes
from ..model import Origin, TensorSpec
from ..profiles import EngineProfiles
from ..runtime_options import RuntimeOptions
from . import trt_build
from .base import BackendStatus, BuildOptions, Engine, Executable, Progress, Refusal, Segment
from .empty import EmptySafe, can_be_empty, empty_parts, refit_empty, revive_empty_parts
from .flavour import FLAVOURS, Flavour, find_capabilities, tf32_environment
from .layers import EngineLayers, LayerProfiler
from .plugin_library import library_environment, require_library
from .plugin_nodes import describe_host, hosted_plugins, probe_segment
from .rtx_plan import read_plan
from .timing_cache import timing_file
from .trt_blame import describe_refusals, failure_words, find_refusals, find_suspects, parsed_graph
from .trt_fit import identity, made_for, misfit, words_of_invalidity
from .trt_layers import TrtLayerProfiler, inspect_layers
from .trt_refit import SKELETON_PART, make_skeleton, refit_plan
from .trt_run import ENGINE_PART, TensorRtExecutable
from .trt_weights import TABLE_PART, exchange_parts, weight_inputs, weight_parts, with_weight_inputs

if TYPE_CHECKING:
    from ..plan import PluginCall

logger = logging.getLogger(__name__)

_MOST_SIZE = (1 << 31) - 1


class TensorRtBackend:
    """Builds with TensorRT or TensorRT-RTX.

    Args:
        name: "tensorrt" or "tensorrt_rtx".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.flavour: Flavour = FLAVOURS[name]

    def status(self) -> BackendStatus:
        try:
            version = str(self.flavour.module().__version__)
        except BackendError as error:
            return BackendStatus(self.name, reason=str(error))
        gpu = torch.cuda.is_available()
        can_build = gpu or self.flavour.builds_without_gpu
        reasons = []
        if not can_build:
            reasons.append(
                "TensorRT needs a GPU to build engines, and none is present; TensorRT-RTX does not "
                "(backend='tensorrt_rtx', pip install 'trtbridge[rtx]')."
            )
        if not gpu:
            reasons.append(_no_gpu(self.flavour))
        return BackendStatus(self.name, version, can_build, gpu, " ".join(reasons), ("cuda",) if gpu else ())

    def check_options(self, options: BuildOptions) -> None:
        find_capabilities(self.flavour, options.compute_capabilities)
        if options.refittable and options.weight_streaming_bytes is not None and not self.flavour.refits:
            raise OptionError(
                f"weight_streaming_bytes streams the weights that are in an engine, and those of a refittable one of "
                f"{self.flavour.title} lie beside it, on the device: leave out one of weight_streaming_bytes and "
                "refittable (strip_weights)."
            )

    def check_runtime(self, options: RuntimeOptions) -> None:
        if options.kernel_specialization is not None and not self.flavour.jit:
            raise OptionError(
                "kernel_specialization is for TensorRT-RTX, which compiles kernels when an engine runs; TensorRT does "
                'not. Leave it out or use backend="tensorrt_rtx".'
            )

    def plugin_refusal(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        refusal = _hosting_refusal(self.name) or _empty_refusal(call, input_specs)
        if refusal:
            return refusal
        try:
            describe_host(call, input_specs)
        except PluginError as error:
            return str(error)
        return ""

    def host_spec(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        return describe_host(call, input_specs).to_json()

    def builds_apart(self, options: BuildOptions, parse_only: bool) -> bool:
        # TensorRT measures kernels on the GPU while it builds; TensorRT-RTX does when an engine first runs.
        return options.isolate and (parse_only or self.flavour.jit)

    def check(self, segment: Segment, options: BuildOptions) -> list[Refusal]:
        self._require_build()
        with _job(self.flavour, segment, options, parse_only=True) as folder:
            outcome = _run(self.flavour, folder, segment, options, None)
            refusals = find_refusals(self.flavour, outcome, segment, weight_inputs(self.flavour, segment, options))
            if outcome.error and not refusals:
                raise BuildError(failure_words(self.flavour, segment, outcome))
            return refusals

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        self._require_build()
        started = time.perf_counter()
        inputs = weight_inputs(self.flavour, segment, options)
        with _job(self.flavour, segment, options, parse_only=False) as folder:
            outcome = _run(self.flavour, folder, segment, options, progress)
            refusals = find_refusals(self.flavour, outcome, segment, inputs)
            if refusals:
                raise UnsupportedOpError(describe_refusals(self.flavour.title, refusals), refusals)
            if outcome.error:
                suspected = find_suspects(segment, outcome) if outcome.graph_at_fault else []
                words = failure_words(self.flavour, segment, outcome)
                raise BuildError(words, suspected, outcome.graph_at_fault)
            plan = _map_file(folder / ENGINE_PART)
        for message in outcome.messages:
            logger.info("%s: %s", segment.name, message)
        info = {
            "version": outcome.version,
            **made_for(self.flavour, options),
            "layers": outcome.layers,
            "tf32": options.tf32,
            "build_seconds": round(time.perf_counter() - started, 3),
            "plugins": hosted_plugins(segment),
            "profiles": EngineProfiles.of(segment.inputs).to_json(),
        }
        parts, info["empty"] = empty_parts(segment, options.strip_weights)
        if _built_in(self.flavour, segment, options):
            parts[SKELETON_PART] = make_skeleton(parsed_graph(self.flavour, segment), segment)
            info |= {"refit": "engine", "stripped": options.strip_weights}
        beside, facts = weight_parts(segment, inputs, options.strip_weights)
        parts |= beside
        info |= facts
        if options.weight_streaming_bytes is not None:
            info["weight_streaming_bytes"] = options.weight_streaming_bytes
        return Engine(self.name, {ENGINE_PART: plan, **parts}, info, segment.inputs, segment.outputs)

    def refit(self, engine: Engine, weights: Mapping[str, ir.TensorProtocol], device: torch.device) -> Engine:
        if TABLE_PART in engine.parts:
            parts, empty = refit_empty(engine, weights)
            info = {**engine.info, "stripped": False, "empty": empty}
            return dataclasses.replace(
                engine, parts={**engine.parts, **parts, **exchange_parts(engine, weights)}, info=info
            )
        if SKELETON_PART not in engine.parts:
            return engine  # it holds no weight of the module
        if not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        parts, empty = refit_empty(engine, weights)
        plan = refit_plan(self.flavour, engine, weights, device)
        info = {**engine.info, "stripped": False, "empty": empty}
        return dataclasses.replace(engine, parts={**engine.parts, **parts, ENGINE_PART: plan}, info=info)

    def identity(self, options: BuildOptions) -> dict[str, Any]:
        return identity(self.flavour, options, self.status().version)

    def parsed(self, segment: Segment) -> onnx.ModelProto:
        return parsed_graph(self.flavour, segment)

    def revive(self, engine: Engine, segment: Segment) -> Engine:
        info = {**engine.info, "plugins": hosted_plugins(segment)}
        return dataclasses.replace(engine, info=info, parts=revive_empty_parts(engine, segment))

    def load(
        self,
        engine: Engine,
        device: torch.device,
        cache_dir: Path | None = None,
        options: RuntimeOptions | None = None,
        beside_plugins: bool = False,
    ) -> Executable:
        options = options or RuntimeOptions()
        self.check_runtime(options)
        if device.type != "cuda":
            raise BackendError(
                f"{self.flavour.title} engines run on a CUDA device, not on {device}. "
                'Convert with backend="onnxruntime" to run on a CPU.'
            )
        if not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        problem = misfit(
            self.flavour,
            engine.info,
            self.status().version,
            torch.cuda.get_device_capability(device),
            torch.cuda.get_device_name(device),
        )
        if problem:
            raise BackendError(problem)
        specialization = options.kernel_specialization
        if specialization is None and options.cuda_graphs and self.flavour.jit:
            specialization = "eager"
        try:
            executable = TensorRtExecutable(self.flavour, engine, device, cache_dir, specialization)
        except BackendError as error:
            words = words_of_invalidity(self.flavour, engine.parts[ENGINE_PART])
            raise BackendError(f"{error}{words}") from error
        return EmptySafe(engine, executable) if can_be_empty(engine.inputs) else executable

    def load_profiler(self, engine: Engine, device: torch.device, cache_dir: Path | None = None) -> LayerProfiler:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        return TrtLayerProfiler(self.flavour, engine, device, cache_dir, read_nodes(engine.info))

    def layers(self, engine: Engine, device: torch.device) -> EngineLayers | None:
        nodes = read_nodes(engine.info)
        if device.type == "cuda" and torch.cuda.is_available() and self.status().can_run:
            return inspect_layers(self.flavour, engine, device, nodes)
        return read_plan(engine.parts[ENGINE_PART], nodes) if self.flavour.jit else None

    def _require_build(self) -> None:
        status = self.status()
        if not status.can_build:
            raise BackendError(status.reason)


@functools.cache
def _hosting_refusal(name: str) -> str:
    """Why this library takes no plugins inside engines, "" where it does: its parser is asked, once a process.

    Its version does not tell: the parser is a library of its own, and the number that it gives is always the same.
    """
    backend = TensorRtBackend(name)
    title = backend.flavour.title
    try:
        refusals = backend.check(probe_segment(), BuildOptions())
    except TrtBridgeError as error:
        return f"{title} cannot be asked whether it takes plugins: {str(error).strip().splitlines()[0]}"
    if not refusals:
        return ""
    needed = "TensorRT-RTX does from 1.7 on" if backend.flavour.jit else "TensorRT does from 10.0 on"
    return (
        f"{title} {backend.status().version} takes no plugins inside engines ({needed}); its parser says: "
        f"{refusals[0].reason}"
    )


def _empty_refusal(call: PluginCall, inputs: Sequence[TensorSpec]) -> str:
    """Why a plugin on such tensors cannot be inside an engine: engines with plugins have no way around empty ones."""
    if not inputs:
        return "it has no inputs, and TensorRT runs no plugin without one"
    for spec in inputs:
        if any(bounds is not None and bounds[0] == 0 for bounds in spec.ranges) or 0 in spec.shape:
            return f"its input {spec.name} {spec.type_text} may be empty, which TensorRT does not run on"
    for made in call.output_specs:
        if made is not None and 0 in made.shape:
            return f"its output {made.name} {made.type_text} is empty, which TensorRT does not run on"
    return ""


@contextmanager
def _job(flavour: Flavour, segment: Segment, options: BuildOptions, parse_only: bool) -> Iterator[Path]:
    """A folder with everything that one build needs; gone afterwards."""
    unknown = [
        f"{spec} (from {segment.provenance.get(spec.name, Origin())})" for spec in segment.inputs if None in spec.ranges
    ]
    if unknown:
        raise DynamicShapeError(
            f"{flavour.title} needs a range for every dimension, and these of {segment.name} depend on data:\n  "
            + "\n  ".join(unknown)
            + "\nState a bound: max_data_size for all of them, tb.Dim in output_shapes for one that a result has, or "
            "torch._check(size <= bound) in the model."
        )
    # The library cuts larger ones to 32 bits, and then refuses the profile or takes another one.
    large = [str(spec) for spec in segment.inputs if any(bounds and bounds[2] > _MOST_SIZE for bounds in spec.ranges)]
    if large:
        raise DynamicShapeError(
            f"{flavour.title} takes sizes up to {_MOST_SIZE}, and by the bounds of what they are made of these of "
            f"{segment.name} may be larger:\n  " + "\n  ".join(large) + "\n"
            "State smaller bounds (max_data_size, output_shapes, tb.Dim)."
        )
    inputs = weight_inputs(flavour, segment, options)
    # The engine is about as large as the weights, and both are in the folder at the end.
    size = 2 * sum(weight.nbytes for weight in segment.weights.values())
    with tempfile.TemporaryDirectory(prefix="trtbridge-", dir=_scratch_folder(size)) as name:
        folder = Path(name)
        try:
            proto = with_weight_inputs(parsed_graph(flavour, segment), inputs)
            (folder / "model.onnx").write_bytes(proto.SerializeToString())
            inside = {name: weight for name, weight in segment.weights.items() if name not in inputs}
            entries = _write_weights(folder / "weights.bin", inside)
        except OSError as error:
            raise BuildError(
                f"The files for the builder cannot be written to {folder}: {error}. Make room, or set $TMPDIR.",
                graph_at_fault=False,
            ) from error
        job = trt_build.Job(
            flavour=flavour.name,
            parse_only=parse_only,
            weights=entries,
            profiles=EngineProfiles.of(segment.inputs).to_json(),
            tf32=options.tf32,
            optimization_level=options.optimization_level,
            workspace_bytes=options.workspace_bytes,
            compute_capabilities=list(options.compute_capabilities),
            gpu_present=torch.cuda.is_available(),
            plugins=bool(hosted_plugins(segment)),
            timings="" if parse_only else _timings(flavour, options),
            refittable=sorted(_built_in(flavour, segment, options)),
            strip_weights=options.strip_weights,
            weight_inputs=sorted(inputs),
            stream_weights=options.weight_streaming_bytes is not None,
        )
        (folder / "job.json").write_text(json.dumps(vars(job)))
        yield folder


def _timings(flavour: Flavour, options: BuildOptions) -> str:
    """The file of kernels' times for a build here, "" where there is none: only TensorRT times kernels, on a GPU."""
    if flavour.jit or not torch.cuda.is_available():
        return ""
    folder = resolve_cache_dir(options.cache_dir)
    gpu = torch.cuda.get_device_name(0 if options.isolate else None)
    return "" if folder is None else str(timing_file(folder.absolute(), flavour.module().__version__, gpu))


def _built_in(flavour: Flavour, segment: Segment, options: BuildOptions) -> set[str]:
    """The weights in a plan that may be exchanged; a part of a segment, built to find a culprit, has some."""
    if not options.refittable or not flavour.refits:
        return set()
    return {tensor.name for tensor in segment.proto.graph.initializer} & segment.refittable


def _scratch_folder(size_bytes: int) -> str | None:
    """Where to exchange files with the builder: in memory where there is ample room, else the temporary folder."""
    try:
        memory = os.statvfs("/dev/shm")
    except (OSError, AttributeError):
        return None
    return "/dev/shm" if memory.f_bavail * memory.f_frsize > 2 * size_bytes + (64 << 20) else None


def _map_file(path: Path) -> memoryview | bytes:
    """A file's content without a copy: where the system allows it the mapping outlives the file."""
    if sys.platform == "win32":
        return path.read_bytes()
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _write_weights(path: Path, weights: Mapping[str, ir.TensorProtocol]) -> list[tuple[str, int, int]]:
    """Write the weights one after the other, aligned; no second copy of them all is made in memory."""
    entries = []
    with path.open("wb") as file:
        for name, weight in weights.items():
            file.write(b"\0" * (-file.tell() % 64))
            offset = file.tell()
            _write_tensor(weight, file)
            entries.append((name, offset, file.tell() - offset))
    return entries


def _write_tensor(weight: ir.TensorProtocol, file: BinaryIO) -> None:
    if hasattr(weight, "tofile"):
        weight.tofile(file)
    else:
        file.write(weight.tobytes())


def _run(
    flavour: Flavour, folder: Path, segment: Segment, options: BuildOptions, progress: Progress | None
) -> trt_build.Outcome:
    report = progress or (lambda phase, fraction: None)
    if not options.isolate:
        if hosted_plugins(segment):
            flavour.module()
            require_library(flavour)
        with tf32_environment(flavour, options.tf32):
            return trt_build.run_job(folder, report)
    with tf32_environment(flavour, options.tf32, in_this_process=False):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or "." for path in sys.path))
    if hosted_plugins(segment):
        environment |= library_environment(flavour, folder)
    command = [sys.executable, "-m", trt_build.__name__, str(folder)]
    last_phase = "starting"
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        timer = None if options.timeout_s is None else threading.Timer(options.timeout_s, process.kill)
        try:
            if timer is not None:
                timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                last_phase, fraction = json.loads(line)
                report(last_phase, fraction)
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if process.stdout is not None:
                process.stdout.close()
    result = folder / "result.json"
    if status == 0 and result.exists():
        return trt_build.Outcome(**json.loads(result.read_text()))
    words = (folder / "stderr").read_text(errors="replace").strip()[-2000:]
    if timer is not None and timer.finished.is_set() and status == -signal.SIGKILL:
        raise BuildError(
            f"{segment.name}: building took longer than timeout_s={options.timeout_s} (phase {last_phase!r}).",
            graph_at_fault=False,
        )
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    raise BuildError(
        f"{flavour.title} took its process down: it {how} in phase {last_phase!r} of {segment.name}. "
        f"This process is unharmed.\n{words}\n{_suspects(segment)}"
    )


def _suspects(segment: Segment) -> str:
    """What is known to crash these libraries, where it stands in this segment."""
    found = [node for node in segment.proto.graph.node if node.op_type == "Attention" and len(set(node.input[:3])) < 3]
    if found:
        origin = segment.provenance.get(found[0].output[0], Origin())
        return f"Attention with the same tensor as query, key or value crashes it: {found[0].name!r} from {origin}."
    return "To find the node try convert(..., opset=20), another release of the library, or a part of the model."


def _no_gpu(flavour: Flavour) -> str:
    return (
        f"{flavour.title} engines run on a CUDA device, and torch sees none here (torch {torch.__version__}). "
        "Install a CUDA build of torch on a machine with an NVIDIA GPU, or convert with "
        "backend='onnxruntime' to run on a CPU."
    )
