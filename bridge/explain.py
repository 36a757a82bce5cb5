"""What becomes of a model, without building it; of each plugin why it is one, what it costs, and how to avoid it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..plugins.sizes import names_in
from .avoid_plugins import ways_to_avoid
from .backends import choose_backend
from .backends.base import Refusal
from .convert import Model, make_planner
from .inspection import describe_plugin
from .model import Origin, Signature
from .options import Options
from .plan import PluginCall
from .plugin_costs import PluginCost, plugin_costs


@dataclass(frozen=True)
class PluginNote:
    """What there is to say of one plugin.

    Attributes:
        op: full name of the torch op.
        origin: the Python line that called it.
        place: "between segments", or "inside" and the segment's name.
        reason: why it is a plugin, in the words of what refused it.
        host_refusal: why it is not inside an engine; "" where it is, or where nobody asked.
        cost: segments and time.
        ways: how to do without it, as far as a way is known.
    """

    op: str
    origin: Origin
    place: str
    reason: str
    host_refusal: str
    cost: PluginCost
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What would become of a model, found without building it.

    Attributes:
        backend: the backend that was asked.
        steps: a line a step: segments with their nodes, plugins with their Python lines and reasons.
        refusals: nodes that the backend's parser does not take, by segment.
        passes: a line a pass, and what became of the precision where one was asked for.
        signature: inputs and outputs.
        plugins: of each plugin what is said of it in ``steps``.
        tips: what would likely make it faster, beside what is said of plugins.
    """

    backend: str
    source: str
    signature: Signature
    steps: tuple[str, ...]
    refusals: Mapping[str, Sequence[Refusal]]
    passes: tuple[str, ...]
    plugins: tuple[PluginNote, ...] = ()
    tips: tuple[str, ...] = ()

    @property
    def converts(self) -> bool:
        """Whether the parser takes everything that is not a plugin."""
        return not any(self.refusals.values())

    def __str__(self) -> str:
        lines = [f"{self.source} on {self.backend}"]
        lines += [f"  input {line}" for line in self.signature.describe_inputs()]
        lines += [f"  {line}" for line in self.signature.describe_profiles()]
        lines += [f"  {line}" for line in self.passes]
        for step in self.steps:
            lines.append(f"  {step}")
            name = step.partition(":")[0]
            lines += ["    refused: " + str(refusal).replace("\n", "\n    ") for refusal in self.refusals.get(name, ())]
        lines += [f"  output {line}" for line in self.signature.describe_outputs()]
        lines += [f"  tip: {tip}" for tip in self.tips]
        lines.append("  converts" if self.converts else "  does not convert: the parser refuses the nodes above")
        return "\n".join(lines)


def explain(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    backend: str = "auto",
    **options: Any,
) -> Explanation:
    """Say what becomes engine, what becomes plugin, why, at what cost and how to avoid it, without building.

    Takes what `convert` takes, and raises the same errors, but `UnsupportedOpError` for what the parser refuses: those
    nodes are in the result.
    """
    chosen = Options.make(options)
    builder, _ = choose_backend(backend)
    builder.check_options(chosen.build)
    builder.check_runtime(chosen.runtime)
    planner = make_planner(model, args, kwargs, dynamic_shapes, builder, chosen, may_measure=False)
    plan, refusals = planner.settled_plan()
    costs = plugin_costs(planner, plan)
    notes: list[PluginNote] = []

    def note(call: PluginCall, place: str) -> list[str]:
        ways = ways_to_avoid(call, chosen.plugin_host)
        found = PluginNote(call.op, call.origin, place, call.reason, call.host_refusal, costs[call.name], ways)
        notes.append(found)
        return [*describe_plugin(call, place), f"  costs {found.cost}", *(f"  instead: {way}" for way in ways)]

    lines = []
    for step in plan.steps:
        if isinstance(step, PluginCall):
            lines += note(step, "between segments")
            continue
        counts: dict[str, int] = {}
        for node in step.proto.graph.node:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
        listed = ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), key=lambda item: -item[1]))
        lines.append(f"{step.name}: engine of {sum(counts.values())} nodes ({listed})")
        for call in step.hosted:
            lines += note(call, f"inside {step.name}")
    passes = tuple(f"pass {r.name}: {r.rewrites} rewrites, {len(r.refusals)} near misses" for r in planner.passes)
    if planner.precision is not None:
        passes += tuple(str(planner.precision).splitlines())
    if planner.attention_report is not None:
        passes += (planner.attention_report.summary,)
    tips = _tips(plan.signature) if builder.name == "tensorrt_rtx" else ()
    return Explanation(builder.name, plan.source, plan.signature, tuple(lines), refusals, passes, tuple(notes), tips)


def _tips(signature: Signature) -> tuple[str, ...]:
    """That a size which comes often may have a profile of its own, where sizes of inputs have one range alone."""
    sizes = [size for spec in signature.inputs for size in spec.shape if isinstance(size, str)]
    used = {name for size in sizes for name in names_in(size)}
    ranges = {name: span for name, span in signature.dims.items() if name in used and span[0] < span[2]}
    if signature.profiles or not ranges:
        return ()
    dims = (f'tb.Dim("{name}", profiles=[{(span[1],) * 3}, {tuple(span)}])' for name, span in ranges.items())
    return (
        "calls with sizes that come often are mostly faster where these have a profile of their own, as in "
        f"{', '.join(dims)} (docs/shapes.md)",
    )
