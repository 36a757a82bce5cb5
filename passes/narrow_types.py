"""Replace element types that TensorRT lacks by ones that it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .pipeline import Notes, Pass
from .surgery import (
    element_type,
    gs_type,
    is_standard,
    output_ids,
    redirect,
    scopes,
    set_input,
    type_name,
)  # fmt: skip

_Type = onnx.TensorProto
_NARROWER: dict[int, int] = {
    _Type.DOUBLE: _Type.FLOAT, _Type.INT16: _Type.INT32, _Type.UINT16: _Type.INT32,
    _Type.UINT32: _Type.INT64, _Type.UINT64: _Type.INT64,
}  # fmt: skip
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype")
# Their types say how bits are laid out or what integers mean, so another type changes the result.
_BOUND_TO_TYPE = {"QuantizeLinear", "DequantizeLinear", "BitShift", "BitCast", "BitwiseNot"}


@dataclass(frozen=True)
class NarrowTypes(Pass):
    """Narrow float64 to float32, and give int16, uint16, uint32 and uint64 a type that TensorRT has.

    ::

        x: double -> Mul(c: double) -> y: double     x: float -> Mul(c: float) -> y: float
        x: double -> plugin -> p -> Relu -> y        x: float -> Cast(double) -> plugin -> p -> Cast(float) -> Relu -> y

    int16 and uint16 become int32, uint32 and uint64 become int64. This changes inputs and outputs of the model, its
    constants, types in attributes, and everything between, in subgraphs too. int8, uint8 and complex types stay.

    Plugin nodes, calls of local functions, and ops that need the old type (quantization, shifts) keep it on their
    tensors, and Casts stand next to them: where the plugin runs between engines, these Casts run at its boundary.

    A type is narrowed everywhere or not at all: a constant that does not fit the new type ends it for that type.
    Integers that would have wrapped around no longer do, and float64 loses its extra digits; the comparison with the
    original shows where that matters.
    """

    after: ClassVar[tuple[type[Pass], ...]] = ()
    changes_io: ClassVar[bool] = True

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        tensors = _all_tensors(graph)
        wanted = {element_type(tensor) for tensor in tensors} | _attribute_types(graph)
        mapping = {old: new for old, new in _NARROWER.items() if old in wanted}
        if not mapping:
            return 0
        fixed = {id(n) for scope in scopes(graph) for n in scope.nodes if _is_fixed(n, mapping, notes)}
        outputs = set().union(*(output_ids(scope) for scope in scopes(graph)))
        for tensor in tensors:
            _drop_misfits(tensor, mapping, fixed, notes)
        kept = {id(t) for t in tensors if element_type(t) in mapping and _keeps_type(t, fixed, outputs)}
        count = 0
        for scope in scopes(graph):
            count += _insert_casts(scope, mapping, fixed, kept, notes, is_main=scope is graph)
        for tensor in tensors:
            old = element_type(tensor)
            if old in mapping and id(tensor) not in kept:
                _narrow_tensor(tensor, mapping[old], notes)
                count += 1
        for scope in scopes(graph):
            for node in scope.nodes:
                if id(node) not in fixed and not any(id(tensor) in kept for tensor in node.outputs):
                    count += _narrow_attributes(node, mapping, notes)
        return count


def _all_tensors(graph: gs.Graph) -> list[gs.Tensor]:
    found: dict[int, gs.Tensor] = {}
    for scope in scopes(graph):
        groups: Iterable[gs.Tensor] = (
            *scope.inputs, *scope.outputs, *(t for node in scope.nodes for t in (*node.inputs, *node.outputs)),
        )  # fmt: skip
        found.update((id(tensor), tensor) for tensor in groups if tensor.name)
    return list(found.values())


def _attribute_types(graph: gs.Graph) -> set[int]:
    found: set[int] = set()
    for scope in scopes(graph):
        for node in scope.nodes:
            if is_standard(node):
                found.update(node.attrs[key] for key in _TYPE_ATTRIBUTES if isinstance(node.attrs.get(key), int))
                found.update(element_type(value) for value in node.attrs.values() if isinstance(value, gs.Constant))
    return found


def _is_fixed(node: gs.Node, mapping: dict[int, int], notes: Notes) -> bool:
    """Whether a node must keep the types of its tensors."""
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if tensor.name and element_type(tensor) in mapping]
    if not tensors:
        return False
    if not is_standard(node) or node.op in _BOUND_TO_TYPE:
        return True
    if any(
        isinstance(tensor, gs.Variable) and tensor.type != "tensor_type" for tensor in (*node.inputs, *node.outputs)
    ):
        return True
    try:
        schema = onnx.defs.get_schema(node.op, notes.opset, "")
    except onnx.defs.SchemaError:
        return True
    for actual, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for position, tensor in enumerate(actual):
            if tensor.name and element_type(tensor) in mapping and formal:
                allowed = formal[min(position, len(formal) - 1)].types
                if f"tensor({type_name(mapping[element_type(tensor)])})" not in allowed:
                    notes.refused(node, f"it does not exist for {type_name(mapping[element_type(tensor)])}")
                    return True
    return False


def _drop_misfits(tensor: gs.Tensor, mapping: dict[int, int], fixed: set[int], notes: Notes) -> None:
    """Take a type out of the mapping if a constant does not fit the new one."""
    holders = [tensor] if isinstance(tensor, gs.Constant) else []
    for node in tensor.inputs:
        if id(node) not in fixed and is_standard(node):
            holders.extend(value for value in node.attrs.values() if isinstance(value, gs.Constant))
    for constant in holders:
        old = element_type(constant)
        if old in mapping and not _fits(notes.values(constant), mapping[old]):
            node = (tensor.inputs or tensor.outputs)[0]
            notes.refused(
                node,
                f"a constant of its does not fit {type_name(mapping[old])}, so all of {type_name(old)} stays",
            )
            del mapping[old]


def _fits(values: np.ndarray, element: int) -> bool:
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        return not finite.size or bool(np.abs(finite).max() <= np.finfo(np.float32).max)
    limits = np.iinfo(onnx.helper.tensor_dtype_to_np_dtype(element))
    return not values.size or (int(values.min()) >= limits.min and int(values.max()) <= limits.max)


def _keeps_type(tensor: gs.Tensor, fixed: set[int], outputs: set[int]) -> bool:
    """Whether a tensor is next to fixed nodes only, or made by one."""
    if isinstance(tensor, gs.Variable) and tensor.type != "tensor_type":
        return True
    maker = tensor.inputs[0] if tensor.inputs else None
    if maker is not None and id(maker) in fixed:
        return True
    only_fixed = bool(tensor.outputs) and id(tensor) not in outputs and all(id(n) in fixed for n in tensor.outputs)
    return only_fixed and (maker is None or is_standard(maker, "Cast"))


def _insert_casts(
    scope: gs.Graph, mapping: dict[int, int], fixed: set[int], kept: set[int], notes: Notes, is_main: bool
) -> int:
    """Cast between fixed nodes, which keep the old types, and all others."""
    result: list[gs.Node] = []
    count = 0
    # What leaves a subgraph must have the type that its node's output has; a model's output may stay as it is.
    leaving = set() if is_main else output_ids(scope)
    for node in scope.nodes:
        if id(node) in fixed:
            for position, tensor in enumerate(node.inputs):
                old = element_type(tensor) if tensor.name else 0
                if old in mapping and id(tensor) not in kept:
                    wide = gs.Variable(notes.fresh_name(f"{tensor.name}_{type_name(old)}"), gs_type(old), tensor.shape)
                    set_input(node, position, wide)
                    kept.add(id(wide))
                    result.append(_cast(tensor, wide, old))
                    count += 1
        result.append(node)
        for tensor in node.outputs:
            if id(tensor) not in kept or id(node) not in fixed:
                continue
            if id(tensor) in leaving or any(_must_narrow(reader, fixed) for reader in tensor.outputs):
                old = element_type(tensor)
                name = notes.fresh_name(f"{tensor.name}_{type_name(mapping[old])}")
                narrow = gs.Variable(name, gs_type(mapping[old]), tensor.shape)
                readers = list(tensor.outputs)
                redirect(tensor, narrow)
                for reader in {id(n): n for n in readers if not _must_narrow(n, fixed)}.values():
                    for position, read in enumerate(reader.inputs):
                        if read is narrow:
                            set_input(reader, position, tensor)
                scope.outputs = scope.outputs if is_main else [narrow if t is tensor else t for t in scope.outputs]
                result.append(_cast(tensor, narrow, mapping[old]))
                count += 1
    scope.nodes = result
    return count


def _must_narrow(reader: gs.Node, fixed: set[int]) -> bool:
    """Whether a reader of a kept tensor needs the new type. A Cast takes any."""
    return id(reader) not in fixed and not is_standard(reader, "Cast")


def _cast(source: gs.Tensor, target: gs.Variable, element: int) -> gs.Node:
    return gs.Node("Cast", attrs={"to": int(element)}, inputs=[source], outputs=[target])


def _narrow_tensor(tensor: gs.Tensor, element: int, notes: Notes) -> None:
    if isinstance(tensor, gs.Constant):
        tensor._values = notes.values(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(element))
    else:
        tensor.dtype = gs_type(element)


def _narrow_attributes(node: gs.Node, mapping: dict[int, int], notes: Notes) -> int:
    if not is_standard(node):
        return 0
    count = 0
    for key, value in node.attrs.items():
        if key in _TYPE_ATTRIBUTES and value in mapping:
            node.attrs[key] = int(mapping[value])
            count += 1
        elif isinstance(value, gs.Constant) and element_type(value) in mapping:
            new = onnx.helper.tensor_dtype_to_np_dtype(mapping[element_type(value)])
            node.attrs[key] = gs.Constant("", notes.values(value).astype(new))
            count += 1
    return count
