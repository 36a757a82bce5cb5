"""The steps of a program as functions over its tensors: engines and plugin calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import ExecutionError, PluginError, TrtBridgeError
from ..nodes import ONNX_NODE_OP
from ..plugins.calls import texts
from ..plugins.program import OP as RUN_PROGRAM
from ..plugins.program import ops_of
from ..plugins.registry import call_op, find_op, stays_out_of_graphs
from ..plugins.sizes import names_in
from .annotation import current_mark
from .backends.base import Context, Engine
from .dims import Range
from .dtypes import to_torch
from .host_thread import about_to_launch
from .lanes import Lane
from .plan import PluginCall
from .program import EngineStep, Program

Environment = dict[str, torch.Tensor]
"""The tensors that are alive between two steps, by name."""

RunStep = Callable[[Environment, Context | None], None]
"""Runs one step: takes what it reads from the environment, in the engine's context, and puts what it makes there."""


def require_ops(program: Program) -> None:
    """See that every plugin op between engines is registered; those inside say so themselves when they are loaded."""
    missing: set[str] = set()
    for call in program.plugin_calls:
        try:
            find_op(call.op)
        except PluginError:
            missing.add(call.op)
    if len(missing) > 1:
        raise PluginError(
            f"The program needs plugin ops that are not registered in this process: {', '.join(sorted(missing))}. "
            "Import the Python modules that register them before loading it."
        )
    for only in missing:
        find_op(only)  # raises again


def engine_step(engine: Engine) -> RunStep:
    inputs = [(spec.name, to_torch(spec.dtype)) for spec in engine.inputs]
    outputs = [spec.name for spec in engine.outputs]

    def run(environment: Environment, context: Context | None) -> None:
        assert context is not None
        # A binding's dtype differs from the tensor's where a pass narrowed a type that the backend lacks.
        tensors = [_of(environment[name], dtype).contiguous() for name, dtype in inputs]
        environment.update(zip(outputs, context(tensors), strict=True))

    return run


def plugin_step(step: PluginCall, device: torch.device, dims: Mapping[str, Range]) -> RunStep:
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

    def run(environment: Environment, context: Context | None) -> None:
        tensors = [
            environment[name] if dtype is None else _of(environment[name], dtype)
            for name, dtype in zip(step.inputs, dtypes, strict=True)
        ]
        about_to_launch()
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
            result = results[index]
            environment[name] = (
                result if result.device == device and result.dtype is dtype else result.to(device, dtype)
            )
        for name, axis, most in bounded:
            if environment[name].shape[axis] > most:
                raise ExecutionError(
                    f"{step.op} gave {environment[name].shape[axis]} elements in dimension {axis}, but what follows "
                    f"was built for {most} at most: convert with a larger max_data_size or a wider tb.Dim.\n"
                    f"  called at {step.origin}"
                )

    return run


class StepRunner:
    """Plain calls of a program, on torch's current stream.

    Args:
        program: whose steps these are.
        steps: in order.
        constants: of the program, on the device; changed in place they are seen by the next call.
    """

    def __init__(self, program: Program, steps: Sequence[RunStep], constants: Mapping[str, torch.Tensor]) -> None:
        self.inputs = [spec.name for spec in program.signature.inputs]
        self.constants = constants
        self._steps = steps
        self._outputs = [
            (program.aliases.get(spec.name, spec.name), to_torch(spec.dtype)) for spec in program.signature.outputs
        ]
        self._dead_after = last_uses(program)
        self._names = [step.name if isinstance(step, EngineStep) else f"plugin {step.op}" for step in program.steps]
        self._title = program.source or "program"

    def __call__(self, inputs: Sequence[torch.Tensor], lane: Lane) -> list[torch.Tensor]:
        """Fresh results for tensors that fit the signature."""
        mark = current_mark()
        if mark is None:
            return self._run(inputs, self._steps, lane)
        with mark(self._title):
            marked = [mark.around(step, name) for step, name in zip(self._steps, self._names, strict=True)]
            return self._run(inputs, marked, lane)

    def run_all(self, inputs: Sequence[torch.Tensor], lane: Lane) -> Environment:
        """Every tensor that crosses from one step to the next, by name."""
        environment: Environment = dict(zip(self.inputs, inputs, strict=True))
        environment.update(self.constants)
        for step, context in zip(self._steps, lane.contexts, strict=True):
            step(environment, context)
        return environment

    @torch.no_grad()
    def _run(self, inputs: Sequence[torch.Tensor], steps: Sequence[RunStep], lane: Lane) -> list[torch.Tensor]:
        environment: Environment = dict(zip(self.inputs, inputs, strict=True))
        environment.update(self.constants)
        for step, context, dead in zip(steps, lane.contexts, self._dead_after, strict=True):
            step(environment, context)
            for name in dead:
                del environment[name]
        given = {tensor.data_ptr() for tensor in [*inputs, *self.constants.values()]}
        results = []
        for name, dtype in self._outputs:
            tensor = _of(environment[name], dtype)
            # A result that only forwards an input or a constant is a copy, so that the caller may write to it.
            results.append(tensor.clone() if tensor.numel() and tensor.data_ptr() in given else tensor)
        return results


def _of(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `Tensor.to` gives, which lets go of Python's lock also where it does nothing."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def last_uses(program: Program) -> list[list[str]]:
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


def capture_problem(program: Program) -> str:
    """Why a CUDA graph cannot hold a call of a program, as far as the program alone tells; "" where nothing speaks
    against it."""
    dims = program.signature.dims.keys()
    for step in program.steps:
        if isinstance(step, EngineStep):
            made, name = step.engine.outputs, f"engine {step.name}"
        else:
            made, name = tuple(spec for spec in step.output_specs if spec is not None), step.op
        for spec in made:
            if any(size is None or (isinstance(size, str) and not names_in(size) <= dims) for size in spec.shape):
                return f"the size of {spec.name} depends on data, so that the host waits for it ({name})"
        if isinstance(step, PluginCall) and step.op == ONNX_NODE_OP:
            return f"the ONNX node from {step.origin} runs in ONNX Runtime on the CPU"
        for op in _ops_of(step):
            if stays_out_of_graphs(op):
                return f"the author of {op} says that no CUDA graph may hold it"
    return ""


def _ops_of(step: EngineStep | PluginCall) -> set[str]:
    """The plugin ops of a step, and those that a condition or loop calls."""
    if isinstance(step, EngineStep):
        return {plugin["op"] for plugin in step.engine.info.get("plugins", [])}
    if step.op != RUN_PROGRAM:
        return {step.op}
    return {op for program in texts(step.call) for op in ops_of(program)}
