"""ConvertPrecision."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from trtbridge.errors import PassError
from trtbridge.passes import Pipeline
from trtbridge.passes.convert_precision import ConvertPrecision

FP16, BF16 = ConvertPrecision("float16"), ConvertPrecision("bfloat16")
_RNG = np.random.default_rng(0)
_F = TensorProto.FLOAT16


def _types(result) -> dict[str, int]:
    graph = result.proto.graph
    return {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}


def _casts(result) -> list[tuple[str, str]]:
    return [(node.input[0], node.output[0]) for node in result.proto.graph.node if node.op_type == "Cast"]


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """ONNX's own implementation, which rounds every result to its type."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feeds)


def _random(*shape: int) -> np.ndarray:
    return _RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("item", "element"), [(FP16, TensorProto.FLOAT16), (BF16, TensorProto.BFLOAT16)])
def test_products_and_what_follows_them(tools, item, element):
    model = tools.model(
        "g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {0.5, -0.5}> "
        "{ a = MatMul(x, w)  c = Add(a, b)  d = Tanh(c)  y = MatMul(d, w) }"
    )
    result = tools.apply(item, model, rewrites=4)
    types = _types(result)
    assert types["x"] == types["y"] == TensorProto.FLOAT
    assert {types[name] for name in "acd"} == {element}
    assert [t.data_type for t in result.proto.graph.initializer] == [element, element]  # w is shared, and stays so
    assert tools.ops(result) == ["Cast", "MatMul", "Add", "Tanh", "MatMul", "Cast"]
    onnx.checker.check_model(result.proto, full_check=True)
    x = _random(3, 2)
    (expected,), (actual,) = _run(model, {"x": x}), _run(result.proto, {"x": x})
    assert actual.dtype == np.float32
    np.testing.assert_allclose(
        actual, expected, rtol=0.03 if item is BF16 else 4e-3, atol=0.02 if item is BF16 else 4e-3
    )


def test_normalization_stays_and_tensors_are_cast_once(tools):
    model = tools.model(
        "g (float[2,4] x) => (float[2,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4] s = {1,1,1,1}> "
        "{ a = MatMul(x, w)  n = LayerNormalization(a, s)  q = MatMul(n, w)  k = MatMul(n, w)  v = MatMul(n, w)"
        "  p = Add(q, k)  r = Add(p, v)  y = Add(r, n) }"
    )
    result = tools.apply(FP16, model, rewrites=7, feeds={"x": _random(2, 4)}, tolerance=0.01, refused="sums squares")
    # x and n once each though four nodes read n, a on its way to the normalization, and the output.
    assert len(_casts(result)) == 4
    scale = next(t for t in result.proto.graph.initializer if t.name == "s")
    assert scale.data_type == TensorProto.FLOAT
    assert _types(result)["n"] == TensorProto.FLOAT
    onnx.checker.check_model(result.proto, full_check=True)


def test_moves_take_the_type_of_their_neighbours(tools):
    model = tools.model(
        "g (float[2,4] x) => (float[4,2] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, float[4] s = {1,1,1,1}, "
        "int64[1] zero = {0}, int64[1] two = {2}> "
        "{ a = MatMul(x, w)  t = Transpose(a)  u = Transpose(t)  n = LayerNormalization(u, s)"
        "  m = Slice(n, zero, two, zero)  z = Identity(m)  q = MatMul(z, w)  y = Transpose(q) }"
    )
    result = tools.apply(FP16, model, rewrites=7 - 1, feeds={"x": _random(2, 4)}, tolerance=0.01, refused="squares")
    types = _types(result)
    assert types["t"] == _F
    assert types["m"] == TensorProto.FLOAT  # the slice is smaller than what it is taken from, so it is cast
    assert types["z"] == _F
    assert len(_casts(result)) == 4


