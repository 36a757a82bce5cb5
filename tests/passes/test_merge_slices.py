"""MergeSlices."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from trtbridge.passes import Pipeline
from trtbridge.passes.merge_slices import MergeSlices

X = np.random.default_rng(0).standard_normal((3, 9, 7)).astype(np.float32)
BOUNDS = "".join(
    f", int64[1] {name} = {{{value}}}"
    for name, value in {
        "i0": 0, "i1": 1, "i2": 2, "i3": 3, "i4": 4, "i8": 8, "i9": 9, "end": 2**63 - 1, "m1": -1, "m2": -2, "m4": -4,
        "first": -(2**63) + 1,
    }.items()
)  # fmt: skip
PIECES = {
    "all": ("a = Slice(x, i0, i4, i1)  b = Slice(x, i4, end, i1)  c = Concat<axis = 1>(a, b)", []),
    "a part": ("a = Slice(x, i1, i4, i1)  b = Slice(x, i4, i8, i1)  c = Concat<axis = -2>(a, b)", ["Slice"]),
    "three": (
        "a = Slice(x, i1, i2, i1)  b = Slice(x, i2, i4, i1)  d = Slice(x, i4, i8, i1)  c = Concat<axis = 1>(a, b, d)",
        ["Slice"],
    ),
    "from the end": ("a = Slice(x, i0, m4, i1)  b = Slice(x, m4, end, i1)  c = Concat<axis = 1>(a, b)", []),
    "among others": ("a = Slice(x, i0, i4, i1)  b = Slice(x, i4, i8, i1)  c = Concat<axis = 1>(x, a, b, x)",
                     ["Slice", "Concat"]),
    "all among others": ("a = Slice(x, i0, i4, i1)  b = Slice(x, i4, end, i1)  c = Concat<axis = 1>(x, a, b)",
                         ["Concat"]),
    "split": ("a, b, d = Split<axis = -2, num_outputs = 3>(x)  c = Concat<axis = 1>(a, b, d)", []),
    "split among others": ("a, b = Split<axis = 1, num_outputs = 2>(x)  c = Concat<axis = 1>(x, a, b)", ["Concat"]),
}  # fmt: skip


def _model(tools, text, batch="3", size="9"):
    head = f"g (float[{batch},{size},7] x) => (float[A,B,C] y) <{BOUNDS[2:]}> "
    return tools.model(f"{head} {{ {text}  y = Neg(c) }}")


@pytest.mark.parametrize("size", ["9", "M"])
@pytest.mark.parametrize("name", PIECES)
def test_pieces(tools, name, size):
    text, ops = PIECES[name]
    result = tools.apply(MergeSlices(), _model(tools, text, "N", size), rewrites=1, feeds={"x": X})
    assert tools.ops(result) == [*ops, "Neg"]


NEAR_MISSES = {
    "a gap": ("a = Slice(x, i0, i3, i1)  b = Slice(x, i4, end, i1)  c = Concat<axis = 1>(a, b)", None),
    "swapped": ("b = Slice(x, i0, i4, i1)  a = Slice(x, i4, end, i1)  c = Concat<axis = 1>(a, b)", None),
    "another axis": ("a = Slice(x, i0, i4, i1)  b = Slice(x, i4, i8, i1)  c = Concat<axis = 2>(a, b)", None),
    "may overlap": ("a = Slice(x, i2, m4, i1)  b = Slice(x, m4, end, i1)  c = Concat<axis = 1>(a, b)", None),
    "by two": ("a = Slice(x, i0, i4, i1, i2)  b = Slice(x, i4, end, i1)  c = Concat<axis = 1>(a, b)", None),
    "split out of order": ("a, b = Split<axis = 1, num_outputs = 2>(x)  c = Concat<axis = 1>(b, a)", None),
    "half a split": ("a, b, d = Split<axis = 1, num_outputs = 3>(x)  c = Concat<axis = 1>(a, b)", None),
    "read elsewhere": (
        "a = Slice(x, i0, i4, i1)  b = Slice(x, i4, i8, i1)  d = Concat<axis = 1>(x, a, b)  e = Slice(d, i0, i4, i1)  "
        "c = Add(a, e)", "has other readers"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_pieces_left(tools, name):
    text, reason = NEAR_MISSES[name]
    tools.apply(MergeSlices(), _model(tools, text, size="M"), rewrites=0, refused=reason)


def test_sizes_at_which_pieces_are_cut(tools):
    # The same graph at every size, also where the end falls inside a piece or before it.
    text = "a = Slice(x, i1, i4, i1)  b = Slice(x, i4, i8, i1)  c = Concat<axis = 1>(a, b)"
    for size in range(1, 11):
        feeds = {"x": np.arange(3 * size * 7, dtype=np.float32).reshape(3, size, 7)}
        tools.apply(MergeSlices(), _model(tools, text, size="M"), rewrites=1, feeds=feeds)


@pytest.mark.parametrize("size", ["9", "M"])
def test_other_axes(tools, size):
    text = "a = Slice(x, i1, i8, i1)  c = Slice(a, m4, m1, m1, i2)"
    result = tools.apply(MergeSlices(), _model(tools, text, size=size), rewrites=1, feeds={"x": X})
    assert tools.ops(result) == ["Slice", "Neg"]


def test_same_axis_of_dynamic_size(tools):
    text = "a = Slice(x, i1, i8, i1)  c = Slice(a, i2, end, i1)"
    tools.apply(MergeSlices(), _model(tools, text, size="M"), rewrites=1, feeds={"x": X})
    text = "a = Slice(x, i1, m1, i1)  c = Slice(a, i2, end, i1)"
    tools.apply(MergeSlices(), _model(tools, text, size="M"), rewrites=0, refused="do not all count from the front")


CUTS = [(0, 9, 1), (1, 8, 1), (-4, 2**63 - 1, 1), (0, -2, 2), (8, -(2**63) + 1, -1), (-1, 2, -2), (5, 3, 1), (2, 3, 1)]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(CUTS, CUTS)))
def test_every_pair_of_cuts(tools, first, second, sized):
    names = [f"{part}{index}" for index in (1, 2) for part in ("s", "e", "t")]
    constants = ", ".join(f"int64[1] {n} = {{{v}}}" for n, v in zip(names, (*first, *second), strict=True))
    model = tools.model(
        f"g (float[{'9' if sized else 'M'}] x) => (float[A] y) <{constants}, int64[1] ax = {{0}}> "
        "{ a = Slice(x, s1, e1, ax, t1)  y = Slice(a, s2, e2, ax, t2) }"
    )
    feeds = {"x": np.arange(9, dtype=np.float32)}
    result = Pipeline((MergeSlices(),)).run(model, {}, check=feeds, tolerance=0.0)
    forward = first[2] == second[2] == 1 and min(first + second) >= 0
    assert result.report.rewrites == (1 if sized or forward else 0)


def test_output_keeps_its_name_and_first_its_readers(tools):
    model = tools.model(f"g (float[3,9,7] x) => (float[3,4,7] z, float[3,4,1] y) <{BOUNDS[2:]}> "
                        "{ z = Slice(x, i0, i4, i1)  y = Slice(z, i0, i1, i2) }")  # fmt: skip
    result = tools.apply(MergeSlices(), model, rewrites=1, feeds={"x": X})
    assert [node.input[0] for node in result.proto.graph.node] == ["x", "x"]


def test_slice_of_opset_9_stays(tools):
    model = tools.model(
        "g (float[9] x) => (float[A] y) "
        "{ a = Slice<starts = [1], ends = [8]>(x)  y = Slice<starts = [1], ends = [3]>(a) }",
        opset=9,
    )
    tools.apply(MergeSlices(), model, rewrites=0)


def test_shape_of_a_grown_piece(tools):
    text = "a = Slice(x, i0, i4, i1)  b = Slice(x, i4, i8, i1)  c = Concat<axis = 1>(x, a, b)"
    result = tools.apply(MergeSlices(), _model(tools, text), rewrites=1, feeds={"x": X})
    info = next(value for value in result.proto.graph.value_info if value.name == "a")
    assert [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [3, 8, 7]
    onnx.shape_inference.infer_shapes(result.proto, strict_mode=True)
