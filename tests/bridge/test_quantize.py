"""precision="int8" and "fp8": which tensors are quantized, with what scales, and that engines take it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions
from trtbridge.bridge.calibration import TensorRange
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import export
from trtbridge.bridge.model import OnnxModel, origin_of
from trtbridge.bridge.onnx_file import read_onnx
from trtbridge.bridge.options import Options
from trtbridge.bridge.planner import Planner
from trtbridge.bridge.quantize import Quantized, quantize
from trtbridge.bridge.quantize_probe import refused_products, runner
from trtbridge.errors import OptionError

PAIR = {"QuantizeLinear", "DequantizeLinear"}


def _planner(model: Any, args: tuple[Any, ...] = (), backend: str = "onnxruntime", **options: Any) -> Planner:
    return make_planner(model, args, None, None, get_backend(backend), Options.make(options))


class Residual(nn.Module):
    """Two convolutions around which the input goes, a product, and an embedding that is tied to a product's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.table = nn.Embedding(20, 16)
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.running_mean.normal_()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.two(torch.relu(self.one(x))) + x)
        states = x.flatten(2).transpose(1, 2) + self.table(ids)[:, None]
        return states, states @ self.table.weight.T


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.transpose(1, 2) / 5.7, -1) @ v)


def _residual() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Residual().eval(), (torch.randn(2, 3, 8, 8), torch.randint(0, 20, (2,)))


def _error(mine: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((mine - wanted).norm() / wanted.norm())


def _initializers(segment: Any) -> dict[str, np.ndarray]:
    graph = segment.proto.graph
    return {
        t.name: segment.weights[t.name].numpy() if t.name in segment.weights else onnx.numpy_helper.to_array(t)
        for t in graph.initializer
    }


@pytest.mark.parametrize(
    ("precision", "limit"), [("int8", 0.02), ("int8+fp16", 0.02), ("fp8", 0.06), ("fp8+fp16", 0.06)]
)
def test_numbers_stay_close(precision, limit):
    for model, args in (_residual(), (Attention().eval(), (torch.randn(2, 10, 32),))):
        fast = tb.convert(model, args, backend="onnxruntime", precision=precision, calibration=[args])
        with torch.no_grad():
            wanted, mine = model(*args), fast(*args)
        pairs = zip(mine, wanted, strict=True) if isinstance(wanted, tuple) else [(mine, wanted)]
        for a, b in pairs:
            assert a.dtype == torch.float32
            assert 1e-4 < _error(a, b) < limit, "close, and not what float32 gives"
        assert fast.program.info["precision"]["unquantized"] == []


def test_what_products_read_is_quantized_and_nothing_else():
    model, args = _residual()
    planner = _planner(model, args, precision="int8", calibration=[args])
    (segment,) = planner.plan().segments
    graph = segment.proto.graph
    onnx.checker.check_model(_inline(segment), full_check=True)
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    products = [node for node in graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]
    assert len(products) == 4
    assert planner.precision.quantized == 4
    for node in products:
        assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert all(name not in makers for name in node.input[2:]), "biases stay"
    assert not {node.op_type for node in graph.node} & {"BatchNormalization"}, "folded into the stem"
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    others = {r for name in dequantized for r in readers[name]}
    assert others <= {"Conv", "MatMul", "Gemm", "Add"}
    (add,) = (n for n in graph.node if n.op_type == "Add" and set(n.input) & dequantized)
    straight = next(name for name in add.input if name not in dequantized)
    assert makers[straight].op_type == "Conv", "the other side of the residual comes from the convolution as it is"
    values = _initializers(segment)
    (gather,) = (node for node in graph.node if node.op_type == "Gather")
    assert values[gather.input[0]].dtype == np.float32, "an embedding stays, also where a product shares it"


def _inline(segment: Any) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in segment.weights:
            tensor.CopyFrom(ir.serde.serialize_tensor(segment.weights[tensor.name]))
    return proto


def test_scales_are_symmetric_and_per_channel():
    model, args = _residual()
    samples = [args, (args[0] * 3, args[1])]
    (segment,) = _planner(model, args, precision="int8", calibration=samples).plan().segments
    values = _initializers(segment)
    found = 0
    for node in segment.proto.graph.node:
        if node.op_type not in PAIR:
            continue
        scale, zero = values[node.input[1]], values[node.input[2]]
        assert zero.dtype == np.int8
        assert not zero.any()
        if node.input[0] == "x":
            assert scale == pytest.approx(float(args[0].abs().max()) * 3 / 127, rel=1e-6), "of the largest sample"
        if node.input[0].startswith("one.weight"):
            weight = model.one.weight.detach().numpy()
            expected = np.abs(weight).max((1, 2, 3)) / 127
            np.testing.assert_allclose(scale, expected, rtol=1e-6)
            codes = values[node.input[0]]
            assert codes.dtype == np.int8
            np.testing.assert_allclose(codes * expected[:, None, None, None], weight, atol=expected.max() / 2 + 1e-7)
            found += 1
    assert found == 1
    assert max(w.nbytes for w in segment.weights.values()) == 16 * 16 * 9, "weights take a byte a number"


def test_float8_weights_are_rounded_once():
    model, args = nn.Linear(32, 64).eval(), (torch.randn(4, 32),)
    (segment,) = _planner(model, args, precision="fp8", calibration=[args]).plan().segments
    values = _initializers(segment)
    (node,) = (n for n in segment.proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values)
    codes, scale = values[node.input[0]], values[node.input[1]]
    weight = model.weight.detach().numpy()
    if codes.shape != weight.shape or (node.attribute and node.attribute[0].i == 1):
        weight = weight.T
    axis = 1 if scale.shape[0] == codes.shape[1] and node.attribute[0].i == 1 else 0
    wide = np.expand_dims(scale, 1 - axis)
    np.testing.assert_allclose(scale, np.abs(weight).max(1 - axis) / 448, rtol=1e-6)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    # 3 bits behind the point; below 2**-6 steps of 2**-9 (arXiv:2209.05433).
    limit = np.maximum(np.abs(weight) / 16, wide * 2.0**-10) * 1.001
    assert (np.abs(codes.astype(np.float32) * wide - weight) <= limit).all()


def test_new_nodes_say_where_they_come_from():
    model, args = _residual()
    (segment,) = _planner(model, args, precision="int8", calibration=[args]).plan().segments
    pairs = [node for node in segment.proto.graph.node if node.op_type in PAIR]
    assert {origin_of(node).module for node in pairs} >= {"stem", "one", "two"}
    types = {v.name: v.type.tensor_type for v in segment.proto.graph.value_info}
    for node in pairs:
        assert types[node.output[0]].elem_type
        assert types[node.output[0]].HasField("shape")
    assert not [entry.key for entry in segment.proto.metadata_props if "infer" in entry.key]


def test_keep_fp32_is_left_out_and_reported():
    model, args = _residual()
    planner = _planner(model, args, precision="int8", calibration=[args], keep_fp32=["stem", "MatMul"])
    planner.plan()
    assert planner.precision.quantized == 2
    assert {node.reason for node in planner.precision.unquantized} >= {"keep_fp32 names it: 'stem'"}
    assert "not in 8 bits: 1 Conv: keep_fp32 names it: 'stem'; from stem" in str(planner.precision)
    assert "2 products in 8 bits, 2 not" in planner.precision.summary


def test_without_calibration_it_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="trtbridge"):
        _planner(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), precision="int8").plan()
    assert "no calibration= was given, so the ranges are measured on the example" in caplog.text