def test_a_finite_mask_stays_exact(tools):
    lowest = float(np.finfo(np.float32).min)
    model = tools.model(
        f"g (float[2,3,4] q, float[2,4,3] k, float[2,3,4] v, bool[2,3,3] m) => (float[2,3,4] y) "
        f"<float zero = {{0}}, float low = {{{lowest}}}> "
        "{ s = MatMul(q, k)  b = Where(m, zero, low)  a = Add(s, b)  p = Softmax(a)  y = MatMul(p, v) }"
    )
    result = tools.apply(FP16, model, rewrites=2, refused="beyond the range of float16")
    types = _types(result)
    assert {types["s"], types["a"], types["p"]} == {TensorProto.FLOAT}
    mask = _RNG.random((2, 3, 3)) < 0.5
    mask[0, 0] = False  # a row that is all masked: equal weights in float32, NaN had the mask become infinite
    mask[0, 1] = True
    feeds = {"q": 30 * _random(2, 3, 4), "k": _random(2, 4, 3), "v": _random(2, 3, 4), "m": mask}
    (expected,), (actual,) = _run(model, feeds), _run(result.proto, feeds)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, atol=0.05)
    np.testing.assert_allclose(actual[0, 0], expected[0, 0], atol=2e-3)


def test_an_infinite_mask_is_the_same_in_16_bits(tools):
    model = tools.model(
        "g (float[3,4] q, float[4,3] k, bool[3,3] m) => (float[3,3] y) <float zero = {0}, float low = {1}> "
        "{ s = MatMul(q, k)  b = Where(m, zero, low)  a = Add(s, b)  y = Softmax(a) }"
    )
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))
    result = tools.apply(FP16, model, rewrites=3, refused="exponentials")
    mask = np.array([[True, False, True], [False] * 3, [True] * 3])
    feeds = {"q": _random(3, 4), "k": _random(4, 3), "m": mask}
    (expected,), (actual,) = _run(model, feeds), _run(result.proto, feeds)
    assert np.isnan(expected[1]).all()
    np.testing.assert_allclose(actual, expected, atol=5e-3)


def test_a_mask_made_of_integers_stays_exact(tools):
    """BERT's ``(1 - mask) * finfo.min``: with nothing masked on the example no measurement would show it."""
    lowest = float(np.finfo(np.float32).min)
    model = tools.model(
        f"g (float[2,3] s, int64[3] m) => (float[2,3] y) <float one = {{1}}, float low = {{{lowest}}}, "
        "float[3,3] w = {1,0,0,0,1,0,0,0,1}> "
        "{ t = MatMul(s, w)  f = Cast<to = 1>(m)  i = Sub(one, f)  b = Mul(i, low)  a = Add(t, b)  y = Softmax(a) }"
    )
    result = tools.apply(FP16, model, rewrites=1, refused="positions, counts or a mask")
    for mask in ([1, 0, 1], [0, 0, 0]):
        feeds = {"s": _random(2, 3), "m": np.array(mask)}
        np.testing.assert_allclose(_run(result.proto, feeds)[0], _run(model, feeds)[0], atol=5e-3)


def test_attention_gets_a_clipped_mask(tools):
    model = tools.model(
        "g (float[1,2,3,4] q, float[1,2,3,4] k, float[1,2,3,4] v, bool[3,3] m) => (float[1,2,3,4] y) "
        "<float zero = {0}, float low = {-1e9}> "
        "{ b = Where(m, zero, low)  y = Attention(q, k, v, b) }",
        opset=23,
    )
    result = tools.apply(FP16, model, rewrites=1, refused="beyond the range")
    assert tools.ops(result).count("Clip") == 1
    feeds = {name: _random(1, 2, 3, 4) for name in "qkv"} | {"m": np.tril(np.ones((3, 3), bool))}
    np.testing.assert_allclose(_run(result.proto, feeds)[0], _run(model, feeds)[0], atol=5e-3)


def test_angles_stay_in_full_back_to_the_layer_that_makes_them(tools):
    model = tools.model(
        "g (float[2,4] x, float[1] t) => (float[2,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, "
        "float[4] f = {1, 0.1, 0.01, 0.001}> "
        "{ a = Mul(t, f)  c = Cos(a)  h = MatMul(x, w)  y = Mul(h, c) }"
    )
    result = tools.apply(FP16, model, rewrites=2, refused="a Cos needs its result in full")
    feeds = {"x": _random(2, 4), "t": np.array([999.3], np.float32)}
    np.testing.assert_allclose(_run(result.proto, feeds)[0], _run(model, feeds)[0], atol=5e-3)


