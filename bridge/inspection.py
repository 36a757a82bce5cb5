"""What ``module.inspect()`` returns: what runs, in which precision, fused into what, with which weights and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .backends import get_backend
from .backends.base import Engine
from .backends.layers import EngineLayers, Layer
from .graph_facts import NodeFacts, WeightFacts, read_dtypes, read_nodes, read_weights
from .model import Signature
from .plan import PluginCall
from .program import EngineStep, Program
from .structure import child_labels
from .text import size_text

_MOST_FUSIONS = 8  # lines of text for one engine
_MOST_OPS = 8  # of one fusion


@dataclass(frozen=True)
class Fusion:
    """Nodes of the graph that became one layer of the engine, or several that do not part them as the graph does.

    Attributes:
        ops: the nodes' ONNX ops, in order.
        kinds: of the layers, in the backend's own words.
        layers: the layers' names, one entry for each place in the graph where this was done.
    """

    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class EngineInspection:
    """One engine.

    Attributes:
        name: of the segment.
        size_bytes: of the engine.
        version, target: of the library that built it, and what for; "" where that does not matter.
        network_layers: layers of the network that the parser made, 0 where there is none.
        nodes: the nodes of the graph by name; empty where the engine does not tell.
        dtypes: how many of these make which element type.
        weights: the initializers; None where the engine does not tell.
        layers: what it was fused into; None where nobody can tell here, or nobody asked.
        plugins: (op, place in the user's program) of each plugin inside it.
        profiles: how many optimization profiles it has, 0 where it does not tell.
        refit: how it takes other weights, "engine" or "inputs" (see `Engine`); "" where it does not, or does not tell.
    """

    name: str
    size_bytes: int
    version: str = ""
    target: str = ""
    network_layers: int = 0
    nodes: Mapping[str, NodeFacts] = field(default_factory=dict, repr=False)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    weights: WeightFacts | None = None
    layers: EngineLayers | None = None
    plugins: tuple[tuple[str, str], ...] = ()
    profiles: int = 0
    refit: str = ""

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """What was fused, the most frequent first; empty where that is not known."""
        parts: dict[tuple[str, ...], list[Layer]] = {}
        for layer in self.layers.layers if self.layers is not None else ():
            if len(layer.nodes) > 1:
                parts.setdefault(layer.nodes, []).append(layer)
        found: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for nodes, layers in parts.items():
            ops = tuple(self.nodes[name].op_type if name in self.nodes else name for name in nodes)
            names = " + ".join(layer.name for layer in layers)
            found.setdefault((ops, tuple(layer.kind for layer in layers)), []).append(names)
        fusions = [Fusion(ops, kinds, tuple(names)) for (ops, kinds), names in found.items()]
        return tuple(sorted(fusions, key=lambda fusion: -len(fusion.layers)))

    def describe(self, backend: str) -> list[str]:
        """As lines."""
        version = f" {self.version}" if self.version else ""
        target = f" for {self.target}" if self.target else ""
        count = f", {self.network_layers} layers" if self.network_layers else ""
        count += f", {self.profiles} profiles" if self.profiles > 1 else ""
        lines = [f"{self.name}: engine of {size_text(self.size_bytes)}{count}, {backend}{version}{target}"]
        if self.dtypes:
            lines.append(f"  nodes: {sum(self.dtypes.values())} ({_counts(self.dtypes)})")
        if self.weights is not None and self.weights.count:
            sizes = ", ".join(f"{size_text(size)} {dtype}" for dtype, size in self.weights.bytes_by_dtype.items())
            shared = f"; {self.weights.shared} ({size_text(self.weights.shared_bytes)}) read by several nodes"
            lines.append(f"  weights: {self.weights.count} ({sizes}{shared if self.weights.shared else ''})")
        if self.refit:
            lines.append(f"  refittable: {'weights are its inputs' if self.refit == 'inputs' else 'weights are in it'}")
        if self.layers is not None:
            lines += [f"  {line}" for line in self._describe_layers(self.layers)]
        return lines + [f"  plugin {op} inside it; from {place}" for op, place in self.plugins]

    def _describe_layers(self, layers: EngineLayers) -> list[str]:
        fusions = self.fusions
        count = sum(len(fusion.layers) for fusion in fusions)
        lines = [f"layers: {len(layers.layers)}, {count} fusions of nodes ({layers.source})"]
        for fusion in fusions[:_MOST_FUSIONS]:
            rest = len(fusion.ops) - _MOST_OPS
            ops = " + ".join(fusion.ops[:_MOST_OPS]) + (f" + {rest} more" if rest > 0 else "")
            lines.append(f"  {len(fusion.layers)} x {ops} as {' + '.join(kind or 'layer' for kind in fusion.kinds)}")
        if len(fusions) > _MOST_FUSIONS:
            lines.append(f"  and {len(fusions) - _MOST_FUSIONS} other kinds of fusion")
        if layers.memory_bytes is not None:
            lines.append(f"memory for activations and scratch: {size_text(layers.memory_bytes)}")
        return lines


@dataclass(frozen=True)
class InspectReport:
    """What a module runs; ``str()`` of it is text for people.

    Attributes:
        source: what was converted.
        backend: what runs it.
        size_bytes: of all engines.
        inputs, outputs: as lines.
        steps: engines and the plugin calls between them, in order.
        fixed: arguments that are no tensors, with the values that they were converted with, as text.
        profiles: the optimization profiles as lines; empty where there is one alone.
        outside: what happens to sizes outside of them, as a line; "" where they are an error.
    """

    source: str
    backend: str
    size_bytes: int
    inputs: tuple[str, ...]
    steps: tuple[EngineInspection | PluginCall, ...]
    outputs: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    outside: str = ""

    @property
    def engines(self) -> tuple[EngineInspection, ...]:
        return tuple(step for step in self.steps if isinstance(step, EngineInspection))

    @property
    def memory_bytes(self) -> int | None:
        """Device memory for activations and scratch space of all engines; None where it is not known of all."""
        sizes = [None if engine.layers is None else engine.layers.memory_bytes for engine in self.engines]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def __str__(self) -> str:
        lines = [f"{self.source or 'program'} on {self.backend}, {size_text(self.size_bytes)}"]
        lines += [f"  input {line}" for line in self.inputs]
        lines += [f"  {line}" for line in self.profiles]
        for step in self.steps:
            described = (
                describe_plugin(step, "between engines")
                if isinstance(step, PluginCall)
                else step.describe(self.backend)
            )
            lines += [f"  {line}" for line in described]
        lines += [f"  output {line}" for line in self.outputs]
        if self.fixed:
            lines.append(f"  fixed arguments: {', '.join(self.fixed)}")
        if self.outside:
            lines.append(f"  {self.outside}")
        return "\n".join(lines)


def inspect(program: Program, device: torch.device, fusions: bool, outside: str = "") -> InspectReport:
    """Look into a program; see `EngineModule.inspect`.

    Args:
        program: what it is.
        device: where it runs: what is fused hangs on that.
        fusions: ask the backend for what it fused.
        outside: what happens to sizes outside every profile.

    Raises:
        BackendError: the backend is asked, and is missing or cannot load an engine.
    """
    signature = program.signature
    return InspectReport(
        source=program.source,
        backend=program.backend,
        size_bytes=program.size_bytes,
        inputs=tuple(signature.describe_inputs()),
        steps=tuple(
            _engine(step.name, step.engine, device, fusions) if isinstance(step, EngineStep) else step
            for step in program.steps
        ),
        outputs=tuple(signature.describe_outputs()),
        fixed=tuple(f"{label}={value!r}" for label, value in _fixed(signature) if value is not None),
        profiles=tuple(signature.describe_profiles()),
        outside=outside,
    )


def _engine(name: str, engine: Engine, device: torch.device, fusions: bool) -> EngineInspection:
    info = engine.info
    return EngineInspection(
        name=name,
        size_bytes=engine.size_bytes,
        version=str(info.get("version", "")),
        target=str(info.get("target", "")),
        network_layers=len(info.get("layers", ())),
        nodes=read_nodes(info),
        dtypes=read_dtypes(info),
        weights=read_weights(info),
        layers=get_backend(engine.backend).layers(engine, device) if fusions else None,
        profiles=len(info.get("profiles", ())),
        refit=str(info.get("refit", "")),
        plugins=tuple((plugin["op"], plugin["place"]) for plugin in info.get("plugins", ())),
    )


def describe_plugin(call: PluginCall, place: str) -> list[str]:
    """A plugin call as lines: the op, where it was called, why it is a plugin and why it is where it is."""
    lines = [f"plugin {call.op} {place}; from {call.origin}"]
    if call.reason:
        lines.append("  because " + call.reason.replace("\n", "\n    "))
    if call.host_refusal:
        lines.append("  not inside an engine: " + call.host_refusal)
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(counts).most_common())


def _fixed(signature: Signature) -> list[tuple[str, Any]]:
    positional, keyword = signature.input_structure.children
    names = [*signature.parameters, *child_labels(keyword, "")]
    parts = [*positional.children, *keyword.children]
    return [pair for name, part in zip(names, parts, strict=True) for pair in part.constants(name)]
