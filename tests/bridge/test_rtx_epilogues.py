"""What TensorRT-RTX 1.6.1 computes wrongly behind a product or convolution gets another form, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from rtx_graphs import parsed, run

from trtbridge.bridge.backends.rtx_faults import avoid_faults, original_name

X = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
S = np.random.default_rng(1).random((3, 1)).astype(np.float32)
FEED = {"x": X, "s": S}

LINEAR = "y = Gemm<transB = 1>(x, w, b) "
PARTS = "e = Div(y, root) f = Erf(e) g = Add(f, one) h = Mul(y, g) a = Mul(h, half) "
IMAGE = "m = Reshape(x, image) c = Conv(m, filter, bias) t = Reshape(s, numbers) "
APART = {
    "a factor for each row": LINEAR + "a = Relu(y) z = Mul(a, s)",
    "the factor first": LINEAR + "a = Relu(y) z = Mul(s, a)",
    "a gated unit": LINEAR + "a = Relu(y) k = MatMul(x, v) z = Mul(a, k)",
    "its square": LINEAR + "a = Relu(y) z = Mul(a, a)",
    "what it is of": LINEAR + "a = Relu(y) z = Mul(a, y)",
    "a constant": LINEAR + "a = Relu(y) z = Mul(a, half)",
    "a sum of its own": "p = MatMul(x, v) y = Add(b, p) a = Relu(y) z = Mul(a, s)",
    "moves in between": LINEAR + "n = Reshape(y, flat) a = Relu(n) k = Reshape(a, flat) z = Mul(k, s)",
    "halves of one product": LINEAR
    + "n, k = Split<axis = 1>(y, twos) a = Relu(n) t = Mul(a, k) z = Concat<axis = 1>(t, k)",
}
WRITTEN = {
    "a constant": LINEAR + "a = Gelu(y) z = Mul(a, half)",
    "the other GELU": LINEAR + 'a = Gelu<approximate = "tanh">(y) z = Mul(half, a)',
    "a gated unit": LINEAR + "a = Gelu(y) k = MatMul(x, v) z = Mul(a, k)",
    "what it is of": LINEAR + 'a = Gelu<approximate = "tanh">(y) z = Mul(a, y)',
    "its square": LINEAR + "a = Gelu(y) z = Mul(a, a)",
    "in parts": LINEAR + PARTS + "z = Mul(a, b)",
    "in parts, by halves first": (
        LINEAR + "e = Mul(y, shrunk) f = Erf(e) g = Add(one, f) h = Mul(y, half) a = Mul(h, g) z = Mul(a, s)"
    ),
    "three axes": (
        "u = Reshape(x, threefold) p = MatMul(u, v) y = Add(p, b) a = Gelu(y) r = Mul(a, half) z = Reshape(r, flat)"
    ),
    "halves of one product": LINEAR
    + "n, k = Split<axis = 1>(y, twos) a = Gelu(n) t = Mul(k, a) z = Concat<axis = 1>(t, k)",
    "two products of it": LINEAR + "a = Gelu(y) k = Mul(a, s) n = Mul(a, half) z = Add(k, n)",
}
ADDED = {
    "a number for each image": IMAGE + "q = Add(c, t) z = ReduceSum<keepdims = 0>(q, spots)",
    "the number first": IMAGE + "q = Add(t, c) z = ReduceSum<keepdims = 0>(q, spots)",
}
FINE = {
    "GELU in parts alone": LINEAR + PARTS + "z = Neg(a)",
    "no bias": "p = MatMul(x, v) a = Relu(p) z = Mul(a, s)",
    "a Gemm without a bias": "p = Gemm<transB = 1>(x, w) a = Gelu(p) z = Mul(a, s)",
    "another activation": LINEAR + "a = LeakyRelu(y) z = Mul(a, s)",
    "SiLU": LINEAR + "a = Sigmoid(y) k = Mul(a, y) z = Mul(k, s)",
    "a sum": LINEAR + "a = Relu(y) z = Add(a, s)",
    "something in between": LINEAR + "a = Relu(y) k = Add(a, one) z = Mul(k, s)",
    "no GELU, as it is scaled otherwise": (
        LINEAR + "e = Mul(y, root) f = Erf(e) g = Add(one, f) h = Mul(y, half) a = Mul(h, g) z = Mul(a, s)"
    ),
    "no GELU, as it is of two tensors": (
        LINEAR
        + "k = MatMul(x, v) e = Div(k, root) f = Erf(e) g = Add(f, one) h = Mul(y, g) a = Mul(h, half) z = Mul(a, s)"
    ),
    "no activation": LINEAR + "z = Mul(y, s)",
    "a product of two inputs and a sum": "p = MatMul(x, v) y = Add(p, p) a = Relu(y) z = Mul(a, s)",
    "a convolution by a number": IMAGE + "q = Mul(c, t) z = ReduceSum<keepdims = 0>(q, spots)",
    "a convolution, an activation and a number": (
        IMAGE + "r = Relu(c) q = Add(r, t) z = ReduceSum<keepdims = 0>(q, spots)"
    ),
    "a constant for each channel": IMAGE + "q = Add(c, channel) z = ReduceSum<keepdims = 0>(q, spots)",
}


def model(body: str) -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    floats = {
        "w": rng.standard_normal((4, 5)), "v": rng.standard_normal((5, 4)), "b": rng.standard_normal(4),
        "half": np.array(0.5), "one": np.array(1.0), "root": np.array(2**0.5), "shrunk": np.array(0.5**0.5),
        "filter": rng.standard_normal((2, 1, 1, 3)), "bias": np.array([1, -1]), "channel": np.ones((1, 2, 1, 1)),
    }  # fmt: skip
    sizes = {
        "image": [3, 1, 1, 5],
        "numbers": [3, 1, 1, 1],
        "threefold": [1, 3, 5],
        "flat": [3, 4],
        "spots": [2, 3],
        "twos": [2, 2],
    }
    kind = "two" if "ReduceSum" in body else "four"
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[3,5] x, float[3,1] s) => (float[3,{kind}] z) {{ {body} }}'
    )
    constants = {name: np.asarray(value, np.float32) for name, value in floats.items()}
    return parsed(text, constants | {name: np.array(size, np.int64) for name, size in sizes.items()})


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


@pytest.mark.parametrize("body", [*APART.values(), *ADDED.values()], ids=[*APART, *ADDED])
def test_the_last_operation_stands_apart(body: str) -> None:
    before = model(body)
    kept = before.SerializeToString()
    after = avoid_faults(before)
    assert before.SerializeToString() == kept
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_array_equal(run(after, FEED)[0], run(before, FEED)[0])
    added = [node for node in after.graph.node if node.name not in {old.name for old in before.graph.node}]
    assert [node.op_type for node in added] == ["Unsqueeze", "Add" if "Conv" in body else "Mul"]
    assert len(after.graph.node) == len(before.graph.node) + 2
    assert {original_name(node.name) for node in after.graph.node} == {node.name for node in before.graph.node}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_gelu_that_is_multiplied_is_written_out(name: str) -> None:
    before = model(WRITTEN[name])
    after = avoid_faults(before)
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(run(after, FEED)[0], run(before, FEED)[0], rtol=1e-5, atol=1e-6)
    assert "Gelu" not in ops(after)
    assert not any(node.op_type in ("Unsqueeze", "Squeeze") for node in after.graph.node)
    (whole,) = (node for node in after.graph.node if node.name.endswith(".whole"))
    (last,) = (node for node in after.graph.node if whole.output[0] in node.input)
    assert last.output[0] == "a"
    assert last.name in {node.name for node in before.graph.node}
    assert {original_name(node.name) for node in after.graph.node} <= {node.name for node in before.graph.node}


def test_halves_are_written_out_in_single_precision() -> None:
    before = model(LINEAR + "a = Gelu(y) z = Mul(a, half)")
    for value in [*before.graph.input, *before.graph.output, *before.graph.value_info]:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in before.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    after = avoid_faults(before)
    onnx.checker.check_model(after, full_check=True)
    casts = [node for node in after.graph.node if node.op_type == "Cast"]
    assert [node.attribute[0].i for node in casts] == [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16]


@pytest.mark.parametrize("name", FINE)
def test_the_rest_is_left_alone(name: str) -> None:
    proto = model(FINE[name])
    assert avoid_faults(proto) is proto


def test_builds() -> None:
    pytest.importorskip("tensorrt_rtx")
    import torch
    from torch.nn import functional as F

    import trtbridge as tb

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.image = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16), torch.nn.Conv2d(1, 2, 1)

        def forward(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * F.gelu(self.gate(x)) * self.up(x), self.image(x[:, None, None]) + s

    dims = {"x": {0: tb.Dim("batch", min=1, max=8)}, "s": {0: tb.Dim("batch", min=1, max=8)}}
    args = (torch.randn(4, 8), torch.randn(4, 1, 1, 1))
    for dtype in (torch.float32, torch.float16):
        given = tuple(t.to(dtype) for t in args)
        converted = tb.convert(Gated().eval().to(dtype), given, dynamic_shapes=dims, backend="tensorrt_rtx")
        assert len(converted.program.engines) == 1
        assert not converted.program.plugin_calls
