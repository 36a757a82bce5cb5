"""MergeCasts."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from trtbridge.passes.merge_casts import MergeCasts, loses_nothing

X = np.array([[1.5, -0.0, 65504.0, 2.0**-24], [np.inf, -np.inf, np.nan, 7.0]], np.float32)
T = onnx.TensorProto
TYPES = [T.BOOL, T.UINT8, T.UINT16, T.UINT32, T.INT8, T.INT16, T.INT32, T.INT64, T.FLOAT16, T.FLOAT, T.DOUBLE]


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        ("a = Cast<to = 1>(x)  b = Cast<to = 10>(a)  c = Neg(b)", ["Neg"]),
        ("a = Cast<to = 1>(x)  c = Cast<to = 16>(a)", ["Cast"]),
        ("a = Cast<to = 1>(x)  d = Cast<to = 11>(a)  c = Neg(d)", ["Cast", "Neg"]),
        ("a = Cast<to = 1>(x)  t = Transpose(a)  b = Cast<to = 10>(t)  c = Neg(b)",
         ["Transpose", "Neg"]),
        ("a = Cast<to = 1>(x)  r = Reshape(a, s)  t = Slice(r, z, o, z)  b = Cast<to = 10>(t)  "
         "c = Neg(b)", ["Reshape", "Slice", "Neg"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", ["2,4", "N,4"])
def test_merges(tools, text, ops, shape):
    model = tools.model(
        f"g (float16[{shape}] x) => (float[A] y) <int64[2] s = {{4, 2}}, int64[1] z = {{0}}, int64[1] o = {{1}}, "
        f"int64[1] f = {{-1}}> {{ {text}  e = Cast<to = 1>(c)  y = Reshape(e, f) }}"
    )
    result = tools.apply(MergeCasts(), model, rewrites=1, feeds={"x": X.astype(np.float16)})
    assert tools.ops(result) == [*ops, "Cast", "Reshape"]


NEAR_MISSES = {
    "float through half": ("a = Cast<to = 10>(x)  b = Cast<to = 1>(a)", "float16 does not hold every float"),
    "int32 through float": ("i = Cast<to = 6>(x)  a = Cast<to = 1>(i)  b = Cast<to = 6>(a)", "hold every int32"),
    "float through int": ("a = Cast<to = 7>(x)  b = Cast<to = 1>(a)", "hold every float"),
    "float through bool": ("a = Cast<to = 9>(x)  b = Cast<to = 1>(a)", "bool does not"),
    "moved to a third type": ("a = Cast<to = 1>(x)  t = Transpose(a)  b = Cast<to = 11>(t)", None),
    "read between": (
        "a = Cast<to = 1>(x)  t = Transpose(a)  b = Cast<to = 10>(t)  v = Exp(t)", None,
    ),
    "computed between": ("a = Cast<to = 1>(x)  t = Exp(a)  b = Cast<to = 10>(t)", None),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    text, reason = NEAR_MISSES[name]
    outputs = "float y, float[A,B] v" if "v =" in text else "float y"
    dtype = "float16" if reason is None else "float"
    model = tools.model(f"g ({dtype}[2,4] x) => ({outputs}) {{ {text}  c = Neg(b)  y = ReduceMax<keepdims = 0>(c) }}")
    result_type = 6 if name == "int32 through float" else 10 if reason is None else 1
    model.graph.output[0].type.tensor_type.elem_type = 11 if "third" in name else result_type
    tools.apply(MergeCasts(), model, rewrites=0, refused=reason)


def _extremes(element: int) -> np.ndarray:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array([info.min, info.max, info.max - 1, 0, 1, info.max // 2], dtype)
    info = np.finfo(dtype)
    return np.array([info.max, info.tiny, info.smallest_subnormal, info.eps, 1 + info.eps, -0.0, np.inf, np.nan], dtype)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(TYPES, 2)))
def test_loses_nothing(source, target):
    # The extreme values come back in just the cases that the table names; no other value is harder.
    values = _extremes(source)
    with np.errstate(all="ignore"):
        there = values.astype(onnx.helper.tensor_dtype_to_np_dtype(target))
        back = there.astype(values.dtype)
    # Integers are compared as Python's, for a float beyond the range comes back as anything.
    same = np.array_equal(values, back, equal_nan=values.dtype.kind == "f")
    if values.dtype.kind in "iu" and there.dtype.kind == "f":
        same = all(int(a) == int(b) if np.isfinite(b) else False for a, b in zip(values, there, strict=True))
    if values.dtype.kind in "iu" and there.dtype.kind in "iu":
        same = all(int(a) == int(b) for a, b in zip(values, there, strict=True))
    assert loses_nothing(source, target) == same


def test_output_keeps_its_name(tools):
    model = tools.model("g (float16[2] x) => (float16[2] y, float[2] z) { z = Cast<to = 1>(x)  y = Cast<to = 10>(z) }")
    result = tools.apply(MergeCasts(), model, rewrites=1, feeds={"x": np.array([1, 2], np.float16)})
    assert tools.ops(result) == ["Cast", "Identity"]