def test_calibration_may_be_an_iterator_of_any_form_and_is_read_once():
    model, x = nn.Linear(8, 8).eval(), torch.randn(2, 8)
    planner = _planner(model, (x,), precision="int8", calibration=iter([x, (x * 2,), {"input": x * 4}]))
    first = planner.plan()
    planner.refused.half.add("nothing")
    again = planner.plan()
    assert planner.precision.calibration == "measured on 3 samples"
    assert first.segments[0].proto == again.segments[0].proto


def test_nothing_to_quantize_is_said(caplog):
    planner = _planner(nn.ReLU(), (torch.randn(2, 8),), precision="int8", calibration=[torch.randn(2, 8)])
    assert [n.op_type for n in planner.plan().segments[0].proto.graph.node] == ["Relu"]
    assert "nothing in the model may be quantized" in caplog.text


def _file(text: str, opset: int = 20) -> OnnxModel:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]> {text}')
    path = Path("net.onnx")
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return read_onnx(path, None)


def _quantized(model: OnnxModel, ranges: dict[str, float], kind: str = "int8", **excluded: str) -> Quantized:
    return quantize(model, {n: TensorRange(v, 0, 0, np.isfinite(v)) for n, v in ranges.items()}, kind, excluded)


@pytest.mark.parametrize(
    ("text", "ranges", "reason"),
    [
        ("a = Neg(x)  y = MatMul(a, w)", {"x": 1.0}, "the range of 'a' was not measured"),
        ("y = MatMul(x, w)", {"x": 0.0}, "'x' was zero all over"),
        ("y = MatMul(x, w)", {"x": np.inf}, "'x' was infinite or NaN"),
        ("y = MatMul(w, x)", {"x": 1.0}, "its first input is a constant"),
        ("s = Neg(w)  y = Gemm(x, s)", {"x": 1.0, "s": 1.0}, "its weight is computed"),
        ("y = Gemm <beta = 2.0> (x, w, c)", {"x": 1.0}, "it is scaled"),
        ("y = Gemm <beta = 0.0> (x, w, c)", {"x": 1.0}, "it is scaled"),
        ("d = DequantizeLinear(q, k)  y = MatMul(x, d)", {"x": 1.0}, "it reads quantized values already"),
    ],
)
def test_products_that_stay(tmp_path, monkeypatch, text, ranges, reason):
    monkeypatch.chdir(tmp_path)
    model = _file(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, float[2] c = {1,2}, int8[2,2] q = {1,2,3,4}, "
        f"float k = {{0.5}}> {{ {text} }}"
    )
    done = _quantized(model, ranges)
    assert not done.products
    assert done.model is model
    assert reason in done.unquantized[0].reason


