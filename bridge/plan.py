"""A plan: what runs in which order, before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ..errors import UnsupportedOpError
from .backends.base import Segment
from .dims import Range
from .model import Origin, Signature, TensorSpec
from .recipes import Recipes


@dataclass(frozen=True)
class PluginCall:
    """A torch op that runs between segments.

    Attributes:
        name: unique in the plan (the node's name).
        op: full name of the torch op ("aten::cummax.default").
        call: JSON template of its arguments (`plugins.calls`).
        inputs: tensor names, in the template's order.
        outputs: tensor names; "" for an output that nothing reads.
        input_dtypes: what each input is cast to before the call, None for no cast.
        output_specs: dtype and shape of each named output after the call; the result is cast to that dtype.
        origin: the Python line that called it.
        reason: why it is a plugin, in the words of what refused it.
        host_refusal: why it is not inside an engine; "" where nobody asked.
    """

    name: str
    op: str
    call: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_dtypes: tuple[ir.DataType | None, ...]
    output_specs: tuple[TensorSpec | None, ...]
    origin: Origin = field(default_factory=Origin)
    reason: str = ""
    host_refusal: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "plugin": self.name,
            "op": self.op,
            "call": self.call,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "input_dtypes": [None if dtype is None else dtype.name for dtype in self.input_dtypes],
            "output_specs": [None if spec is None else spec.to_json() for spec in self.output_specs],
            "origin": self.origin.to_metadata(),
            "reason": self.reason,
            "host_refusal": self.host_refusal,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PluginCall:
        return cls(
            name=data["plugin"],
            op=data["op"],
            call=data["call"],
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            input_dtypes=tuple(None if name is None else ir.DataType[name] for name in data["input_dtypes"]),
            output_specs=tuple(None if spec is None else TensorSpec.from_json(spec) for spec in data["output_specs"]),
            origin=Origin.from_metadata(data["origin"]),
            reason=data.get("reason", ""),
            host_refusal=data.get("host_refusal", ""),
        )


@dataclass(frozen=True)
class Plan:
    """An ordered list of steps over named tensors.

    Attributes:
        steps: segments and plugin calls, each after those whose outputs it reads.
        signature: of the whole model.
        constants: initializers that plugin calls read or that are results themselves, by name.
        aliases: results that only forward an input, a constant or a plugin's output: result → that tensor.
        source: what the model was made from.
        data_dims: ranges of the sizes that depend on data.
        recipes: how weights and constants come from the module; None where they cannot be exchanged.
    """

    steps: tuple[Segment | PluginCall, ...]
    signature: Signature
    constants: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    data_dims: Mapping[str, Range] = field(default_factory=dict)
    recipes: Recipes | None = None

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(step for step in self.steps if isinstance(step, Segment))

    @property
    def hosted_calls(self) -> tuple[PluginCall, ...]:
        """Plugin calls inside engines."""
        return tuple(call for segment in self.segments for call in segment.hosted)

    @property
    def plugin_calls(self) -> tuple[PluginCall, ...]:
        return tuple(step for step in self.steps if isinstance(step, PluginCall))


def with_recipes(plan: Plan, recipes: Recipes) -> Plan:
    """A plan that knows how its weights are made."""
    inside = {name for segment in plan.segments for name in segment.weights}
    kept = recipes.only(inside, plan.constants.keys())
    steps = [
        dataclasses.replace(step, refittable=frozenset(step.weights) & kept.weights.keys())
        if isinstance(step, Segment)
        else step
        for step in plan.steps
    ]
    return dataclasses.replace(plan, steps=tuple(steps), recipes=kept)


def require_inside(plan: Plan, backend: str) -> None:
    """See that all plugins of a plan are inside its engines.

    Raises:
        UnsupportedOpError: some are not; each is named, with what is in the way.
    """
    outside = plan.plugin_calls
    if outside:
        lines = "\n".join(f"  {call.op} from {call.origin}: {call.host_refusal}" for call in outside)
        raise UnsupportedOpError(
            f'plugin_host="engine", but {backend} cannot hold {len(outside)} plugin(s) inside an engine:\n{lines}\n'
            'Use plugin_host="auto" to run these between engines.'
        )
