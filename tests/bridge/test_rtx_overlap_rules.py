"""What a convolution joins, where it was made right ahead of it, is joined in another kernel, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from rtx_graphs import parsed, run

from trtbridge.bridge.backends.rtx_faults import avoid_faults, original_name

X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
SQUARE = "<pads = [1, 1, 1, 1]>"

APART = {
    "another convolution": "a = Conv(x, w) b = Conv(x, v) z = Add(a, b)",
    "behind activations": "a = Conv(x, w) r = Relu(a) b = Conv(x, v) s = Sigmoid(b) z = Mul(r, s)",
    "what another kernel made": (
        "p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x) a = Conv(x, w) z = Sub(p, a)"
    ),
    "its image": "p = AveragePool<kernel_shape = [1, 1]>(x) a = Conv(p, w) z = Add(p, a)",
    "the end of a branch and of another": (
        f"a = Conv(x, w) b = Relu(a) c = Conv{SQUARE}(b, k) d = Conv(x, v) e = Add(c, d) z = Relu(e)"
    ),
    "what was made of a number in between": "a = Conv(x, w) p = Exp(x) b = Conv(a, v) z = Add(b, p)",
}
FINE = {
    "a residual branch": f"p = Exp(x) a = Conv(p, w) b = Relu(a) c = Conv{SQUARE}(b, k) z = Add(c, p)",
    "a longer one": f"p = Conv(x, v) a = Conv(p, w) b = Conv{SQUARE}(a, k) c = Conv(b, w) d = Relu(c) z = Add(p, d)",
    "an input": "a = Conv(x, w) z = Add(a, x)",
    "a view of an input": "u = Reshape(x, shape) a = Conv(x, w) z = Add(a, u)",
    "a constant": "c = Constant<value = float {2.0}>() a = Conv(x, w) z = Mul(a, c)",
    "itself": "a = Conv(x, w) s = Sigmoid(a) z = Mul(a, s)",
    "no convolution": "a = MatMul(x, m) b = MatMul(x, m) z = Add(a, b)",
}


def model(body: str) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1), "k": (4, 4, 3, 3), "m": (6, 6)}
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[2,4,6,6] x) => (float[2,4,6,6] z) {{ {body} }}'
    constants = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    return parsed(text, constants | {"shape": np.array(X.shape, np.int64)})


@pytest.mark.parametrize("name", APART)
def test_joined_in_a_kernel_of_its_own(name: str) -> None:
    before = model(APART[name])
    kept = before.SerializeToString()
    after = avoid_faults(before)
    assert before.SerializeToString() == kept
    onnx.checker.check_model(after, full_check=True)
    np.testing.assert_allclose(run(after, {"x": X})[0], run(before, {"x": X})[0], rtol=1e-5, atol=1e-6)
    (apart,) = (node for node in after.graph.node if node.name.endswith(".apart"))
    assert apart.op_type in ("Add", "Mul", "Sub")
    assert {original_name(node.name) for node in after.graph.node} == {node.name for node in before.graph.node}


@pytest.mark.parametrize("name", FINE)
def test_the_rest_is_left_alone(name: str) -> None:
    proto = model(FINE[name])
    assert avoid_faults(proto) is proto
