"""The backends ``tensorrt`` and ``tensorrt_rtx``: engines built in a child process and run on torch's CUDA streams."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import onnx
import onnx_ir as ir
import torch

from ...errors import BackendError, BuildError, DynamicShapeError, PluginError, TrtBridgeError, UnsupportedOpError
from ..model import Origin, TensorSpec
from . import trt_build
from .base import BackendStatus, BuildOptions, Engine, Executable, Progress, Refusal, Segment
from .empty import EmptySafe, can_be_empty, empty_parts, refit_empty
from .flavour import FLAVOURS, Flavour, find_capabilities, tf32_environment
from .plugin_library import library_environment, require_library
from .plugin_nodes import describe_host, hosted_plugins, make_parseable, probe_segment
from .rtx_faults import avoid_faults, original_name
from .trt_refit import SKELETON_PART, make_skeleton, refit_plan
from .trt_run import ENGINE_PART, TensorRtExecutable

if TYPE_CHECKING:
    from ..plan import PluginCall

logger = logging.getLogger(__name__)


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

    def check(self, segment: Segment, options: BuildOptions) -> list[Refusal]:
        self._require_build()
        with _job(self.flavour, segment, options, parse_only=True) as folder:
            outcome = _run(self.flavour, folder, segment, options, None)
            refusals = _refusals(self.flavour, outcome, segment)
            if outcome.error and not refusals:
                raise BuildError(_failure(self.flavour, segment, outcome))
            return refusals

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        self._require_build()
        started = time.perf_counter()
        with _job(self.flavour, segment, options, parse_only=False) as folder:
            outcome = _run(self.flavour, folder, segment, options, progress)
            refusals = _refusals(self.flavour, outcome, segment)
            if refusals:
                raise UnsupportedOpError(describe_refusals(self.flavour.title, refusals), refusals)
            if outcome.error:
                suspected = _suspected(segment, outcome) if outcome.graph_at_fault else []
                raise BuildError(_failure(self.flavour, segment, outcome), suspected, outcome.graph_at_fault)
            plan = _map_file(folder / ENGINE_PART)
        for message in outcome.messages:
            logger.info("%s: %s", segment.name, message)
        info = {
            "version": outcome.version,
            "target": _target(options),
            "layers": outcome.layers,
            "tf32": options.tf32,
            "build_seconds": round(time.perf_counter() - started, 3),
            "plugins": hosted_plugins(segment),
        }
        parts, info["empty"] = empty_parts(segment, options.strip_weights)
        if _refittable(segment, options):
            parts[SKELETON_PART] = make_skeleton(_parsed(self.flavour, segment), segment)
            info["stripped"] = options.strip_weights
        if options.weight_streaming_bytes is not None:
            info["weight_streaming_bytes"] = options.weight_streaming_bytes
        return Engine(self.name, {ENGINE_PART: plan, **parts}, info, segment.inputs, segment.outputs)

    def refit(self, engine: Engine, weights: Mapping[str, ir.TensorProtocol], device: torch.device) -> Engine:
        if SKELETON_PART not in engine.parts:
            return engine  # it holds no weight of the module
        if not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        parts, empty = refit_empty(engine, weights)
        plan = refit_plan(self.flavour, engine, weights, device)
        info = {**engine.info, "stripped": False, "empty": empty}
        return dataclasses.replace(engine, parts={**engine.parts, **parts, ENGINE_PART: plan}, info=info)

    def load(self, engine: Engine, device: torch.device, cache_dir: Path | None = None) -> Executable:
        if device.type != "cuda":
            raise BackendError(
                f"{self.flavour.title} engines run on a CUDA device, not on {device}. "
                'Convert with backend="onnxruntime" to run on a CPU.'
            )
        if not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        executable = TensorRtExecutable(self.flavour, engine, device, cache_dir)
        return EmptySafe(engine, executable) if can_be_empty(engine.inputs) else executable

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


def describe_refusals(title: str, refusals: Sequence[Refusal]) -> str:
    """One message for all refused nodes."""
    lines = "\n".join(f"  {index}. {refusal}" for index, refusal in enumerate(refusals, 1))
    return (
        f"{title} does not take {len(refusals)} node{'s' * (len(refusals) > 1)} of the graph:\n{lines}\n"
        "Replace the op in the model, or make it a custom op (torch.library.custom_op), run as a plugin."
    )


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
    # The engine is about as large as the weights, and both are in the folder at the end.
    size = 2 * sum(weight.nbytes for weight in segment.weights.values())
    with tempfile.TemporaryDirectory(prefix="trtbridge-", dir=_scratch_folder(size)) as name:
        folder = Path(name)
        try:
            (folder / "model.onnx").write_bytes(_parsed(flavour, segment).SerializeToString())
            entries = _write_weights(folder / "weights.bin", segment.weights)
        except OSError as error:
            raise BuildError(
                f"The files for the builder cannot be written to {folder}: {error}. Make room, or set $TMPDIR.",
                graph_at_fault=False,
            ) from error
        job = trt_build.Job(
            flavour=flavour.name,
            parse_only=parse_only,
            weights=entries,
            inputs=[(spec.name, [r for r in spec.ranges if r is not None]) for spec in segment.inputs],
            tf32=options.tf32,
            optimization_level=options.optimization_level,
            workspace_bytes=options.workspace_bytes,
            compute_capabilities=list(options.compute_capabilities),
            gpu_present=torch.cuda.is_available(),
            plugins=bool(hosted_plugins(segment)),
            refittable=sorted(_refittable(segment, options)),
            strip_weights=options.strip_weights,
            stream_weights=options.weight_streaming_bytes is not None,
        )
        (folder / "job.json").write_text(json.dumps(vars(job)))
        yield folder


def _parsed(flavour: Flavour, segment: Segment) -> onnx.ModelProto:
    """The graph that the parser gets."""
    proto = make_parseable(segment.proto)
    return avoid_faults(proto) if flavour.name == "tensorrt_rtx" else proto


def _refittable(segment: Segment, options: BuildOptions) -> set[str]:
    """The weights of an engine that may be exchanged; a part of a segment, built to find a culprit, has some."""
    own = {tensor.name for tensor in segment.proto.graph.initializer} if options.refittable else set()
    return own & segment.refittable


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


def _refusals(flavour: Flavour, outcome: trt_build.Outcome, segment: Segment) -> list[Refusal]:
    by_name = {node.name: node for node in segment.proto.graph.node if node.name}
    by_output = {name: node for node in segment.proto.graph.node for name in node.output if name}
    parsed = _parsed(flavour, segment).graph.node if outcome.refusals else ()
    types = _types_by_name(segment)
    found = []
    for entry in outcome.refusals:
        index = entry["index"]
        node = by_name.get(original_name(entry["name"]))
        if node is None and 0 <= index < len(parsed):
            node = by_output.get(original_name(next(filter(None, parsed[index].output), "")))
        if node is None:
            found.append(Refusal(entry["name"], entry["op"] or "?", (), entry["reason"]))
            continue
        origin = next((segment.provenance[name] for name in node.output if name in segment.provenance), Origin())
        inputs = tuple(types.get(name, name) for name in node.input if name)
        found.append(Refusal(node.name, node.op_type, tuple(node.output), entry["reason"], inputs, origin))
    return found


def _types_by_name(segment: Segment) -> dict[str, str]:
    graph = segment.proto.graph
    found = {}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        sizes = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
        found[value.name] = f"{value.name}: ({', '.join(sizes)}) {ir.DataType(tensor.elem_type).name.lower()}"
    for initializer in graph.initializer:
        sizes = list(map(str, initializer.dims))
        found[initializer.name] = (
            f"{initializer.name}: ({', '.join(sizes)}) {ir.DataType(initializer.data_type).name.lower()}"
        )
    return found


def _failure(flavour: Flavour, segment: Segment, outcome: trt_build.Outcome) -> str:
    """The builder's own words, with the Python lines of the nodes that they name."""
    words = [message for message in outcome.messages if not message.startswith("WARNING")] or outcome.messages
    text = f"{flavour.title} {outcome.version} cannot build {segment.name}: {outcome.error}."
    if words:
        text += "\n  " + "\n  ".join(words[-8:])
    for refusal in _suspected(segment, outcome)[:8]:
        text += f"\n  {refusal.op_type} {refusal.node!r} is from {refusal.origin}"
    return text


