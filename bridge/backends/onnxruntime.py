"""ONNX Runtime as a backend: builds on any machine, runs on a CPU, and on CUDA with onnxruntime-gpu."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from ...errors import (
    BackendError,
    BuildError,
    ExecutionError,
    OptionError,
    PluginError,
    RefitError,
    UnsupportedOpError,
)
from ...plugins.sessions import never_spin
from ..model import TensorSpec, iterate_nodes
from ..profiles import EngineProfiles
from ..runtime_options import RuntimeOptions
from .base import BackendStatus, BuildOptions, Context, Engine, Progress, Refusal, Segment
from .layers import EngineLayers
from .ort_layers import OrtLayerProfiler, optimized_layers
from .ort_refusals import find_refusals
from .ort_session import (
    MODEL_PART,
    WEIGHTS_PART,
    hoist_stand_ins,
    is_numpy_dtype,
    make_session,
    ort_values,
    pack,
    read_parts,
    stand_ins,
    unpack,
    with_provenance,
    zeros_like,
)
from .widen import NARROW_TYPES, widen

if TYPE_CHECKING:
    from ..plan import PluginCall

_LOG_FATAL_ONLY = 4  # errors arrive as exceptions
# CUDA has float16 kernels for nearly everything, bfloat16 kernels for some.
_WIDENED_ON = {"cpu": NARROW_TYPES, "cuda": frozenset({ir.DataType.BFLOAT16})}


class OnnxRuntimeBackend:
    """The `Backend` over ONNX Runtime.

    It has no kernels of its own choosing to compile: an engine is the graph and a snapshot of its weights, and what
    differs between a CPU and CUDA is settled when the engine is loaded. A graph in float16 or bfloat16 runs in
    float32 on a CPU, one in bfloat16 does so on CUDA. Of the build options it heeds ``tf32``.

    Args:
        widens: False leaves the types of the graph as they are, for graphs that round on purpose.
    """

    name = "onnxruntime"

    def __init__(self, widens: bool = True) -> None:
        self._widens = widens

    def status(self) -> BackendStatus:
        """What it can do here. Never raises."""
        try:
            ort = _import_onnxruntime()
            has_cuda = "CUDAExecutionProvider" in ort.get_available_providers() and torch.cuda.is_available()
            devices = ("cuda", "cpu") if has_cuda else ("cpu",)
        except Exception as error:  # a broken installation can raise anything
            return BackendStatus(self.name, reason=str(error))
        return BackendStatus(self.name, version=ort.__version__, can_build=True, can_run=True, devices=devices)

    def check_options(self, options: BuildOptions) -> None:
        """Refuse options that are TensorRT's alone.

        Raises:
            OptionError: one of them is set; the message names it.
        """
        unset = BuildOptions()
        for name in (
            *("optimization_level", "workspace_bytes", "compute_capabilities", "timeout_s"),
            "weight_streaming_bytes",
        ):
            if getattr(options, name) != getattr(unset, name):
                raise OptionError(f"{name} is for TensorRT; backend 'onnxruntime' has no such option. Leave it out.")

    def check_runtime(self, options: RuntimeOptions) -> None:
        """Refuse options that are TensorRT's alone.

        Raises:
            OptionError: one of them is set; the message names it.
        """
        if options.kernel_specialization is not None:
            raise OptionError(
                "kernel_specialization is for TensorRT-RTX; backend 'onnxruntime' has no such option. Leave it out."
            )

    def plugin_refusal(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        """Why a plugin call cannot stay inside an engine: none can."""
        return "ONNX Runtime has no torch ops"

    def host_spec(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        """Refuse.

        Raises:
            PluginError: always.
        """
        raise PluginError(f"{call.op} cannot stay inside an engine: {self.plugin_refusal(call, input_specs)}.")

    def builds_apart(self, options: BuildOptions, parse_only: bool) -> bool:
        return False  # a session is made in this process, and quickly

    def check(self, segment: Segment, options: BuildOptions) -> list[Refusal]:
        """Ask ONNX Runtime for a kernel for every node, with zeros in place of the weights.

        Raises:
            BackendError: onnxruntime is not installed.
            BuildError: the graph is refused, and no node is to blame.
        """
        ort = _import_onnxruntime()
        proto, _ = widen(hoist_stand_ins(segment.proto), segment.weights)
        try:
            # No kernel hangs on the values of large weights, and reading them could take long.
            zeros = {tensor.name: zeros_like(ort, tensor) for tensor in stand_ins(proto)}
            make_session(ort, proto, zeros, optimize=False, prepack=False)
        except Exception as error:  # ONNX Runtime's errors have no common base
            return find_refusals(ort, segment, error)
        return []

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        """Take a snapshot of the graph and its weights, and see that a CPU session takes them.

        Raises:
            BackendError: onnxruntime is not installed.
            UnsupportedOpError: ONNX Runtime has no kernel for some nodes; all of them are named.
            BuildError: a weight is missing, or ONNX Runtime refuses the graph for another reason.
        """
        ort = _import_onnxruntime()
        report = progress or (lambda phase, fraction: None)
        report("weights", 0.0)
        proto = hoist_stand_ins(segment.proto)
        buffer = pack(proto, segment.weights, segment.name, report)
        weights = unpack(proto, buffer.data, segment.name)
        wide_proto, wide_weights = widen(proto, weights, _WIDENED_ON["cpu"] if self._widens else frozenset())
        report("session", 0.0)
        try:
            # Prepacking would copy the weights once more, for nothing.
            make_session(ort, wide_proto, ort_values(ort, wide_weights), prepack=False)
        except Exception as error:  # ONNX Runtime's errors have no common base
            refusals = find_refusals(ort, segment, error)
            nodes = "\n".join(f"- {refusal}" for refusal in refusals)
            raise UnsupportedOpError(
                f"ONNX Runtime {ort.__version__} does not take {len(refusals)} node(s) of {segment.name}:\n{nodes}\n"
                "Let these run as plugins, or rewrite them with a pass.",
                refusals,
            ) from error
        report("session", 1.0)
        info = {
            "segment": segment.name,
            "onnxruntime": ort.__version__,
            "onnx": onnx.__version__,
            "nodes": sum(1 for _ in iterate_nodes(proto.graph)),
            "widened": wide_proto is not proto,
            "widens": self._widens,
            "tf32": options.tf32,
            "profiles": EngineProfiles.of(segment.inputs).to_json(),
            "stripped": options.strip_weights and not segment.refittable.isdisjoint(weights),
        }
        if info["stripped"]:
            buffer = pack(proto, weights, segment.name, report, left_out=segment.refittable)
        parts = {MODEL_PART: proto.SerializeToString(), WEIGHTS_PART: buffer.data}
        return Engine(self.name, parts, info, segment.inputs, segment.outputs)

    def refit(self, engine: Engine, weights: Mapping[str, ir.TensorProtocol], device: torch.device) -> Engine:
        """Write a new ``weights.bin``; a session is made when the engine is loaded.

        Raises:
            RefitError: a weight is missing, or has another type or shape.
            ModelFileError: the engine's parts are missing or damaged.
        """
        name = str(engine.info.get("segment", "engine"))
        proto, old = read_parts(engine, name)
        own = {tensor.name for tensor in stand_ins(proto)}
        made = {weight: value for weight, value in weights.items() if weight in own}
        try:
            buffer = pack(proto, {**old, **made}, name, lambda phase, fraction: None)
        except BuildError as error:
            raise RefitError(str(error)) from error
        parts = {MODEL_PART: proto.SerializeToString(), WEIGHTS_PART: buffer.data}
        return dataclasses.replace(engine, parts=parts, info={**engine.info, "stripped": False})

    def identity(self, options: BuildOptions) -> dict[str, Any]:
        """Versions: an engine is the graph, and what differs between devices is settled when it is loaded."""
        return {"version": _import_onnxruntime().__version__, "onnx": onnx.__version__, "widens": self._widens}

    def parsed(self, segment: Segment) -> onnx.ModelProto:
        """The segment's own graph."""
        return segment.proto

    def revive(self, engine: Engine, segment: Segment) -> Engine:
        """An engine with the segment's places in its graph; see `Backend.revive`."""
        model = with_provenance(engine.parts[MODEL_PART], segment.proto)
        return dataclasses.replace(engine, parts={**engine.parts, MODEL_PART: model})

    def load(
        self,
        engine: Engine,
        device: torch.device,
        cache_dir: Path | None = None,
        options: RuntimeOptions | None = None,
        beside_plugins: bool = False,
    ) -> OnnxRuntimeExecutable:
        """Create the session for a device; ``cache_dir`` is not used, as nothing is compiled. See `Backend.load`.

        Raises:
            OptionError: ``options`` has one that is TensorRT's alone.
            BackendError: onnxruntime is not installed, does not support the device, or did not make the engine.
            ModelFileError: the engine's parts are missing or damaged.
        """
        if options is not None:
            self.check_runtime(options)
        return self._open(engine, device, never_spin if beside_plugins else None)

    def load_profiler(self, engine: Engine, device: torch.device, cache_dir: Path | None = None) -> OrtLayerProfiler:
        """Load an engine into a session of its own that notes the time of each layer; see `Backend.load_profiler`.

        Raises:
            BackendError, ModelFileError: as `load`.
        """
        return OrtLayerProfiler(lambda prepare: self._open(engine, device, prepare), _graph_of(engine))

    def layers(self, engine: Engine, device: torch.device) -> EngineLayers:
        """The layers as ONNX Runtime fuses them for a device; see `Backend.layers`.

        Raises:
            BackendError, ModelFileError: as `load`.
        """
        return optimized_layers(lambda prepare: self._open(engine, device, prepare), _graph_of(engine))

    def _open(
        self, engine: Engine, device: torch.device, prepare: Callable[[Any], None] | None = None
    ) -> OnnxRuntimeExecutable:
        ort = _import_onnxruntime()
        if engine.backend != self.name:
            raise BackendError(f"This engine was built by {engine.backend!r}; {self.name!r} cannot load it.")
        name = str(engine.info.get("segment", "engine"))
        device = _checked_device(ort, device)
        narrow = _WIDENED_ON[device.type] if engine.info.get("widens", True) else frozenset()
        proto, weights = widen(*read_parts(engine, name), narrow)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        providers: list[Any] = ["CPUExecutionProvider"]
        if stream is not None:
            cuda = {
                "device_id": str(device.index),
                "user_compute_stream": str(stream.cuda_stream),
                "use_tf32": str(int(bool(engine.info.get("tf32", False)))),
            }
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        try:
            values = ort_values(ort, weights)
            session = make_session(ort, proto, values, providers=providers, prepare=prepare)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {name} on {device}: {error}") from error
        if stream is not None and "CUDAExecutionProvider" not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime's CUDA provider did not start on {device}: the CUDA and cuDNN libraries that "
                f"onnxruntime-gpu {ort.__version__} needs may be missing. The engine runs on device 'cpu'."
            )
        return OnnxRuntimeExecutable(session, engine, device, narrow, stream, keep_alive=tuple(values.values()))


