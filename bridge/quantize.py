"""Products that read 8-bit values: explicit QuantizeLinear and DequantizeLinear nodes, for TensorRT to fuse.

ONNX Runtime's quantizer computes scales and weights and writes the nodes; which tensors, this module decides. TensorRT
wants the pairs on what products read and not on what they make, no bias quantized, zero points 0, and the tensor that
is added to the result of a convolution quantized too, as the sum is then part of the convolution's kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from ..errors import OptionError
from ..passes.exchange import stand_in_name
from .calibration import TensorRange
from .model import INLINE_LIMIT_BYTES, ORIGIN_KEY, OnnxModel, iterate_nodes, make_stand_in, origin_of
from .ort_quantizer import PRODUCTS, run_quantizer
from .precision_report import KeptNode

LARGEST_FLOAT8 = 448.0
"""Of float8e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433)."""
LARGEST_INT8 = 127.0

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
_MOVING = {"Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Identity",
           "Cast"}  # fmt: skip
_FIRST_OPSET = {"int8": 13, "fp8": 19}
_FIRST_OPSET_OF_16_BIT_SCALES = 19
_MOST_WEIGHT_BYTES = (2 << 30) - (64 << 20)
_SUFFIX = "_read_in_8_bits"
_LEAST_FLOAT16 = np.float16(2.0**-24)


@dataclass(frozen=True)
class Quantized:
    """What became of a model.

    Attributes:
        model: with the new nodes.
        products: names of the nodes that read 8-bit values now.
        unquantized: other products, with the reason.
    """

    model: OnnxModel
    products: frozenset[str]
    unquantized: tuple[KeptNode, ...]


def quantize(model: OnnxModel, ranges: Mapping[str, TensorRange], kind: str, excluded: Mapping[str, str]) -> Quantized:
    """Let the products of a model read 8-bit values.

    Scales are symmetric: the largest magnitude over 127 (or 448), for weights of each channel that comes out, for other
    tensors of all of it. What reads quantized values already stays as it is.

    Args:
        model: float32 or mixed; weights of products are constants that they read directly, as `PrepareQuantization`
            leaves them; node names are unique.
        ranges: of its tensors.
        kind: "int8" or "fp8".
        excluded: why products are left out, by op type, node name, or a tensor that they make.

    Raises:
        OptionError: the model's opset is too old, or its weights are too large for one proto.
    """
    _check_opset(model.proto, kind)
    choice = _Choice(model, ranges, excluded)
    choice.make()
    if not choice.inputs:
        return Quantized(model, frozenset(), tuple(choice.reasons))
    proto = _write(model, choice)
    if kind == "fp8":
        _retarget(proto, model)
    _restore(proto, model.proto)
    return Quantized(_with_stand_ins(model, proto), frozenset(choice.inputs), tuple(choice.reasons))


def quantized_nodes(proto: onnx.ModelProto) -> dict[str, frozenset[str]]:
    """For each product that reads 8-bit values, and each Q/DQ node ahead of one, the products that it is about."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, frozenset[str]] = {}
    for node in proto.graph.node:
        pairs = [makers[name] for name in node.input if name in makers and makers[name].op_type == "DequantizeLinear"]
        if node.op_type not in PRODUCTS or not pairs:
            continue
        pairs += [q for dq in pairs if (q := makers.get(dq.input[0])) is not None and q.op_type == "QuantizeLinear"]
        for other in (node, *pairs):
            found[other.name] = found.get(other.name, frozenset()) | {node.name}
    return found


