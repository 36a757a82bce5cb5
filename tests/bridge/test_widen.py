"""widen: every float16 and bfloat16 in a graph becomes float32, and nothing else changes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from trtbridge.bridge.backends.widen import widen
from trtbridge.bridge.model import iterate_nodes, make_stand_in
from trtbridge.errors import ModelFileError

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def narrow_types_in(proto: onnx.ModelProto) -> list[str]:
    """Whatever in the textual form still speaks of 16-bit floats."""
    text = onnx.printer.to_text(proto)
    return [word for word in ("float16", "bfloat16") if word in text]


def bits(dtype: str, *values: float) -> str:
    """A literal for onnx.parser, which takes the bits of 16-bit floats."""
    array = np.array(values, np.float32).astype(np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    return "{" + ", ".join(map(str, array.view(np.uint16))) + "}"


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def has_bit_cast() -> bool:
    """True where ONNX Runtime knows opset 26."""
    proto = onnx.parser.parse_model(
        '<ir_version: 13, opset_import: ["" : 26]> g (float x) => (float y) { y = Neg (x) }'
    )
    try:
        run(proto, {"x": np.array(1, np.float32)})
    except Exception:  # ONNX Runtime's errors have no common base
        return False
    return True


needs_bit_cast = pytest.mark.skipif(not has_bit_cast(), reason="this ONNX Runtime has no opset 26")


def test_returns_the_same_objects_when_nothing_is_narrow() -> None:
    proto = onnx.parser.parse_model(HEADER + "g (float[N] x) => (float[N] y) { y = Cast <to = 1> (x) }")
    weights = {"w": ir.tensor(np.zeros(3, np.float32))}
    wide, wide_weights = widen(proto, weights)
    assert wide is proto
    assert wide_weights is weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_initializers_constants_casts_and_boundary(dtype: str) -> None:
    code = {"float16": 10, "bfloat16": 16}[dtype]
    text = f"""{HEADER}
    g ({dtype}[N, 3] x, float[3] f) => ({dtype}[N, 3] y) <{dtype}[3] w = {bits(dtype, 1, 2.5, -3)}, {dtype}[3] c> {{
        c = Constant <value = {dtype}[3] {bits(dtype, 0.5, 0.25, 8)}> ()
        a = Add (x, w)
        b = Mul (a, c)
        d = Cast <to = {code}> (f)
        e = CastLike (f, w)
        h = Add (d, e)
        y = Add (b, h)
    }}"""
    proto = onnx.parser.parse_model(text)
    before = proto.SerializeToString(deterministic=True)
    wide, _ = widen(proto, {})
    assert proto.SerializeToString(deterministic=True) == before
    assert narrow_types_in(wide) == []
    assert [v.name for v in (*wide.graph.input, *wide.graph.output)] == ["x", "f", "y"]
    onnx.checker.check_model(wide, full_check=True)
    x, f = np.array([[1, 2, 3]], np.float32), np.array([1, 2, 4], np.float32)
    [y] = run(wide, {"x": x, "f": f})
    np.testing.assert_array_equal(y, (x + np.array([1, 2.5, -3])) * [0.5, 0.25, 8] + 2 * f)


def test_only_the_types_asked_for() -> None:
    text = HEADER + "g (float16[N] x) => (bfloat16[N] y) { y = Cast <to = 16> (x) }"
    wide, _ = widen(onnx.parser.parse_model(text), {}, frozenset({ir.DataType.BFLOAT16}))
    assert wide.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert wide.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    "node",
    [
        "y = RandomNormal <dtype = 10, shape = [2, 2]> ()",
        "y = RandomNormalLike <dtype = 10> (x)",
        "y = RandomUniform <dtype = 10, shape = [2, 2]> ()",
        "y = RandomUniformLike <dtype = 10> (x)",
        "y = Bernoulli <dtype = 10> (x)",
        "y = EyeLike <dtype = 10> (x)",
        f"s = Constant <value_ints = [2, 2]> () y = ConstantOfShape <value = float16[1] {bits('float16', 3)}> (s)",
        "n = Constant <value_int = 8> () y = HannWindow <output_datatype = 10> (n)",
        "e = SequenceEmpty <dtype = 10> () q = SequenceInsert (e, x) i = Constant <value_int = 0> () "
        "y = SequenceAt (q, i)",
        f"s = Constant <value = float16 {bits('float16', 2)}> () q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)",
        f"s = Constant <value = float16[2] {bits('float16', 1, 2)}> () y = LayerNormalization <stash_type = 16> (x, s)",
    ],
)
def test_attributes_that_hold_a_type(node: str) -> None:
    text = HEADER + f"g (float16[2, 2] x) => (float16[M, K] y) {{ {node} }}"
    proto = onnx.parser.parse_model(text.replace("[M, K]", "[M]") if "Hann" in node else text)
    wide, _ = widen(proto, {})
    assert narrow_types_in(wide) == []
    attributes = [a for n in iterate_nodes(wide.graph) for a in n.attribute]
    assert all(a.i != onnx.TensorProto.FLOAT16 for a in attributes)
    [y] = run(wide, {"x": np.ones((2, 2), np.float32)})
    assert y.dtype == np.float32


def test_subgraphs_and_value_info() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (bool c, bfloat16[N] x, int64 trips) => (bfloat16[N] y) <bfloat16[N] h> {
        h = If (c) <
            then_branch = a () => (bfloat16[N] p) <bfloat16 w = THREE> { p = Mul (x, w) },
            else_branch = b () => (bfloat16[N] q) { k = Constant <value = bfloat16 FIVE> () q = Mul (x, k) }
        >
        t = Constant <value = bool {1}> ()
        y = Loop (trips, t, h) <
            body = l (int64 i, bool go, bfloat16[N] s) => (bool go2, bfloat16[N] s2) {
                go2 = Identity (go)
                f = Cast <to = 16> (i)
                s2 = Add (s, f)
            }
        >
    }"""
    text = text.replace("THREE", bits("bfloat16", 3)).replace("FIVE", bits("bfloat16", 5))
    proto = onnx.parser.parse_model(text)
    wide, _ = widen(proto, {})
    assert narrow_types_in(wide) == []
    feeds = {"x": np.array([1, 2], np.float32), "trips": np.array(4)}
    np.testing.assert_array_equal(run(wide, feeds | {"c": np.array(True)})[0], [9, 12])
    np.testing.assert_array_equal(run(wide, feeds | {"c": np.array(False)})[0], [11, 16])


