"""Ranges for sizes that depend on data: what the user states joins what torch derived."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import onnx

from ..errors import OptionError
from ..plugins.sizes import names_in
from .dims import Dim, Range
from .model import OnnxModel, Signature, TensorSpec, iterate_nodes
from .options import Options
from .structure import leaf_labels


def with_bounds(model: OnnxModel, options: Options, example: Mapping[str, int] | None = None) -> OnnxModel:
    """A model whose data-dependent sizes have the names of ``output_shapes`` and the bounds that the options give.

    Args:
        model: after the passes.
        options: ``output_shapes`` and ``max_data_size`` are read.
        example: sizes to tune for by symbol, where these are known; else it is half of the bound.

    Raises:
        OptionError: ``output_shapes`` names no result, or a dimension that does not depend on data.
    """
    example = example or {}
    ranges = {name: _tuned(bounds, example.get(name)) for name, bounds in model.data_dims.items()}
    names: dict[str, str] = {}
    for place, dims in (options.output_shapes or {}).items():
        for axis, dim in dims.items():
            symbol = _symbol(model, place, axis, dim)
            names[symbol] = dim.name
            ranges.pop(symbol, None)
            ranges[dim.name] = _tuned(_range(dim), example.get(symbol) if dim.opt is None else None)
    if names:
        model = _renamed(model, names)
    if options.max_data_size is not None:
        most = options.max_data_size
        model = _all_named(model)
        known = {*model.signature.dims, *ranges}
        for text in _dim_texts(model.proto.graph):
            for name in names_in(text) - known:
                ranges[name] = _tuned((0, max(1, most // 2), most), example.get(name))
    if ranges == model.data_dims:
        return model
    every = {**model.signature.dims, **ranges}
    outputs = tuple(TensorSpec.make(spec.name, spec.dtype, spec.shape, every) for spec in model.signature.outputs)
    return dataclasses.replace(model, data_dims=ranges, signature=dataclasses.replace(model.signature, outputs=outputs))


def _symbol(model: OnnxModel, place: str | int, axis: int, dim: Dim) -> str:
    """The symbol that stands in a dimension of a result."""
    signature = model.signature
    labels = leaf_labels(signature.output_structure, "")
    choices = {
        **{spec.name: i for i, spec in enumerate(signature.outputs)},
        **{label: i for i, label in enumerate(labels) if label},
    }
    index = place if isinstance(place, int) else choices.get(place, choices.get(f"[{place!r}]", -1))
    if not 0 <= index < len(signature.outputs):
        raise OptionError(
            f"output_shapes names {place!r}; the results are {', '.join(choices) or 'one tensor'}, or by position."
        )
    spec = signature.outputs[index]
    if not -len(spec.shape) <= axis < len(spec.shape):
        raise OptionError(f"output_shapes: result {place!r} has no dimension {axis}; it is {spec.type_text}.")
    size = spec.shape[axis]
    if not isinstance(size, str) or not size.isidentifier() or size in signature.dims:
        raise OptionError(
            f"output_shapes: dimension {axis} of result {place!r} is {size}, which does not depend on data alone, so "
            f"{dim.name!r} cannot name it."
        )
    if dim.profiles:
        raise OptionError(
            f"output_shapes: {dim.name!r} has profiles, but a size that depends on data is known only after a profile "
            f"is chosen; give it one range, as in tb.Dim({dim.name!r}, max={dim.max})."
        )
    if dim.name in signature.dims:
        raise OptionError(f"output_shapes: {dim.name!r} is an input's Dim; give the data-dependent size another name.")
    return size


def _range(dim: Dim) -> Range:
    opt = max(dim.min, dim.max // 2, 1) if dim.opt is None else dim.opt
    return (dim.min if dim.min > 1 else 0, opt, dim.max)


def _tuned(bounds: Range, size: int | None) -> Range:
    """A range that is tuned for a size, as far as that is inside of it."""
    low, opt, high = bounds
    return (low, opt if size is None else min(max(size, low, 1), high), high)


def _renamed(model: OnnxModel, names: Mapping[str, str]) -> OnnxModel:
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def rename(text: str) -> str:
        return pattern.sub(lambda match: names[match[0]], text)

    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for value in _values(proto.graph):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = rename(size.dim_param)
    outputs = tuple(
        TensorSpec.make(s.name, s.dtype, tuple(rename(n) if isinstance(n, str) else n for n in s.shape), {})
        for s in model.signature.outputs
    )
    signature: Signature = dataclasses.replace(model.signature, outputs=outputs)
    return dataclasses.replace(model, proto=proto, signature=signature)


def _all_named(model: OnnxModel) -> OnnxModel:
    """A model in which sizes that shape inference left without a name have one, so that they can have a bound.

    Those of results stay: nothing in the model needs a bound for them.
    """
    nameless = [
        (index, axis)
        for index, value in enumerate(model.proto.graph.value_info)
        for axis, size in enumerate(value.type.tensor_type.shape.dim)
        if not size.HasField("dim_value") and not size.dim_param
    ]
    if not nameless:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for number, (index, axis) in enumerate(nameless):
        proto.graph.value_info[index].type.tensor_type.shape.dim[axis].dim_param = f"data_size_{number}"
    return dataclasses.replace(model, proto=proto)


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    for inner in [graph, *(a.g for node in iterate_nodes(graph) for a in node.attribute if a.HasField("g"))]:
        yield from inner.value_info
        yield from inner.input
        yield from inner.output


def _dim_texts(graph: onnx.GraphProto) -> Iterator[str]:
    for value in _values(graph):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                yield size.dim_param