def _suspected(segment: Segment, outcome: trt_build.Outcome) -> list[Refusal]:
    """The nodes that the builder's words are about."""
    words = [message for message in outcome.messages if not message.startswith("WARNING")] or outcome.messages
    joined = "\n".join(words)
    nodes = segment.proto.graph.node
    named = [node for node in nodes if node.name and re.search(rf"(?<![\w.]){re.escape(node.name)}(?![\w.])", joined)]
    # The builder may speak of the kind of a node alone: "Attention operation was not supported".
    named = named or [node for node in nodes if len(node.op_type) > 4 and re.search(rf"\b{node.op_type}\b", joined)]
    shape_input = re.match(r"input '([^']+)' is used as a shape", outcome.error)
    if shape_input:
        words, named = [outcome.error], [node for node in nodes if shape_input[1] in node.input]
    types = _types_by_name(segment)
    reason = words[-1] if words else outcome.error
    return [
        Refusal(
            node.name,
            node.op_type,
            tuple(node.output),
            reason,
            tuple(types.get(name, name) for name in node.input if name),
            segment.provenance.get(next((name for name in node.output if name), ""), Origin()),
        )
        for node in named
    ]


def _target(options: BuildOptions) -> str:
    if options.compute_capabilities:
        return ", ".join(f"{major}.{minor}" for major, minor in options.compute_capabilities)
    if torch.cuda.is_available():
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability())
    return "any GPU it supports"


def _no_gpu(flavour: Flavour) -> str:
    return (
        f"{flavour.title} engines run on a CUDA device, and torch sees none here (torch {torch.__version__}). "
        "Install a CUDA build of torch on a machine with an NVIDIA GPU, or convert with "
        "backend='onnxruntime' to run on a CPU."
    )