def test_functions_take_types_through_their_attributes() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
    g (float[N] x) => (float16[N] y, int64[N] z) {
        y = local.outer <kind = 10> (x)
        z = local.inner <kind = 7> (x)
    }
    <domain: "local", opset_import: ["" : 21, "local" : 1]>
    outer <kind> (x) => (y) { h = local.inner <kind: int = @kind> (x) y = local.twice (h) }
    <domain: "local", opset_import: ["" : 21]>
    inner <kind> (x) => (y) { y = Cast <to: int = @kind> (x) }
    <domain: "local", opset_import: ["" : 21]>
    twice (x) => (y) { t = Constant <value = float16 {16384}> () y = Mul (x, t) }
    """
    wide, _ = widen(onnx.parser.parse_model(text), {})
    y, z = run(wide, {"x": np.array([1.5, 2], np.float32)})
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, [3, 4])
    np.testing.assert_array_equal(z, [1, 2])


def test_sequence_and_optional_types() -> None:
    proto = onnx.parser.parse_model(
        HEADER + "g (seq(float16[N]) s, optional(float16[N]) o) => (seq(float16[N]) t) { t = Identity (s) }"
    )
    wide, _ = widen(proto, {})
    assert narrow_types_in(wide) == []


def test_sparse_initializers() -> None:
    proto = onnx.parser.parse_model(HEADER + "g (float16[3] x) => (float16[3] y) { y = Add (x, w) }")
    values = onnx.numpy_helper.from_array(np.array([2, 4], np.float16), "w")
    indices = onnx.numpy_helper.from_array(np.array([0, 2]), "w_indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))
    wide, _ = widen(proto, {})
    np.testing.assert_array_equal(run(wide, {"x": np.ones(3, np.float32)})[0], [3, 1, 5])


def test_stand_ins_are_converted_when_read() -> None:
    reads: list[int] = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.Tensor(np.arange(1000).astype(ml_dtypes.bfloat16), name="w")

    weight = ir.LazyTensor(read, dtype=ir.DataType.BFLOAT16, shape=ir.Shape([1000]), name="w")
    other = ir.tensor(np.zeros(1000, np.int64), name="n")
    proto = onnx.parser.parse_model(HEADER + "g (bfloat16[1000] x) => (bfloat16[1000] y) { y = Add (x, w) }")
    proto.graph.initializer.append(make_stand_in("w", weight))
    proto.graph.initializer[0].external_data.add(key="offset", value="64")
    wide, weights = widen(proto, {"w": weight, "n": other})
    assert not reads
    assert weights["n"] is other
    assert (weights["w"].dtype, tuple(weights["w"].shape.numpy())) == (ir.DataType.FLOAT, (1000,))
    assert weights["w"].numpy().dtype == np.float32
    np.testing.assert_array_equal(weights["w"].numpy()[:257], np.arange(257))
    assert len(reads) == 2  # nothing is kept
    [stand_in] = wide.graph.initializer
    assert stand_in.data_type == onnx.TensorProto.FLOAT
    assert [entry.key for entry in stand_in.external_data] == ["location"]
    with pytest.raises(ModelFileError, match="'w' has no values"):
        widen(proto, {})


@needs_bit_cast
def test_bit_casts_still_read_the_16_bits() -> None:
    text = """<ir_version: 13, opset_import: ["" : 26]>
    g (float16[N] x, int16[N] i, float[N] f) => (int16[N] bits, float16[N] back, bfloat16[N] other, int32[N] same) {
        h = Neg (x)
        bits = BitCast <to = 5> (h)
        back = BitCast <to = 10> (i)
        other = BitCast <to = 16> (x)
        same = BitCast <to = 6> (f)
    }"""
    wide, _ = widen(onnx.parser.parse_model(text), {})
    x = np.array([1.5, -2, 0.1], np.float16)
    i = np.array([0x3C00, 0x4100, -1024], np.int16)
    f = np.array([1, 2, 3], np.float32)
    bits, back, other, same = run(wide, {"x": x.astype(np.float32), "i": i, "f": f})
    np.testing.assert_array_equal(bits, (-x).view(np.int16))
    np.testing.assert_array_equal(back, i.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(other, x.view(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(same, f.view(np.int32))


@needs_bit_cast
def test_bit_casts_inside_functions() -> None:
    text = """<ir_version: 13, opset_import: ["" : 26, "local" : 1]>
    g (bfloat16[N] x) => (int16[N] y) { y = local.bits (x) }
    <domain: "local", opset_import: ["" : 26]>
    bits (x) => (y) { y = BitCast <to = 5> (x) }
    """
    wide, _ = widen(onnx.parser.parse_model(text), {})
    x = np.array([1.5, -2], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(run(wide, {"x": x.astype(np.float32)})[0], x.view(np.int16))


def test_custom_domains_keep_their_attributes() -> None:
    text = (
        '<ir_version: 10, opset_import: ["mine" : 1]>g (float16[N] x) => (float16[N] y) { y = mine.Op <to = 10> (x) }'
    )
    wide, _ = widen(onnx.parser.parse_model(text), {})
    assert wide.graph.node[0].attribute[0].i == 10
