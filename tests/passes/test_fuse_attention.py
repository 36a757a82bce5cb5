"""FuseAttention and raise_opset."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtbridge.errors import PassError
from trtbridge.passes import Pipeline, RemoveDeadNodes
from trtbridge.passes.fuse_attention import FuseAttention
from trtbridge.passes.opset import CHANGED, NEWEST, OLDEST, opset_of, raise_opset

RNG = np.random.default_rng(0)
B, H, L, S, D = 2, 4, 6, 9, 16
F16 = onnx.TensorProto.FLOAT16


def _random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


Q, K, V = _random(B, H, L, D), _random(B, H, S, D), _random(B, H, S, D)
KEEP = np.tril(np.ones((L, S), bool)).reshape(1, 1, L, S)  # no row is hidden altogether
BIAS = _random(1, H, L, S)
HEAD = "g (float[b,4,l,16] q, float[b,4,s,16] k, float[b,4,s,16] v{more}) => (float[b,4,l,16] y)"
CONSTANTS = """<float quarter = {0.25}, float half = {0.5}, float four = {4}, float[1] one = {0.25}, float zero = {0},
float low = {-3.4028235e38}, float hidden = {-inf}, float mild = {-100.0}>"""
SCALED = "t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t) c = Mul(s, quarter)"
END = "p = Softmax<axis=-1>(c) y = MatMul(p, v)"


def _model(tools, text, more="", head=HEAD, opset=23):
    return tools.model(f"{head.replace('{more}', more)} {CONSTANTS} {{ {text} }}", opset)


def _fuse(tools, model, feeds, *, rewrites=1, refused=None, weights=None, tolerance=2e-6):
    result = tools.apply(
        FuseAttention(), model, weights, rewrites=rewrites, feeds=feeds, refused=refused, tolerance=tolerance
    )
    return Pipeline((RemoveDeadNodes(),)).run(result.proto, result.weights)


def _attributes(result):
    node = next(node for node in result.proto.graph.node if node.op_type == "Attention")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


FORMS = {
    "scores multiplied": f"{SCALED} {END}",
    "scores divided": f"t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t) c = Div(s, four) {END}",
    "queries multiplied": f"a = Mul(q, quarter) t = Transpose<perm=[0,1,3,2]>(k) c = MatMul(a, t) {END}",
    "root on both": "a = Mul(q, half) t = Transpose<perm=[0,1,3,2]>(k) u = Mul(half, t) c = MatMul(a, u) " + END,
    "root ahead of the transpose": "a = Mul(q, half) u = Mul(k, half) t = Transpose<perm=[0,1,3,2]>(u) "
    f"c = MatMul(a, t) {END}",
    "einsum": 'a = Mul(q, quarter) c = Einsum<equation="bhid,bhjd->bhij">(a, k) p = Softmax<axis=-1>(c) '
    'y = Einsum<equation="bhij,bhjd->bhid">(p, v)',
    "axis counted from the front": f"{SCALED} p = Softmax<axis=3>(c) y = MatMul(p, v)",
    "identities": f"{SCALED} i = Identity(c) p = Softmax<axis=-1>(i) j = Identity(p) y = MatMul(j, v)",
}


@pytest.mark.parametrize("name", FORMS)
def test_fuses_every_form_without_a_mask(tools, name):
    result = _fuse(tools, _model(tools, FORMS[name]), {"q": Q, "k": K, "v": V})
    assert tools.ops(result) == ["Attention"]
    assert _attributes(result) == {}  # 0.25 is the default of 16 channels
    assert list(result.proto.graph.node[0].input) == ["q", "k", "v"]


def test_another_scale_is_written(tools):
    text = f"{SCALED} d = Mul(c, half) p = Softmax<axis=-1>(d) y = MatMul(p, v)"
    result = _fuse(tools, _model(tools, text), {"q": Q, "k": K, "v": V})
    assert _attributes(result) == {"scale": pytest.approx(0.125)}


FLOAT_MASK, BOOL_MASK = ", float[1,4,l,s] m", ", bool[1,1,l,s] m"
MASKS = {
    "added": (FLOAT_MASK, f"{SCALED} d = Add(c, m) p = Softmax<axis=-1>(d) y = MatMul(p, v)", BIAS),
    "added from the left": (FLOAT_MASK, f"{SCALED} d = Add(m, c) p = Softmax<axis=-1>(d) y = MatMul(p, v)", BIAS),
    "of two axes": (", float[l,s] m", f"{SCALED} d = Add(c, m) p = Softmax<axis=-1>(d) y = MatMul(p, v)", BIAS[0, 0]),
    "chosen": (BOOL_MASK, f"{SCALED} d = Where(m, c, low) p = Softmax<axis=-1>(d) y = MatMul(p, v)", KEEP),
    "chosen the other way": (
        BOOL_MASK, f"{SCALED} d = Where(m, hidden, c) p = Softmax<axis=-1>(d) y = MatMul(p, v)", ~KEEP,
    ),
    "chosen, then added": (
        BOOL_MASK, f"w = Where(m, zero, low) {SCALED} d = Add(c, w) p = Softmax<axis=-1>(d) y = MatMul(p, v)", KEEP,
    ),
    "guarded": (
        BOOL_MASK,
        f"w = Where(m, zero, low) {SCALED} d = Add(c, w) p = Softmax<axis=-1>(d) n = IsNaN(p) o = Where(n, zero, p) "
        "y = MatMul(o, v)",
        KEEP,
    ),
    "of a row": (", float[1,1,1,s] m", f"{SCALED} d = Add(c, m) p = Softmax<axis=-1>(d) y = MatMul(p, v)",
                 BIAS[:, :1, :1]),
    "two": (
        BOOL_MASK + ", float[1,4,1,s] n",
        f"{SCALED} a = Add(c, n) d = Where(m, a, low) p = Softmax<axis=-1>(d) y = MatMul(p, v)",
        KEEP,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_fuses_every_mask(tools, name):
    more, text, mask = MASKS[name]
    feeds = {"q": Q, "k": K, "v": V, "m": mask}
    if name == "two":
        feeds["n"] = BIAS[:, :, :1]
    result = _fuse(tools, _model(tools, text, more), feeds)
    assert tools.ops(result)[-1] == "Attention"
    assert "Softmax" not in tools.ops(result)
    assert ("Expand" in tools.ops(result)) is (name == "of a row")
    mask_name = result.proto.graph.node[-1].input[3]
    known = {v.name: v for v in (*result.proto.graph.value_info, *result.proto.graph.input)}
    assert len(known[mask_name].type.tensor_type.shape.dim) == 4
    assert _attributes(result) == {}


def test_rows_that_are_hidden_altogether_stay_zero_behind_a_guard(tools):
    text = (
        f"w = Where(m, zero, hidden) {SCALED} d = Add(c, w) p = Softmax<axis=-1>(d) n = IsNaN(p) "
        "o = Where(n, zero, p) y = MatMul(o, v)"
    )
    keep = KEEP.copy()
    keep[0, 0, 2] = False
    result = _fuse(tools, _model(tools, text, BOOL_MASK), {"q": Q, "k": K, "v": V, "m": keep})
    assert "Attention" in tools.ops(result)
    assert tools.ops(result)[-1] == "Where"


def test_a_row_without_a_key_is_a_mean_where_the_mask_is_finite(tools):
    keep = KEEP.copy()
    keep[0, 0, 2] = False
    _fuse(tools, _model(tools, MASKS["chosen"][1], BOOL_MASK), {"q": Q, "k": K, "v": V, "m": keep})


SQUARE = "g (float[b,4,l,16] q, float[b,4,l,16] k, float[b,4,l,16] v{more}) => (float[b,4,l,16] y)"
LOWER = "n = Shape<start=2,end=3>(k) h = Concat<axis=0>(n, n)"
CAUSAL = {
    "trilu of trues": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=0>(o, nought) {SCALED} d = Where(m, c, low)",
    "compared": f"{LOWER} o = Expand(unit, h) r = Trilu<upper=0>(o) e = Equal(r, zero) w = Where(e, low, zero) "
    f"{SCALED} d = Add(c, w)",
    "upper": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=1>(o, ahead) {SCALED} d = Where(m, hidden, c)",
    "triangle of -inf": f"{LOWER} o = Expand(hidden, h) w = Trilu<upper=1>(o, ahead) {SCALED} d = Add(c, w)",
    "not": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=1>(o, ahead) i = Not(m) u = Unsqueeze(i, both) "
    f"{SCALED} d = Where(u, c, low)",
}


PLACES = "a = Shape<start=2,end=3>(k) z = Squeeze(a) r = Range(nought, z, ahead) "
PLACES += "i = Unsqueeze(r, last) j = Unsqueeze(r, first) "
CHOSEN = f"{SCALED} d = Where(m, c, low)"
CAUSAL |= {
    "at most": f"{PLACES} m = LessOrEqual(j, i) {CHOSEN}",
    "at least": f"{PLACES} m = GreaterOrEqual(i, j) {CHOSEN}",
    "not more": f"{PLACES} e = Greater(j, i) m = Not(e) {CHOSEN}",
    "less than the next": f"{PLACES} e = Add(i, ahead) m = Less(j, e) {CHOSEN}",
    "distance": f"{PLACES} e = Sub(j, i) m = LessOrEqual(e, nought) {CHOSEN}",
    "more, hidden": f"{PLACES} m = Greater(j, i) {SCALED} d = Where(m, hidden, c)",
    "as a sum": f"{PLACES} m = LessOrEqual(j, i) w = Where(m, zero, low) {SCALED} d = Add(c, w)",
    "and true": f"{PLACES} e = LessOrEqual(j, i) m = And(yes, e) {CHOSEN}",
    "looked up": f"{PLACES} q4 = Unsqueeze(i, last) p4 = Add(r, two) e = GatherND(p4, q4) f = Unsqueeze(e, last) "
    f"g = Sub(f, two) h = Squeeze(g, last) m = LessOrEqual(j, h) {CHOSEN}",
    "differences of one": f"{PLACES} e = Concat<axis=1>(before, j) "
    "b = Add(a, f1) s0 = Slice(e, f0, a, f1, f1) s1 = Slice(e, f1, b, f1, f1) u = Sub(s1, s0) w = Equal(u, ahead) "
    "x = Not(w) g = Cast<to=7>(x) h = CumSum(g, ahead) t0 = Equal(h, nought) l0 = LessOrEqual(j, i) m = And(t0, l0) "
    f"{CHOSEN}",
}


def _square(tools, text, more=""):
    constants = CONSTANTS[:-1] + ", bool yes = {1}, float unit = {1}, int64 nought = {0}, int64 ahead = {1}, "
    constants += "int64 two = {2}, int64[2] both = {0, 1}, int64[1] last = {-1}, int64[1] first = {0}, "
    constants += "int64[1] f0 = {0}, int64[1] f1 = {1}, int64 three = {3}, int64[1,1] before = {-1}>"
    text = f"{SQUARE.replace('{more}', more)} {constants} {{ {text} p = Softmax<axis=-1>(d) y = MatMul(p, v) }}"
    return tools.model(text, 23)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mask_of_what_comes_later_is_an_attribute(tools, name):
    result = _fuse(tools, _square(tools, CAUSAL[name]), {"q": Q, "k": K[:, :, :L], "v": V[:, :, :L]})
    assert tools.ops(result) == ["Attention"]
    assert _attributes(result) == {"is_causal": 1}


@pytest.mark.parametrize("kind", ["added", "chosen", "chosen the other way"])
@pytest.mark.parametrize("length", [6, 40])
def test_a_constant_mask_of_what_comes_later_is_an_attribute(tools, kind, length):
    lower = np.tri(length, dtype=bool)[None, None]
    values = {"added": np.where(lower, 0, -np.inf).astype(np.float32), "chosen": lower, "chosen the other way": ~lower}
    step = {"added": "d = Add(c, m)", "chosen": "d = Where(m, c, low)", "chosen the other way": "d = Where(m, low, c)"}
    model = _square(tools, f"{SCALED} {step[kind]}", f", {'float' if kind == 'added' else 'bool'}[1,1,l,l] m")
    del model.graph.input[-1]
    weights = tools.stand_in(model, "m", values[kind])
    feeds = {name: _random(B, H, length, D) for name in "qkv"}
    result = _fuse(tools, model, feeds, weights=weights)
    assert _attributes(result) == {"is_causal": 1}
    assert len(result.proto.graph.node[-1].input) == 3


NO_CAUSE = {
    "one more": f"{PLACES} e = Add(i, ahead) m = LessOrEqual(j, e) {CHOSEN}",
    "a window": f"{PLACES} e = LessOrEqual(j, i) f = Sub(i, three) g = Greater(j, f) m = And(e, g) {CHOSEN}",
    "of the later": f"{PLACES} m = GreaterOrEqual(j, i) {CHOSEN}",
    "twice the distance": f"{PLACES} e = Mul(i, two) m = LessOrEqual(j, e) {CHOSEN}",
    "another start": f"{PLACES} e = Range(ahead, z, ahead) f = Slice(j, f1, a, f1, f1) h = LessOrEqual(f, e) "
    f"s1 = Unsqueeze(r, last) m = Less(j, s1) o = Or(m, yes) x = And(o, m) y0 = Not(x) {SCALED} d = Where(y0, c, low)",
    "one off": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=0>(o, ahead) {SCALED} d = Where(m, c, low)",
    "further up": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=1>(o, two) {SCALED} d = Where(m, hidden, c)",
    "the other way": f"{LOWER} o = Expand(yes, h) m = Trilu<upper=0>(o, nought) e = Not(m) f = Not(e) i = Not(f) "
    f"z = Trilu<upper=1>(o, nought) {SCALED} d = Where(z, c, low)",
}


@pytest.mark.parametrize("name", NO_CAUSE)
def test_another_triangle_is_a_mask(tools, name):
    result = _fuse(tools, _square(tools, NO_CAUSE[name]), {"q": Q, "k": K[:, :, :L], "v": V[:, :, :L]})
    assert _attributes(result) == {}
    assert len(result.proto.graph.node[-1].input) == 4


def test_a_triangle_over_other_keys_than_queries_is_a_mask(tools):
    text = "o = Expand(yes, h) m = Trilu<upper=0>(o, nought) " + SCALED + " d = Where(m, c, low)"
    text = f"n = Shape<start=2,end=3>(q) z = Shape<start=2,end=3>(k) h = Concat<axis=0>(n, z) {text}"
    constants = CONSTANTS[:-1] + ", bool yes = {1}, int64 nought = {0}>"
    head = HEAD.replace("{more}", "")
    model = tools.model(f"{head} {constants} {{ {text} p = Softmax<axis=-1>(d) y = MatMul(p, v) }}", 23)
    result = _fuse(tools, model, {"q": Q, "k": K, "v": V})
    assert len(result.proto.graph.node[-1].input) == 4


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_that_lets_everything_stay_is_dropped(tools, value):
    head = HEAD.replace("{more}", "")
    text = f"n = Shape(q) x = Slice(n, first, second) h = Concat<axis=0>(x, x) w = Expand(fill, h) {SCALED}"
    constants = CONSTANTS[:-1] + f", float fill = {{{value}}}, int64[1] first = {{0}}, int64[1] second = {{1}}>"
    text = text.replace("h = Concat<axis=0>(x, x) ", "h = Concat<axis=0>(x, units) ")
    constants = constants[:-1] + ", int64[3] units = {1, 1, 1}>"
    model = tools.model(f"{head} {constants} {{ {text} d = Add(c, w) p = Softmax<axis=-1>(d) y = MatMul(p, v) }}", 23)
    result = _fuse(tools, model, {"q": Q, "k": K, "v": V})
    assert (tools.ops(result) == ["Attention"]) is (value == 0)


def test_heads_that_are_repeated_are_shared(tools):
    head = "g (float[b,4,l,16] q, float[b,2,s,16] k, float[b,2,s,16] v) => (float[b,4,l,16] y)"
    constants = "<float quarter = {0.25}, int64[1] two = {2}, int64[5] times = {1,1,2,1,1}, int64[4] all = {0,4,-1,16}>"
    repeat = "{0}a = Unsqueeze({0}, two) {0}b = Expand({0}a, times) {0}c = Reshape({0}b, all) "
    text = repeat.format("k") + repeat.format("v")
    text += "t = Transpose<perm=[0,1,3,2]>(kc) s = MatMul(q, t) c = Mul(s, quarter) p = Softmax<axis=-1>(c) "
    model = tools.model(f"{head} {constants} {{ {text} y = MatMul(p, vc) }}", 23)
    for value in model.graph.value_info:  # what the exporter knows, and ONNX's inference does not
        if value.name in ("kc", "vc"):
            for axis, size in ((0, "b"), (2, "s")):
                value.type.tensor_type.shape.dim[axis].dim_param = size
    feeds = {"q": Q, "k": K[:, :2], "v": V[:, :2]}
    result = _fuse(tools, model, feeds)
    assert tools.ops(result) == ["Attention"]
    assert list(result.proto.graph.node[0].input) == ["q", "k", "v"]


def test_one_head_of_keys_serves_all_queries(tools):
    head = "g (float[b,4,l,16] q, float[b,1,s,16] k, float[b,1,s,16] v) => (float[b,4,l,16] y)"
    result = _fuse(tools, _model(tools, FORMS["scores multiplied"], head=head), {"q": Q, "k": K[:, :1], "v": V[:, :1]})
    assert tools.ops(result) == ["Attention"]


def test_a_transpose_that_splits_heads_too_is_kept_for_the_heads(tools):
    head = "g (float[b,4,l,16] q, float[b,s,4,16] k, float[b,4,s,16] v) => (float[b,4,l,16] y)"
    text = FORMS["scores multiplied"].replace("[0,1,3,2]", "[0,2,3,1]")
    result = _fuse(tools, _model(tools, text, head=head), {"q": Q, "k": K.transpose(0, 2, 1, 3).copy(), "v": V})
    assert tools.ops(result) == ["Transpose", "Attention"]
    assert list(result.proto.graph.node[0].attribute[0].ints) == [0, 2, 1, 3]


def test_einsum_over_other_orders(tools):
    head = "g (float[b,l,4,16] q, float[b,s,4,16] k, float[b,s,4,16] v) => (float[b,l,4,16] y)"
    text = (
        'c = Einsum<equation="bqhd,bkhd->bhqk">(q, k) e = Mul(c, quarter) p = Softmax<axis=-1>(e) '
        'y = Einsum<equation="bhqk,bkhd->bqhd">(p, v)'
    )
    feeds = {name: x.transpose(0, 2, 1, 3).copy() for name, x in zip("qkv", (Q, K, V), strict=True)}
    result = _fuse(tools, _model(tools, text, head=head), feeds)
    assert sorted(tools.ops(result)) == ["Attention", "Transpose", "Transpose", "Transpose", "Transpose"]


def test_batches_of_heads_in_one_axis(tools):
    head = "g (float[n,l,16] q, float[n,s,16] k, float[n,s,16] v, float[n,l,s] m) => (float[n,l,16] y)"
    text = "t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) c = Mul(s, quarter) d = Add(c, m) p = Softmax<axis=-1>(d) "
    feeds = {"q": Q[:, 0], "k": K[:, 0], "v": V[:, 0], "m": BIAS[0, :2]}
    result = _fuse(tools, _model(tools, text + "y = MatMul(p, v)", head=head), feeds)
    assert tools.ops(result)[-2:] == ["Attention", "Squeeze"]


def test_scores_in_float32_between_halves(tools):
    head = "g (float16[b,4,l,16] q, float16[b,4,s,16] k, float16[b,4,s,16] v, bool[1,1,l,s] m) => (float16[b,4,l,16] y)"
    text = (
        "t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t) w = Cast<to=1>(s) c = Mul(w, quarter) "
        "o = Where(m, zero, low) d = Add(c, o) p = Softmax<axis=-1>(d) h = Cast<to=10>(p) y = MatMul(h, v)"
    )
    model = _model(tools, text, head=head)
    feeds = {"q": Q.astype(np.float16), "k": K.astype(np.float16), "v": V.astype(np.float16), "m": KEEP}
    result = _fuse(tools, model, feeds, tolerance=2e-3)
    assert tools.ops(result) == ["Where", "Attention"]
    types = {v.name: v.type.tensor_type.elem_type for v in result.proto.graph.value_info}
    assert types[result.proto.graph.node[1].input[3]] == F16
    hidden = [onnx.numpy_helper.to_array(t) for t in result.proto.graph.initializer if t.data_type == F16]
    assert min(float(value) for value in hidden) == -32752  # leaves room for the scores that it is added to


def test_a_mask_in_float32_is_clipped_and_written_once(tools):
    head = (
        "g (float16[b,4,l,16] q, float16[b,4,s,16] k, float16[b,4,s,16] v, float[1,4,l,s] m) => "
        "(float16[b,4,l,16] y, float16[b,4,l,16] z)"
    )
    block = (
        "{0}t = Transpose<perm=[0,1,3,2]>(k) {0}s = MatMul({1}, {0}t) {0}w = Cast<to=1>({0}s) {0}c = Add({0}w, m) "
        "{0}p = Softmax<axis=-1>({0}c) {0}h = Cast<to=10>({0}p) {2} = MatMul({0}h, v) "
    )
    text = block.format("a", "q", "y") + block.format("b", "y", "z")
    bias = np.where(KEEP, BIAS, -3.4e38).astype(np.float32)
    feeds = {"q": Q.astype(np.float16), "k": K.astype(np.float16), "v": V.astype(np.float16), "m": bias}
    result = _fuse(tools, _model(tools, text, head=head), feeds, rewrites=2, tolerance=5e-3)
    assert tools.ops(result) == ["Clip", "Cast", "Attention", "Attention"]


SUMMED = "z = MatMul(p, v) y = Add(z, r)"
NEAR_MISSES = {
    "another axis": (f"{SCALED} p = Softmax<axis=-2>(c) y = MatMul(p, v)", "over axis -2"),
    "a dropout": (f"{SCALED} p = Softmax<axis=-1>(c) o = Dropout(p) y = MatMul(o, v)", "Dropout"),
    "scores read elsewhere": (
        f"{SCALED} p = Softmax<axis=-1>(c) e = Neg(c) r = ReduceSum(e) {SUMMED}",
        "'c' inside it is read elsewhere",
    ),
    "weights read elsewhere": (f"{SCALED} p = Softmax<axis=-1>(c) r = ReduceSum(p) {SUMMED}", "'p' are read elsewhere"),
    "a cap": (f"{SCALED} e = Tanh(c) p = Softmax<axis=-1>(e) y = MatMul(p, v)", "tanh"),
    "a mild mask": (
        f"r = ReduceMax(q) j = IsNaN(r) {SCALED} e = Where(j, mild, c) p = Softmax<axis=-1>(e) y = MatMul(p, v)",
        "not a very low number",
    ),
    "a scaled mask": (
        f"{SCALED} d = Add(c, half) e = Mul(d, half) p = Softmax<axis=-1>(e) y = MatMul(p, v)",
        "its mask is scaled",
    ),
    "a negative scale": (f"t = Transpose<perm=[0,1,3,2]>(k) u = Mul(t, minus) c = MatMul(q, u) {END}", "scaled by -1"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(tools, name):
    text, reason = NEAR_MISSES[name]
    constants = CONSTANTS[:-1] + ", float minus = {-1}>"
    model = tools.model(f"{HEAD.replace('{more}', '')} {constants} {{ {text} }}", 23)
    _fuse(tools, model, {"q": Q, "k": K, "v": V}, rewrites=0, refused=reason)


SHAPES = {
    "heads of no fixed number": ("g (float[b,h,l,16] q, float[b,h,s,16] k, float[b,h,s,16] v) => (float[b,h,l,16] y)",
                                 "numbers of its heads"),
    "batches that may differ": ("g (float[b,4,l,16] q, float[a,4,s,16] k, float[a,4,s,16] v) => (float[b,4,l,16] y)",
                                "batches b and a may differ"),
    "sizes of no fixed number": ("g (float[b,4,l,d] q, float[b,4,s,d] k, float[b,4,s,16] v) => (float[b,4,l,16] y)",
                                 "sizes of its heads"),
    "float64": ("g (double[b,4,l,16] q, double[b,4,s,16] k, double[b,4,s,16] v) => (double[b,4,l,16] y)", "double"),
    "five axes": ("g (float[b,1,4,l,16] q, float[b,1,4,s,16] k, float[b,1,4,s,16] v) => (float[b,1,4,l,16] y)",
                  "5, 5 and 5 axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_do_not_fit_say_why(tools, name):
    head, reason = SHAPES[name]
    axes = "0,1,2,4,3" if name == "five axes" else "0,1,3,2"
    text = f"t = Transpose<perm=[{axes}]>(k) c = MatMul(q, t) {END}"
    tools.apply(FuseAttention(), _model(tools, text, head=head), rewrites=0, refused=reason)


def test_a_mask_that_widens_the_scores_stays(tools):
    head = "g (float[1,4,l,16] q, float[1,4,s,16] k, float[1,4,s,16] v, float[b,1,l,s] m) => (float[b,4,l,16] y)"
    text = MASKS["added"][1]
    feeds = {"q": Q[:1], "k": K[:1], "v": V[:1], "m": _random(3, 1, L, S)}
    _fuse(tools, _model(tools, text, head=head), feeds, rewrites=0, refused="larger than its scores")


def test_an_older_opset_and_a_block_that_stays_say_why(tools):
    text = FORMS["scores multiplied"]
    tools.apply(FuseAttention(), _model(tools, text, opset=20), rewrites=0, refused="opset 23")
    model = _model(tools, text)
    tools.apply(FuseAttention({"y": "it is slower"}), model, rewrites=0, refused="it is slower")
    model.graph.node[-1].name = "last"
    tools.apply(FuseAttention({"last": "it is slower"}), model, rewrites=0, refused="it is slower")


def test_one_tensor_as_queries_and_keys_stays(tools):
    head = "g (float[b,4,l,16] q, float[b,4,l,16] v) => (float[b,4,l,16] y)"
    text = f"{SCALED.replace('(k)', '(q)')} {END}"
    _fuse(tools, _model(tools, text, head=head), {"q": Q, "v": Q}, rewrites=0, refused="crashes")


def test_a_classifier_is_no_attention(tools):
    model = tools.model(
        "g (float[b,8] x, float[8,4] w, float[4,8] u) => (float[b,8] y) { s = MatMul(x, w) p = Softmax<axis=-1>(s) "
        "y = MatMul(p, u) }",
        23,
    )
    tools.apply(FuseAttention(), model, rewrites=0)


# Opsets


def _meaning(name, version):
    schema = onnx.defs.get_schema(name, version, "")
    count = len([i for i in schema.inputs if i.option != onnx.defs.OpSchema.FormalParameterOption.Optional])
    attributes = {}
    for key, attribute in schema.attributes.items():
        default = attribute.default_value
        attributes[key] = (attribute.type, default.SerializeToString() if default is not None else b"")
    return count, attributes


def test_ops_that_are_not_listed_mean_the_same_in_the_newer_opset():
    """Same inputs that must be given; every old attribute with its old default; new ones are optional."""
    looked_at = 0
    names = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    for name in sorted(names - set(CHANGED)):
        try:
            old, new = (onnx.defs.get_schema(name, version, "") for version in (OLDEST, NEWEST))
        except onnx.defs.SchemaError:
            continue  # it came later
        if old.since_version == new.since_version:
            continue
        looked_at += 1
        (old_inputs, old_attributes), (new_inputs, new_attributes) = _meaning(name, OLDEST), _meaning(name, NEWEST)
        assert old_inputs == new_inputs, name
        assert old_attributes.items() <= new_attributes.items(), name
        assert not any(new.attributes[key].required for key in new_attributes.keys() - old_attributes.keys()), name
    assert looked_at > 30


@pytest.mark.parametrize("name", CHANGED)
def test_ops_that_are_listed_are_refused_below_their_change(tools, name):
    model = tools.model("g (float[b,4] x) => (float[b,4] y) { y = Relu(x) }", CHANGED[name] - 1)
    model.graph.node[0].op_type = name
    assert name in raise_opset(model, 23)
    model.opset_import[0].version = CHANGED[name]
    assert opset_of(raise_opset(model, 23)) == 23


def test_raising_keeps_the_model_and_needs_a_known_opset(tools):
    model = tools.model("g (float[b,4] x) => (float[b,4] y) { y = Relu(x) }", 20)
    before = model.SerializeToString(deterministic=True)
    raised = raise_opset(model, 23)
    onnx.checker.check_model(raised)
    assert (opset_of(raised), raised.ir_version) == (23, 11)
    assert model.SerializeToString(deterministic=True) == before
    assert raise_opset(raised, 20) is raised
    model.opset_import[0].version = 17
    assert "opset 17" in raise_opset(model, 23)


def test_the_order_of_passes_is_checked():
    from trtbridge.passes import DEFAULT, FoldShapes

    with pytest.raises(PassError, match="must come after"):
        DEFAULT.insert(FuseAttention(), before=FoldShapes)
