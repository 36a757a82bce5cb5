"""The backends ``tensorrt`` and ``tensorrt_rtx``: engines built in a child process and run on torch's CUDA streams."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
import queue
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

import onnx_ir as ir
import torch

from ...errors import BackendError, BuildError, DynamicShapeError, ExecutionError, UnsupportedOpError
from ..cache import JitCacheFile
from ..dtypes import to_torch
from ..model import Origin
from . import trt_build
from .base import BackendStatus, BuildOptions, Engine, Progress, Refusal, Segment
from .flavour import FLAVOURS, Flavour, JitCache, tf32_environment

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

_ENGINE_PART = "engine.plan"
_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


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

    def check(self, segment: Segment, options: BuildOptions) -> list[Refusal]:
        self._require_build()
        with _job(self.flavour, segment, options, parse_only=True) as folder:
            outcome = _run(self.flavour, folder, segment, options, None)
            refusals = _refusals(outcome, segment)
            if outcome.error and not refusals:
                raise BuildError(_failure(self.flavour, segment, outcome))
            return refusals

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        self._require_build()
        started = time.perf_counter()
        with _job(self.flavour, segment, options, parse_only=False) as folder:
            outcome = _run(self.flavour, folder, segment, options, progress)
            refusals = _refusals(outcome, segment)
            if refusals:
                raise UnsupportedOpError(describe_refusals(self.flavour.title, refusals))
            if outcome.error:
                raise BuildError(_failure(self.flavour, segment, outcome))
            plan = _map_file(folder / _ENGINE_PART)
        for message in outcome.messages:
            logger.info("%s: %s", segment.name, message)
        info = {
            "version": outcome.version,
            "target": _target(options),
            "layers": outcome.layers,
            "tf32": options.tf32,
            "build_seconds": round(time.perf_counter() - started, 3),
        }
        return Engine(self.name, {_ENGINE_PART: plan}, info, segment.inputs, segment.outputs)

    def load(self, engine: Engine, device: torch.device, cache_dir: Path | None = None) -> TensorRtExecutable:
        if device.type != "cuda":
            raise BackendError(
                f"{self.flavour.title} engines run on a CUDA device, not on {device}. "
                'Convert with backend="onnxruntime" to run on a CPU.'
            )
        if not torch.cuda.is_available():
            raise BackendError(_no_gpu(self.flavour))
        return TensorRtExecutable(self.flavour, engine, device, cache_dir)

    def _require_build(self) -> None:
        status = self.status()
        if not status.can_build:
            raise BackendError(status.reason)


class TensorRtExecutable:
    """An engine on a device, with as many execution contexts as calls that overlap."""

    def __init__(self, flavour: Flavour, engine: Engine, device: torch.device, cache_dir: Path | None) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._flavour = flavour
        self._inputs = tuple((spec.name, to_torch(spec.dtype)) for spec in engine.inputs)
        self._outputs = tuple((spec.name, to_torch(spec.dtype)) for spec in engine.outputs)
        self._tf32 = bool(engine.info.get("tf32"))
        plan = engine.parts[_ENGINE_PART]
        with torch.cuda.device(self.device), tf32_environment(flavour, self._tf32):
            torch.cuda.current_stream()  # makes torch's context the current one
            self._logger = trt.Logger(trt.ILogger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            loaded = self._runtime.deserialize_cuda_engine(plan)
            if loaded is None:
                raise BackendError(
                    f"{flavour.title} {trt.__version__} cannot load this engine on "
                    f"{torch.cuda.get_device_name(index)}: it was built with {engine.info.get('version')} for "
                    f"{engine.info.get('target')}. Convert again on this machine."
                )
            self._engine = loaded
            self._jit_file = JitCacheFile(cache_dir, plan, f"{flavour.name}-{trt.__version__}") if flavour.jit else None
            self._jit = JitCache(flavour, loaded, self._jit_file.read() if self._jit_file else None)
            self._contexts: queue.LifoQueue[_Context] = queue.LifoQueue()
        self._contexts.put(self._new_context())
        self._captured: dict[tuple[int, int], _Context] = {}

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if torch.cuda.is_current_stream_capturing():
            return self._capture(inputs)
        try:
            context = self._contexts.get_nowait()
        except queue.Empty:
            context = self._new_context()
        try:
            return context.run(inputs)
        finally:
            self._contexts.put(context)
            if self._jit_file is not None:
                self._jit_file.update(self._jit.serialize)

    def _capture(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run within the capture of a CUDA graph by the caller.

        A replay may come at any time, so the context and its scratch memory belong to that graph from now on. Calls on
        one stream of one capture share it: the graph runs them one after the other.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream
        key = (stream, capture_id(stream))
        context = self._captured.get(key)
        if context is None:
            try:
                context = self._contexts.get_nowait()
            except queue.Empty:
                raise ExecutionError(
                    "A CUDA graph capture needs an idle execution context, and none can be made during a capture: "
                    "call the module once with inputs of these shapes, outside the capture, right before it."
                ) from None
            self._captured[key] = context
        return context.run(inputs, capturing=True)

    def _new_context(self) -> _Context:
        with torch.cuda.device(self.device), tf32_environment(self._flavour, self._tf32):
            config = self._jit.config
            made = self._engine.create_execution_context(config) if config else self._engine.create_execution_context()
        if made is None:
            raise ExecutionError(
                f"{self._flavour.title} could not make an execution context on {self.device}: it needs "
                f"{self._engine.device_memory_size_v2 >> 20} MiB of device memory."
            )
        return _Context(made, self._inputs, self._outputs, self.device)


class _Context:
    """One execution context: used by one thread at a time, on any stream."""

    def __init__(
        self,
        context: trt.IExecutionContext,
        inputs: Sequence[tuple[str, torch.dtype]],
        outputs: Sequence[tuple[str, torch.dtype]],
        device: torch.device,
    ) -> None:
        self._context = context
        self._inputs = inputs
        self._outputs = outputs
        self._device = device
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None
        self._shapes: tuple[torch.Size, ...] = ()
        self._output_shapes: list[tuple[int, ...]] = []

    def run(self, inputs: Sequence[torch.Tensor], capturing: bool = False) -> list[torch.Tensor]:
        stream = torch.cuda.current_stream(self._device)
        # A capture begins with a synchronization, and may not wait for events from outside.
        if self._stream is not None and self._stream != stream and not capturing:
            stream.wait_event(self._done)  # the scratch memory of the last run may still be in use on its stream
        tensors = [t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in inputs]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes != self._shapes:
            self._set_shapes(shapes)
        outputs = [
            torch.empty(shape, dtype=dtype, device=self._device)
            for shape, (_, dtype) in zip(self._output_shapes, self._outputs, strict=True)
        ]
        for tensor, (name, _) in zip([*tensors, *outputs], [*self._inputs, *self._outputs], strict=True):
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise ExecutionError(
                f"TensorRT failed to run the engine on inputs of shapes {[tuple(shape) for shape in shapes]}; "
                "its own words are on standard error."
            )
        if not capturing:
            self._done.record(stream)
            self._stream = stream
        return outputs

    def _set_shapes(self, shapes: tuple[torch.Size, ...]) -> None:
        self._shapes = ()  # a failure half-way leaves nothing that looks valid
        for (name, _), shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(name, tuple(shape)):
                raise ExecutionError(
                    f"The engine does not take shape {tuple(shape)} for {name!r}: outside its profile."
                )
        missing = self._context.infer_shapes()
        if missing:
            raise ExecutionError(f"The engine cannot infer its shapes; it lacks {list(missing)}.")
        self._output_shapes = [tuple(self._context.get_tensor_shape(name)) for name, _ in self._outputs]
        for (name, _), sizes in zip(self._outputs, self._output_shapes, strict=True):
            if any(size < 0 for size in sizes):
                raise ExecutionError(f"The size of output {name!r} depends on data, which engines do not return yet.")
        self._shapes = shapes


def capture_id(stream: int) -> int:
    """The number of the capture that a stream takes part in, unique in the process; 0 without one.

    Args:
        stream: CUDA stream handle.
    """
    # torch does not tell, so the driver is asked: CUresult cuStreamGetCaptureInfo(stream, status*, id*), as v2 with the
    # optional outputs left out.
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    status, number = ctypes.c_int(), ctypes.c_uint64()
    driver.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value


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
        )
    # The engine is about as large as the weights, and both are in the folder at the end.
    size = 2 * sum(weight.nbytes for weight in segment.weights.values())
    with tempfile.TemporaryDirectory(prefix="trtbridge-", dir=_scratch_folder(size)) as name:
        folder = Path(name)
        try:
            (folder / "model.onnx").write_bytes(segment.proto.SerializeToString())
            entries = _write_weights(folder / "weights.bin", segment.weights)
        except OSError as error:
            raise BuildError(
                f"The files for the builder cannot be written to {folder}: {error}. Make room, or set $TMPDIR."
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
        )
        (folder / "job.json").write_text(json.dumps(vars(job)))
        yield folder


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
        with tf32_environment(flavour, options.tf32):
            return trt_build.run_job(folder, report)
    with tf32_environment(flavour, options.tf32, in_this_process=False):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path or "." for path in sys.path))
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
            f"{segment.name}: building took longer than timeout_s={options.timeout_s} (phase {last_phase!r})."
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


def _refusals(outcome: trt_build.Outcome, segment: Segment) -> list[Refusal]:
    nodes = list(segment.proto.graph.node)
    by_name = {node.name: node for node in nodes if node.name}
    types = _types_by_name(segment)
    found = []
    for entry in outcome.refusals:
        index = entry["index"]
        node = by_name.get(entry["name"]) or (nodes[index] if 0 <= index < len(nodes) else None)
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
    joined = "\n".join(words)
    nodes = segment.proto.graph.node
    named = [node for node in nodes if node.name and node.name in joined]
    # The builder may speak of the kind of a node alone: "Attention operation was not supported".
    named = named or [node for node in nodes if len(node.op_type) > 4 and re.search(rf"\b{node.op_type}\b", joined)]
    for node in named[:8]:
        text += f"\n  {node.op_type} {node.name!r} is from {segment.provenance.get(node.output[0], Origin())}"
    return text


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
