"""FuseRotaryEmbedding."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtbridge.passes.fuse_rotary_embedding import FuseRotaryEmbedding

ITEM = FuseRotaryEmbedding()
BOUNDS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}, int64[1] last = {9223372036854775807}, "
    "int64[1] axis = {3}, int64[1] minus = {-1}, int64[1] three = {3}, float scale = {1.5}, int64[1] two = {2}, "
    "int64[4] spread = {1, 1, 1, 2}, int64[3] flat = {0, 0, 8}, int64[4] whole = {0, 0, 0, 8}"
)
ANGLES = (
    "cat = Concat<axis=-1>(f, f)  cc = Cos(cat)  ss = Sin(cat)  cm = Mul(cc, scale)  sm = Mul(scale, ss)  "
    "c = Unsqueeze(cm, one)  s = Unsqueeze(sm, one)"
)
SLICES = "l = Slice(x, zero, four, axis, one)  r = Slice(x, four, last, axis, one)"
SPLIT = "l, r = Split<axis=-1, num_outputs=2>(x)"
TURN = "n = Neg(r)  t = Concat<axis=-1>(n, l)  p = Mul(x, c)  q = Mul(t, s)"
BODY = f"{ANGLES}  {SLICES}  {TURN}  y = Add(p, q)"


PAIRED_ANGLES = (
    "lift = Unsqueeze(f, three)  wide = Expand(lift, spread)  pairs = Reshape(wide, flat)  cc = Cos(pairs)  "
    "ss = Sin(pairs)  cm = Mul(cc, scale)  sm = Mul(scale, ss)  c = Unsqueeze(cm, one)  s = Unsqueeze(sm, one)"
)
STACK = (
    "l = Slice(x, zero, last, axis, two)  r = Slice(x, one, last, axis, two)  n = Neg(r)  nl = Unsqueeze(n, four)  "
    "el = Unsqueeze(l, minus)  st = Concat<axis=-1>(nl, el)  t = Reshape(st, whole)  p = Mul(x, c)  q = Mul(t, s)"
)
PAIRS = f"{PAIRED_ANGLES}  {STACK}  y = Add(p, q)"


def _model(tools, body=BODY, x="B,3,5,8", f="B,5,4", opset=23, dtype="float", outputs=""):
    return tools.model(f"g ({dtype}[{x}] x, float[{f}] f) => ({dtype}[{x}] y{outputs}) <{BOUNDS}> {{ {body} }}", opset)


def _feeds(batch=2, samples=2, length=5):
    random = np.random.default_rng(0)
    x = random.standard_normal((batch, 3, length, 8)).astype(np.float32)
    return {"x": x, "f": random.uniform(0, 3, (samples, length, 4)).astype(np.float32)}


@pytest.mark.parametrize(
    ("x", "f", "samples", "more"),
    [
        ("B,3,5,8", "B,5,4", 2, []),
        ("2,3,5,8", "2,5,4", 2, []),
        ("B,3,T,8", "B,T,4", 2, []),
        ("2,3,T,8", "1,T,4", 1, ["Expand"]),
        ("B,3,T,8", "1,T,4", 1, ["Shape", "Concat", "Expand"]),
    ],
)
def test_fuses(tools, x, f, samples, more):
    result = tools.apply(ITEM, _model(tools, x=x, f=f), rewrites=1, feeds=_feeds(samples=samples), tolerance=1e-6)
    found = [op for op in tools.ops(result) if op not in ("Concat", "Cos", "Sin", "Mul", "Unsqueeze")]
    assert found.count("RotaryEmbedding") == 1
    assert found.count("Slice") == 2  # a half of cos, and one of sin
    assert found.count("Expand") == 2 * ("Expand" in more)
    assert found.count("Shape") == 2 * ("Shape" in more)
    assert not {"Neg", "Split", "Add"} & set(found)
    node = result.proto.graph.node[-1]
    assert (node.op_type, node.input[0], list(node.output), list(node.attribute)) == ("RotaryEmbedding", "x", ["y"], [])


@pytest.mark.parametrize(
    "body",
    [
        BODY.replace("Add(p, q)", "Add(q, p)").replace("Mul(t, s)", "Mul(s, t)").replace("Mul(x, c)", "Mul(c, x)"),
        BODY.replace(SLICES, SPLIT),
        BODY.replace("axis, one", "minus, one").replace("axis=-1", "axis=-1"),
    ],
)
def test_other_forms(tools, body):
    tools.apply(ITEM, _model(tools, body), rewrites=1, feeds=_feeds(), tolerance=1e-6)


def test_queries_and_keys_share_their_angles(tools):
    again = BODY.replace("y = ", "z = ").replace(ANGLES, "")
    for name in ("l", "r", "n", "t", "p", "q"):
        again = (
            again.replace(f"{name} =", f"{name}2 =").replace(f"({name}", f"({name}2").replace(f" {name})", f" {name}2)")
        )
    model = _model(tools, f"{BODY}  {again}", f="1,5,4", outputs=", float[B,3,5,8] z")
    result = tools.apply(ITEM, model, rewrites=2, feeds=_feeds(samples=1), tolerance=1e-6)
    ops = tools.ops(result)
    assert (ops.count("RotaryEmbedding"), ops.count("Slice"), ops.count("Expand")) == (2, 2, 2)


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (1, 1, 5, 8)])
def test_constant_angles(tools, shape):
    angles = np.tile(np.random.default_rng(1).uniform(0, 3, (5, 4)), 2).reshape(shape).astype(np.float32)
    model = _model(tools, f"{SLICES}  {TURN}  y = Add(p, q)  unused = Neg(f)")
    for name, values in (("c", np.cos(angles)), ("s", np.sin(angles))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model = onnx.shape_inference.infer_shapes(model)
    result = tools.apply(ITEM, model, rewrites=1, feeds=_feeds(), tolerance=1e-6)
    assert [a.dims[:] for a in result.proto.graph.initializer if a.name.endswith("_half")] == [[1, 5, 4]] * 2

    next(t for t in model.graph.initializer if t.name == "s").raw_data = np.arange(40, dtype=np.float32).tobytes()
    tools.apply(ITEM, model, rewrites=0, refused="'s' is not seen to be the same for all heads and in both halves")


@pytest.mark.parametrize(
    ("x", "f", "samples", "more"),
    [
        ("2,3,5,8", "2,5,4", 2, []),
        ("B,3,T,8", "B,T,4", 2, []),
        ("B,3,5,8", "1,5,4", 1, ["Shape", "Concat", "Expand"]),
    ],
)
def test_fuses_neighbours(tools, x, f, samples, more):
    result = tools.apply(ITEM, _pairs(tools, x=x, f=f), rewrites=1, feeds=_feeds(samples=samples), tolerance=1e-6)
    node = result.proto.graph.node[-1]
    assert (node.op_type, node.input[0], list(node.output)) == ("RotaryEmbedding", "x", ["y"])
    assert [(a.name, a.i) for a in node.attribute] == [("interleaved", 1)]
    ops = tools.ops(result)
    assert (ops.count("Slice"), ops.count("Expand")) == (2, 1 + 2 * ("Expand" in more))
    assert not {"Neg", "Add"} & set(ops)


def _pairs(tools, body=PAIRS, **more):
    """A model with neighbours; its shapes as FoldShapes leaves them."""
    model = _model(tools, body, **more)
    known = {value.name: value for value in (*model.graph.input, *model.graph.value_info)}
    for name, like in (("pairs", "f"), ("t", "x")):
        if name not in known:
            continue
        dims = known[name].type.tensor_type.shape.dim
        for size, wanted in zip(dims, known[like].type.tensor_type.shape.dim[: len(dims) - 1], strict=False):
            size.CopyFrom(wanted)
    return model


def test_constant_angles_of_neighbours(tools):
    angles = np.repeat(np.random.default_rng(1).uniform(0, 3, (5, 4)), 2, -1).astype(np.float32)
    model = _model(tools, f"{STACK}  y = Add(p, q)  unused = Neg(f)", x="2,3,5,8")
    for name, values in (("c", np.cos(angles)), ("s", np.sin(angles))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model = onnx.shape_inference.infer_shapes(model)
    result = tools.apply(ITEM, model, rewrites=1, feeds=_feeds(), tolerance=1e-6)
    half = next(a for a in result.proto.graph.initializer if a.name == "c_half")
    assert np.array_equal(onnx.numpy_helper.to_array(half), np.cos(angles)[None, :, ::2])

    tiled = np.tile(angles[:, ::2], 2)  # by halves, where neighbours are turned
    next(t for t in model.graph.initializer if t.name == "s").raw_data = np.sin(tiled).tobytes()
    tools.apply(ITEM, model, rewrites=0, refused="'s' is not seen to be the same for all heads and for neighbours")


PAIRED_NEAR_MISSES = {
    "the other way round": (PAIRS.replace("(nl, el)", "(el, nl)"), None),
    "odd twice": (PAIRS.replace("Slice(x, zero, last", "Slice(x, one, last"), None),
    "side by side": (PAIRS.replace("axis=-1>(nl, el)", "axis=3>(nl, el)"), None),
    "angles by halves": (PAIRS.replace(PAIRED_ANGLES, ANGLES), "for neighbours"),
    "halves with angles of neighbours": (BODY.replace(ANGLES, PAIRED_ANGLES), "in both halves"),
}


@pytest.mark.parametrize("name", PAIRED_NEAR_MISSES)
def test_leaves_neighbours(tools, name):
    body, reason = PAIRED_NEAR_MISSES[name]
    tools.apply(ITEM, _pairs(tools, body), rewrites=0, refused=reason)


NEAR_MISSES = {
    "halves that differ": (BODY.replace("Concat<axis=-1>(f, f)", "Concat<axis=-1>(f, h)").replace(
        ANGLES[:3], "h = Neg(f)  cat", 1), "in both halves"),
    "the other way round": (BODY.replace("n = Neg(r)", "n = Neg(l)").replace("(n, l)", "(n, r)"), None),
    "no minus": (BODY.replace("n = Neg(r)", "n = Abs(r)"), None),
    "another difference": (BODY.replace("y = Add", "y = Sub"), None),
    "unequal pieces": (BODY.replace("zero, four", "zero, three").replace("four, last", "three, last"), None),
    "another tensor": (BODY.replace("p = Mul(x, c)", "w = Abs(x)  p = Mul(w, c)"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_leaves(tools, name):
    body, reason = NEAR_MISSES[name]
    tools.apply(ITEM, _model(tools, body), rewrites=0, refused=reason)


@pytest.mark.parametrize("inner", ["l", "t", "p"])
def test_part_read_elsewhere_stays(tools, inner):
    size = 4 if inner == "l" else 8
    model = _model(tools, f"{BODY}  w = Abs({inner})", outputs=f", float[B,3,5,{size}] w")
    tools.apply(ITEM, model, rewrites=0, refused=f"'{inner}' inside it is read elsewhere")


def test_sizes_that_are_not_known_to_fit_stay(tools):
    tools.apply(ITEM, _model(tools, x="B,3,T,8", f="B,S,4"), rewrites=0, refused="one row for each position")
    tools.apply(ITEM, _model(tools, x="B,3,T,8", f="C,T,4"), rewrites=0, refused="one row for each position")
    tools.apply(ITEM, _model(tools, opset=22), rewrites=0, refused="came with opset 23")
    odd = BODY.replace("one)  s", "zero)  s")  # an axis per sample, not per head
    tools.apply(ITEM, _model(tools, odd, x="2,3,5,8", f="3,5,4"), rewrites=0, refused="the same for all heads")


@pytest.mark.parametrize("body", [BODY, PAIRS], ids=["halves", "neighbours"])
@pytest.mark.parametrize(("dtype", "element"), [("float", 1), ("float16", 10), ("bfloat16", 16)])
def test_builds(tools, rtx_refusal, dtype, element, body):
    cast = body.replace("cc, scale)", "cc, scale)  ch = Cast<to = ELEMENT>(cm)").replace("Unsqueeze(cm", "Unsqueeze(ch")
    cast = cast.replace("scale, ss)", "scale, ss)  sh = Cast<to = ELEMENT>(sm)").replace("Unsqueeze(sm", "Unsqueeze(sh")
    model = _model(tools, cast.replace("ELEMENT", str(element)), x="2,3,5,8", f="1,5,4", dtype=dtype)
    result = tools.apply(ITEM, model, rewrites=1)
    assert "RotaryEmbedding" in tools.ops(result)
    assert rtx_refusal(result.proto) is None


def test_angles_of_another_type_stay(tools):
    wide = BODY.replace("l = Slice(x", "h = Cast<to = 10>(x)  l = Slice(h").replace("r = Slice(x", "r = Slice(h")
    wide = wide.replace("p = Mul(x, c)", "hc = Cast<to = 10>(c)  p = Mul(h, hc)").replace("Mul(t, s)", "Mul(t, hs)")
    wide = wide.replace("n = Neg", "hs = Cast<to = 10>(s)  n = Neg").replace(
        "y = Add(p, q)", "e = Add(p, q)  y = Cast<to = 1>(e)"
    )
    tools.apply(ITEM, _model(tools, wide), rewrites=0, refused="'hc' is not seen to be the same for all heads")
