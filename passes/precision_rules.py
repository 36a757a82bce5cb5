"""What each op and each constant says about working in 16 bits; `precision_judge` puts it together for a graph.

float16 has 11 significant bits, the largest value 65504 and the least normal one 2**-14 (IEEE 754-2008, binary16);
bfloat16 has float32's range and 8 significant bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .pipeline import Notes
from .surgery import bodies, element_type, is_standard, nbytes, sizes, type_name

FLOAT = onnx.TensorProto.FLOAT
TARGETS: Mapping[str, int] = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}

LARGEST: Mapping[int, float] = {
    onnx.TensorProto.FLOAT16: 65504.0,
    onnx.TensorProto.BFLOAT16: 3.3895313892515355e38,
}
"""The largest finite value of each type."""

SENSITIVE: Mapping[str, str] = {
    **dict.fromkeys(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization",
         "SimplifiedLayerNormalization", "LpNormalization", "MeanVarianceNormalization", "LRN"),
        "it sums squares",
    ),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Softplus", "Exp", "ReduceLogSumExp"), "it takes exponentials"),
    **dict.fromkeys(("Log", "ReduceLogSum"), "it takes a logarithm"),
    **dict.fromkeys(
        ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd", "CumSum", "CumProd"), "it sums or multiplies many"
    ),
    "Pow": "powers leave the range of 16 bits",
}  # fmt: skip
"""Ops of float values that stay in float32, with the reason."""

# Their cost is in the multiplications, and every backend accumulates these in float32.
COMPUTE = {"Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention"}
# They move values, so that they do in any type what they do in another.
MOVE = {
    "Reshape", "Transpose", "Slice", "Split", "Concat", "Gather", "GatherND", "GatherElements", "Squeeze", "Unsqueeze",
    "Flatten", "Expand", "Tile", "Identity", "Pad", "DepthToSpace", "SpaceToDepth", "ScatterND", "ScatterElements",
    "Trilu", "Dropout", "ReverseSequence", "Where",
}  # fmt: skip
# Elementwise or over few values: right in 16 bits where what they read is. Erf, Tanh and their like are bounded and
# flat where their argument is large, so that GELU may be computed in 16 bits.
FOLLOW = {
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sum", "Mean", "Max", "Min", "Sqrt", "Reciprocal", "Sign",
    "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish",
    "Swish", "Tanh", "Erf", "Gelu", "Mish", "Softsign", "Clip", "BatchNormalization", "MaxPool", "GlobalMaxPool",
    "AveragePool", "GlobalAveragePool", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "TopK", "ArgMax", "ArgMin",
    "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf", "Shape", "Size", "Resize",
    "Upsample", "Floor", "Ceil", "Round",
}  # fmt: skip
SUMMING = {"AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"}
MOST_SUMMED = 256
"""A mean or sum over more elements stays in float32."""

# What they read is an angle, a place or a count, for which 11 bits are too few.
EXACT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Sin": (0,), "Cos": (0,), "Tan": (0,), "GridSample": (1,), "Range": (0, 1, 2), "Floor": (0,), "Ceil": (0,),
    "Round": (0,), "Mod": (0, 1), "CumSum": (0,), "RoiAlign": (1,), "NonMaxSuppression": (0, 1),
}  # fmt: skip
# Inputs whose type is another than that of the data, so that they keep their float32 values.
_OTHER_TYPE: Mapping[str, tuple[int, ...]] = {
    "Resize": (1, 2, 3), "Upsample": (1,), "BatchNormalization": (1, 2, 3, 4), "Dropout": (1, 2),
}  # fmt: skip
BOUNDED = {"Sigmoid", "HardSigmoid", "Tanh", "Erf", "Sign", "Softsign", "Clip"}
"""Ops of FOLLOW whose result is of ordinary size even where they read the -3.4e38 of a mask."""
BOUNDS = {"Clip": (1, 2)}  # A bound beyond the type's range may become infinite: it bounds as much.
GROWING = {"Expand", "Tile", "Pad"}
_ROUNDING_LIMIT = 1e-2
INTEGERS = "it computes with positions, counts or a mask: 11 bits or less are too few for these"


INTEGER_TYPES = {
    onnx.TensorProto.BOOL, onnx.TensorProto.INT8, onnx.TensorProto.INT16, onnx.TensorProto.INT32,
    onnx.TensorProto.INT64, onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.UINT32,
    onnx.TensorProto.UINT64,
}  # fmt: skip


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether a tensor has a name and float32 values; not a sequence of such."""
    if not tensor.name or (isinstance(tensor, gs.Variable) and tensor.type != "tensor_type"):
        return False
    return element_type(tensor) == FLOAT


