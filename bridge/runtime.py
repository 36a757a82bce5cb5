"""Runs a program on a device: engines and plugin calls over named tensors, on one stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from ..errors import ExecutionError, PluginError, TrtBridgeError
from ..plugins.registry import call_op, find_op
from ..plugins.sizes import names_in
from .backends import get_backend
from .backends.base import Backend, Engine, Executable
from .dims import Range
from .dtypes import to_torch
from .plan import PluginCall
from .program import EngineStep, Program

_Environment = dict[str, torch.Tensor]


class RunningProgram:
    """A program whose engines are loaded on a device.

    Args:
        program: what to run.
        device: where.
        cache_dir: where compiled kernels are kept.
        backend: what loads the engines; None for the one that the program names.

    Raises:
        BackendError: the backend is missing, or cannot run these engines on that device.
        PluginError: a plugin op is not registered in this process.
    """

    def __init__(
        self, program: Program, device: torch.device, cache_dir: Path | None, backend: Backend | None = None
    ) -> None:
        backend = backend or get_backend(program.backend)
        _require_ops(program)
        self.device = device
        self._inputs = [spec.name for spec in program.signature.inputs]
        self._outputs = [
            (program.aliases.get(spec.name, spec.name), to_torch(spec.dtype)) for spec in program.signature.outputs
        ]
        self._constants = {name: tensor.to(device) for name, tensor in program.constants.items()}
        self._steps: list[Callable[[_Environment], None]] = []
        for step in program.steps:
            if isinstance(step, EngineStep):
                self._steps.append(_engine_step(step.engine, backend.load(step.engine, device, cache_dir)))
            else:
                self._steps.append(_plugin_step(step, device, program.signature.dims))
        self._dead_after = _last_uses(program)
        self._local = threading.local()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on tensors that fit the signature; outputs are fresh.

        On CUDA the work is ordered with torch's current stream, and the call may return before it is done.
        """
        if self.device.type != "cuda":
            return self._run(inputs)
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            if caller != torch.cuda.default_stream() or torch.cuda.is_current_stream_capturing():
                return self._run(inputs)
            # TensorRT synchronizes when given the default stream, so the work goes to one of our own, with events.
            own = self._own_stream()
            own.wait_stream(caller)
            with torch.cuda.stream(own):
                outputs = self._run(inputs)
            caller.wait_stream(own)
            for tensor in inputs:
                tensor.record_stream(own)  # its memory must not be given away before our stream has read it
            for tensor in outputs:
                tensor.record_stream(caller)
            return outputs

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait until the device has done all work of calls that have returned."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        yield

    @torch.no_grad()
    def run_all(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run, wait, and return every tensor that crosses from one step to the next, by name."""
        environment = dict(zip(self._inputs, inputs, strict=True)) | self._constants
        stream: AbstractContextManager[object] = nullcontext()
        if self.device.type == "cuda":
            stream = torch.cuda.stream(self._own_stream())
            torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(), stream:
            for step in self._steps:
                step(environment)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return environment

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        environment = dict(zip(self._inputs, inputs, strict=True))
        environment.update(self._constants)
        for step, dead in zip(self._steps, self._dead_after, strict=True):
            step(environment)
            for name in dead:
                del environment[name]
        given = {tensor.data_ptr() for tensor in [*inputs, *self._constants.values()]}
        results = []
        for name, dtype in self._outputs:
            tensor = environment[name].to(dtype)
            # A result that only forwards an input or a constant is a copy, so that the caller may write to it.
            results.append(tensor.clone() if tensor.numel() and tensor.data_ptr() in given else tensor)
        return results

    def _own_stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = torch.cuda.Stream()
        return stream


def _require_ops(program: Program) -> None:
    """See that every plugin op between engines is registered; those inside say so themselves when they are loaded."""
    missing: dict[str, PluginError] = {}
    for call in program.plugin_calls:
        try:
            find_op(call.op)
        except PluginError as error:
            missing[call.op] = error
    if len(missing) > 1:
        raise PluginError(
            f"The program needs plugin ops that are not registered in this process: {', '.join(sorted(missing))}. "
            "Import the Python modules that register them before loading it."
        )
    for only in missing.values():
        raise only


def _engine_step(engine: Engine, executable: Executable) -> Callable[[_Environment], None]:
    inputs = [(spec.name, to_torch(spec.dtype)) for spec in engine.inputs]
    outputs = [spec.name for spec in engine.outputs]

    def run(environment: _Environment) -> None:
        # A binding's dtype differs from the tensor's where a pass narrowed a type that the backend lacks.
        tensors = [environment[name].to(dtype).contiguous() for name, dtype in inputs]
        environment.update(zip(outputs, executable(tensors), strict=True))

    return run


def _plugin_step(step: PluginCall, device: torch.device, dims: Mapping[str, Range]) -> Callable[[_Environment], None]:
    op = find_op(step.op)
    dtypes = [None if dtype is None else to_torch(dtype) for dtype in step.input_dtypes]
    outputs = [
        (index, name, to_torch(spec.dtype))
        for index, (name, spec) in enumerate(zip(step.outputs, step.output_specs, strict=True))
        if name and spec is not None
    ]

    # Sizes that depend on data, with their bounds: the engines behind them take no more.
    bounded = [
        (name, axis, bounds[2])
        for name, spec in zip(step.outputs, step.output_specs, strict=True)
        if name and spec is not None
        for axis, (size, bounds) in enumerate(zip(spec.shape, spec.ranges, strict=True))
        if isinstance(size, str) and bounds is not None and not names_in(size) <= dims.keys()
    ]

    def no_autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()

    def run(environment: _Environment) -> None:
        tensors = [
            environment[name] if dtype is None else environment[name].to(dtype)
            for name, dtype in zip(step.inputs, dtypes, strict=True)
        ]
        try:
            with no_autocast():
                results = call_op(op, step.call, tensors, device)
        except TrtBridgeError:
            raise
        except Exception as error:
            shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors]
            raise ExecutionError(
                f"The plugin op {step.op} failed on inputs {shapes}: {type(error).__name__}: {error}\n"
                f"  called at {step.origin}"
            ) from error
        for index, name, dtype in outputs:
            environment[name] = results[index].to(device, dtype)
        for name, axis, most in bounded:
            if environment[name].shape[axis] > most:
                raise ExecutionError(
                    f"{step.op} gave {environment[name].shape[axis]} elements in dimension {axis}, but what follows "
                    f"was built for {most} at most: convert with a larger max_data_size or a wider tb.Dim.\n"
                    f"  called at {step.origin}"
                )

    return run


def _last_uses(program: Program) -> list[list[str]]:
    """For each step the tensors that nothing reads after it, so that their memory is free for the next step."""
    alive = {program.aliases.get(spec.name, spec.name) for spec in program.signature.outputs}
    dead_after: list[list[str]] = []
    for step in reversed(program.steps):
        if isinstance(step, EngineStep):
            names = {spec.name for spec in (*step.engine.inputs, *step.engine.outputs)}
        else:
            names = {name for name in (*step.inputs, *step.outputs) if name}
        dead_after.append(sorted(names - alive))
        alive |= names
    return dead_after[::-1]