def test_positions_made_of_integers_stay(tools):
    model = tools.model(
        "g (float[1,5,4] x, int64[1,5] p) => (float[1,5,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, "
        "float[1,4] f = {1, 0.1, 0.01, 0.001}, int64[1] last = {2}> "
        "{ i = Cast<to = 1>(p)  j = Unsqueeze(i, last)  a = MatMul(j, f)  s = Sin(a)  h = MatMul(x, w)  y = Mul(h, s) }"
    )
    result = tools.apply(FP16, model, rewrites=2, refused="positions")
    feeds = {"x": _random(1, 5, 4), "p": np.array([[0, 1, 2047, 4097, 9999]])}
    np.testing.assert_allclose(_run(result.proto, feeds)[0], _run(model, feeds)[0], atol=5e-3)


@pytest.mark.parametrize(("value", "stays"), [(1e-12, True), (1e-6, True), (1e-3, False), (7e4, True)])
def test_constants_that_do_not_fit(tools, value, stays):
    model = tools.model(
        f"g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {{1,2,3,4}}, float e = {{{value}}}> "
        "{ a = MatMul(x, w)  b = Add(a, e)  y = MatMul(b, w) }"
    )
    result = tools.apply(FP16, model, rewrites=2 if stays else 3, refused="constant 'e'" if stays else None)
    assert (_types(result)["b"] == TensorProto.FLOAT) == stays


def test_a_weight_that_overflows_keeps_its_product(tools):
    model = tools.model("g (float[2,4] x) => (float[2,4] y) { a = MatMul(x, v)  y = MatMul(a, w) }")
    weights = tools.stand_in(model, "v", 1e5 * np.ones((4, 300), np.float32))
    weights |= tools.stand_in(model, "w", 1e-3 * np.ones((300, 4), np.float32))
    result = tools.apply(FP16, model, weights, rewrites=1, refused="constant 'v' holds 1e+05")
    assert result.weights["v"] is weights["v"]


def test_weights_beside_the_proto_are_cast_not_copied(tools):
    model = tools.model("g (float[2,32] x) => (float[2,32] y) { a = MatMul(x, w)  b = Relu(a)  y = MatMul(b, w) }")
    weights = tools.stand_in(model, "w", _random(32, 32))
    result = tools.apply(FP16, model, weights, rewrites=3)
    assert dict(result.weights) == weights
    assert [pair[0] for pair in _casts(result)].count("w") == 1


def test_large_sums_stay_and_small_ones_do_not(tools):
    for size, count, rewrites in ((8, 64, 2), (32, 1024, 1)):
        model = tools.model(
            f"g (float[1,2,{size},{size}] x) => (float[1,2,1,1] y) <float[2,2,1,1] w = {{1,2,3,4}}> "
            "{ a = Conv(x, w)  y = GlobalAveragePool(a) }"
        )
        tools.apply(FP16, model, rewrites=rewrites, refused=f"sums {count} values" if rewrites == 1 else None)


def test_batch_normalization_keeps_its_statistics(tools, rtx_refusal):
    body = (
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w = {1,2,3,4}, float[2] s = {1,2}, "
        "float[2] b = {0,1}, float[2] m = {0,1}, float[2] v = {1e-7,2}> "
        "{ a = Conv(x, w)  n = BatchNormalization(a, s, b, m, v)  y = Relu(n) }"
    )
    result = tools.apply(FP16, tools.model(body), rewrites=3)
    assert tools.ops(result) == ["Cast", "Conv", "BatchNormalization", "Relu", "Cast"]
    assert {t.name: t.data_type for t in result.proto.graph.initializer}["v"] == TensorProto.FLOAT
    onnx.checker.check_model(result.proto, full_check=True)
    assert rtx_refusal(result.proto) is None
    tools.apply(FP16, tools.model(body, opset=13), rewrites=1, refused="before opset 15")


def test_bfloat16_where_the_opset_has_it(tools, rtx_refusal):
    body = "g (float[1,2,4,4] x) => (float[1,2,4,4] y) <float[2,2,1,1] w = {1,2,3,4}> { y = Conv(x, w) }"
    tools.apply(BF16, tools.model(body, opset=20), rewrites=0, refused="does not exist for bfloat16 in opset 20")
    result = tools.apply(BF16, tools.model(body, opset=22), rewrites=1)
    onnx.checker.check_model(result.proto, full_check=True)
    assert rtx_refusal(result.proto) is None


