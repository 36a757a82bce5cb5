"""One attention block of a model as a small model of its own, in both forms, to be built and timed alone."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import onnx
import onnx_ir as ir

from ..passes import Pipeline, RemoveDeadNodes, RepeatHeads
from ..passes.rewrite_refused import RewriteRefused
from .backends.base import Segment
from .dims import Range
from .model import OnnxModel, TensorSpec
from .partition import spec_of

_MOST_NODES = 64
"""A block of more nodes is none; as people write it it has ten."""

_INTEGERS = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}


@dataclass(frozen=True)
class BlockPair:
    """The same attention in both forms.

    Attributes:
        node: name of the Attention node.
        fused: with that node.
        decomposed: with the ops that it stands for; None where they cannot be cut out of the model.
        key: equal for blocks that are equal but for names.
        kind: type and shapes, for people: ``float16 (batch, 12, 197, 64), causal``.
        element: ONNX type.
        repeated: with that node, and keys and values repeated ahead of it; None where heads are not shared.
    """

    node: str
    fused: Segment
    decomposed: Segment | None
    key: str
    kind: str
    element: int
    repeated: Segment | None = None


@dataclass
class Cutter:
    """Cuts blocks out of two forms of one model.

    Attributes:
        written: the model as it is written.
        fused: the same with Attention nodes.
    """

    written: OnnxModel
    fused: OnnxModel
    _graphs: tuple[_Graph, _Graph] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._graphs = _Graph(self.written), _Graph(self.fused)

    def kind(self, node: onnx.NodeProto) -> str:
        """Type, shapes and mask of an Attention node of the fused model, in words."""
        return self._graphs[1].kind(node)

    def cut(self, node: onnx.NodeProto) -> BlockPair | None:
        """The block around an Attention node of the fused model; None where its types are not all known."""
        old, new = self._graphs
        twin = old.by_name.get(node.name)
        result = (twin if twin is not None else node).output[0]
        found = [new.back_to(name, old) for name in node.input[:3]]
        # Transposes that split and join heads cost more in one form than in the other, so they belong to it.
        sources = [old.ahead_of_transpose(name) for name in found if name is not None]
        if len(sources) < len(found):
            return None
        result = old.behind_transpose(result)
        fused = new.segment("fused", result, sources)
        if fused is None:
            return None
        is_native = twin is not None and twin.op_type == "Attention"
        written = _decomposed(fused, node.name) if is_native else old.segment("decomposed", result, sources)
        repeated = _repeated(fused, node.name)
        text = "".join(_text(form) for form in (fused, written, repeated) if form is not None)
        key = hashlib.sha256(text.encode()).hexdigest()
        return BlockPair(node.name, fused, written, key, new.kind(node), new.element(node.output[0]), repeated)


class _Graph:
    """One form, with links."""

    def __init__(self, model: OnnxModel) -> None:
        graph = model.proto.graph
        self.model = model
        self.dims: Mapping[str, Range] = {**model.signature.dims, **model.data_dims}
        self.by_name = {node.name: node for node in graph.node if node.name}
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
        self.results = {value.name for value in graph.output}

    def element(self, name: str) -> int:
        if name in self.constants:
            return int(self.constants[name].data_type)
        return int(self.values[name].type.tensor_type.elem_type) if name in self.values else 0

    def back_to(self, name: str, other: _Graph) -> str | None:
        """The tensor of the other form that an operand is made of, by nodes with one input of data each."""
        for _ in range(4):
            if name in other.values or name in other.makers:
                return name
            if name not in self.makers:
                return None
            name = self.makers[name].input[0]
        return None

    def ahead_of_transpose(self, name: str) -> str:
        node = self.makers.get(name)
        return node.input[0] if node is not None and node.op_type == "Transpose" else name

    def behind_transpose(self, name: str) -> str:
        readers = self.readers.get(name, [])
        alone = len(readers) == 1 and readers[0].op_type == "Transpose" and name not in self.results
        return str(readers[0].output[0]) if alone else name

    def kind(self, node: onnx.NodeProto) -> str:
        """Type, shapes and mask of an Attention node in words."""
        shapes = [self._shape(name) for name in node.input[:3]]
        text = f"{ir.DataType(self.element(node.output[0])).name.lower()} {shapes[0]}"
        if shapes[1] != shapes[0] or shapes[2] != shapes[0]:
            text += f" on {shapes[1]}" if shapes[1] == shapes[2] else f" on {shapes[1]} and {shapes[2]}"
        if any(a.name == "is_causal" and a.i for a in node.attribute):
            text += ", causal"
        if len(node.input) > 3 and node.input[3]:
            text += f", mask {self._shape(node.input[3])}"
        return text

    def _shape(self, name: str) -> str:
        if name in self.constants:
            return f"({', '.join(map(str, self.constants[name].dims))})"
        value = self.values.get(name)
        sizes = [] if value is None else spec_of(value).shape
        return f"({', '.join('?' if s is None else str(s) for s in sizes)})"

    def segment(self, name: str, result: str, sources: Iterable[str]) -> Segment | None:
        """The nodes between some tensors and a result, with whatever else they read as inputs."""
        nodes = self._between(result, set(sources))
        if nodes is None:
            return None
        made = {n for node in nodes for n in node.output if n}
        read = dict.fromkeys(n for node in nodes for n in node.input if n)
        inputs = [n for n in read if n not in made and n not in self.constants]
        specs = [self._spec(n) for n in (*inputs, result)]
        if any(spec is None or None in spec.ranges for spec in specs):
            return None
        source = self.model.proto
        graph = onnx.GraphProto(name=name, node=nodes)
        graph.input.extend(self.values[n] for n in inputs)
        graph.output.append(self.values[result])
        graph.initializer.extend(self.constants[n] for n in read if n in self.constants)
        graph.value_info.extend(self.values[n] for n in made if n in self.values and n != result)
        proto = onnx.ModelProto(ir_version=source.ir_version, producer_name="trtbridge", graph=graph)
        proto.opset_import.extend(o for o in source.opset_import if o.domain in ("", "ai.onnx"))
        weights = {n: self.model.weights[n] for n in read if n in self.model.weights}
        known = [spec for spec in specs if spec is not None]
        return Segment(name, proto, weights, tuple(known[:-1]), (known[-1],))

    def _spec(self, name: str) -> TensorSpec | None:
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        spec = spec_of(value)
        return TensorSpec.make(name, spec.dtype, spec.shape, self.dims)

    def _between(self, result: str, sources: set[str]) -> list[onnx.NodeProto] | None:
        """The nodes that lead from the sources to a result, in order, and those that make the shapes they read.

        What else they read, such as a mask, is cut off: blocks share it.
        """
        above = self._above(result, sources)
        if above is None:
            return None
        dependent = set(sources)
        for node in above:
            if node.op_type != "Shape" and not dependent.isdisjoint(node.input):
                dependent.update(node.output)
        kept = {id(node) for node in above if not dependent.isdisjoint(node.output)}
        shapes = deque(n for node in above if id(node) in kept for n in node.input)
        while shapes:
            name = shapes.popleft()
            maker = self.makers.get(name)
            if maker is None or name in sources or id(maker) in kept or self.element(name) not in _INTEGERS:
                continue
            kept.add(id(maker))
            shapes.extend(maker.input)
        found = [node for node in self.model.proto.graph.node if id(node) in kept]
        return found if 0 < len(found) <= _MOST_NODES else None

    def _above(self, result: str, sources: set[str]) -> list[onnx.NodeProto] | None:
        """The nodes above a result and not above the sources, in order; None where the way up does not end."""
        seen: dict[int, onnx.NodeProto] = {}
        pending = deque([result])
        reached: set[str] = set()
        while pending:
            name = pending.popleft()
            if name in sources:
                reached.add(name)
                continue
            node = self.makers.get(name)
            if node is None or id(node) in seen:
                continue
            if len(seen) == 4 * _MOST_NODES:
                break  # A mask that is made of much: what leads to the product has been found, or it is too far.
            if node.domain not in ("", "ai.onnx") or any(a.HasField("g") for a in node.attribute):
                continue
            seen[id(node)] = node
            pending.extend(n for n in node.input if n)
        if reached != sources:
            return None
        return [node for node in self.model.proto.graph.node if id(node) in seen]


def _decomposed(fused: Segment, name: str) -> Segment | None:
    """A block with its Attention node inlined, for a model that came with it."""
    return _after(Pipeline((RewriteRefused(frozenset({name})), RemoveDeadNodes())), fused, "decomposed")


def _repeated(fused: Segment, name: str) -> Segment | None:
    """A block with as many heads of keys and values as of queries; None where it has them, or cannot."""
    return _after(Pipeline((RepeatHeads(frozenset({name})),)), fused, "repeated")


def _after(passes: Pipeline, segment: Segment, name: str) -> Segment | None:
    """A segment behind passes, under another name; None where the first of them changes nothing."""
    result = passes.run(segment.proto, segment.weights)
    if not result.report.passes[0].rewrites:
        return None
    return replace(segment, name=name, proto=result.proto, weights=result.weights)


def _text(segment: Segment) -> str:
    """What a segment computes, without its names."""
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return names.setdefault(name, f"t{len(names)}") if name else ""

    lines = [f"{short(spec.name)} {spec.dtype.name} {spec.shape} {spec.ranges}" for spec in segment.inputs]
    for tensor in segment.proto.graph.initializer:
        weight = segment.weights.get(tensor.name)
        values = tensor.SerializeToString() if weight is None else weight.tobytes()
        anonymous = onnx.TensorProto.FromString(values) if weight is None else None
        if anonymous is not None:
            anonymous.name = ""
            values = anonymous.SerializeToString()
        digest = hashlib.sha256(values).hexdigest()
        lines.append(f"{short(tensor.name)} {tensor.data_type} {list(tensor.dims)} {digest}")
    for node in segment.proto.graph.node:
        attributes = sorted(a.SerializeToString().hex() for a in node.attribute)
        read, made = [short(n) for n in node.input], [short(n) for n in node.output]
        lines.append(f"{node.op_type} {read} {made} {attributes}")
    return "\n".join(lines)
