"""From an .onnx file to an `OnnxModel`: shapes from the file, ranges by input name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google.protobuf.message
import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_ir as ir
from onnx import numpy_helper

from ..errors import DynamicShapeError, ModelFileError
from ..plugins.bounds import DATA_DEPENDENT, node_bound
from ..plugins.sizes import names_in
from .dims import DerivedDim, Dim, Range, Shape, Size, combine_profiles, evaluate_range
from .model import (
    INLINE_LIMIT_BYTES,
    ORIGIN_KEY,
    OnnxModel,
    Origin,
    Signature,
    TensorSpec,
    iterate_nodes,
    make_stand_in,
)
from .structure import TENSOR, Structure


def read_onnx(path: str | os.PathLike[str], dynamic_shapes: Mapping[str, Any] | None = None) -> OnnxModel:
    """Read an .onnx file without loading its external data.

    Args:
        path: the file; external data is found beside it.
        dynamic_shapes: for each input with dynamic dimensions ``{dimension: Dim}``, by input name. A whole number in
            place of a Dim fixes the dimension.

    Returns:
        The model. It is called with the inputs in order or by name; one output comes back as a tensor, several as a
        dict by name.

    Raises:
        ModelFileError: no such file, damaged, or not an ONNX model.
        DynamicShapeError: a dynamic dimension of an input has no range.
    """
    path = Path(path)
    proto = _load(path)
    weights = _separate_weights(proto, path.parent)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in initializers]
    # Initializers that older files list among the inputs are constants.
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    _name_parts(proto.graph)
    dims, profiles = _apply_ranges(proto.graph, dynamic_shapes or {}, path)
    del proto.graph.value_info[:]
    try:
        proto, data_dims = name_data_sizes(proto, dims)
    except onnx.shape_inference.InferenceError as error:
        raise ModelFileError(f"The graph in {path} contradicts itself: {error}") from error
    names = [re.sub(r"\W+", "_", value.name) for value in proto.graph.input]
    if len(set(names)) < len(names):
        names = [value.name for value in proto.graph.input]
    outputs = [value.name for value in proto.graph.output]
    single = len(outputs) == 1
    signature = Signature(
        inputs=tuple(_spec(value, dims, path) for value in proto.graph.input),
        outputs=tuple(_spec(value, {**dims, **data_dims}, path) for value in proto.graph.output),
        labels=tuple(names),
        dims=dims,
        input_structure=Structure("tuple", (Structure("tuple", (TENSOR,) * len(names)), Structure("dict"))),
        output_structure=TENSOR if single else Structure("dict", (TENSOR,) * len(outputs), tuple(outputs)),
        parameters=tuple(names),
        profiles=profiles,
    )
    return OnnxModel(proto, weights, signature, path.name, data_dims)


def name_data_sizes(proto: onnx.ModelProto, dims: Mapping[str, Range]) -> tuple[onnx.ModelProto, dict[str, Range]]:
    """Infer shapes, and give every size that depends on data a name: ``NonZero_3_count``, ``Range_7_size0``.

    Args:
        proto: the model; its input shapes are named or fixed.
        dims: ranges of the named sizes.

    Returns:
        The model with the type of every tensor of known rank, and the ranges of those new names that are bounded.
    """
    # The file's own names for sizes of results are kept for those that inference finds no other name for.
    given: dict[tuple[str, int], str] = {}
    for value in proto.graph.output:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and not names_in(size.dim_param) <= dims.keys():
                given[value.name, axis] = size.dim_param
                size.ClearField("dim_param")
    namer = _Namer(dims, given)
    for round_ in range(_MOST_ROUNDS + 1):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        if not namer.name_sizes(proto, everything=round_ == _MOST_ROUNDS):
            break
    return proto, namer.ranges


_MOST_ROUNDS = 16
"""How many data-dependent sizes in a row are named one after the other; further ones get names all at once."""


class _Namer:
    """Gives names to the sizes that inference does not know, and bounds to those names where there are any."""

    def __init__(self, dims: Mapping[str, Range], given: Mapping[tuple[str, int], str]) -> None:
        self.dims = dims
        self.given = given
        self.ranges: dict[str, Range] = {}
        self._taken = {*dims, *given.values()}

    def name_sizes(self, proto: onnx.ModelProto, everything: bool) -> bool:
        """Name sizes in place; whether inference should be asked again, as it may know more now."""
        values = {value.name: value for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
        shapes = {name: shape for name, value in values.items() if (shape := _sizes(value)) is not None}
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
        constants = _small_constants(proto.graph)
        renamed = self._file_names(values)
        stale: set[str] = set()  # follow from a size that has only now got a name
        for node in proto.graph.node:
            outputs = [name for name in node.output if name in shapes]
            if stale.intersection(node.input) and not everything:
                stale.update(node.output)
                continue
            for output in outputs:
                for axis, size in enumerate(values[output].type.tensor_type.shape.dim):
                    if _is_made_up(size.dim_param) and size.dim_param in renamed:
                        size.dim_param = renamed[size.dim_param]
                    elif _is_made_up(size.dim_param):
                        symbol = size.dim_param
                        renamed[symbol] = size.dim_param = self._name(node, output, axis)
                    elif _is_unset(size):
                        size.dim_param = self._name(node, output, axis)
                        stale.add(output)
                    if size.dim_param and not names_in(size.dim_param) <= {*self.dims, *self.ranges}:
                        self._bound(size.dim_param, node, shapes, constants)
                shapes[output] = _sizes(values[output]) or ()
        # Symbols of nodes that were passed over get their names in the next round.
        return bool(stale)

    def _file_names(self, values: Mapping[str, onnx.ValueInfoProto]) -> dict[str, str]:
        """Inference's own symbols that stand in results, and the names that the file gives to those sizes."""
        found: dict[str, str] = {}
        for (output, axis), name in self.given.items():
            sizes = values[output].type.tensor_type.shape.dim
            if axis < len(sizes) and _is_made_up(sizes[axis].dim_param) and name.isidentifier():
                found.setdefault(sizes[axis].dim_param, name)
        return found

    def _name(self, node: onnx.NodeProto, output: str, axis: int) -> str:
        name = _size_name(node, output, axis)
        # One count stands in all results of a node whose count depends on data.
        while name in self._taken and not (node.op_type in DATA_DEPENDENT and name in self.ranges):
            name += "_"
        self._taken.add(name)
        return name

    def _bound(
        self, name: str, node: onnx.NodeProto, shapes: Mapping[str, Shape], constants: Mapping[str, np.ndarray]
    ) -> None:
        limit = node_bound(node, shapes, constants)
        reach = evaluate_range(limit, {**self.dims, **self.ranges}) if limit is not None else None
        if reach is not None:
            self.ranges[name] = (0, max(1, reach[2] // 2), max(1, reach[2]))


def _is_made_up(symbol: str) -> bool:
    """Whether onnx's shape inference made a symbol itself."""
    return re.fullmatch(r"unk__\d+", symbol) is not None


def _size_name(node: onnx.NodeProto, output: str, axis: int) -> str:
    if node.op_type in DATA_DEPENDENT:
        name = f"{node.name}_count"
    elif output == node.output[0]:
        name = f"{node.name}_size{axis}"
    else:
        name = f"{node.name}_{output}_size{axis}"
    name = re.sub(r"\W+", "_", name)
    return name if name.isidentifier() else f"n_{name}"


def _sizes(value: onnx.ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)


def _small_constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    inline = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in inline}
    for node in graph.node:
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and not node.domain and value is not None:
            found[node.output[0]] = numpy_helper.to_array(value)
    return found


def _load(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(os.fspath(path))
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
    except FileNotFoundError as error:
        raise ModelFileError(f"There is no file {path}.") from error
    except (google.protobuf.message.DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise ModelFileError(
            f"{path} is not a valid ONNX model, or is damaged: {error}\nCheck it with: polygraphy inspect model {path}"
        ) from error
    if not proto.graph.output:
        raise ModelFileError(f"{path} is not an ONNX model, or is damaged: its graph has no output.")
    return proto


def _separate_weights(proto: onnx.ModelProto, folder: Path) -> dict[str, ir.TensorProtocol]:
    weights: dict[str, ir.TensorProtocol] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            weight: ir.TensorProtocol = ir.ExternalTensor(
                entries["location"],
                int(entries["offset"]) if "offset" in entries else None,
                int(entries["length"]) if "length" in entries else None,
                ir.DataType(tensor.data_type),
                shape=ir.Shape(tensor.dims),
                name=tensor.name,
                base_dir=folder,
            )
        else:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            weight = ir.serde.deserialize_tensor(copy)
        if weight.nbytes > INLINE_LIMIT_BYTES:
            weights[tensor.name] = weight
            tensor.CopyFrom(make_stand_in(tensor.name, weight))
        elif tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.CopyFrom(ir.serde.serialize_tensor(ir.Tensor(weight.numpy(), dtype=weight.dtype, name=tensor.name)))
    return weights


def _name_parts(graph: onnx.GraphProto) -> None:
    """Give every node a name and an origin, so that messages can name it."""
    for index, node in enumerate(iterate_nodes(graph)):
        node.name = node.name or f"{node.op_type}_{index}"
        if all(entry.key != ORIGIN_KEY for entry in node.metadata_props):
            node.metadata_props.add(key=ORIGIN_KEY, value=Origin(module=node.name, op=node.op_type).to_metadata())


def _apply_ranges(
    graph: onnx.GraphProto, dynamic_shapes: Mapping[str, Any], path: Path
) -> tuple[dict[str, Range], tuple[dict[str, Range], ...]]:
    """Put the user's dims in place of the file's symbols, in its inputs; returns their ranges, whole and by profile."""
    inputs = {value.name: value for value in graph.input}
    unknown = [name for name in dynamic_shapes if name not in inputs]
    if unknown:
        raise DynamicShapeError(f"dynamic_shapes names {unknown}, but the inputs of {path} are {list(inputs)}.")
    roots: dict[str, Dim] = {}
    replaced: dict[str, str | int] = {}
    told: list[onnx.TensorShapeProto.Dimension] = []
    for name, value in inputs.items():
        given = dynamic_shapes.get(name) or {}
        sizes = value.type.tensor_type.shape.dim
        entries = _by_axis(given, len(sizes), name)
        for axis, size in enumerate(sizes):
            entry = entries.get(axis)
            if entry is None:
                continue
            if isinstance(entry, (Dim, DerivedDim)):
                derived = entry if isinstance(entry, DerivedDim) else DerivedDim(entry, 1, 0)
                if roots.setdefault(derived.root.name, derived.root) != derived.root:
                    raise DynamicShapeError(f"Dim {derived.root.name!r} is given with two ranges.")
                new: str | int = str(derived)
            elif isinstance(entry, int):
                new = entry
            else:
                raise DynamicShapeError(
                    f"dynamic_shapes gives {entry!r} for dimension {axis} of {name}; write a tb.Dim or a size."
                )
            if size.HasField("dim_value") and size.dim_value != new:
                raise DynamicShapeError(
                    f"dynamic_shapes gives {new} for dimension {axis} of {name}, fixed at {size.dim_value} in {path}."
                )
            if size.dim_param:
                replaced[size.dim_param] = new
            told.append(size)
            _set_size(size, new)
    # The file's own symbols: the same symbol elsewhere is the same dim. A name of the user's may be one of them.
    for value in [*graph.input, *graph.output]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in replaced and not any(size is given for given in told):
                _set_size(size, replaced[size.dim_param])
    static = {name: dim for name, dim in roots.items() if dim.min == dim.max}
    if static:
        raise DynamicShapeError(f"Dims {list(static)} have one size only: write the number instead.")
    missing = [
        f"{value.name}[{axis}] ({size.dim_param or 'unnamed'})"
        for value in graph.input
        for axis, size in enumerate(value.type.tensor_type.shape.dim)
        if (not size.HasField("dim_value") and not names_in(size.dim_param) <= roots.keys()) or _is_unset(size)
    ]
    if missing:
        first = missing[0].partition("[")[0]
        raise DynamicShapeError(
            f"Dynamic dimensions of {path} have no range: {', '.join(missing)}. Give one by input name, as in "
            f'dynamic_shapes={{"{first}": {{0: tb.Dim("batch", min=1, opt=8, max=32)}}}}.'
        )
    ranges = {
        name: (dim.min, (dim.min + dim.max) // 2 if dim.opt is None else dim.opt, dim.max)
        for name, dim in roots.items()
    }
    return ranges, combine_profiles(roots.values(), ranges)


def _by_axis(given: Any, rank: int, name: str) -> dict[int, Any]:
    """An input's entry of dynamic_shapes by dimension, counted from the front."""
    pairs = dict(enumerate(given)) if isinstance(given, (tuple, list)) else given
    if not isinstance(pairs, Mapping):
        raise DynamicShapeError(f"dynamic_shapes for {name} is {given!r}; write {{dimension: Dim}} or one a dimension.")
    outside = [axis for axis in pairs if not isinstance(axis, int) or not -rank <= axis < rank]
    if outside:
        raise DynamicShapeError(f"dynamic_shapes for {name}: {outside[0]!r} is no dimension of a rank {rank} tensor.")
    return {axis % rank: entry for axis, entry in pairs.items()}


def _is_unset(size: onnx.TensorShapeProto.Dimension) -> bool:
    return not size.HasField("dim_value") and not size.dim_param


def _set_size(size: onnx.TensorShapeProto.Dimension, new: str | int) -> None:
    if isinstance(new, int):
        size.dim_value = new
    else:
        size.dim_param = new


def _spec(value: onnx.ValueInfoProto, dims: Mapping[str, Range], path: Path) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise ModelFileError(f"{path}: {value.name!r} is a {kind}, and engines take and return tensors only.")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ModelFileError(f"{path}: {value.name!r} has no rank in the file, nor does shape inference find it.")
    shape: list[Size] = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    return TensorSpec.make(value.name, ir.DataType(tensor.elem_type), tuple(shape), dims)