def test_subgraphs_and_plugins_read_float32(tools):
    model = tools.model(
        """g (float[2,2] x, bool c) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> {
        a = MatMul(x, w)
        b = If<then_branch = t () => (float[2,2] to) { to = Relu(a) },
               else_branch = e () => (float[2,2] eo) { eo = MatMul(a, w) }>(c)
        p = trtbridge.f(a)
        d = Add(a, p)
        h = Add(d, b)
        y = MatMul(h, w)
        }"""
    )
    for name in "pdh":
        if name not in {value.name for value in model.graph.value_info}:
            model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]))
    result = tools.apply(FP16, model, rewrites=4, refused="bodies of conditions")
    types = _types(result)
    assert types["a"] == types["p"] == types["b"] == TensorProto.FLOAT
    assert types["d"] == types["h"] == _F
    assert {t.name: t.data_type for t in result.proto.graph.initializer} == {
        "w": TensorProto.FLOAT,  # a branch reads it
        "w_float16": TensorProto.FLOAT16,
    }


def test_keep_and_wide(tools):
    body = (
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> "
        "{ a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  y = MatMul(c, w) }"
    )
    kept = ConvertPrecision(keep={"c": "asked for"})
    result = tools.apply(
        kept, tools.model(body), rewrites=3, feeds={"x": _random(2, 2)}, tolerance=0.01, refused="asked"
    )
    assert _types(result)["c"] == TensorProto.FLOAT
    wide = ConvertPrecision(wide={"a": "reaches 1e+06"})
    result = tools.apply(wide, tools.model(body), rewrites=2, refused="'a' reaches 1e+06")
    assert _types(result)["a"] == _types(result)["b"] == TensorProto.FLOAT


def test_a_model_in_16_bits_stays_as_it_is(tools):
    model = tools.model(
        "g (float16[2,4] x) => (float16[2,4] y) <float16[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, "
        "float[4] s = {1,1,1,1}, float e = {0.001}, float two = {2}, int64[1] last = {1}> "
        "{ a = MatMul(x, w)  f = Cast<to = 1>(a)  q = Pow(f, two)  m = ReduceMean(q, last)  v = Add(m, e)  r = Sqrt(v)"
        "  d = Div(f, r)  n = Mul(d, s)  h = Cast<to = 10>(n)  y = MatMul(h, w) }"
    )
    before = tools.ops(model)
    result = tools.apply(FP16, model, rewrites=0, refused="powers")
    assert tools.ops(result) == before


def test_casts_of_the_model_are_merged(tools):
    model = tools.model(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, float16[2,2] h = {1,2,3,4}> "
        "{ a = MatMul(x, w)  b = Cast<to = 10>(a)  c = MatMul(b, h)  d = Cast<to = 1>(c)  y = MatMul(d, w) }"
    )
    result = tools.apply(FP16, model, rewrites=2)
    assert tools.ops(result) == ["Cast", "MatMul", "MatMul", "MatMul", "Cast"]


def test_bounds_beyond_the_range_become_infinite(tools):
    model = tools.model(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, float low = {0}, float high = {1e9}> "
        "{ a = MatMul(x, w)  y = Clip(a, low, high) }"
    )
    result = tools.apply(FP16, model, rewrites=2)
    assert np.isposinf(tools.initializer(result, "high"))


def test_quantized_products_stay(tools):
    model = tools.model(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, int8[2,2] v = {1,2,3,4}, float s = {0.5}, "
        "int8 z = {0}> { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(v, s, z)"
        "  a = MatMul(d, e)  y = MatMul(a, w) }"
    )
    result = tools.apply(FP16, model, rewrites=1, refused="quantized values")
    assert _types(result)["d"] == _types(result)["a"] == TensorProto.FLOAT


def test_other_targets_are_refused():
    with pytest.raises(PassError, match="'int8' is none of float16, bfloat16"):
        ConvertPrecision("int8")


def test_bfloat16_constants_are_rounded_to_nearest(tools):
    model = tools.model("g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1.01, 2, 3, 4}> { y = MatMul(x, w) }")
    result = Pipeline((BF16,)).run(model, {})
    assert tools.initializer(result, "w")[0, 0] == ml_dtypes.bfloat16(1.01)