def test_large_biases_are_not_read():
    """They are stand-ins beside the proto, as are the parameters of a batch norm that go into them."""
    model = nn.Sequential(nn.Conv2d(2, 300, 1), nn.BatchNorm2d(300), nn.Flatten(), nn.Linear(1200, 300)).eval()
    x = torch.randn(2, 2, 2, 2)
    fast = tb.convert(model, (x,), backend="onnxruntime", precision="int8", calibration=[x])
    assert fast.program.info["precision"]["quantized"] == 2
    assert _error(fast(x), model(x).detach()) < 0.02


def test_what_is_in_bfloat16_stays():
    model, x = nn.Linear(8, 8).eval().bfloat16(), torch.randn(2, 8).bfloat16()
    planner = _planner(model, (x,), precision="int8", calibration=[x])
    planner.plan()
    assert [node.reason for node in planner.precision.unquantized] == ["the quantizer takes no bfloat16"]


def test_a_model_in_float16_is_quantized_as_it_is():
    model, x = Attention().eval(), torch.randn(2, 10, 32)
    wanted = model(x).detach()
    fast = tb.convert(model.half(), (x.half(),), backend="onnxruntime", precision="int8", calibration=[x.half()])
    assert fast.program.info["precision"]["quantized"] == 4
    assert fast(x.half()).dtype == torch.float16
    assert _error(fast(x.half()).float(), wanted) < 0.02


def test_a_range_is_found_behind_what_moves_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = _file(
        "g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}, int64[2] s = {2,2}> "
        "{ a = Transpose(x)  b = Reshape(a, s)  y = MatMul(b, w) }"
    )
    done = _quantized(model, {"x": 2.54})
    assert len(done.products) == 1
    scale = next(t for t in done.model.proto.graph.initializer if t.name.startswith("b") and "scale" in t.name)
    assert onnx.numpy_helper.to_array(scale) == pytest.approx(0.02)


@pytest.mark.parametrize(("kind", "opset"), [("int8", 12), ("fp8", 18)])
def test_an_opset_that_is_too_old(tmp_path, monkeypatch, kind, opset):
    monkeypatch.chdir(tmp_path)
    model = _file("g (float[2,2] x) => (float[2,2] y) <float[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }", opset)
    with pytest.raises(OptionError, match=f"needs opset .* for this model, which has {opset}"):
        _quantized(model, {"x": 1.0}, kind)


def test_weights_that_no_proto_holds(monkeypatch):
    monkeypatch.setattr("trtbridge.bridge.quantize._MOST_WEIGHT_BYTES", 100)
    with pytest.raises(OptionError, match="over 2 GB"):
        _planner(nn.Linear(8, 8).eval(), (torch.randn(2, 8),), precision="int8", calibration=[torch.randn(2, 8)]).plan()


def test_the_model_given_is_not_touched():
    model, args = _residual()
    exported = export(model, args)
    before, weights = exported.proto.SerializeToString(), dict(exported.weights)
    done = _quantized(exported, {"x": 3.0, "relu": 3.0, "relu_1": 3.0, "relu_2": 3.0})
    assert done.products
    assert exported.proto.SerializeToString() == before
    assert dict(exported.weights) == weights