@dataclass
class _Choice:
    """Which tensors are quantized, for which nodes.

    Attributes:
        inputs: for each product, the positions of the inputs that it reads in 8 bits.
        residuals: for each Add behind a convolution, the position of the tensor that is added to its result.
        reasons: products that stay.
    """

    model: OnnxModel
    ranges: Mapping[str, TensorRange]
    excluded: Mapping[str, str]
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    residuals: dict[str, int] = field(default_factory=dict)
    reasons: list[KeptNode] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.proto.graph
        self.makers = {name: node for node in graph.node for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output, *graph.input)}
        self.types |= {name: tensor.data_type for name, tensor in self.constants.items()}

    def make(self) -> None:
        for node in self.model.proto.graph.node:
            if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx"):
                continue
            if self.types.get(node.input[0]) not in (*_FLOATS, onnx.TensorProto.BFLOAT16):
                continue
            if reason := self._refusal(node):
                self.reasons.append(KeptNode(node.op_type, node.output[0], reason, origin_of(node)))
            else:
                self.inputs[node.name] = (0, 1)
        self._choose_residuals()

    def range_of(self, name: str) -> TensorRange | None:
        """The range of an activation; of what only moves values, that of its source."""
        while name not in self.ranges:
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in _MOVING or maker.domain:
                return None
            name = maker.input[0]
        return self.ranges[name]

    def _refusal(self, node: onnx.NodeProto) -> str:
        for name in (node.op_type, node.name, *node.output):
            if name in self.excluded:
                return self.excluded[name]
        data, weight = node.input[0], node.input[1]
        if self.types[data] not in _FLOATS:
            return "the quantizer takes no bfloat16"
        if self.types.get(weight) != self.types[data]:
            return f"the type of {weight!r} is not known"
        if any(self.makers[name].op_type == "DequantizeLinear" for name in (data, weight) if name in self.makers):
            return "it reads quantized values already"
        if data in self.constants:
            return "its first input is a constant"
        if weight in self.constants:
            if len(self.constants[weight].dims) < 2:
                return "its weight is a vector"
        elif node.op_type != "MatMul":
            return "its weight is computed"
        if any(attribute.name == "beta" and attribute.f != 1 for attribute in node.attribute):
            return "it is scaled, which the quantizer does not keep"
        for name in (data, weight):
            if name in self.constants:
                continue
            seen = self.range_of(name)
            if seen is None:
                return f"the range of {name!r} was not measured"
            if not seen.finite or seen.largest == 0:
                return f"{name!r} was {'infinite or NaN' if not seen.finite else 'zero all over'} on the samples"
        return ""

    def _choose_residuals(self) -> None:
        """The other input of an Add that a quantized convolution alone feeds."""
        readers: dict[str, int] = {}
        for node in iterate_nodes(self.model.proto.graph):
            for name in node.input:
                readers[name] = readers.get(name, 0) + 1
        for node in self.model.proto.graph.node:
            if node.op_type != "Add" or node.domain or any(name in self.constants for name in node.input):
                continue
            is_product = [
                (maker := self.makers.get(name)) is not None
                and maker.op_type == "Conv"
                and maker.name in self.inputs
                and readers[name] == 1
                for name in node.input
            ]
            if not any(is_product) or node.name in self.excluded:
                continue
            position = 1 if is_product[0] else 0
            seen = self.range_of(node.input[position])
            if self.types.get(node.input[position]) in _FLOATS and seen and seen.finite and seen.largest > 0:
                self.residuals[node.name] = position


def _check_opset(proto: onnx.ModelProto, kind: str) -> None:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    graph = proto.graph
    narrow = any(v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16 for v in (*graph.value_info, *graph.input))
    first = max(_FIRST_OPSET[kind], _FIRST_OPSET_OF_16_BIT_SCALES if narrow else 0)
    if opset < first:
        raise OptionError(
            f"precision {kind!r} needs opset {first} for this model, which has {opset}: export it in a later one, or "
            "raise it with onnx.version_converter."
        )


def _write(model: OnnxModel, choice: _Choice) -> onnx.ModelProto:
    """The graph with int8 Q/DQ pairs ahead of what was chosen, by ONNX Runtime's quantizer.

    Every quantized tensor gets a name of its own for the nodes that read it in 8 bits, so that other readers keep what
    they read, and the weights of other nodes stay beside the proto.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph = proto.graph
    described = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    ranges: dict[str, tuple[np.float32, np.float32]] = {}
    size = 0
    copies: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        positions = choice.inputs.get(node.name) or ((p,) if (p := choice.residuals.get(node.name)) is not None else ())
        for position in positions:
            name = node.input[position]
            node.input[position] = own = name + _SUFFIX
            if own in done:
                continue
            done.add(own)
            if name in choice.constants:
                values = _values(model, choice.constants[name])
                size += values.nbytes
                if size > _MOST_WEIGHT_BYTES:
                    raise OptionError(
                        "The weights of all products are over 2 GB, more than ONNX Runtime's quantizer takes. Leave "
                        "some out with keep_fp32, or quantize the model before it is converted."
                    )
                graph.initializer.append(onnx.numpy_helper.from_array(values, own))
                continue
            seen = choice.range_of(name)
            assert seen is not None
            ranges[own] = (np.float32(-seen.largest), np.float32(seen.largest))
            copies.append(onnx.helper.make_node("Identity", [name], [own], own))
            value = onnx.ValueInfoProto()
            value.CopyFrom(described[name])
            value.name = own
            graph.value_info.append(value)
    graph.node.extend(copies)
    adds = {node.name: node for node in graph.node if node.name in choice.residuals}
    others = [adds[name].input[position] for name, position in choice.residuals.items()]
    result = run_quantizer(proto, ranges, list(choice.inputs), others)
    made = {node.name for node in copies}
    kept = [node for node in result.graph.node if node.name not in made]
    for node in kept:
        node.input[:] = [name.removesuffix(_SUFFIX) if name in made else name for name in node.input]
    _replace(result.graph.node, kept)
    _replace(result.graph.value_info, [value for value in result.graph.value_info if value.name not in done])
    _type_scales(result, {name: value.type.tensor_type.elem_type for name, value in described.items()})
    return result


def _type_scales(proto: onnx.ModelProto, types: Mapping[str, int]) -> None:
    """Give the scales of 16-bit tensors 16 bits: what DequantizeLinear makes has the type of its scale."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type != "QuantizeLinear" or types.get(node.input[0]) != onnx.TensorProto.FLOAT16:
            continue
        scale = constants.get(node.input[1])
        if scale is not None and scale.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(scale).astype(np.float16)
            scale.CopyFrom(onnx.numpy_helper.from_array(np.maximum(values, _LEAST_FLOAT16), scale.name))


