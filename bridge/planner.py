"""Plans of one model, with more and more of it as plugins until the backend takes the rest.

The judges are the exporter, ONNX Runtime, the backend's parser and its builder: what one of them refuses, or gets
wrong, is traced to the call of a torch op, and the model is translated again with that call as a plugin. What has
no torch op behind it (an .onnx file's nodes) becomes a plugin that runs the node itself.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import onnx

from ..errors import BuildError, PassError, PluginError, TrtBridgeError, UnsupportedOpError
from ..nodes import wrong_in_onnxruntime
from ..passes.graft_nodes import graft
from ..passes.opset import opset_of
from ..passes.pipeline import PassReport
from ..plugins.host_spec import HOST_OP_TYPE
from .as_plugins import wanted_calls, wanted_nodes
from .attention import Attention, AttentionReport
from .backends import get_backend
from .backends.base import Backend, BuildOptions, Refusal
from .bounds import with_bounds
from .build import build_plan, check_plan
from .check_passes import run_passes
from .engine_cache import EngineCache
from .example_sizes import example_sizes
from .export import ExportedModule
from .halving import find_culprit
from .model import OnnxModel, iterate_nodes, origin_of
from .options import Options
from .partition import partition
from .plan import Plan, require_inside, with_recipes
from .precision import PrecisionReport, Refused, convert_precision, sixteen_bit_nodes, with_opset
from .precision_request import Measurements
from .program import Program
from .quantize import quantized_nodes
from .recipes import bake
from .rewrites import Rewrites, Site
from .stages import Stages
from .untranslatable import reading_calls, sharing_calls
from .verify import find_wrong_calls

logger = logging.getLogger(__name__)

_KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")

_MOST_ROUNDS = 40
"""Each round makes at least one more plugin; a model that needs more is beyond help."""


@dataclass
class Planner:
    """Makes plans of a model for a backend, and learns from what is refused.

    Attributes:
        source: a traced module, or the model of an .onnx file.
        backend: what judges and builds.
        options: of the conversion.
        stages: where seconds are noted.
        calls: calls of the traced module that are plugins, each with the reason.
        nodes: ONNX nodes that are plugins, each with the reason.
        outside: plugin nodes that an engine failed over, which run between engines.
        refused: nodes that the backend refuses in the precision asked for.
        rewrites: nodes that are written in other ops, because the backend refuses them as they are.
        passes: what the passes did last.
        precision: what became of the model's precision, where one was asked for.
        models: the last model after each stage that changes it: "export", "passes", "precision", "attention".
        attention: chooses the form of attention; None leaves it as it is.
        cache: where engines are looked up and kept; None builds all.
    """

    source: ExportedModule | OnnxModel
    backend: Backend
    options: Options
    stages: Stages
    calls: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    refused: Refused = field(default_factory=Refused)
    rewrites: Rewrites = field(default_factory=Rewrites)
    passes: Sequence[PassReport] = ()
    precision: PrecisionReport | None = None
    models: dict[str, OnnxModel] = field(default_factory=dict)
    attention: Attention | None = None
    cache: EngineCache | None = None
    _opset: int | None = None
    _exported: tuple[frozenset[str], OnnxModel] | None = None  # the last translation and what was a plugin in it
    _rewritten: OnnxModel | None = None  # the last model, its refused nodes rewritten, no node a plugin
    _nodes: Sequence[onnx.NodeProto] = ()
    _half: frozenset[str] = frozenset()  # nodes that work in 16 bits by the precision asked for
    # products over 8 bits, and Q/DQ nodes ahead of them, with the products that they are about
    _quantized: Mapping[str, frozenset[str]] = field(default_factory=dict)
    _measurements: Measurements = field(default_factory=Measurements)
    _checked: frozenset[str] | None = None
    _sizes: Mapping[str, int] | None = None  # of the example, once they are known
    _made: tuple[frozenset[str], Plan] | None = None  # the last plan and what was a plugin in it
    _fixed: set[str] = field(default_factory=set)  # calls that cannot be plugins

    def __post_init__(self) -> None:
        if isinstance(self.source, ExportedModule):
            wanted = wanted_calls(self.source, self.options.as_plugins)
            self.calls |= wanted
            self.rewrites.given_up |= wanted.keys()  # plugins that a pass could write in ops of ONNX

    @property
    def opset(self) -> int | None:
        """The ONNX opset of the default domain in the last model."""
        return self._opset

    @property
    def learned(self) -> dict[str, Any]:
        """What was refused so far, JSON-ready: what `recall` takes."""
        refused = {"full": sorted(self.refused.half), "unquantized": sorted(self.refused.quantized)}
        sets = {"outside": sorted(self.outside), **refused, "as written": sorted(self.rewrites.given_up)}
        rewritten = [[*site, reason] for site, reason in self.rewrites.sites.items()]
        attention = {} if self.attention is None else self.attention.learned
        found = {"calls": self.calls, "nodes": self.nodes, **sets, "rewritten": rewritten, **attention}
        return {name: value for name, value in found.items() if value}

    def recall(self, learned: Mapping[str, Any]) -> None:
        """Begin with what was refused in an earlier conversion of the same model."""
        source = self.source
        if isinstance(source, ExportedModule):
            known = {node.name for node in source.program.graph.nodes}
            calls = {call: why for call, why in learned.get("calls", {}).items() if call in known}
            problems = source.plugin_problems(calls) if calls else {}
            self.calls |= {call: why for call, why in calls.items() if call not in problems}
        self.nodes |= learned.get("nodes", {})
        self.outside |= set(learned.get("outside", ()))
        self.refused.half |= set(learned.get("full", ()))
        self.refused.quantized |= set(learned.get("unquantized", ()))
        self.rewrites.given_up |= set(learned.get("as written", ()))
        self.rewrites.sites |= {Site(*site): reason for *site, reason in learned.get("rewritten", ())}
        if self.attention is not None:
            self.attention.recall(learned)

    @property
    def attention_report(self) -> AttentionReport | None:
        """What became of attention in the last model."""
        return None if self.attention is None else self.attention.report

    def plan(self) -> Plan:
        """A plan whose export has been checked; the backend has not been asked yet."""
        rounds = 0
        while True:
            if self._made is not None and self._made[0] == self._state():
                return self._made[1]
            rounds += 1
            try:
                model = self._model()
            except PassError as error:
                if self._add_calls(self._invalid_calls()):
                    continue  # the passes failed over a graph that the exporter made wrong
                raise error
            # Checked in the precision of the module: rounding to 16 bits is no mistake of the export.
            wrong = self._wrong_calls(model)
            if any([self.rewrites.give_up(wrong), self._add_calls(wrong)]) and rounds < _MOST_ROUNDS:
                continue
            self.models["passes"] = model
            if self.options.precision is not None:
                with self.stages.stage("precision"):
                    model, self.precision = convert_precision(
                        model, self.source, self.options, self.refused, self._measurements, self.backend
                    )
                    self._half, self._quantized = sixteen_bit_nodes(model.proto), quantized_nodes(model.proto)
                self.models["precision"] = model
            if self.attention is not None:
                with self.stages.stage("attention") if self.attention.is_open(model) else nullcontext():
                    model, unwanted = self.attention.apply(model)
                self.passes = (*self.passes, *self.attention.passes)
                if unwanted and self._write_out(unwanted) and rounds < _MOST_ROUNDS:
                    continue
                self._opset = opset_of(model.proto)
                self.models["attention"] = model
            with self.stages.stage("partition"):
                model, recipes = bake(model, self.models["export"])
                plan = partition(model, None if self.options.plugin_host == "segments" else self.backend, self.outside)
                plan = plan if recipes is None else with_recipes(plan, recipes)
                if self.options.plugin_host == "engine":
                    require_inside(plan, self.backend.name)
            self._made = (self._state(), plan)
            return plan

    def _state(self) -> frozenset[str]:
        others = (
            *(f"node {name}" for name in self.nodes),
            *(f"out {name}" for name in self.outside),
            *(f"full {name}" for name in self.refused.half),
            *(f"float {name}" for name in self.refused.quantized),
        )
        parts = frozenset() if self.attention is None else self.attention.state
        return self.rewrites.state | parts | {*self.calls, *others}

    def _write_out(self, unwanted: Sequence[Refusal]) -> bool:
        """Write nodes in other ops; whether any of them can be and was not."""
        before = self.rewrites.state
        if self._rewritten is not None:
            self.rewrites.add(self._rewritten, unwanted, self.backend.name)
        return self.rewrites.state != before

    def settled_plan(self) -> tuple[Plan, Mapping[str, Sequence[Refusal]]]:
        """A plan that the backend's parser takes, or the last one with what it still refuses, by segment."""
        rounds = 0
        while True:
            rounds += 1
            plan = self.plan()
            with self.stages.stage("parse"):
                refusals = check_plan(plan, self.backend, self.options.build)
            found = [refusal for each in refusals.values() for refusal in each]
            if not found or rounds == _MOST_ROUNDS or not self.learn(found):
                return plan, refusals

    def build(self) -> Program:
        """Build the model, whatever has to be a plugin for that.

        Raises:
            UnsupportedOpError: the parser refuses nodes that cannot be plugins.
            BuildError: the builder fails, and nothing that could be a plugin is to blame.
        """
        for round_ in range(_MOST_ROUNDS):
            plan = self.plan()
            known = self.cache is not None and self.cache.has_all(plan.segments, self.backend, self.options.build)
            # With several segments the parser is asked for all refusals first: what is built before one is lost.
            if len(plan.segments) > 1 and not known:
                plan, _ = self.settled_plan()
            try:
                with self.stages.stage("build"):
                    return build_plan(plan, self.backend, self.options.build, self.options.progress, self.cache)
            except UnsupportedOpError as error:
                if not self.options.fallback or not self.learn(error.refusals):
                    raise
            except BuildError as error:
                if not self.options.fallback or not error.graph_at_fault or round_ == _MOST_ROUNDS - 1:
                    raise
                logger.info("%s", error)
                inside = {call.name for call in plan.hosted_calls}
                if self.learn(error.refusals):
                    continue
                if inside - self.outside and self.options.plugin_host == "auto":
                    self.outside |= inside  # a plugin that fails while the engine is built still runs between engines
                elif not self.learn(self._culprit(plan, error)):
                    raise
        raise BuildError(
            f"{self.backend.name} refuses another part of the model in each of {_MOST_ROUNDS} rounds; the last were "
            f"{', '.join(list(self.calls or self.nodes)[-5:])}."
        )

    def learn(self, refusals: Sequence[Refusal]) -> bool:
        """Rewrite what was refused, or make plugins of it; False where nothing of it can be either."""
        if not self.options.fallback:
            return False
        title = self.backend.name
        if self.attention is not None:
            others = self.attention.learn(refusals)
            if len(others) < len(refusals):
                return True  # what else was refused comes again
        # An Attention node is better written in parts than kept in float32.
        wide = {refusal.node for refusal in refusals if refusal.op_type != "Attention"}
        if self.refused.learn(wide, self._half, self._quantized, title):
            return True
        count = len(refusals)
        if self._rewritten is not None:
            refusals = self.rewrites.add(self._rewritten, refusals, title)
        progress = len(refusals) < count
        if not refusals:
            return progress
        calls: dict[str, str] = {}
        nodes: dict[str, str] = {}
        hosted = {refusal.node for refusal in refusals if refusal.op_type == HOST_OP_TYPE}
        if hosted - self.outside:
            self.outside |= hosted
            return True
        for refusal in refusals:
            words = refusal.reason.strip()
            reason = f"{title} refuses {refusal.op_type}: {words}" if words else f"{title} refuses {refusal.op_type}"
            # A file that this package wrote still names the calls of the module that it was made from.
            call = refusal.origin.call if isinstance(self.source, ExportedModule) else ""
            progress |= self.rewrites.give_up([call])
            if root := "" if call else self.rewrites.give_up_node(refusal.node):
                nodes[root] = reason
            elif call and call not in self.calls and call not in self._fixed:
                calls.setdefault(call, reason)
        if calls and isinstance(self.source, ExportedModule):
            types = {r.origin.call: r.op_type for r in refusals if r.origin.call in calls}
            made = ((origin_of(node).call, node.op_type) for node in self._nodes)
            shared = sharing_calls(self.source.program, types, made)
            owners = {r.node: r.origin.call for r in refusals if r.origin.call in calls}
            shared |= reading_calls(self.source.program, self._nodes, owners)
            calls |= {other: calls[call] for other, call in shared.items() if other not in calls}
        if self._add_calls(calls):
            return True
        for refusal in refusals:  # also those whose call has just turned out to be none that can be a plugin
            call, node = refusal.origin.call, refusal.node
            hopeless = not call or call in self.calls or call in self._fixed
            if hopeless and node and node not in nodes and self._can_run_alone(node):
                nodes[node] = f"{title} refuses {refusal.op_type}: {refusal.reason.strip()}".removesuffix(": ")
        new = {name: reason for name, reason in nodes.items() if name not in self.nodes}
        for name, reason in new.items():
            logger.info("node %s becomes a plugin: %s", name, reason)
        self.nodes |= new
        return bool(new) or progress

    def _can_run_alone(self, name: str) -> bool:
        """Whether ONNX or ONNX Runtime know the op of a node."""
        node = next((node for node in self._nodes if node.name == name), None)
        return node is not None and node.domain in _KNOWN_DOMAINS

    def _add_calls(self, calls: Mapping[str, str]) -> bool:
        assert isinstance(self.source, ExportedModule) or not calls
        new = {call: why for call, why in calls.items() if call not in self.calls and call not in self._fixed}
        problems = self.source.plugin_problems(new) if new else {}  # type: ignore[union-attr]
        for call, reason in new.items():
            if call in problems:
                logger.warning("%s should be a plugin, for %s; it cannot: %s", call, reason, problems[call])
                self._fixed.add(call)
                continue
            logger.info("%s becomes a plugin: %s", call, reason)
            self.calls[call] = reason
        return len(new) > len(problems)

    def _model(self) -> OnnxModel:
        self.source = with_opset(self.source, self.options)
        if isinstance(self.source, OnnxModel):
            model = self.source
        else:
            with self.stages.stage("export"):
                model = self._export(self.source)
        self.models["export"] = model
        with self.stages.stage("passes"):
            result = run_passes(self.options.pipeline, model, self.source, self.options)
            self.passes = tuple(result.report.passes)
            model = dataclasses.replace(model, proto=result.proto, weights=result.weights)
            logger.debug("%s", result.report)
            if isinstance(self.source, ExportedModule):
                self.rewrites.add_plugins(model)
            model = self._rewritten = self.rewrites.apply(model)
            self.passes = (*self.passes, *self.rewrites.reports)
            if self.backend.name == "onnxruntime" and isinstance(self.source, OnnxModel):
                # Known mistakes of ONNX Runtime, which it does not report; for a module the check of the export finds
                # them.
                self.nodes |= {n.name: why for n in model.proto.graph.node if (why := wrong_in_onnxruntime(n))}
            if isinstance(self.source, OnnxModel):
                self.nodes |= wanted_nodes(model.proto, self.options.as_plugins)
            # A translation with other plugins may name its nodes otherwise, or have them no more.
            present = {node.name for node in iterate_nodes(model.proto.graph)}
            self.nodes = {name: reason for name, reason in self.nodes.items() if name in present}
            if self.nodes:
                try:
                    model = dataclasses.replace(model, proto=graft(model.proto, self.nodes))
                except PassError as error:
                    raise UnsupportedOpError(f"{error} Refused were: {self.nodes}") from error
            self._nodes = [*iterate_nodes(model.proto.graph)]
            self._opset = opset_of(model.proto) or None
            return with_bounds(model, self.options, self._example_sizes())

    def _example_sizes(self) -> Mapping[str, int]:
        """What sizes that depend on data are on the example; ONNX Runtime has no profiles to tune by them."""
        if self._sizes is None:
            known = isinstance(self.source, ExportedModule) and self.backend.name != "onnxruntime"
            self._sizes = example_sizes(self.source) if known else {}  # type: ignore[arg-type]
        return self._sizes

    def _export(self, source: ExportedModule) -> OnnxModel:
        """The translation with all calls so far as plugins; made again only when there are more."""
        if self._exported is None or self._exported[0] != frozenset(self.calls):
            model, self.calls = source.to_onnx(self.calls)
            self._exported = frozenset(self.calls), model
        return self._exported[1]

    def _invalid_calls(self) -> dict[str, str]:
        """Calls whose translation is no valid ONNX, in ONNX Runtime's words."""
        if isinstance(self.source, OnnxModel):
            return {}
        model, self.calls = self.source.to_onnx(self.calls)
        runtime = get_backend("onnxruntime")
        found = {}
        for segment in partition(model).segments:
            for refusal in runtime.check(segment, BuildOptions()):
                if refusal.origin.call:
                    found[refusal.origin.call] = f"its ONNX translation is invalid: {refusal.reason.strip()[:300]}"
        return found

    def _wrong_calls(self, model: OnnxModel) -> dict[str, str]:
        """Calls whose translation is wrong; asked again only when the translation has changed."""
        state = self.rewrites.state | {*self.calls, *self.nodes}
        if isinstance(self.source, OnnxModel) or not self.options.check_export or state == self._checked:
            return {}
        self._checked = state
        with self.stages.stage("verify"):
            return self.source.alike(find_wrong_calls(self.source, model, partition(model)))

    def _culprit(self, plan: Plan, error: BuildError) -> Sequence[Refusal]:
        segment = next((s for s in plan.segments if s.name == error.segment), None)
        if segment is None:
            return []
        with self.stages.stage("halve"):
            try:
                return find_culprit(segment, self.backend, self.options.build)
            except (TrtBridgeError, PluginError) as inner:
                logger.info("halving %s fails: %s", segment.name, inner)
                return []