def test_a_quantized_file_passes_through(tmp_path):
    model, args = _residual()
    (segment,) = _planner(model, args, precision="int8", calibration=[args]).plan().segments
    onnx.save(_inline(segment), tmp_path / "net.onnx")
    planner = _planner(tmp_path / "net.onnx")
    (again,) = planner.plan().segments
    count = sum(node.op_type in PAIR for node in segment.proto.graph.node)
    assert sum(node.op_type in PAIR for node in again.proto.graph.node) == count > 10
    mine = tb.convert(tmp_path / "net.onnx", backend="onnxruntime")(x=args[0], ids=args[1])
    with torch.no_grad():
        for a, b in zip(mine.values(), model(*args), strict=True):
            assert _error(a, b) < 0.02


# Engines


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["int8", "int8+fp16", "fp8", "fp8+fp16"])
def test_engines_are_built(precision):
    trt = pytest.importorskip("tensorrt_rtx")
    model, args = _residual()
    planner = _planner(model, args, "tensorrt_rtx", precision=precision, calibration=[args])
    program = planner.build()
    assert len(program.engines) == 1
    assert not program.plugin_calls
    assert not planner.refused.quantized, "what is refused is known before building"
    has_int8_convolution = trt.__version__ >= "1.7"
    expected = 4 if has_int8_convolution or "fp8" in precision else 1
    assert planner.precision.quantized == expected
    if expected == 1:
        assert all("builds no Conv over int8" in node.reason for node in planner.precision.unquantized)


@pytest.mark.rtx
def test_attention_is_built_over_8_bits():
    pytest.importorskip("tensorrt_rtx")
    model, x = Attention().eval(), torch.randn(2, 10, 32)
    planner = _planner(model, (x,), "tensorrt_rtx", precision="int8+fp16", calibration=[x])
    assert not planner.build().plugin_calls
    assert planner.precision.quantized == 4


@pytest.mark.rtx
def test_the_probe_asks_the_backend():
    trt = pytest.importorskip("tensorrt_rtx")
    found = refused_products(get_backend("tensorrt_rtx"), BuildOptions(), "int8", False, {"Conv", "MatMul", "Gemm"})
    assert set(found) == (set() if trt.__version__ >= "1.7" else {"Conv"})
    assert refused_products(get_backend("onnxruntime"), BuildOptions(), "fp8", True, {"ConvTranspose"}) == {}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("is_half", [False, True], ids=["float32", "float16"])
def test_the_probe_holds_what_runs_against_the_right_numbers(kind, is_half):
    backend, asked = get_backend("onnxruntime"), {"Conv", "ConvTranspose", "Gemm", "MatMul"}

    def right(engine, data):
        (result,) = backend.load(engine, torch.device("cpu")).new_context()([data])
        return result

    def wrong(engine, data):
        return right(engine, data) * (float("inf") if len(engine.outputs[0].shape) == 2 else 1.03)

    def fails(engine, data):
        raise tb.ExecutionError("no such kernel")

    assert refused_products(backend, BuildOptions(), kind, is_half, asked, right) == {}
    found = refused_products(backend, BuildOptions(), kind, is_half, asked, wrong)
    assert set(found) == asked
    assert found["Gemm"].endswith(f"computes Gemm over {kind} wrongly here: off by inf of the largest result")
    assert "no such kernel" in refused_products(backend, BuildOptions(), kind, is_half, {"Gemm"}, fails)["Gemm"]
    assert runner(backend, BuildOptions()) is None


def test_what_the_builder_refuses_over_8_bits_is_left_as_it_is(monkeypatch):
    """First the product loses its Q/DQ pair, then it goes to float32, and only then would it be a plugin."""
    model, args = _residual()
    backend = get_backend("onnxruntime")
    planner = make_planner(
        model, args, None, None, backend, Options.make({"precision": "int8+fp16", "calibration": [args]})
    )
    planner.plan()

    def learns(node: str) -> bool:
        return planner.refused.learn({node}, planner._half, planner._quantized, backend.name)

    (segment,) = planner.plan().segments
    pair = next(n for n in segment.proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0].startswith("x"))
    conv = next(n.name for n in segment.proto.graph.node if n.op_type == "Conv" and "stem" in origin_of(n).module)
    assert learns(pair.name)
    assert planner.refused.quantized == {conv}
    planner.plan()
    assert [n.reason for n in planner.precision.unquantized] == ["the backend refuses it over int8"]
    assert learns(conv)
    assert planner.refused.half == {conv}
    assert not learns(conv)