def _values(model: OnnxModel, tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    if stand_in_name(tensor) is not None:
        return np.asarray(model.weights[tensor.name].numpy())
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _retarget(proto: onnx.ModelProto, model: OnnxModel) -> None:
    """Make float8e4m3fn of the quantizer's int8: scales, zero points, and weights from the values that they had."""
    old = {node.name for node in model.proto.graph.node}
    sources = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    pairs = [n for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.name not in old]
    for name in {node.input[1] for node in pairs}:
        scale = onnx.numpy_helper.to_array(constants[name])
        other = (scale.astype(np.float64) * (LARGEST_INT8 / LARGEST_FLOAT8)).astype(scale.dtype)
        other = np.maximum(other, _LEAST_FLOAT16.astype(scale.dtype))
        constants[name].CopyFrom(onnx.numpy_helper.from_array(other, name))
    for name in {node.input[2] for node in pairs}:
        constants[name].CopyFrom(_float8(np.zeros(tuple(constants[name].dims), np.float32), name))
    for node in pairs:
        name = node.input[0]
        if name not in constants:
            continue
        values = _values(model, sources[name.removesuffix("_quantized").removesuffix(_SUFFIX)]).astype(np.float32)
        scale = onnx.numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if scale.ndim:
            scale = scale.reshape([-1 if index == axis % values.ndim else 1 for index in range(values.ndim)])
        constants[name].CopyFrom(_float8(np.clip(values / scale, -LARGEST_FLOAT8, LARGEST_FLOAT8), name))


def _float8(values: np.ndarray[Any, Any], name: str) -> onnx.TensorProto:
    data = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
    return onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT8E4M3FN, list(values.shape), data, raw=True)


def _restore(proto: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Give new nodes the origin of the node that reads them, new tensors a type, and the model its own head again."""
    graph = proto.graph
    del proto.metadata_props[:]
    proto.metadata_props.extend(before.metadata_props)
    proto.producer_name, proto.producer_version = before.producer_name, before.producer_version
    old = {node.name for node in before.graph.node}
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    types = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    shapes = {tensor.name: tensor.dims for tensor in graph.initializer}
    elements = {tensor.name: tensor.data_type for tensor in graph.initializer}
    described: list[onnx.ValueInfoProto] = []
    for node in graph.node:
        if node.name in old or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        reader = readers[node.output[0]]
        while reader.name not in old:
            reader = readers[reader.output[0]]
        node.metadata_props.extend(entry for entry in reader.metadata_props if entry.key == ORIGIN_KEY)
        element = elements[node.input[2 if node.op_type == "QuantizeLinear" else 1]]
        if node.input[0] in types:
            value = onnx.ValueInfoProto()
            value.CopyFrom(types[node.input[0]])
            value.name = node.output[0]
            value.type.tensor_type.elem_type = element
        else:
            value = onnx.helper.make_tensor_value_info(node.output[0], element, list(shapes[node.input[0]]))
        types[value.name] = value
        described.append(value)
    graph.value_info.extend(described)


def _with_stand_ins(model: OnnxModel, proto: onnx.ModelProto) -> OnnxModel:
    """The model with large new constants beside the proto, and without the weights that nobody reads any more."""
    weights: dict[str, ir.TensorProtocol] = {}
    used = {name for node in iterate_nodes(proto.graph) for name in node.input}
    used |= {value.name for value in proto.graph.output}
    for node in iterate_nodes(proto.graph):
        for attribute in node.attribute:
            used |= {value.name for value in attribute.g.output}
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name not in used:
            continue
        if stand_in_name(tensor) is not None:
            weights[tensor.name] = model.weights[tensor.name]
        elif tensor.ByteSize() > INLINE_LIMIT_BYTES:
            weights[tensor.name] = ir.serde.TensorProtoTensor(tensor)
            tensor = make_stand_in(tensor.name, weights[tensor.name])
        kept.append(tensor)
    _replace(proto.graph.initializer, kept)
    inner = {name: weight for name, weight in model.weights.items() if name in used}
    return dataclasses.replace(model, proto=proto, weights={**inner, **weights})


def _replace(field_: Any, items: list[Any]) -> None:
    """Let a repeated field of a proto hold these, some of which it holds now."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field_[:]
    field_.extend(copies)
