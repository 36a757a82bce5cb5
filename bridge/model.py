"""The type that passes between the stages before the plan: an ONNX graph, its signature and its provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import ModelFileError
from ..plugins.sizes import names_in
from .dims import Range, Shape, evaluate_range
from .parameters import Parameters
from .profiles import describe_profiles
from .structure import Structure, leaf_labels

ORIGIN_KEY = "trtbridge.origin"
"""Key of the node metadata entry that holds an `Origin` as JSON."""

EXTERNAL_LOCATION = "trtbridge-weights"
"""``location`` of an initializer's stand-in: its values are `OnnxModel.weights` under the initializer's name."""

INLINE_LIMIT_BYTES = 1024
"""Initializers up to this size stay in the proto (shapes, axes, scalars: what passes look at); larger ones do not."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at a boundary: of the model, of a segment, of a plugin call.

    Attributes:
        name: ONNX tensor name.
        dtype: element type.
        shape: one entry a dimension: a size, an expression over named dims ("batch", "2*seq + 1"), or None where the
            size depends on data.
        ranges: (min, opt, max) of each dimension; a fixed size n is (n, n, n), None where the size depends on data.
        profiles: at the boundary of a segment the ranges of each dimension in each profile; () where there is one.
    """

    name: str
    dtype: ir.DataType
    shape: Shape
    ranges: tuple[Range | None, ...]
    profiles: tuple[tuple[Range | None, ...], ...] = ()

    @classmethod
    def make(
        cls,
        name: str,
        dtype: ir.DataType,
        shape: Shape,
        dims: Mapping[str, Range],
        profiles: Sequence[Mapping[str, Range]] = (),
    ) -> TensorSpec:
        """A spec whose ranges are evaluated from those of the named dims, and for each profile from its own."""
        whole = tuple(evaluate_range(size, dims) for size in shape)
        each = tuple(
            tuple(evaluate_range(size, {**dims, **p}) or r for size, r in zip(shape, whole, strict=True))
            for p in profiles
        )
        return cls(name, dtype, tuple(shape), whole, each)

    @property
    def type_text(self) -> str:
        """Shape and dtype, for people."""
        return f"({', '.join('?' if s is None else str(s) for s in self.shape)}) {self.dtype.name.lower()}"

    def __str__(self) -> str:
        return f"{self.name}: {self.type_text}"

    def to_json(self) -> dict[str, Any]:
        profiles = {"profiles": [list(profile) for profile in self.profiles]} if self.profiles else {}
        found = {"name": self.name, "dtype": self.dtype.name, "shape": list(self.shape), "ranges": list(self.ranges)}
        return {**found, **profiles}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        profiles = tuple(map(_read_ranges, data.get("profiles", ())))
        dtype = ir.DataType[data["dtype"]]
        return cls(data["name"], dtype, tuple(data["shape"]), _read_ranges(data["ranges"]), profiles)


def _read_ranges(ranges: Sequence[Sequence[int] | None]) -> tuple[Range | None, ...]:
    return tuple(None if r is None else (int(r[0]), int(r[1]), int(r[2])) for r in ranges)


@dataclass(frozen=True)
class Signature:
    """How the original is called and what it returns.

    Attributes:
        inputs: the tensors among the arguments, flat, in the order of the ONNX graph's inputs.
        outputs: the tensors among the results, flat, in the order of the ONNX graph's outputs.
        labels: for each input, how a user would write it: ``x``, ``batch['mask']``, ``args[0].ids``.
        dims: range of each named dim, over all profiles.
        input_structure: the structure of ``(args, kwargs)``, non-tensor leaves included.
        output_structure: the structure of the result.
        parameters: names of forward's positional parameters, to accept them as keywords.
        complex_inputs: which inputs are complex tensors, which the graph holds as (..., 2) reals.
        complex_outputs: which outputs are.
        profiles: range of each named dim in each profile; () where there is one, ``dims``. Sizes fit that lie in one.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]
    dims: Mapping[str, Range]
    input_structure: Structure
    output_structure: Structure
    parameters: tuple[str, ...] = ()
    complex_inputs: tuple[int, ...] = ()
    complex_outputs: tuple[int, ...] = ()
    profiles: tuple[Mapping[str, Range], ...] = ()

    @property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The least and the largest size of each named dim, over all profiles."""
        return {name: (low, high) for name, (low, _, high) in self.dims.items()}

    def describe_inputs(self) -> list[str]:
        """A line an input: its place in the call, shape, dtype, and the ranges of its dims."""
        lines = []
        for label, spec in zip(self.labels, self.inputs, strict=True):
            used = {name for size in spec.shape if isinstance(size, str) for name in names_in(size)}
            ranges = [f"{n} in {self._range_text(n)}" for n in self.dims if n in used]
            lines.append(f"{label}: {spec.type_text}" + (f"  ({', '.join(ranges)})" if ranges else ""))
        return lines

    def _range_text(self, name: str) -> str:
        low, opt, high = self.dims[name]
        ranges = dict.fromkeys(f"[{profile[name][0]}, {profile[name][2]}]" for profile in self.profiles)
        return " or ".join(ranges) if ranges else f"[{low}, {high}], tuned for {opt}"

    def describe_profiles(self) -> list[str]:
        """A line a profile, where there are several: the ranges of all dims in it."""
        return describe_profiles(self.profiles)

    def describe_outputs(self) -> list[str]:
        """A line an output: its place in the result, shape and dtype."""
        labels = leaf_labels(self.output_structure, "")
        return [f"{label or spec.name}: {spec.type_text}" for label, spec in zip(labels, self.outputs, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "labels": list(self.labels),
            "dims": {name: list(r) for name, r in self.dims.items()},
            "input_structure": self.input_structure.to_json(),
            "output_structure": self.output_structure.to_json(),
            "parameters": list(self.parameters),
            "complex_inputs": list(self.complex_inputs),
            "complex_outputs": list(self.complex_outputs),
            "profiles": [{name: list(r) for name, r in profile.items()} for profile in self.profiles],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        return cls(
            inputs=tuple(TensorSpec.from_json(spec) for spec in data["inputs"]),
            outputs=tuple(TensorSpec.from_json(spec) for spec in data["outputs"]),
            labels=tuple(data["labels"]),
            dims=_read_dims(data["dims"]),
            input_structure=Structure.from_json(data["input_structure"]),
            output_structure=Structure.from_json(data["output_structure"]),
            parameters=tuple(data["parameters"]),
            complex_inputs=tuple(data.get("complex_inputs", ())),
            complex_outputs=tuple(data.get("complex_outputs", ())),
            profiles=tuple(map(_read_dims, data.get("profiles", ()))),
        )


def _read_dims(data: Mapping[str, Sequence[int]]) -> dict[str, Range]:
    return {name: (int(r[0]), int(r[1]), int(r[2])) for name, r in data.items()}


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from in the user's program.

    Attributes:
        file: Python file, "" where unknown (a tensor of an .onnx file).
        line: line in that file, 0 where unknown.
        code: the text of that line.
        module: path of the nn.Module that made it ("encoder.layer.0.attention"), "" for the root; the parameter's
            full name for an initializer.
        module_class: qualified class of that module.
        op: the aten op ("aten.linear.default"), "input", "initializer", or the ONNX op for a node of an .onnx file.
        call: name of the call in the exported program, "" where there is none; it can be made a plugin.
    """

    file: str = ""
    line: int = 0
    code: str = ""
    module: str = ""
    module_class: str = ""
    op: str = ""
    call: str = ""

    def __str__(self) -> str:
        place = f'"{self.file}", line {self.line}' if self.file else "no Python line known"
        parts = [place]
        if self.code:
            parts.append(f"`{self.code}`")
        if self.module:
            parts.append(f"in {self.module}")
        if self.op:
            parts.append(f"({self.op})")
        return " ".join(parts)

    def to_metadata(self) -> str:
        return json.dumps({k: v for k, v in self.__dict__.items() if v}, separators=(",", ":"))

    @classmethod
    def from_metadata(cls, text: str) -> Origin:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX graph whose weights stand beside it, so that no stage copies them.

    Attributes:
        proto: the graph. Initializers over `INLINE_LIMIT_BYTES` are external stand-ins (``location`` is
            `EXTERNAL_LOCATION`), so the proto is small whatever the model's size.
        weights: the values of those initializers by name, read lazily; torch parameters are shared, not copied.
        signature: names, dtypes, symbolic shapes, ranges and structures of inputs and outputs.
        source: what it was made from, for messages ("ResNet", "model.onnx").
        data_dims: (min, opt, max) of each named size that depends on data, where it is known.
        parameters: for a program that can be refitted, the module's tensors that it reads: initializers of these names
            are marked in the proto (`passes.parameters`), and no pass reads them.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, ir.TensorProtocol]
    signature: Signature
    source: str = ""
    data_dims: Mapping[str, Range] = field(default_factory=dict)
    parameters: Parameters | None = None

    @cached_property
    def provenance(self) -> Mapping[str, Origin]:
        """The origin of every tensor: node outputs from their node's metadata, inputs and initializers by name."""
        found: dict[str, Origin] = {value.name: Origin(op="input") for value in self.proto.graph.input}
        found |= {t.name: Origin(module=t.name, op="initializer") for t in self.proto.graph.initializer}
        for node in iterate_nodes(self.proto.graph):
            origin = origin_of(node)
            found.update((name, origin) for name in node.output if name)
        return found

    @property
    def weight_bytes(self) -> int:
        """Total size of the initializers in bytes, shared ones counted once."""
        inline = sum(len(t.raw_data) for t in self.proto.graph.initializer)
        return inline + sum(w.nbytes for w in self.weights.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a standard .onnx file; weights go into ``<name>.data`` beside it where they exceed 1 GiB.

        Raises:
            ModelFileError: the file cannot be written.
        """
        path = Path(path)
        model = ir.from_proto(self.proto)
        for name, weight in self.weights.items():
            model.graph.initializers[name].const_value = weight
        try:
            if self.weight_bytes > 1 << 30:
                ir.save(model, path, external_data=path.name + ".data")
            else:
                ir.save(model, path)
        except OSError as error:
            raise ModelFileError(f"Cannot write {path}: {error}") from error


def origin_of(node: onnx.NodeProto) -> Origin:
    """The origin stored in a node's metadata; for a node without one, its op type alone."""
    for entry in node.metadata_props:
        if entry.key == ORIGIN_KEY:
            return Origin.from_metadata(entry.value)
    return Origin(op=f"{node.domain}::{node.op_type}" if node.domain else node.op_type)


def iterate_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, those of its subgraphs (If, Loop, Scan) included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from iterate_nodes(attribute.g)
            for subgraph in attribute.graphs:
                yield from iterate_nodes(subgraph)


def make_stand_in(name: str, weight: ir.TensorProtocol) -> onnx.TensorProto:
    """The external initializer that stands for a weight in the proto."""
    tensor = onnx.TensorProto(
        name=name, data_type=int(weight.dtype), dims=list(weight.shape.numpy()), data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=EXTERNAL_LOCATION)
    return tensor
