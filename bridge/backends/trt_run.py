"""Runs one engine of TensorRT or TensorRT-RTX on torch's CUDA streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from ...errors import BackendError, ExecutionError, TrtBridgeError
from ...plugins.capture_gate import GATE
from ...plugins.tensorrt_v3 import PluginHost, plugin_host
from ..cache import JitCacheFile
from ..dtypes import to_torch
from ..host_thread import about_to_launch
from ..profiles import EngineProfiles
from .base import Context, Engine
from .flavour import Flavour, JitCache, tf32_environment
from .plugin_nodes import require_ops
from .trt_outputs import SizedByData
from .trt_profiles import select_profile
from .trt_refit import SKELETON_PART, stream_weights
from .trt_weights import TABLE_PART, DeviceWeights

if TYPE_CHECKING:
    import tensorrt as trt

ENGINE_PART = "engine.plan"
_ALIGNMENT = 256  # bytes, of every address that TensorRT is given
_MOST_SHAPES = 4096  # combinations of input shapes whose output shapes are remembered


class TensorRtExecutable:
    """An engine on a device; an `Executable`."""

    def __init__(
        self,
        flavour: Flavour,
        engine: Engine,
        device: torch.device,
        cache_dir: Path | None,
        kernel_specialization: str | None = None,
    ) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = flavour.module()
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._flavour = flavour
        self._inputs = tuple((spec.name, to_torch(spec.dtype)) for spec in engine.inputs)
        self._outputs = tuple((spec.name, to_torch(spec.dtype)) for spec in engine.outputs)
        self._profiles = EngineProfiles.of_engine(engine.info, engine.inputs)
        self._tf32 = bool(engine.info.get("tf32"))
        plugins = engine.info.get("plugins", [])
        require_ops(plugins)
        self._host = plugin_host(flavour.module) if plugins else None
        plan = engine.parts[ENGINE_PART]
        with torch.cuda.device(self.device), tf32_environment(flavour, self._tf32):
            torch.cuda.set_device(self.device)  # makes torch's context that of this thread, also of a new one
            self._logger = trt.Logger(trt.ILogger.ERROR)
            self._runtime = trt.Runtime(self._logger)
            loaded = self._runtime.deserialize_cuda_engine(plan)
            _raise_failure(self._host)
            if loaded is None:
                raise BackendError(
                    f"{flavour.title} {trt.__version__} cannot load this engine on "
                    f"{torch.cuda.get_device_name(index)}: it was built with {engine.info.get('version')} for "
                    f"{engine.info.get('target')}. Convert again on this machine."
                )
            stream_weights(loaded, engine.info)
            self._engine = loaded
            self._jit_file = JitCacheFile(cache_dir, plan, f"{flavour.name}-{trt.__version__}") if flavour.jit else None
            blob = self._jit_file.read() if self._jit_file else None
            self._jit = JitCache(flavour, loaded, blob, kernel_specialization)
            names = frozenset(loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors))
            self._weights = DeviceWeights(engine, self.device, names) if TABLE_PART in engine.parts else None
        self._has_own_weights = SKELETON_PART in engine.parts
        self.workspace_bytes = int(loaded.device_memory_size_v2)  # of the profile that needs most

    def exchange(self, engine: Engine) -> Callable[[], None] | None:
        """See `Exchanging`: weights that are inputs are exchanged in place, those in the plan are not."""
        if self._has_own_weights:
            return None
        return _nothing if self._weights is None else self._weights.exchange(engine)

    def new_context(self, workspace: torch.Tensor | None = None) -> Context:
        with torch.cuda.device(self.device), tf32_environment(self._flavour, self._tf32):
            made = self._jit.create_context(user_managed=workspace is not None)
        if made is None:
            raise ExecutionError(
                f"{self._flavour.title} could not make an execution context on {self.device}. It needs "
                f"{self.workspace_bytes >> 20} MiB of device memory; its own words are on standard error."
            )
        if workspace is not None:
            made.set_device_memory(workspace.data_ptr(), workspace.numel())
        return _Context(
            self._flavour,
            made,
            self._inputs,
            self._outputs,
            self.device,
            self._host,
            self._watch,
            workspace,
            self._profiles,
            self._tf32,
            self._weights,
        )

    def _watch(self, shapes: tuple[torch.Size, ...]) -> AbstractContextManager[None]:
        """To be around a call: what is compiled in it is written down."""
        return nullcontext() if self._jit_file is None else self._jit_file.watch(shapes, self._jit.serialize)


class _Context:
    """One execution context: used by one thread at a time, on any stream."""

    def __init__(
        self,
        flavour: Flavour,
        context: trt.IExecutionContext,
        inputs: Sequence[tuple[str, torch.dtype]],
        outputs: Sequence[tuple[str, torch.dtype]],
        device: torch.device,
        host: PluginHost | None,
        watch: Callable[[tuple[torch.Size, ...]], AbstractContextManager[None]],
        workspace: torch.Tensor | None,
        profiles: EngineProfiles,
        tf32: bool,
        weights: DeviceWeights | None,
    ) -> None:
        self._flavour = flavour
        self._tf32 = tf32
        self._profiles = profiles
        self._context = context
        self._host = host
        self._inputs = inputs
        self._outputs = outputs
        self._names = [name for name, _ in (*inputs, *outputs)]
        self._device = device
        self._watch = watch
        self._workspace = workspace  # TensorRT holds its address alone
        self._shapes: tuple[torch.Size, ...] = ()
        self._output_shapes: list[tuple[int, ...] | None] = []  # None where the size depends on data
        self._known: dict[tuple[torch.Size, ...], list[tuple[int, ...] | None]] = {}
        self._addresses = [0] * len(self._names)  # as TensorRT has them
        self._sized: SizedByData | None = None
        self._weights = weights
        self._has_weights = weights is None

    def __del__(self) -> None:
        vars(self).pop("_context", None)  # ahead of what it was made with

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [t if t.data_ptr() % _ALIGNMENT == 0 else t.clone() for t in inputs]
        shapes = tuple(tensor.shape for tensor in tensors)
        capturing = torch.cuda.is_current_stream_capturing()
        with nullcontext() if capturing else self._watch(shapes):
            return self._run(tensors, shapes, capturing)

    def _run(
        self, tensors: Sequence[torch.Tensor], shapes: tuple[torch.Size, ...], capturing: bool
    ) -> list[torch.Tensor]:
        if shapes != self._shapes:
            self._set_shapes(shapes)
        outputs = [
            None if shape is None else torch.empty(shape, dtype=dtype, device=self._device)
            for shape, (_, dtype) in zip(self._output_shapes, self._outputs, strict=True)
        ]
        if self._sized is not None:
            self._check_sized(capturing)
        for index, tensor in enumerate((*tensors, *outputs)):
            if tensor is not None and (address := tensor.data_ptr()) != self._addresses[index]:
                self._context.set_tensor_address(self._names[index], address)
                self._addresses[index] = address
        if self._weights is not None:
            if not self._has_weights:
                self._weights.bind(self._context)
                self._has_weights = True
            self._weights.used_on(torch.cuda.current_stream(self._device))
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)  # a stream object takes ten times as long
        about_to_launch()
        GATE.enter()
        try:
            works = self._context.execute_async_v3(stream)
        finally:
            GATE.leave()
        if not works:
            self._fail(shapes)
        return [
            self._take(name) if tensor is None else tensor
            for tensor, (name, _) in zip(outputs, self._outputs, strict=True)
        ]

    def _fail(self, shapes: tuple[torch.Size, ...]) -> NoReturn:
        self._shapes = ()
        self._forget_addresses()
        _raise_failure(self._host)
        if self._sized is not None:
            self._sized.raise_failure()
        raise ExecutionError(
            f"TensorRT failed to run the engine on inputs of shapes {[tuple(shape) for shape in shapes]}; "
            "its own words are on standard error."
        )

    def _check_sized(self, capturing: bool) -> None:
        assert self._sized is not None
        self._sized.clear()
        if capturing:
            names = [name for shape, (name, _) in zip(self._output_shapes, self._outputs, strict=True) if shape is None]
            raise ExecutionError(
                f"The size of {', '.join(map(repr, names))} depends on data, so that the host waits for it: such an "
                "engine cannot be captured in a CUDA graph."
            )

    def _take(self, name: str) -> torch.Tensor:
        """An output whose size depends on data: TensorRT has waited for it by now."""
        tensor = self._sized.take(name) if self._sized is not None else None
        if tensor is None:
            raise ExecutionError(f"TensorRT ran the engine and gave no shape for its output {name!r}.")
        return tensor

    def _set_shapes(self, shapes: tuple[torch.Size, ...]) -> None:
        before, self._shapes = self._shapes, ()  # a failure half-way leaves nothing that looks valid
        stream, capturing = torch.cuda.current_stream(self._device), torch.cuda.is_current_stream_capturing()
        if select_profile(self._context, self._profiles, shapes, stream, capturing, self._environment):
            before = ()
            self._forget_addresses()  # TensorRT wants all of them anew
        for index, ((name, _), shape) in enumerate(zip(self._inputs, shapes, strict=True)):
            if before and before[index] == shape:
                continue
            if not self._context.set_input_shape(name, tuple(shape)):
                raise ExecutionError(
                    f"The engine does not take shape {tuple(shape)} for {name!r}: outside its profile."
                )
        known = self._known.get(shapes)
        self._output_shapes = self._infer_shapes() if known is None else known
        if len(self._known) == _MOST_SHAPES:
            self._known.clear()
        self._known[shapes] = self._output_shapes
        self._shapes = shapes

    def _environment(self) -> AbstractContextManager[None]:
        return tf32_environment(self._flavour, self._tf32)

    def _forget_addresses(self) -> None:
        self._addresses = [0] * len(self._names)
        self._has_weights = self._weights is None

    def _infer_shapes(self) -> list[tuple[int, ...] | None]:
        """Shapes of the outputs, now that those of the inputs are set."""
        missing = self._context.infer_shapes()
        if missing:
            raise ExecutionError(f"The engine cannot infer its shapes; it lacks {list(missing)}.")
        found = [tuple(self._context.get_tensor_shape(name)) for name, _ in self._outputs]
        shapes = [None if any(size < 0 for size in sizes) else sizes for sizes in found]
        sized = {name: dtype for (name, dtype), shape in zip(self._outputs, shapes, strict=True) if shape is None}
        if sized and self._sized is None:  # which ones they are does not change with the shapes
            self._sized = SizedByData(self._flavour, self._context, sized, self._device)
        return shapes


def _nothing() -> None:
    """Of an engine without weights that may be exchanged there is nothing to do."""


def _raise_failure(host: PluginHost | None) -> None:
    """Raise what a plugin raised while TensorRT called it: TensorRT itself only says that something failed."""
    failure = host.take_failure() if host is not None else None
    if failure is None:
        return
    try:
        if isinstance(failure, TrtBridgeError) or not isinstance(failure, Exception):
            raise failure
        raise ExecutionError(
            f"A plugin inside the engine failed: {type(failure).__name__}: {failure}. Above is where; convert with "
            'plugin_host="segments" to run it outside the engine.'
        ) from failure
    finally:
        del failure  # or it would keep this frame, and the frame it: memory until the garbage collector comes by