def is_cast(node: gs.Node) -> bool:
    return is_standard(node, "Cast")


def positions(node: gs.Node, opset: int, target: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which float32 inputs and outputs of a node take the type that the node works in.

    None where the op, in this opset, does not exist for that type.
    """
    if is_cast(node):
        return ((0,) if is_float32(node.inputs[0]) else ()), ()
    if not is_standard(node) or bodies(node):
        return (), ()
    found: list[tuple[int, ...]] = []
    for actual, number in ((node.inputs, 0), (node.outputs, 1)):
        formals = _formals(node.op, opset, target)
        if formals is None:
            return None
        chosen = []
        for position, tensor in enumerate(actual):
            if not is_float32(tensor) or (number == 0 and position in _OTHER_TYPE.get(node.op, ())):
                continue
            group = formals[number]
            is_fixed, is_allowed = group[min(position, len(group) - 1)] if group else (True, False)
            if is_fixed:
                continue
            if not is_allowed:
                return None
            chosen.append(position)
        found.append(tuple(chosen))
    return found[0], found[1]


@cache
def _formals(op: str, opset: int, target: int) -> tuple[tuple[tuple[bool, bool], ...], ...] | None:
    """For each formal input and output whether its type is fixed, and whether it may be the target."""
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    text = f"tensor({type_name(target)})"
    return tuple(
        tuple(("(" in formal.type_str, text in formal.types) for formal in group)
        for group in (schema.inputs, schema.outputs)
    )


def misfit(values: np.ndarray, target: int) -> tuple[bool, str]:
    """Whether finite values lie beyond the range of a 16-bit type, and why they do not fit it, "" where they do.

    They do not fit where the L2 norm of the rounding error is over 1 % of that of the values: 2**-11 or 2**-8 of each
    is usual, and more means that they are below the least normal number.
    """
    if values.dtype != np.float32 or not values.size:
        return False, ""
    dtype = np.dtype(np.float16) if target == TARGETS["float16"] else np.dtype(ml_dtypes.bfloat16)
    limit = LARGEST[target]
    largest, error, size = 0.0, 0.0, 0.0
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):  # so that no second copy of a large weight is made
        part = flat[start : start + _CHUNK]
        part = part[np.isfinite(part)]
        if not part.size:
            continue
        largest = max(largest, float(np.abs(part).max()))
        if largest > limit:
            return True, f"holds {largest:.3g}, beyond the range of {dtype.name}"
        wide = part.astype(np.float64)
        error += float(np.square(part.astype(dtype).astype(np.float64) - wide).sum())
        size += float(np.square(wide).sum())
    if error > _ROUNDING_LIMIT**2 * size:
        return False, f"loses {math.sqrt(error / size):.1%} in {dtype.name}: its values are too small"
    return False, ""


_CHUNK = 1 << 20


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, perhaps moved about."""
    for _ in range(8):
        if isinstance(tensor, gs.Constant):
            return True
        maker = tensor.inputs[0] if tensor.inputs else None
        if (
            maker is None
            or not is_standard(maker)
            or maker.op not in MOVE - {"Gather", "GatherND", "GatherElements", "Where"}
        ):
            return False
        tensor = maker.inputs[0]
    return False


def is_outer(node: gs.Node) -> bool:
    """Whether a product sums nothing, as that of positions and frequencies."""
    if is_standard(node, "MatMul"):
        shape = sizes(node.inputs[0])
        return bool(shape) and shape is not None and shape[-1] == 1
    if is_standard(node, "Einsum"):
        left, arrow, right = str(node.attrs.get("equation", "")).replace(" ", "").partition("->")
        return bool(arrow) and set(left) - {","} <= set(right)
    return False


def count_summed(node: gs.Node, notes: Notes) -> int | None:
    """How many values go into one result; None where that is not known."""
    if node.op == "AveragePool":
        return math.prod(int(size) for size in node.attrs["kernel_shape"])
    shape = sizes(node.inputs[0])
    if shape is None:
        return None
    axes = node.attrs.get("axes")
    if node.op == "GlobalAveragePool":
        axes = range(2, len(shape))
    elif axes is None and len(node.inputs) > 1 and node.inputs[1].name:
        tensor = node.inputs[1]
        if not isinstance(tensor, gs.Constant) or nbytes(tensor) > 1024:
            return None
        axes = [int(axis) for axis in notes.values(tensor).reshape(-1)]
    if axes is None:
        axes = () if node.attrs.get("noop_with_empty_axes") else range(len(shape))
    taken = [shape[axis] if -len(shape) <= axis < len(shape) else None for axis in axes]
    return None if any(size is None for size in taken) else math.prod(size for size in taken if size is not None)
