"""Profiles a module: whole calls as users make them, then step by step, then layer by layer, each in calls of its own.

Timing a layer means waiting for it, so what is timed closely is not what is fast: every number comes from calls in
which nothing finer was measured, and the report shows the sums beside one another. Every number is the mean over the
faster half of its calls: medians of layers do not add up to that of the engine, and means over all are the machine's
other work as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError, ExecutionError, OptionError
from ..plugins.captures import wait_for_device
from ..plugins.registry import call_op, find_op
from .backends import get_backend
from .backends.base import Engine
from .backends.layers import Layer, LayerProfiler, LayerRun
from .dtypes import to_torch
from .graph_facts import NodeFacts, read_nodes
from .input_check import InputChecker
from .model import Origin
from .module import EngineModule
from .plan import PluginCall
from .profile_report import LayerTime, ProfileReport, Span, StepTime, module_of
from .program import EngineStep, Program

_WARM_UP_CALLS = 3
_CALLS_IN_TRACE = 3
_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")
"""Ops that take the time of what they are fused with."""

_Environment = dict[str, torch.Tensor]
_Step = Callable[[_Environment], None]


def profile(
    module: EngineModule, args: Sequence[Any], kwargs: Mapping[str, Any], iterations: int, cache_dir: Path | None
) -> ProfileReport:
    """Measure where a module's time goes; see `EngineModule.profile`.

    Args:
        module: what is measured; its own engines run the whole calls, copies of them all else.
        args, kwargs: of the call.
        iterations: how many calls of each kind.
        cache_dir: folder for compiled kernels.

    Raises:
        OptionError: no iterations.
        InputError, BackendError, ExecutionError: as a call.
    """
    if iterations < 1:
        raise OptionError(f"iterations={iterations}: at least one call must be timed.")
    program, device = module.program, module.device
    if device.type == "cuda" and not torch.cuda.is_available():
        status = get_backend(program.backend).status()
        raise BackendError(status.reason or f"There is no device {device} here.")
    tensors = InputChecker(program.signature, device)(tuple(args), dict(kwargs))
    for _ in range(_WARM_UP_CALLS):
        module(*args, **kwargs)
    calls = [_timed(lambda: module(*args, **kwargs), device) for _ in range(iterations)]
    with _own_stream(device):
        step_times = _time_steps(program, tensors, device, iterations, cache_dir)
        layers, spans = _time_layers(program, tensors, device, iterations, cache_dir)
    inputs = [f"{label} {tuple(t.shape)}" for label, t in zip(program.signature.labels, tensors, strict=True)]
    unknown = [layer for layer in layers if layer.origin is None]
    notes = ["steps and layers are timed in calls of their own, with a wait after each: they need not add up"]
    if unknown:
        shares = f"{len(unknown)} of {len(layers)} layers, {sum(layer.time_ms for layer in unknown):.3f} ms"
        notes.append(f"{shares}, have names that do not lead to a node of the graph")
    return ProfileReport(
        source=program.source,
        backend=program.backend,
        device=_device_text(device),
        inputs=", ".join(inputs),
        iterations=iterations,
        call_ms=_mean([calls[index] for index in _faster_half(calls)]),
        fastest_ms=min(calls),
        slowest_ms=max(calls),
        steps=tuple(step_times),
        layers=tuple(layers),
        spans=tuple(spans),
        notes=tuple(notes),
    )


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of a call until its results are there."""
    if device.type == "cuda":
        wait_for_device(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        wait_for_device(device)
    return (time.perf_counter() - started) * 1e3


class _Clock:
    """Moments of the work on a device, all in one list."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def read_ms(self) -> list[float]:
        """All moments in milliseconds since the first."""
        if self._cuda:
            wait_for_device(self._device)
            return [self._events[0].elapsed_time(event) for event in self._events]
        return [(moment - self._seconds[0]) * 1e3 for moment in self._seconds]


def _time_steps(
    program: Program, tensors: Sequence[torch.Tensor], device: torch.device, iterations: int, cache_dir: Path | None
) -> list[StepTime]:
    backend = get_backend(program.backend)
    steps = [
        _engine_step(step.engine, backend.load(step.engine, device, cache_dir).new_context())
        if isinstance(step, EngineStep)
        else _plugin_step(step, device)
        for step in program.steps
    ]
    clock = _Clock(device)
    for index in range(_WARM_UP_CALLS + iterations):
        timed = index >= _WARM_UP_CALLS
        _run(steps, _environment(program, tensors, device), clock.mark if timed else _nothing)
    moments = clock.read_ms()
    count = len(steps) + 1
    calls = [moments[start : start + count] for start in range(0, len(moments), count)]
    kept = [calls[index] for index in _faster_half([ends[-1] - ends[0] for ends in calls])]
    found = []
    for position, step in enumerate(program.steps):
        time_ms = _mean([ends[position + 1] - ends[position] for ends in kept])
        if isinstance(step, PluginCall):
            found.append(StepTime(step.name, time_ms, step.op, step.origin))
        else:
            found.append(StepTime(step.name, time_ms))
    return found


def _time_layers(
    program: Program, tensors: Sequence[torch.Tensor], device: torch.device, iterations: int, cache_dir: Path | None
) -> tuple[list[LayerTime], list[Span]]:
    backend = get_backend(program.backend)
    profilers: dict[str, LayerProfiler] = {}
    steps: list[_Step] = []
    for step in program.steps:
        if isinstance(step, PluginCall):
            steps.append(_plugin_step(step, device))
        else:
            profilers[step.name] = backend.load_profiler(step.engine, device, cache_dir)
            steps.append(_engine_step(step.engine, profilers[step.name]))
    clock = _Clock(device)
    for _ in range(_WARM_UP_CALLS + iterations):
        _run(steps, _environment(program, tensors, device), clock.mark)
    moments = clock.read_ms()
    runs = {name: profiler.finish()[_WARM_UP_CALLS:] for name, profiler in profilers.items()}
    for name, calls in runs.items():
        if len(calls) != iterations:
            raise ExecutionError(
                f"{name}: the backend's profiler noted {len(calls)} of {iterations} calls. Profile fewer iterations."
            )
    layers: list[LayerTime] = []
    facts = {step.name: read_nodes(step.engine.info) for step in program.steps if isinstance(step, EngineStep)}
    for name, calls in runs.items():
        layers += _summarize(name, calls, facts[name])
    details = {(layer.segment, layer.name): _details(layer) for layer in layers}
    spans: list[Span] = []
    for call in range(max(0, iterations - _CALLS_IN_TRACE), iterations):
        start = (_WARM_UP_CALLS + call) * (len(steps) + 1)
        ends = [moment * 1e3 for moment in moments[start : start + len(steps) + 1]]
        spans += _call_spans(program, {name: calls[call] for name, calls in runs.items()}, ends, details)
    first = spans[0].start_us
    return layers, [Span(s.name, s.category, s.start_us - first, s.duration_us, s.details) for s in spans]


def _summarize(segment: str, calls: Sequence[Sequence[LayerRun]], nodes: Mapping[str, NodeFacts]) -> list[LayerTime]:
    """The time of each layer of an engine; one that runs several times in a call (in a loop) counts in all."""
    kept = _faster_half([sum(run.time_us for run in runs) for runs in calls])
    totals: dict[str, float] = {}
    found: dict[str, Layer] = {}
    for index in sorted(kept):
        for run in calls[index]:
            found.setdefault(run.layer.name, run.layer)
            totals[run.layer.name] = totals.get(run.layer.name, 0.0) + run.time_us
    layers = []
    for name, layer in found.items():
        main, others = find_origin(layer.nodes, nodes)
        time_ms = totals[name] / len(kept) / 1e3
        layers.append(LayerTime(name, layer.kind, segment, time_ms, layer.nodes, main, others))
    return layers


def _faster_half(totals: Sequence[float]) -> list[int]:
    """Which of some calls are the faster half of them."""
    order = sorted(range(len(totals)), key=lambda index: totals[index])
    return order[: (len(order) + 1) // 2]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def find_origin(names: Sequence[str], nodes: Mapping[str, NodeFacts]) -> tuple[Origin | None, tuple[str, ...]]:
    """Where a layer's time counts, and the paths of the other modules in it.

    Args:
        names: the nodes that it computes.
        nodes: what is known of them.

    Returns:
        The origin of the product among them, else of the last of them; None where nothing is known of any.
    """
    known = [nodes[name] for name in names if name in nodes]
    if not known:
        return None, ()
    products = [node for node in known if node.op_type in _PRODUCTS]
    main = (products or known[::-1])[0].origin
    paths = dict.fromkeys(module_of(node.origin) for node in known)
    return main, tuple(path for path in paths if path != module_of(main))


def _details(layer: LayerTime) -> dict[str, str]:
    details = {"kind": layer.kind, "module": layer.module, "nodes": ", ".join(layer.nodes)}
    if layer.origin is not None and layer.origin.file:
        details |= {"line": f"{layer.origin.file}:{layer.origin.line}", "code": layer.origin.code}
    return {name: text for name, text in details.items() if text}


def _call_spans(
    program: Program,
    runs: Mapping[str, Sequence[LayerRun]],
    ends_us: Sequence[float],
    details: Mapping[tuple[str, str], Mapping[str, str]],
) -> Iterator[Span]:
    """A call, its steps in it, and their layers in them."""
    yield Span("call", "call", ends_us[0], ends_us[-1] - ends_us[0])
    for step, start, end in zip(program.steps, ends_us, ends_us[1:], strict=False):
        if isinstance(step, PluginCall):
            yield Span(step.op, "plugin", start, end - start, {"node": step.name, "from": str(step.origin)})
            continue
        yield Span(step.name, "segment", start, end - start)
        yield from _layer_spans(step.name, runs[step.name], start, end, details)


def _layer_spans(
    segment: str,
    runs: Sequence[LayerRun],
    start: float,
    end: float,
    details: Mapping[tuple[str, str], Mapping[str, str]],
) -> Iterator[Span]:
    # Where the backend tells no moments, layers stand one after the other. Where the run lies within its step is not
    # known: in the middle of it.
    moment = 0.0
    placed = []
    for run in runs:
        begins = moment if run.start_us is None else run.start_us
        length = run.time_us if run.start_us is None else run.span_us
        moment = begins + length
        placed.append((run, begins, length))
    total = max((begins + length for _, begins, length in placed), default=0.0)
    shift = start + max(0.0, (end - start - total) / 2)
    for run, begins, length in placed:
        at = min(shift + begins, end)
        yield Span(run.layer.name, "layer", at, min(length, end - at), details.get((segment, run.layer.name), {}))


# A call in steps


def _run(steps: Sequence[_Step], environment: _Environment, mark: Callable[[], None]) -> None:
    mark()
    for step in steps:
        step(environment)
        mark()


def _nothing() -> None:
    """In place of a clock."""


def _environment(program: Program, tensors: Sequence[torch.Tensor], device: torch.device) -> _Environment:
    names = [spec.name for spec in program.signature.inputs]
    constants = {name: tensor.to(device) for name, tensor in program.constants.items()}
    return dict(zip(names, tensors, strict=True)) | constants


def _engine_step(engine: Engine, run: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]) -> _Step:
    inputs = [(spec.name, to_torch(spec.dtype)) for spec in engine.inputs]
    outputs = [spec.name for spec in engine.outputs]

    @torch.no_grad()
    def step(environment: _Environment) -> None:
        tensors = [environment[name].to(dtype).contiguous() for name, dtype in inputs]
        environment.update(zip(outputs, run(tensors), strict=True))

    return step


def _plugin_step(call: PluginCall, device: torch.device) -> _Step:
    op = find_op(call.op)
    dtypes = [None if dtype is None else to_torch(dtype) for dtype in call.input_dtypes]

    @torch.no_grad()
    def step(environment: _Environment) -> None:
        tensors = [environment[name] for name in call.inputs]
        cast = [t if dtype is None else t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        results = call_op(op, call.call, cast, device)
        for name, spec, result in zip(call.outputs, call.output_specs, results, strict=False):
            if name and spec is not None:
                environment[name] = result.to(device, to_torch(spec.dtype))

    return step


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A stream that is not the default one, on which TensorRT would wait by itself."""
    if device.type != "cuda":
        yield
        return
    wait_for_device(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        wait_for_device(device)


def _device_text(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
