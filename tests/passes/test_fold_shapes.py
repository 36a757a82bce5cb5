"""FoldShapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtbridge.passes.fold_shapes import FoldShapes

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
MASK = np.ones((2, 3), np.int64)
HEAD = """g (float[b,s,8] x, int64[b,s] mask) => (%s) <int64 i0 = {0}, int64[1] a0 = {0}, int64[1] a1 = {1},
int64[1] m1 = {-1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] eight = {8},
int64[2] two_four = {2, 4}, int64[1] end = {9223372036854775807}> """
SIZES = "h = Shape(mask)  d = Gather(h, i0)  b = Unsqueeze(d, a0)  e = Shape<start = 1>(x)  s = Slice(e, a0, a1, a0)  "
RESHAPES = {
    "heads": (SIZES + "t = Concat<axis = 0>(b, s, two_four)  r = Reshape(x, t)", [0, 0, 2, 4]),
    "heads, the rest": (SIZES + "t = Concat<axis = 0>(b, s, two, m1)  r = Reshape(x, t)", [0, 0, 2, 4]),
    "all in one": (SIZES + "t = Concat<axis = 0>(m1, eight)  r = Reshape(x, t)", None),
    "moved": (SIZES + "t = Concat<axis = 0>(b, eight, s)  r = Reshape(x, t)", [0, 8, -1]),
    "allowed zeros": (SIZES + "t = Concat<axis = 0>(b, s, two_four)  r = Reshape<allowzero = 1>(x, t)", [0, 0, 2, 4]),
    "squeezed": ("h = Shape<end = 1>(mask)  d = Squeeze(h)  c = Cast<to = 7>(d)  u = Unsqueeze(c, a0)  "
                 "t = Concat<axis = 0>(u, m1)  r = Reshape(x, t)", [0, -1]),
    "from the end": ("h = Shape(mask)  s = Slice(h, m1, end)  t = Concat<axis = 0>(m1, s, eight)  r = Reshape(x, t)",
                     [0, 0, 8]),
}  # fmt: skip


@pytest.mark.parametrize("name", RESHAPES)
def test_reshape(tools, name):
    text, expected = RESHAPES[name]
    model = tools.model(f"{HEAD % 'float[A] y'} {{ {text}  n = Neg(r)  y = Reshape(n, m1) }}")
    result = tools.apply(FoldShapes(), model, rewrites=0 if expected is None else 1, feeds={"x": X, "mask": MASK})
    if expected is not None:
        assert tools.initializer(result, "r_shape").tolist() == expected
        unread = "Unsqueeze" if "Unsqueeze" in text else "Shape"
        assert unread not in tools.ops(result) or name == "moved"


def test_sizes_at_which_dimensions_agree(tools):
    # A 0 copies the right dimension also where others happen to be as large.
    model = tools.model(f"{HEAD % 'float[A,B,C] y'} {{ {SIZES} t = Concat<axis = 0>(b, eight, s)  y = Reshape(x, t) }}")
    for b, s in [(1, 1), (8, 8), (3, 8), (8, 3), (1, 8)]:
        feeds = {"x": np.arange(b * s * 8, dtype=np.float32).reshape(b, s, 8), "mask": np.ones((b, s), np.int64)}
        tools.apply(FoldShapes(), model, rewrites=1, feeds=feeds)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # Two symbols that the input has elsewhere.
        (SIZES + "t = Concat<axis = 0>(s, b, eight)  r = Reshape(x, t)", "does not follow"),
        # What is not made of shapes is not known.
        ("h = Shape(mask)  k = Add(h, h)  t = Concat<axis = 0>(k, m1)  r = Reshape(x, t)", None),
        (SIZES + "t = Concat<axis = 0>(b, s, a0)  r = Reshape(x, t)", "does not follow"),
    ],
)
def test_left(tools, text, reason):
    model = tools.model(f"{HEAD % 'float y'} {{ {text}  y = ReduceSum<keepdims = 0>(r) }}")
    tools.apply(FoldShapes(), model, rewrites=0, refused=reason)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("b, s, eight", [1, 1, 8]), ("four, b, s, eight", [4, 1, 1, 8]), ("b, s, a1", [1, 1, 1])],
)
def test_expand(tools, shape, expected):
    body = f"{SIZES} t = Concat<axis = 0>({shape})  r = Expand(x, t)  y = Neg(r)"
    dims = "A,B,C,D" if "four" in shape else "A,B,C"
    model = tools.model(f"{HEAD % f'float[{dims}] y'} {{ {body} }}")
    result = tools.apply(FoldShapes(), model, rewrites=1, feeds={"x": X, "mask": MASK})
    assert tools.initializer(result, "r_shape").tolist() == expected


def test_expand_that_makes_a_dimension_stays(tools):
    body = f"{SIZES} t = Concat<axis = 0>(s, b, s, eight)  r = Expand(x, t)  y = Neg(r)"
    tools.apply(FoldShapes(), tools.model(f"{HEAD % 'float[A,B,C,D] y'} {{ {body} }}"), rewrites=0)


def test_shape_of_the_result_is_written_down(tools):
    body = f"{SIZES} t = Concat<axis = 0>(m1, s, four)  r = Reshape(x, t)  u = Transpose(r)  y = Neg(u)"
    model = tools.model(f"{HEAD % 'float[A,B,C] y'} {{ {body} }}")
    del model.graph.value_info[:]
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, None))
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("u", onnx.TensorProto.FLOAT, None))
    result = tools.apply(FoldShapes(), model, rewrites=1, feeds={"x": X, "mask": MASK})
    shapes = {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in result.proto.graph.value_info
    }
    assert shapes["r"] == [0, "s", 4]
    assert shapes["u"] == [4, "s", 0]


def test_arithmetic_that_others_read_stays(tools):
    model = tools.model(
        f"{HEAD % 'float[A,B,C,D] y, int64[4] t'} {{ {SIZES} t = Concat<axis = 0>(b, s, two_four)  y = Reshape(x, t) }}"
    )
    result = tools.apply(FoldShapes(), model, rewrites=1, feeds={"x": X, "mask": MASK})
    assert tools.ops(result) == ["Shape", "Gather", "Unsqueeze", "Shape", "Slice", "Concat", "Reshape"]


def test_branch_reads_sizes_from_outside(tools):
    model = tools.model(
        f"""{(HEAD % "float[A,B,C,D] y").replace("mask)", "mask, bool c)", 1)} {{ {SIZES}
        y = If<then_branch = f () => (float[A,B,C,D] to) {{ t = Concat<axis = 0>(b, s, two_four)  to = Reshape(x, t) }},
               else_branch = g () => (float[A,B,C,D] eo)
                   {{ u = Concat<axis = 0>(b, s, a1, m1)  eo = Reshape(x, u) }}>(c) }}"""
    )
    feeds = {"x": X, "mask": MASK, "c": np.array(False)}
    tools.apply(FoldShapes(), model, rewrites=2, feeds=feeds)


def test_declared_shape_of_an_output_stays(tools):
    body = f"{SIZES} t = Concat<axis = 0>(b, s, two_four)  y = Reshape(x, t)"
    model = tools.model(f"{HEAD % 'float[P,Q,R,T] y'} {{ {body} }}")
    model.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    result = tools.apply(FoldShapes(), model, rewrites=1, feeds={"x": X, "mask": MASK})
    assert result.proto.graph.output[0] == model.graph.output[0]
