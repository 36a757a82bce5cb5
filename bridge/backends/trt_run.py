"""Runs one engine of TensorRT or TensorRT-RTX on torch's CUDA streams."""

from __future__ import annotations

import ctypes
import queue
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from ...errors import BackendError, ExecutionError, TrtBridgeError
from ...plugins.tensorrt_v3 import PluginHost, plugin_host
from ..cache import JitCacheFile
from ..dtypes import to_torch
from .base import Engine
from .flavour import Flavour, JitCache, tf32_environment
from .plugin_nodes import require_ops
from .trt_outputs import SizedByData
from .trt_refit import stream_weights

if TYPE_CHECKING:
    import tensorrt as trt

ENGINE_PART = "engine.plan"
_ALIGNMENT = 256  # bytes, of every address that TensorRT is given


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
        plugins = engine.info.get("plugins", [])
        require_ops(plugins)
        self._host = plugin_host(flavour.module) if plugins else None
        plan = engine.parts[ENGINE_PART]
        with torch.cuda.device(self.device), tf32_environment(flavour, self._tf32):
            torch.cuda.current_stream()  # makes torch's context the current one
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
                self._jit_file.update(tuple(tensor.shape for tensor in inputs), self._jit.serialize)

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
        return _Context(self._flavour, made, self._inputs, self._outputs, self.device, self._host)


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
    ) -> None:
        self._flavour = flavour
        self._context = context
        self._host = host
        self._inputs = inputs
        self._outputs = outputs
        self._device = device
        self._done = torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None
        self._shapes: tuple[torch.Size, ...] = ()
        self._output_shapes: list[tuple[int, ...] | None] = []  # None where the size depends on data
        self._sized: SizedByData | None = None

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
            None if shape is None else torch.empty(shape, dtype=dtype, device=self._device)
            for shape, (_, dtype) in zip(self._output_shapes, self._outputs, strict=True)
        ]
        if self._sized is not None:
            self._check_sized(capturing)
        for tensor, (name, _) in zip([*tensors, *outputs], [*self._inputs, *self._outputs], strict=True):
            if tensor is not None:
                self._context.set_tensor_address(name, tensor.data_ptr())
        done = self._context.execute_async_v3(stream.cuda_stream)
        if not capturing:
            self._done.record(stream)
            self._stream = stream
        if not done:
            self._fail(shapes)
        return [
            self._take(name) if tensor is None else tensor
            for tensor, (name, _) in zip(outputs, self._outputs, strict=True)
        ]

    def _fail(self, shapes: tuple[torch.Size, ...]) -> NoReturn:
        self._shapes = ()
        _raise_failure(self._host)
        if self._sized is not None and self._sized.failure is not None:
            raise self._sized.failure
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
        self._shapes = ()  # a failure half-way leaves nothing that looks valid
        for (name, _), shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(name, tuple(shape)):
                raise ExecutionError(
                    f"The engine does not take shape {tuple(shape)} for {name!r}: outside its profile."
                )
        missing = self._context.infer_shapes()
        if missing:
            raise ExecutionError(f"The engine cannot infer its shapes; it lacks {list(missing)}.")
        known = [tuple(self._context.get_tensor_shape(name)) for name, _ in self._outputs]
        self._output_shapes = [None if any(size < 0 for size in sizes) else sizes for sizes in known]
        sized = {
            name: dtype
            for (name, dtype), shape in zip(self._outputs, self._output_shapes, strict=True)
            if shape is None
        }
        if sized and self._sized is None:  # which ones they are does not change with the shapes
            self._sized = SizedByData(self._flavour, self._context, sized, self._device)
        self._shapes = shapes


def _raise_failure(host: PluginHost | None) -> None:
    """Raise what a plugin raised while TensorRT called it: TensorRT itself only says that something failed."""
    failure = host.take_failure() if host is not None else None
    if failure is None:
        return
    if isinstance(failure, TrtBridgeError) or not isinstance(failure, Exception):
        raise failure
    raise ExecutionError(
        f"A plugin inside the engine failed: {type(failure).__name__}: {failure}. Above is where; convert with "
        'plugin_host="segments" to run it outside the engine.'
    ) from failure


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
