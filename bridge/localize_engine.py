"""Engines against the reference: inner tensors are marked as outputs, in as few builds as can be.

A build with every comparable tensor marked gives the error of every layer, with what came from those before it. Marking
keeps TensorRT from fusing across the marks, so what it shows is shown again: the layer where the error begins is built
alone, and run on the reference's values. Where the marks make the error vanish, it lies in a fusion; then a build with
few marks tells between which of them.

NaN and infinity are the exception: marks do not hide where they begin. Where a layer that has them is several nodes, it
alone is built with all their results marked, and the node that makes them of finite numbers is named.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import torch

from ..errors import TrtBridgeError
from .activations import NOT_FINITE, excess, from_numpy, layer_error, with_outputs
from .backends.base import Backend, BuildOptions, Segment
from .build import build_plan
from .dtypes import to_torch
from .localize_points import Point
from .localize_report import Layer, Stage, Suspect
from .localize_stage import GraphCheck, weight_of
from .partition import partition
from .plan import Plan
from .repro import Repro
from .runtime import RunningProgram

logger = logging.getLogger(__name__)

MOST_BUILDS = 3
_GROWTH = 5.0
"""An error begins in a layer where it is this many times larger than in what it reads."""

_FEW_MARKS = 8

_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand"}

Differences = Mapping[str, tuple[float, str]]
"""For each tensor its error and in words how it is beyond what its precision explains."""


@dataclass
class EngineCheck:
    """Compares engines of a plan.

    Attributes:
        name: of the stage.
        graph: the check of the graph that the plan was made of.
        plan: what the engines are built of.
        backend: what builds and runs them.
        options: how they are built.
        device: where they run.
        cache_dir: folder for compiled kernels.
        builds: how many were made.
    """

    name: str
    graph: GraphCheck
    plan: Plan
    backend: Backend
    options: BuildOptions
    device: torch.device
    cache_dir: Path | None = None
    builds: int = 0
    _notes: list[str] = field(default_factory=list)
    _not_finite: set[str] = field(default_factory=set)  # tensors that were NaN or infinite where they should not be
    _breaking: dict[str, onnx.NodeProto] = field(default_factory=dict)  # by such a tensor, the node where it begins

    def run(self, given: Differences) -> tuple[Stage, Suspect | None, Repro | None]:
        """Compare every layer, and confirm the first that is wrong.

        Args:
            given: errors of the results of the engines that were converted, as they are.

        Returns:
            The stage, the layer to blame and it alone, where there is one.
        """
        marked = [point.tensor for point in self.graph.examined.points if self._is_marked(point)]
        seen = self._run_marked(marked)
        if not seen and marked:
            seen = self._run_marked([*marked[3:-1:4], marked[-1]])
        layers = self._layers(seen)
        wrong = "; ".join(f"{name}: {words}" for name, (_, words) in given.items() if words)
        first = self._beginnings(layers)
        if wrong and not first and not any(words for name, (_, words) in seen.items() if name in given):
            if seen:
                words = "with every layer marked as an output the results are right: the error lies in a fusion"
                self._notes.append(words)
            layers, first = self._with_few_marks(layers, marked)
        if self.graph.reference.is_random:
            self._notes.append("the model draws random numbers: its inner values are not judged")
            first = []
        suspect, layer = self._confirm(first, bool(wrong))
        if layer is not None:
            layers = tuple(layer if one.tensor == layer.tensor else one for one in layers)
        errors = {name: error for name, (error, _) in given.items()}
        stage = Stage(self.name, layers, errors, wrong, tuple(self._notes))
        return stage, suspect, None if suspect is None else self._repro(suspect.layer)

    def _is_marked(self, point: Point) -> bool:
        """Whether a tensor is worth an output: a float, and not only another one with its elements moved."""
        if not to_torch(self.graph.examined.dtypes[point.tensor]).is_floating_point:
            return False
        results = {value.name for value in self.graph.examined.model.proto.graph.output}
        return point.node.op_type not in _MOVES or point.tensor in results

    # Builds

    def _build(self, plan: Plan, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Build a plan's engines, run them, and return what crosses steps, on the CPU."""
        self.builds += 1
        program = build_plan(plan, self.backend, self.options)
        running = RunningProgram(program, self.device, self.cache_dir, self.backend)
        seen = running.run_all([tensor.to(self.device) for tensor in inputs])
        return {name: tensor.detach().cpu() for name, tensor in seen.items()}

    def _run_marked(self, names: Collection[str]) -> dict[str, tuple[float, str]]:
        """Build with some tensors marked as outputs; their errors."""
        try:
            seen = self._build(_marked(self.plan, names), list(self.graph.inputs.values()))
        except TrtBridgeError as error:
            self._notes.append(f"the engine with {len(set(names))} tensors marked as outputs fails: {error}")
            return {}
        found: dict[str, tuple[float, str]] = {}
        here = [name for name in names if name in seen]
        limit = self.graph.limits.whole(set(self.graph.examined.dtypes.values()))
        values = self.graph.reference.values({self.graph.keys[name] for name in here})
        for name in here:
            mine, wanted_value = seen[name], values[self.graph.keys[name]]
            words = excess(mine, wanted_value, limit, 1e-2 * limit)
            found[name] = layer_error(mine, wanted_value), words
            if words == NOT_FINITE:
                self._not_finite.add(name)
        return found

    def _layers(self, seen: Differences) -> tuple[Layer, ...]:
        """The layers that were marked, with their errors, and those of the marked ones that each reads."""
        layers = []
        for point in self.graph.examined.points:
            if point.tensor not in seen:
                continue
            _, before = self.graph.examined.frontier(point.tensor, seen.keys())
            layers.append(
                Layer(
                    tensor=point.tensor,
                    op_type=point.node.op_type,
                    node=point.node.name,
                    origin=point.origin,
                    precision=str(to_torch(self.graph.examined.dtypes[point.tensor])).removeprefix("torch."),
                    shape=self.graph.reference.types[point.key][0],
                    error=seen[point.tensor][0],
                    inherited=max((seen[name][0] for name in before if name in seen), default=0.0),
                    limit=self.graph.limit(point),
                )
            )
        return tuple(layers)

    def _with_few_marks(
        self, all_layers: tuple[Layer, ...], marked: Sequence[str]
    ) -> tuple[tuple[Layer, ...], list[Layer]]:
        """Build with few tensors marked; the layers, those not marked without an error, and where an error begins."""
        if self.builds >= MOST_BUILDS:
            return all_layers, []
        step = max(2, len(marked) // _FEW_MARKS)
        few = [*marked[step - 1 : -1 : step], marked[-1]]
        seen = self._run_marked(few)
        layers = self._layers(seen)
        first = self._beginnings(layers)
        if first:
            self._notes.append(
                f"with {len(few)} marks the error begins between {first[0].tensor!r} and the mark before it"
            )
        by_name = {layer.tensor: layer for layer in layers}
        return tuple(by_name.get(one.tensor, dataclasses.replace(one, error=None)) for one in all_layers), first

    @staticmethod
    def _beginnings(layers: Sequence[Layer]) -> list[Layer]:
        """Where an error begins: beyond what the layer's precision explains, and far beyond what it reads."""
        return [
            layer
            for layer in layers
            if layer.error is not None and layer.error > layer.limit and layer.error > _GROWTH * layer.inherited
        ]

    # Blame

    def _confirm(self, candidates: Sequence[Layer], are_results_wrong: bool) -> tuple[Suspect | None, Layer | None]:
        """Build candidates alone, the first of them first, until one is wrong by itself.

        One that is not is to blame all the same where results are wrong; where they are right it is not: among equal
        values a top-k may take others, and then what follows is other values, rightly.
        """
        tried = False
        for layer in candidates:
            if self.builds >= MOST_BUILDS:
                break
            try:
                error, words = self._alone(layer)
            except TrtBridgeError as failure:
                self._notes.append(f"{layer.tensor} cannot be built alone: {failure}")
                continue
            if words:
                confirmed = dataclasses.replace(layer, own_error=error, wrong=words)
                return self._suspect(confirmed, words), confirmed
            tried = True
            self._notes.append(f"{layer.tensor} is right where it is built alone (error {error:.2g})")
        if not candidates or not are_results_wrong:
            return None, None
        words = f"relative error {candidates[0].error:.2g}, what it reads {candidates[0].inherited:.2g}"
        if tried:
            words += "; right where it is built alone: the error is in how it is joined with its neighbours"
        layer = dataclasses.replace(candidates[0], wrong=words)
        return self._suspect(layer, words), layer

    def _alone(self, layer: Layer) -> tuple[float, str]:
        """The error of an engine of one layer, given the reference's values, and how it is beyond the limit."""
        repro = self.graph.repro(layer)
        model = repro.fixed()
        plan = partition(model, self.backend if self.plan.hosted_calls else None)
        specs = model.signature.inputs
        nodes = list(model.proto.graph.node)
        made = {name: plan.aliases.get(name, name) for node in nodes for name in node.output if self._is_wide(name)}
        if layer.tensor in self._not_finite and len(nodes) > 1:
            plan = _marked(plan, made.values())
        inputs = {spec.name: repro.inputs[spec.name].to(to_torch(spec.dtype)) for spec in specs}
        seen = self._build(plan, list(inputs.values()))
        mine, wanted = seen[plan.aliases.get(layer.tensor, layer.tensor)], repro.expected[layer.tensor]
        words = excess(mine, wanted, layer.limit, 1e-2 * layer.limit)
        if words == NOT_FINITE:
            inner = {name: seen[held] for name, held in made.items() if held in seen}
            node = _first_not_finite(nodes, inputs | inner | self._constants(nodes))
            if node is not None:
                self._breaking[layer.tensor] = node
        return layer_error(mine, wanted), words

    def _is_wide(self, name: str) -> bool:
        """Whether a tensor is a float of 16 bits or more."""
        dtype = self.graph.examined.dtypes.get(name)
        return dtype is not None and dtype.bitwidth >= 16 and to_torch(dtype).is_floating_point

    def _constants(self, nodes: Sequence[onnx.NodeProto]) -> dict[str, torch.Tensor]:
        """The constant floats that nodes read."""
        names = {name for node in nodes for name in node.input if self._is_wide(name)}
        found = {name: weight_of(self.graph.examined, name) for name in names}
        return {name: from_numpy(array) for name, array in found.items() if array is not None}

    def _suspect(self, layer: Layer, words: str) -> Suspect:
        suspect = self.graph.blame(layer, None, self._breaking.get(layer.tensor))
        return dataclasses.replace(suspect, stage=self.name, words=words)

    def _repro(self, layer: Layer) -> Repro:
        backend = "" if self.backend.name == "onnxruntime" else self.backend.name
        return dataclasses.replace(self.graph.repro(layer), backend=backend, tf32=self.options.tf32)


def _marked(plan: Plan, names: Collection[str]) -> Plan:
    """A plan whose engines hand out inner tensors, too."""
    wanted = sorted(set(names))
    steps = [with_outputs(step, wanted) if isinstance(step, Segment) else step for step in plan.steps]
    return dataclasses.replace(plan, steps=tuple(steps))


def _first_not_finite(nodes: Sequence[onnx.NodeProto], values: Mapping[str, torch.Tensor]) -> onnx.NodeProto | None:
    """The first node that makes NaN or infinity of finite numbers; None where none does.

    Args:
        nodes: in order.
        values: the tensors that are known; others, and those of 8 bits, are taken for finite.
    """
    wide = {name: t for name, t in values.items() if t.is_floating_point() and t.dtype.itemsize > 1}
    broken = {name for name, tensor in wide.items() if not bool(torch.isfinite(tensor).all())}
    for node in nodes:
        if not broken.isdisjoint(node.output) and broken.isdisjoint(node.input):
            return node
    return None
