"""What each plugin of a plan costs: engines that there would be fewer without it, and its own time on the example."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..plugins.captures import wait_for_device
from .activations import Recorder, cuda_devices
from .backends.base import Backend
from .export import ExportedModule
from .model import OnnxModel, TensorSpec
from .partition import partition
from .plan import Plan, PluginCall
from .planner import Planner
from .seeds import seeded

_CALLS = 4
"""How often an op is called to time it; the fastest counts, since the first call pays for what comes once."""

_NODE = "trtbridge::onnx_node"


@dataclass(frozen=True)
class PluginCost:
    """What one plugin costs.

    Attributes:
        segments_added: engines that there would be fewer if the backend could hold this plugin alone inside one. 0 for
            one that is inside, or that stands where another one divides the model as well.
        milliseconds: of one call of the op by torch on the example; None where it was not measured.
        device: where it was measured ("cpu", "cuda").
        not_measured: why not, "" where it was.
    """

    segments_added: int
    milliseconds: float | None = None
    device: str = ""
    not_measured: str = ""

    def __str__(self) -> str:
        count = self.segments_added
        parts = [f"{count} segment{'s' * (count != 1)} more"]
        if self.milliseconds is None:
            parts.append(f"time not measured: {self.not_measured}")
        else:
            parts.append(f"{self.milliseconds:.3g} ms a call on {self.device}")
        return "; ".join(parts)


def plugin_costs(planner: Planner, plan: Plan) -> dict[str, PluginCost]:
    """What every plugin of a plan costs, by its name in the plan.

    Args:
        planner: that made the plan; nothing is exported or built again.
        plan: its last one.
    """
    calls = [*plan.plugin_calls, *plan.hosted_calls]
    if not calls:
        return {}
    times, why = _times(planner, calls)
    between = {call.name for call in plan.plugin_calls}
    found = {}
    for call in calls:
        added = _segments_added(planner, plan, call) if call.name in between else 0
        milliseconds = times.get(call.name)
        said = "" if milliseconds is not None else why or _why_not(call)
        device = _device(planner.source) if milliseconds is not None else ""
        found[call.name] = PluginCost(added, milliseconds, device, said)
    return found


def _segments_added(planner: Planner, plan: Plan, call: PluginCall) -> int:
    """How many segments fewer there are if one plugin more is inside an engine."""
    model = next(planner.models[key] for key in ("attention", "precision", "passes") if key in planner.models)
    hosting = planner.backend if planner.options.plugin_host != "segments" else None
    trial = partition(model, _OneMore(planner.backend, hosting is None, call.name), planner.outside - {call.name})
    return max(0, len(plan.segments) - len(trial.segments))


class _OneMore:
    """A backend, for `partition` alone, that holds one plugin more inside its engines."""

    def __init__(self, backend: Backend, holds_none: bool, name: str) -> None:
        self._backend, self._holds_none, self._name = backend, holds_none, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def plugin_refusal(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        if call.name == self._name:
            return ""
        return "not asked" if self._holds_none else self._backend.plugin_refusal(call, input_specs)

    def host_spec(self, call: PluginCall, input_specs: tuple[TensorSpec, ...]) -> str:
        return "{}" if call.name == self._name else self._backend.host_spec(call, input_specs)


def _times(planner: Planner, calls: Collection[PluginCall]) -> tuple[dict[str, float], str]:
    """Milliseconds by name of the plugin call; or why none was measured."""
    source = planner.source
    if isinstance(source, OnnxModel):
        return {}, "an .onnx file brings no example to call it with"
    device = _device(source)
    if planner.backend.name != "onnxruntime" and device == "cpu":
        return {}, f"{planner.backend.name} runs plugins on a GPU, and the module is on the CPU"
    wanted = {call.origin.call: call.name for call in calls if call.origin.call and not call.op.startswith(_NODE)}
    clock = _Clock(source, wanted)
    try:
        with seeded(cuda_devices(source)):
            clock.run_example()
    except Exception as error:  # the module's own code runs, so any error can come
        return {}, f"the module fails on its example: {str(error).strip().splitlines()[0][:200]}"
    return clock.milliseconds, ""


def _why_not(call: PluginCall) -> str:
    if call.op.startswith(_NODE):
        return "it is one ONNX node, not a call of the model"
    return "the example does not call it by itself"


def _device(source: ExportedModule | OnnxModel) -> str:
    return "cuda" if isinstance(source, ExportedModule) and cuda_devices(source) else "cpu"


class _Clock(Recorder):
    """Runs an exported program and times some of its calls."""

    def __init__(self, traced: ExportedModule, names: Mapping[str, str]) -> None:
        super().__init__(traced)
        self._names = names
        self.milliseconds: dict[str, float] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.name not in self._names:
            return super().run_node(n)
        seconds, value = [], None
        for _ in range(1 if _writes(n) else _CALLS):
            _wait(self.traced)
            started = time.perf_counter()
            value = super().run_node(n)
            _wait(self.traced)
            seconds.append(time.perf_counter() - started)
        self.milliseconds[self._names[n.name]] = min(seconds) * 1e3
        return value


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.is_mutable)


def _wait(traced: ExportedModule) -> None:
    for index in cuda_devices(traced):
        wait_for_device(index)