class OnnxRuntimeExecutable:
    """A session on a device; an `Executable`, and as sessions take calls from several threads also its only `Context`.

    Args:
        session: the onnxruntime.InferenceSession.
        engine: what it was made from.
        device: where it runs.
        narrow: element types that the session holds as float32.
        stream: the stream that the CUDA provider computes on; None on a CPU.
        keep_alive: memory that the session may read.
    """

    workspace_bytes = 0  # ONNX Runtime takes its memory from an arena of its own

    def __init__(
        self,
        session: Any,
        engine: Engine,
        device: torch.device,
        narrow: frozenset[ir.DataType],
        stream: torch.cuda.Stream | None = None,
        keep_alive: tuple[Any, ...] = (),
    ) -> None:
        self.device = device
        self.session = session
        self._name = str(engine.info.get("segment", "engine"))
        self._inputs = [_Binding.make(spec, narrow) for spec in engine.inputs]
        self._outputs = [_Binding.make(spec, narrow) for spec in engine.outputs]
        self._stream = stream
        self._keep_alive = keep_alive
        self._lock = threading.Lock()
        # Sessions on a CPU take and give numpy arrays without a copy, for the types that numpy has.
        self._numpy = stream is None and all(is_numpy_dtype(binding.type) for binding in self._inputs + self._outputs)

    def new_context(self, workspace: torch.Tensor | None = None) -> Context:
        return self

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the engine.

        Raises:
            ExecutionError: ONNX Runtime failed, or the inputs do not fit.
        """
        if len(inputs) != len(self._inputs):
            raise ExecutionError(f"{self._name} takes {len(self._inputs)} inputs, got {len(inputs)}.")
        for tensor, binding in zip(inputs, self._inputs, strict=True):
            if tensor.device != self.device or tensor.dtype != binding.outer:
                raise ExecutionError(
                    f"{self._name}: input {binding.name!r} must be {binding.outer} on {self.device}, got "
                    f"{tensor.dtype} on {tensor.device}."
                )
        tensors = [t.detach().to(b.inner).contiguous() for t, b in zip(inputs, self._inputs, strict=True)]
        try:
            if self._numpy:
                results = self._run_numpy(tensors)
            elif self._stream is None:
                results = self._run_bound(tensors)
            else:
                results = self._run_on_stream(tensors, self._stream)
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise ExecutionError(f"{self._name} failed in ONNX Runtime: {error}") from error
        return [result.to(binding.outer) for result, binding in zip(results, self._outputs, strict=True)]

    def _run_numpy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        feeds = {binding.name: tensor.numpy() for binding, tensor in zip(self._inputs, tensors, strict=True)}
        arrays = self.session.run([binding.name for binding in self._outputs], feeds, _run_options())
        # An input that is an output as it is comes back as the same memory (seen up to ONNX Runtime 1.22).
        own = (array.copy() if b.name in feeds else array for array, b in zip(arrays, self._outputs, strict=True))
        return [torch.from_numpy(array) for array in own]

    def _run_on_stream(self, tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> list[torch.Tensor]:
        # The provider's stream is fixed when the session is made, so the caller's stream is joined before and after;
        # the lock keeps the work of two callers apart on that one stream.
        with self._lock:
            caller = torch.cuda.current_stream(self.device)
            stream.wait_stream(caller)
            with torch.cuda.stream(stream):
                results = self._run_bound(tensors)
            caller.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(stream)
        for result in results:
            result.record_stream(caller)
        return results

    def _run_bound(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run over bare pointers: for every device and every element type."""
        kind, index = self.device.type, self.device.index or 0
        binding = self.session.io_binding()
        for this, tensor in zip(self._inputs, tensors, strict=True):
            binding.bind_input(this.name, kind, index, int(this.type), list(tensor.shape), tensor.data_ptr())
        for this in self._outputs:
            binding.bind_output(this.name, kind, index)
        self.session.run_with_iobinding(binding, _run_options(synchronize=self._stream is None))
        results = []
        for value, this in zip(binding.get_outputs(), self._outputs, strict=True):
            shape = value.shape()
            # ONNX Runtime takes its memory back with the value, hence the copy.
            copied = _bytes_at(value.data_ptr(), math.prod(shape) * this.inner.itemsize, self.device).clone()
            results.append(copied.view(this.inner).reshape(shape))
        return results


