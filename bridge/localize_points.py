"""Which tensor of a graph holds which value of the reference, and what lies between two such tensors."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx
import onnx_ir as ir
import torch

from ..nodes import DOMAIN
from .dims import Shape
from .dtypes import to_torch
from .localize_reference import OUTPUT, Reference, Type
from .model import OnnxModel, Origin, Signature, TensorSpec, origin_of
from .partition import reads_of, tensor_types
from .structure import TENSOR, Structure


@dataclass(frozen=True)
class Point:
    """A tensor of a graph whose value the reference knows.

    Attributes:
        tensor: its name.
        key: of the value in the reference.
        node: the node that makes it.
    """

    tensor: str
    key: str
    node: onnx.NodeProto

    @property
    def origin(self) -> Origin:
        return origin_of(self.node)


@dataclass(frozen=True)
class Examined:
    """A graph and where it can be compared.

    Attributes:
        model: the graph.
        points: in the graph's order.
    """

    model: OnnxModel
    points: tuple[Point, ...]

    @cached_property
    def types(self) -> Mapping[str, tuple[ir.DataType | None, Shape | None]]:
        return tensor_types(self.model.proto)

    @cached_property
    def dtypes(self) -> dict[str, ir.DataType]:
        """Element type of every tensor of which it is known."""
        return {name: dtype for name, (dtype, _) in self.types.items() if dtype is not None}

    @cached_property
    def nodes(self) -> list[onnx.NodeProto]:
        return list(self.model.proto.graph.node)

    @cached_property
    def makers(self) -> dict[str, int]:
        """For each tensor the position of the node that makes it."""
        return {name: index for index, node in enumerate(self.nodes) for name in node.output if name}

    @cached_property
    def _reads(self) -> list[list[str]]:
        return [reads_of(node) for node in self.nodes]

    @cached_property
    def _inputs(self) -> set[str]:
        return {value.name for value in self.model.proto.graph.input}

    def frontier(self, tensor: str, stops: Collection[str]) -> tuple[list[int], list[str]]:
        """What makes a tensor: positions of nodes in order, and what they read of ``stops`` and the graph's inputs."""
        chosen: set[int] = set()
        reached: dict[str, None] = {}
        pending = [self.makers[tensor]]
        while pending:
            index = pending.pop()
            if index in chosen:
                continue
            chosen.add(index)
            for name in self._reads[index]:
                if name in stops or name in self._inputs:
                    reached[name] = None
                elif name in self.makers:
                    pending.append(self.makers[name])
        return sorted(chosen), list(reached)

    def cut(self, outputs: Sequence[str], stops: Collection[str]) -> tuple[OnnxModel, dict[str, str]]:
        """The part of the graph that makes some tensors of others.

        Args:
            outputs: what it makes.
            stops: tensors that it reads as inputs instead of making them for itself.

        Returns:
            The part, and the name of each of its inputs with the tensor of the whole graph that it stands for.
        """
        chosen: set[int] = set()
        reached: dict[str, None] = {}
        for name in outputs:
            made, needs = self.frontier(name, stops)
            chosen.update(made)
            reached |= dict.fromkeys(needs)
        kept = [self.nodes[index] for index in sorted(chosen)]
        made_here = {name for node in kept for name in node.output if name}
        given = {name: f"{name}__given" if name in made_here else name for name in reached}
        source = self.model.proto
        proto = onnx.ModelProto(ir_version=source.ir_version, producer_name="trtbridge")
        graph = proto.graph
        graph.name = source.graph.name
        graph.node.extend(kept)
        renamed = {name: new for name, new in given.items() if new != name}
        if renamed:
            for node in graph.node:
                _rename(node, renamed)
        used = {name for node in kept for name in reads_of(node)}
        graph.initializer.extend(t for t in source.graph.initializer if t.name in used)
        graph.value_info.extend(v for v in source.graph.value_info if v.name in made_here and v.name not in outputs)
        graph.input.extend(self._value_info(name, new) for name, new in given.items())
        graph.output.extend(self._value_info(name, name) for name in outputs)
        proto.opset_import.extend(source.opset_import)
        proto.functions.extend(source.functions)
        weights = {name: weight for name, weight in self.model.weights.items() if name in used}
        signature = self._signature(given, outputs)
        model = dataclasses.replace(self.model, proto=proto, weights=weights, signature=signature)
        return model, {new: name for name, new in given.items()}

    def _signature(self, given: Mapping[str, str], outputs: Sequence[str]) -> Signature:
        names = tuple(given.values())
        return Signature(
            inputs=tuple(self._spec(name, new) for name, new in given.items()),
            outputs=tuple(self._spec(name, name) for name in outputs),
            labels=names,
            dims=self.model.signature.dims,
            input_structure=Structure("tuple", (Structure("tuple", (TENSOR,) * len(names)), Structure("dict"))),
            output_structure=Structure("dict", (TENSOR,) * len(outputs), tuple(outputs)),
            parameters=names,
            profiles=self.model.signature.profiles,
        )

    def _spec(self, name: str, new: str) -> TensorSpec:
        dtype, shape = self.types.get(name, (None, None))
        ranges = {**self.model.signature.dims, **self.model.data_dims}
        return TensorSpec.make(new, dtype or ir.DataType.FLOAT, shape or (), ranges)

    def _value_info(self, name: str, new: str) -> onnx.ValueInfoProto:
        dtype, shape = self.types.get(name, (None, None))
        return onnx.helper.make_tensor_value_info(
            new, int(dtype or ir.DataType.FLOAT), None if shape is None else list(shape)
        )


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Let a node, and the bodies in it that do not make such a tensor themselves, read other tensors."""
    node.input[:] = [names.get(name, name) for name in node.input]
    for attribute in node.attribute:
        for body in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else ()), *attribute.graphs):
            own = {name for inner in body.node for name in inner.output} | {value.name for value in body.input}
            inside = {old: new for old, new in names.items() if old not in own}
            for inner in body.node:
                _rename(inner, inside)


def examine(
    model: OnnxModel, reference: Reference, calls: Mapping[str, str] | None = None, export: OnnxModel | None = None
) -> Examined:
    """Find the tensors of a graph that hold values of the reference.

    Which tensor holds a call's result is not recorded. It is one that the call's nodes make, that others read, and of
    the result's shape; where several are, the one that is named after the call, or the last. What the reference knows
    by the tensor's own name needs no such guess.

    Args:
        model: the graph.
        reference: whose values.
        calls: the graph's calls by the reference's names of them (`align`); None where they are the same.
        export: the graph before the passes. A tensor that a call made there which has no nodes any more still holds
            that call's result, whatever node makes it now.
    """
    types = tensor_types(model.proto)
    known = reference.types
    nodes = list(model.proto.graph.node)
    makers = {name: node for node in nodes for name in node.output if name}
    results = {value.name: i for i, value in enumerate(model.proto.graph.output)}
    taken: dict[str, str] = {}
    named = {name for name in makers if name in known}
    for name in named:
        if _fits(types.get(name), known[name]):
            taken[name] = name
    before = [] if export is None or calls is not None else export.proto.graph.node
    here = {"", *(origin_of(node).call for node in nodes)}
    # What a call gave whose nodes are gone, as they were folded into another call's.
    makes = {name: call for node in before if (call := origin_of(node).call) not in here for name in node.output}
    for call, tensors in _results_of_calls(nodes, results, makes).items():
        own = call if calls is None else calls.get(call, "")
        keys: list[str] = []
        while f"{own}:{len(keys)}" in known:
            keys.append(f"{own}:{len(keys)}")
        for group in _alike(keys, known):
            fitting = [name for name in tensors if name not in taken and _fits(types.get(name), known[group[0]])]
            if len(group) == 1 and fitting:
                taken[call if call in fitting else fitting[-1]] = group[0]
            elif len(group) == len(fitting):
                taken |= dict(zip(fitting, group, strict=True))
    for name, index in results.items():
        key = f"{OUTPUT}{index}"
        if name in makers and name not in taken and key in known:
            taken[name] = key
    order = (name for node in nodes for name in node.output)
    return Examined(model, tuple(Point(name, taken[name], makers[name]) for name in order if name in taken))


def _results_of_calls(
    nodes: Sequence[onnx.NodeProto], results: Collection[str], makes: Mapping[str, str]
) -> dict[str, list[str]]:
    """For each call the tensors that it made and that nodes of other calls read, or that are results, in order.

    Args:
        nodes: of the graph.
        results: of the graph.
        makes: the call of a tensor where that is known by its name; else it is that of its node.
    """
    made = {
        name: makes.get(name, call) for node in nodes if (call := origin_of(node).call) for name in node.output if name
    }
    read: set[str] = set(results)
    for node in nodes:
        call = origin_of(node).call
        read.update(name for name in reads_of(node) if name in made and made[name] != call)
    found: dict[str, list[str]] = {}
    for name, call in made.items():
        if name in read:
            found.setdefault(call, []).append(name)
    return found


def _alike(keys: Sequence[str], known: Mapping[str, Type]) -> Iterator[list[str]]:
    """Results of one call, those of the same shape and kind together."""
    groups: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for key in keys:
        shape, dtype = known[key]
        groups.setdefault((shape, _kind(dtype)), []).append(key)
    yield from groups.values()


def _fits(found: tuple[ir.DataType | None, Shape | None] | None, wanted: Type) -> bool:
    """Whether a tensor of a graph can hold a value, by kind, rank and the sizes that are known."""
    dtype, shape = found or (None, None)
    if dtype is None or shape is None or dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED) or dtype.bitwidth < 8:
        return False
    sizes, torch_dtype = wanted
    if _kind(to_torch(dtype)) != _kind(torch_dtype) or len(shape) != len(sizes):
        return False
    return all(not isinstance(size, int) or size == real for size, real in zip(shape, sizes, strict=True))


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "float"
    return "bool" if dtype == torch.bool else "int"


def align(model: OnnxModel, export: OnnxModel) -> dict[str, str] | None:
    """The calls of a graph, each with the name that the same call has in an export of the module at hand.

    A graph that was made of an earlier or later version of the module has other calls, and then the numbers in the
    names of all that follow differ. Calls are the same where ops and module paths go in the same order.

    Returns:
        The name of each call in the export; None where all calls have the same names.
    """
    theirs, ours = _call_sequence(model), _call_sequence(export)
    if all(ours.get(call, kind) == kind for call, kind in theirs.items()) and theirs.keys() <= ours.keys():
        return None
    matcher = difflib.SequenceMatcher(None, list(theirs.values()), list(ours.values()), autojunk=False)
    names = (list(theirs), list(ours))
    found: dict[str, str] = {}
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        # As many others in the same place: an op in place of another one.
        if kind == "equal" or (kind == "replace" and a_end - a == b_end - b):
            found |= dict(zip(names[0][a:a_end], names[1][b:b_end], strict=True))
    return found


def _call_sequence(model: OnnxModel) -> dict[str, tuple[str, str]]:
    """Each call with its op and its module path, in order."""
    found: dict[str, tuple[str, str]] = {}
    for node in model.proto.graph.node:
        origin = origin_of(node)
        if origin.call and (origin.call not in found or node.domain == DOMAIN):
            found[origin.call] = (origin.op.partition(".default")[0], origin.module)
    return found
