"""Rounding to 16 bits, emulated: a float32 graph in which groups of nodes round what they read and make.

ONNX Runtime computes 16-bit graphs in float32 on a CPU, and rounds nothing. Here every tensor that a node would have in
16 bits goes through a Cast there and back, which no optimization of ONNX Runtime removes, as widening is not exact.
Sums inside a node stay in float32, as they do in the tensor cores. Each group of nodes has a switch that is an input of
the graph, so that one session serves a whole search. This is closer to the engine than it may seem: what TensorRT fuses
it rounds less often, so that errors are rather over- than underestimated. No engine is built and no GPU is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import torch

from .backends.base import BuildOptions
from .backends.onnxruntime import OnnxRuntimeBackend
from .backends.widen import widen
from .build import build_plan
from .model import OnnxModel, TensorSpec
from .partition import partition
from .runtime import RunningProgram
from .seeds import seeded

_FLOAT = onnx.TensorProto.FLOAT
_NARROW = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_SWITCHES = "trtbridge_switches"


def narrow_places(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, tuple[list[int], list[int]]]:
    """Which inputs and outputs of each node have 16 bits after `ConvertPrecision` and had float32 before.

    Args:
        before: the graph in float32.
        after: the mixed one; its nodes have the names that they had.

    Returns:
        Positions of inputs and outputs by node name; casts, and nodes that are in float32 as before, are left out.
    """
    wide, mixed = _types(before), _types(after)
    nodes = {node.name: node for node in after.graph.node if node.op_type != "Cast"}
    found = {}
    for node in before.graph.node:
        other = nodes.get(node.name)
        if other is None or node.op_type == "Cast":
            continue
        places = tuple(
            [
                i
                for i, (old, new) in enumerate(zip(mine, theirs, strict=False))
                if wide.get(old) == _FLOAT and mixed.get(new) in _NARROW
            ]
            for mine, theirs in ((node.input, other.input), (node.output, other.output))
        )
        if any(places):
            found[node.name] = (places[0], places[1])
    return found


class RoundedModel:
    """A model that runs on a CPU as if nodes of it worked in 16 bits.

    Args:
        model: in float32; node names are unique.
        places: of the nodes that would work in 16 bits, from `narrow_places`.
        target: "float16" or "bfloat16".
        groups: names of these nodes by group; default one group of all.

    Raises:
        TrtBridgeError: ONNX Runtime cannot run it.
    """

    def __init__(
        self,
        model: OnnxModel,
        places: Mapping[str, tuple[Sequence[int], Sequence[int]]],
        target: str,
        groups: Sequence[Collection[str]] | None = None,
    ) -> None:
        groups = [list(places)] if groups is None else groups
        self.groups = len(groups)
        proto, weights = widen(model.proto, model.weights)
        group_of = {name: index for index, group in enumerate(groups) for name in group}
        proto = _Writer(proto, places, onnx.TensorProto.DataType.Value(target.upper()), group_of, self.groups).write()
        switches = TensorSpec.make(_SWITCHES, ir.DataType.BOOL, (self.groups,), {})
        signature = dataclasses.replace(model.signature, inputs=(*model.signature.inputs, switches))
        changed = dataclasses.replace(model, proto=proto, weights=weights, signature=signature)
        program = build_plan(partition(changed), OnnxRuntimeBackend(widens=False), BuildOptions())
        self._running = RunningProgram(program, torch.device("cpu"), None)

    def __call__(self, inputs: Sequence[torch.Tensor], rounding: Sequence[bool] | None = None) -> list[torch.Tensor]:
        """Run on one sample.

        Args:
            inputs: a tensor for each input of the model, on the CPU.
            rounding: for each group whether it rounds; default all do.

        Returns:
            The outputs in order.
        """
        switches = torch.tensor([True] * self.groups if rounding is None else list(rounding))
        with seeded():
            return self._running([*inputs, switches])


@dataclass
class _Writer:
    """Writes the graph that rounds.

    Attributes:
        rounded: the rounded form of a tensor for a group, by name and group.
    """

    proto: onnx.ModelProto
    places: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    target: int
    group_of: Mapping[str, int]
    groups: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    rounded: dict[tuple[str, int], str] = field(default_factory=dict)
    types: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    added: list[onnx.ValueInfoProto] = field(default_factory=list)

    def write(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self.proto)
        graph = result.graph
        self.types = {
            tensor.name: onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            for tensor in graph.initializer
        }
        self.types |= {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        graph.input.append(onnx.helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.BOOL, [self.groups]))
        for index in range(self.groups):
            name = f"{_SWITCHES}_at_{index}"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(index, np.int64), name))
            self.nodes.append(onnx.helper.make_node("Gather", [_SWITCHES, name], [self._switch(index)]))
            self.added.append(onnx.helper.make_tensor_value_info(self._switch(index), onnx.TensorProto.BOOL, []))
        for node in graph.node:
            group = self.group_of.get(node.name)
            if group is None or node.name not in self.places:
                self.nodes.append(node)
                continue
            read, made = self.places[node.name]
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for position in read:
                copy.input[position] = self._round(node.input[position], group)
            for position in made:
                name = node.output[position]
                copy.output[position] = f"{name}_full"
                self._describe(copy.output[position], name, _FLOAT)
            self.nodes.append(copy)
            for position in made:
                self._cast(copy.output[position], node.output[position], group)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del graph.node[:]
        graph.node.extend(copies)
        graph.value_info.extend(self.added)
        return result

    def _switch(self, group: int) -> str:
        return f"{_SWITCHES}_{group}"

    def _round(self, name: str, group: int) -> str:
        if (name, group) not in self.rounded:
            self._cast(name, f"{name}_rounded_{group}", group)
            self.rounded[name, group] = f"{name}_rounded_{group}"
            self._describe(f"{name}_rounded_{group}", name, _FLOAT)
        return self.rounded[name, group]

    def _cast(self, source: str, result: str, group: int) -> None:
        """``result`` is ``source``, rounded if the group's switch is on."""
        narrow, back = f"{source}_narrow_{group}", f"{source}_back_{group}"
        self.nodes += [
            onnx.helper.make_node("Cast", [source], [narrow], to=self.target),
            onnx.helper.make_node("Cast", [narrow], [back], to=_FLOAT),
            onnx.helper.make_node("Where", [self._switch(group), back, source], [result]),
        ]
        self._describe(narrow, source, self.target)
        self._describe(back, source, _FLOAT)
        self.rounded[result, group] = result  # rounding again would change nothing

    def _describe(self, name: str, like: str, element: int) -> None:
        if like not in self.types:
            return
        value = onnx.ValueInfoProto()
        value.CopyFrom(self.types[like])
        value.name = name
        value.type.tensor_type.elem_type = element
        self.types[name] = value
        self.added.append(value)


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    graph = proto.graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}