@dataclass(frozen=True)
class _Binding:
    """An input or output: its element type in the session and its torch dtypes inside and outside."""

    name: str
    type: ir.DataType
    inner: torch.dtype
    outer: torch.dtype

    @classmethod
    def make(cls, spec: TensorSpec, narrow: frozenset[ir.DataType]) -> _Binding:
        inner = ir.DataType.FLOAT if spec.dtype in narrow else spec.dtype
        message = f"{spec.name!r} is {spec.dtype.name.lower()}: torch has no tensors of that type."
        if inner.bitwidth < 8:
            raise BackendError(message)
        try:
            return cls(spec.name, inner, to_torch_dtype(inner), to_torch_dtype(spec.dtype))
        except TypeError as error:
            raise BackendError(message) from error


class _DevicePointer:
    """What torch.as_tensor needs to see memory on a GPU."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def _bytes_at(address: int, size_bytes: int, device: torch.device) -> torch.Tensor:
    if not size_bytes:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return torch.as_tensor(_DevicePointer(address, size_bytes), device=device)
    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)


def _graph_of(engine: Engine) -> onnx.GraphProto:
    return read_parts(engine, str(engine.info.get("segment", "engine")))[0].graph


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu to run on CUDA too."
        ) from error
    except ImportError as error:
        raise BackendError(f"onnxruntime is installed but does not import: {error}") from error
    return onnxruntime


def _run_options(synchronize: bool = True) -> Any:
    options = _import_onnxruntime().RunOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    if not synchronize:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def _checked_device(ort: Any, device: torch.device) -> torch.device:
    """The device, with an index for CUDA."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise BackendError(f"The onnxruntime backend runs on 'cpu' and 'cuda', not on {str(device)!r}.")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise BackendError(
            f"This ONNX Runtime ({ort.__version__}) has no CUDA: pip install onnxruntime-gpu in place of onnxruntime. "
            "The engine runs on device 'cpu' as it is."
        )
    if not torch.cuda.is_available():
        raise BackendError("torch sees no CUDA device here. The engine runs on device 'cpu'.")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
