"""How each weight of a program comes from the module's tensors, so that new ones can take its place without a rebuild.

The graph of a refittable program never looks at its parameters (`passes.parameters`). What it computes of parameters
alone is therefore a part of the graph like any other, and `bake` cuts it out: that part is the recipe, its results are
weights. There is no second description of what the passes did that could differ from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir

from ..errors import RefitError
from ..passes.exchange import make_stand_in, stand_in_name
from ..passes.parameters import names_read, parameter_names, set_parameter_names
from .evaluate import evaluate
from .model import OnnxModel
from .parameters import Parameters, TensorType

_NEVER = {
    "Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike", "Dropout",
    # Weights in 8 bits are what engines look for behind these.
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
}  # fmt: skip
_MOST_GROWTH = 2
"""A result this many times larger than the parameters behind it is computed in the engine."""
_ALWAYS_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """One weight.

    Attributes:
        type: its element type and shape.
        parameter: name of the tensor of the module that it is, in another element type perhaps; "" for a result.
        part: index of the graph that makes it, where it is a result.
    """

    type: TensorType
    parameter: str = ""
    part: int = -1


@dataclass(frozen=True)
class Recipes:
    """All weights of a program that come from the module.

    Attributes:
        parameters: what new weights must look like.
        weights: how each is made, by the name that it has in engines and among constants.
        parts: serialized ONNX models that make those that are no parameter as it is.
        inputs: for each part the name in the module of each of its inputs; the inputs are named as the initializers of
            the graph that it was cut out of.
        constants: those of the weights that are read between engines, not in them.
    """

    parameters: Parameters
    weights: Mapping[str, Recipe]
    parts: tuple[bytes, ...] = ()
    inputs: tuple[Mapping[str, str], ...] = ()
    constants: tuple[str, ...] = ()

    def make(self, tensors: Mapping[str, ir.TensorProtocol]) -> dict[str, ir.TensorProtocol]:
        """The weights, each made when it is read.

        Args:
            tensors: of the module, by first name, as `Parameters.types` says.
        """
        found: dict[str, ir.TensorProtocol] = {}
        for name, recipe in self.weights.items():
            if recipe.parameter:
                function = partial(_fitting, tensors[recipe.parameter], recipe.type.dtype, recipe.parameter)
                same = tensors[recipe.parameter].dtype == recipe.type.dtype
                found[name] = tensors[recipe.parameter] if same else _lazy(function, name, recipe)
            else:
                function = partial(self._run, recipe.part, name, tensors)
                found[name] = _lazy(function, name, recipe)
        return found

    def only(self, weights: Collection[str], constants: Collection[str]) -> Recipes:
        """Less what a program has neither in its engines nor between them."""
        names = {*weights, *constants}
        kept = {name: recipe for name, recipe in self.weights.items() if name in names}
        between = tuple(name for name in kept if name in constants)
        return dataclasses.replace(self, weights=kept, constants=between)

    def sources(self, name: str) -> tuple[str, ...]:
        """The tensors of the module that a weight is made of."""
        recipe = self.weights[name]
        return (recipe.parameter,) if recipe.parameter else tuple(self.inputs[recipe.part].values())

    def _run(self, part: int, name: str, tensors: Mapping[str, ir.TensorProtocol]) -> ir.TensorProtocol:
        proto = onnx.ModelProto.FromString(self.parts[part])
        given = {}
        for value in proto.graph.input:
            own = self.inputs[part][value.name]
            given[value.name] = _fitting(tensors[own], ir.DataType(value.type.tensor_type.elem_type), own).numpy()
        made = evaluate(proto, given, [name])[0]
        if not _is_finite(made) and all(_is_finite(array) for array in given.values()):
            raise RefitError(_misfit(", ".join(self.inputs[part].values()), self.weights[name].type.dtype))
        return ir.Tensor(made, dtype=self.weights[name].type.dtype, name=name)

    def to_json(self) -> dict[str, Any]:
        """All but the parts."""
        return {
            "parameters": self.parameters.to_json(),
            "weights": {n: [*r.type.to_json(), r.parameter or r.part] for n, r in self.weights.items()},
            "inputs": [dict(names) for names in self.inputs],
            "constants": list(self.constants),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], parts: Sequence[bytes]) -> Recipes:
        weights = {}
        for name, (dtype, shape, source) in data["weights"].items():
            kind = TensorType.from_json([dtype, shape])
            weights[name] = Recipe(kind, source) if isinstance(source, str) else Recipe(kind, part=source)
        parameters = Parameters.from_json(data["parameters"])
        return cls(parameters, weights, tuple(parts), tuple(data["inputs"]), tuple(data["constants"]))


def bake(model: OnnxModel, exported: OnnxModel) -> tuple[OnnxModel, Recipes | None]:
    """Cut out of a graph what it computes of its parameters alone.

    Args:
        model: whose parameters are marked (`passes.parameters`).
        exported: what it was made from, with the module's own tensors.

    Returns:
        The model, with results of parameters as weights that are made when they are read; and how. Models that are not
        refittable come back as they are.
    """
    if model.parameters is None:
        return model, None
    names = parameter_names(model.proto)
    ties = model.parameters.ties
    own = {name: ties.get(target, target) for name, target in names.items() if name in model.weights}
    originals = {
        ties.get(target, target): exported.weights[name] for name, target in parameter_names(exported.proto).items()
    }
    cut = _Cut(model, own)
    parts = cut.parts()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    set_parameter_names(proto, {})
    graph = proto.graph
    gone = {id(node) for node in cut.nodes}
    nodes = [
        node for node, original in zip(graph.node, model.proto.graph.node, strict=True) if id(original) not in gone
    ]
    kept_nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept_nodes)
    read = names_read(graph)
    weights: dict[str, Recipe] = {}
    for name, target in own.items():
        if name in read:
            weight = model.weights[name]
            weights[name] = Recipe(TensorType(weight.dtype, tuple(weight.shape.numpy())), target)
    for index, part in enumerate(parts):
        for value in part.graph.output:
            weights[value.name] = Recipe(cut.types[value.name], part=index)
    inputs = tuple({value.name: own[value.name] for value in part.graph.input} for part in parts)
    recipes = Recipes(model.parameters, weights, tuple(part.SerializeToString() for part in parts), inputs)
    values = {**model.weights, **recipes.make(originals)}
    old = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(t for t in old if t.name not in weights)
    graph.initializer.extend(make_stand_in(name, values[name]) for name in weights)
    used = {tensor.name for tensor in graph.initializer}
    kept = {name: weight for name, weight in values.items() if name in used}
    return dataclasses.replace(model, proto=proto, weights=kept), recipes


class _Cut:
    """What a graph computes of parameters alone.

    Attributes:
        nodes: that do so, in order.
        types: of what they make.
    """

    def __init__(self, model: OnnxModel, own: Mapping[str, str]) -> None:
        graph = model.proto.graph
        self._model, self._own = model, own
        self._constants: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.types: dict[str, TensorType] = {}
        self._behind: dict[str, frozenset[str]] = {}  # the parameters behind a tensor
        for name in own:
            weight = model.weights[name]
            self.types[name] = TensorType(weight.dtype, tuple(weight.shape.numpy()))
            self._behind[name] = frozenset({name})
        self._sizes = {name: weight.nbytes for name, weight in model.weights.items()}
        self._maker: dict[str, onnx.NodeProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            if self._is_ours(node) and (made := self._infer(node)) is not None:
                self.nodes.append(node)
                behind = frozenset().union(*(self._behind.get(name, frozenset()) for name in node.input))
                for name, kind in made.items():
                    self.types[name], self._behind[name], self._maker[name] = kind, behind, node
        ours = {id(node) for node in self.nodes}
        rest = onnx.GraphProto(output=graph.output)
        rest.node.extend(node for node in graph.node if id(node) not in ours)
        self._results = names_read(rest) & self._maker.keys()

    def parts(self) -> list[onnx.ModelProto]:
        """The nodes as models, each as small as can be: what hangs together is in one."""
        root: dict[str, str] = {}

        def find(name: str) -> str:
            while root.setdefault(name, name) != name:
                name = root[name]
            return name

        for node in self.nodes:
            made = [name for name in node.output if name]
            for name in (*made[1:], *(name for name in node.input if name in self._maker)):
                root[find(name)] = find(made[0])
        groups: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            groups.setdefault(find(next(name for name in node.output if name)), []).append(node)
        return [self._part(nodes) for nodes in groups.values() if self._made(nodes) & self._results]

    def _part(self, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
        read = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        graph = onnx.GraphProto(name="recipe")
        for node in nodes:
            copied = graph.node.add()
            copied.CopyFrom(node)
            copied.ClearField("metadata_props")
            copied.ClearField("doc_string")
        graph.input.extend(self._value(name) for name in read if name in self._own)
        graph.output.extend(self._value(name) for name in sorted(self._made(nodes) & self._results))
        graph.initializer.extend(self._filled(n) for n in read if n in self._constants and n not in self._own)
        proto = onnx.ModelProto(ir_version=self._model.proto.ir_version, graph=graph)
        proto.opset_import.extend(o for o in self._model.proto.opset_import if o.domain in ("", "ai.onnx"))
        return proto

    def _made(self, nodes: Iterable[onnx.NodeProto]) -> set[str]:
        return {name for node in nodes for name in node.output if name}

    def _is_ours(self, node: onnx.NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or node.op_type in _NEVER:
            return False
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            return False
        read = [name for name in node.input if name]
        known = all(name in self.types or name in self._constants for name in read)
        return known and any(name in self._behind for name in read)

    def _infer(self, node: onnx.NodeProto) -> dict[str, TensorType] | None:
        """The types of what a node makes; None where they are not known, or so large that the engine computes it."""
        graph = onnx.GraphProto(name="node", node=[node])
        read = dict.fromkeys(name for name in node.input if name)
        graph.input.extend(self._value(name) for name in read if name in self.types)
        graph.initializer.extend(self._filled(name) for name in read if name not in self.types)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        proto = onnx.ModelProto(ir_version=self._model.proto.ir_version, graph=graph)
        proto.opset_import.extend(self._model.proto.opset_import)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError:
            return None
        found: dict[str, TensorType] = {}
        for value in inferred.graph.output:
            tensor = value.type.tensor_type
            if not tensor.elem_type or not tensor.HasField("shape"):
                return None
            if not all(size.HasField("dim_value") for size in tensor.shape.dim):
                return None
            shape = tuple(size.dim_value for size in tensor.shape.dim)
            found[value.name] = TensorType(ir.DataType(tensor.elem_type), shape)
        behind = set().union(*(self._behind.get(name, frozenset()) for name in read))
        limit = max(_MOST_GROWTH * sum(self._sizes[name] for name in behind), _ALWAYS_SMALL_BYTES)
        made = sum(math.prod(kind.shape) * kind.dtype.bitwidth // 8 for kind in found.values())
        return found if 0 < made <= limit else None

    def _value(self, name: str) -> onnx.ValueInfoProto:
        kind = self.types[name]
        return onnx.helper.make_tensor_value_info(name, int(kind.dtype), list(kind.shape))

    def _filled(self, name: str) -> onnx.TensorProto:
        """A constant with its values in it."""
        tensor = self._constants[name]
        if stand_in_name(tensor) is None:
            return tensor
        values = self._model.weights[name].numpy()
        filled: onnx.TensorProto = ir.to_proto(ir.Tensor(values, dtype=ir.DataType(tensor.data_type), name=name))
        return filled


def _lazy(function: Any, name: str, recipe: Recipe) -> ir.TensorProtocol:
    return ir.LazyTensor(function, dtype=recipe.type.dtype, shape=ir.Shape(recipe.type.shape), name=name)


def _fitting(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """A tensor in another type.

    Raises:
        RefitError: it has numbers that the type cannot hold.
    """
    if tensor.dtype == dtype:
        return tensor
    before = tensor.numpy()
    with np.errstate(over="ignore"):
        after = before.astype(dtype.numpy())
    if not _is_finite(after) and _is_finite(before):
        raise RefitError(_misfit(name, dtype))
    return ir.Tensor(after, dtype=dtype, name=tensor.name)


def _misfit(names: str, dtype: ir.DataType) -> str:
    return (
        f"{names}: there are numbers that {dtype.name.lower()} cannot hold, and the engine computes with it there. "
        "Convert with keep_fp32=[the module's path], or without precision=."
    )


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind not in "fV" or bool(
        np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array).all()
    )
