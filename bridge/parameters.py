"""What a module holds that a program can take anew: which tensors stand in its graph, under which names.

Parameters and persistent buffers of floating types may change; of these a refittable program knows the names, types and
shapes, never the values. All else that the graph holds of the module (positions, masks, plain attributes) is built in;
of that it knows a digest, to tell when it differs.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ExportError
from .dtypes import from_torch

_MARK = "trtbridge.parameter"


@dataclass(frozen=True)
class TensorType:
    """Element type and shape of a tensor of a module."""

    dtype: ir.DataType
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.shape))}) {self.dtype.name.lower()}"

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorType:
        return cls(from_torch(tensor.dtype), tuple(tensor.shape))

    def to_json(self) -> list[Any]:
        return [self.dtype.name, list(self.shape)]

    @classmethod
    def from_json(cls, data: list[Any]) -> TensorType:
        return cls(ir.DataType[data[0]], tuple(data[1]))


@dataclass(frozen=True)
class Parameters:
    """Of the module that a refittable program was made from.

    Attributes:
        names: all names of its state dict.
        types: of the tensors that the graph reads and that may change, by their first name.
        ties: other names of such a tensor: name → first name.
        fixed: SHA-256 of the bytes of those that the graph has built in, by name.
    """

    names: tuple[str, ...]
    types: Mapping[str, TensorType]
    ties: Mapping[str, str]
    fixed: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "types": {name: kind.to_json() for name, kind in self.types.items()},
            "ties": dict(self.ties),
            "fixed": dict(self.fixed),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Parameters:
        types = {name: TensorType.from_json(kind) for name, kind in data["types"].items()}
        return cls(tuple(data["names"]), types, data["ties"], data["fixed"])


def module_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by all their names, buffers included that its state dict leaves out."""
    found = dict(module.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**found, **_buffers(module)}.items()}


def attribute_of(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """The tensor that a module has under a dotted name, whatever it is there."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found.detach() if isinstance(found, torch.Tensor) else None


def state_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's state dict."""
    return tuple(module.state_dict())


def describe_parameters(module: torch.nn.Module, program: torch.export.ExportedProgram, prefix: str) -> Parameters:
    """What of a module's tensors an exported program reads.

    Args:
        module: that was exported.
        program: made of it.
        prefix: of its names in the program, with the dot.
    """
    tensors = module_tensors(module)
    signature = program.graph_signature
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    left_out = set(signature.non_persistent_buffers)
    changing: dict[str, torch.Tensor] = {}
    fixed: dict[str, str] = {}
    for name, target in {**named, **signature.inputs_to_lifted_tensor_constants}.items():
        own = target.removeprefix(prefix)
        tensor = tensors.get(own) if name in named else attribute_of(module, own)
        if name not in read or tensor is None:
            continue
        if name in named and target not in left_out and tensor.is_floating_point() and tensor.numel():
            changing[own] = tensor
        else:
            fixed[own] = digest(tensor)
    # Tied tensors are one in the graph; an attribute that is a parameter's own memory goes with it.
    by_place: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, tensor in changing.items():
        if (first := by_place.setdefault(_place(tensor), name)) != name:
            ties[name] = first
    for name, tensor in tensors.items():
        first = by_place.get(_place(tensor), name) if tensor.numel() else name
        if first != name:
            ties[name] = first
    types = {name: TensorType.of(tensor) for name, tensor in changing.items() if name not in ties}
    return Parameters(state_names(module), types, ties, fixed)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data.tobytes()).hexdigest()


def mark(model: ir.Model, parameters: Parameters, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Note at each initializer that may change which tensor of the module it is; `marked` tells.

    Args:
        model: as the exporter made it.
        parameters: what may change.
        tensors: the exported program's own, by name with the prefix.
        prefix: of names in the program, with the dot.

    Raises:
        ExportError: a tensor that may change is not there, so that it would be built in.
    """
    own = {name: parameters.ties.get(name, name) for name in (*parameters.types, *parameters.ties)}
    places = {_place(t): own[n] for name, t in tensors.items() if (n := name.removeprefix(prefix)) in own}
    for name, value in model.graph.initializers.items():
        # The exporter renames what is a result as well, but it keeps the memory.
        raw = getattr(value.const_value, "raw", None)
        found = places.get(_place(raw)) if isinstance(raw, torch.Tensor) else None
        found = found or own.get(name.removeprefix(prefix))
        if found is not None:
            value.meta[_MARK] = found
    lost = parameters.types.keys() - {marked(value) for value in model.graph.initializers.values()}
    if lost:
        raise ExportError(
            f"torch.onnx made other tensors of {', '.join(sorted(lost))}, so that new weights could not be put in "
            "their place: convert without refittable=True."
        )


def marked(value: ir.Value) -> str:
    """The tensor of the module that an initializer is; "" for one that may not change."""
    return str(value.meta.get(_MARK, ""))


@contextlib.contextmanager
def hidden(model: ir.Model) -> Iterator[None]:
    """Make inputs of marked initializers for a while, so that no rewrite can look at their values."""
    graph = model.graph
    values = [value for value in graph.initializers.values() if marked(value)]
    kept = [value.const_value for value in values]
    for value in values:
        weight = value.const_value
        assert weight is not None
        del graph.initializers[value.name or ""]
        value.shape, value.dtype, value.const_value = ir.Shape(weight.shape.numpy()), weight.dtype, None
    graph.inputs.extend(values)
    try:
        yield
    finally:
        for value, weight in zip(values, kept, strict=True):
            graph.inputs.remove(value)
            value.const_value = weight
            if value.uses() or value.is_graph_output():
                graph.initializers.add(value)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))
