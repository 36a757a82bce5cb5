"""Weights that products read directly, and batch norms folded into convolutions."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes.prepare_quantization import PrepareQuantization

PASS = PrepareQuantization()
X = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)}
NORM = "float[2] s = {2, 0.5}, float[2] b = {1, -1}, float[2] m = {0.3, -0.2}, float[2] v = {4, 0.25}"


@pytest.mark.parametrize("bias", ["", ", c"])
def test_a_batch_norm_goes_into_the_convolution(tools, bias):
    weight = np.random.default_rng(1).standard_normal((2, 2, 3, 3)).astype(np.float32)
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,2,2] y) <{NORM}, float[2] c = {{3, 4}}> "
        f"{{ a = Conv(x, w{bias})  n = BatchNormalization <epsilon = 0.01> (a, s, b, m, v)  y = Relu(n) }}"
    )
    weights = tools.stand_in(model, "w", weight)
    result = tools.apply(PASS, model, weights, rewrites=1, feeds=X, tolerance=1e-6)
    assert tools.ops(result) == ["Conv", "Relu"]
    (conv, _) = result.proto.graph.node
    factor = np.array([2, 0.5]) / np.sqrt(np.array([4, 0.25]) + 0.01)
    shift = ((np.array([3, 4]) if bias else 0) - np.array([0.3, -0.2])) * factor + np.array([1, -1])
    np.testing.assert_allclose(tools.initializer(result, conv.input[2]), shift, rtol=1e-6)


def test_a_transposed_convolution_and_an_output_by_name(tools):
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ a = ConvTranspose(x, w)  y = BatchNormalization(a, s, b, m, v) }"
    )
    result = tools.apply(PASS, model, rewrites=1, feeds=X, tolerance=1e-6)
    assert tools.ops(result) == ["ConvTranspose"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Conv(x, w)  n = BatchNormalization(a, s, b, m, v)  y = Add(a, n)", "something else reads"),
        ("a = Conv(x, w)  t = Identity(v)  y = BatchNormalization(a, s, b, m, t)", "are no constants"),
        ("a = ConvTranspose <group = 2> (x, u)  y = BatchNormalization(a, s, b, m, v)", "grouped ConvTranspose"),
    ],
)
def test_batch_norms_that_stay(tools, body, reason):
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}, "
        f"float[2,1,1,1] u = {{1, 2}}> {{ {body} }}"
    )
    tools.apply(PASS, model, rewrites=0, refused=reason)


def test_transposed_weights_become_constants_and_shared_ones_stay_for_others(tools):
    model = tools.model(
        "g (float[1,2] x) => (float[1,3] y, float[1,3] z, float[2,3] t) "
        "{ p = Transpose <perm = [1, 0]> (w)  y = MatMul(x, p)  z = MatMul(x, p)  t = Transpose(w) }"
    )
    weights = tools.stand_in(model, "w", np.arange(6, dtype=np.float32).reshape(3, 2))
    feeds = {"x": np.array([[1.0, 2.0]], np.float32)}
    result = tools.apply(PASS, model, weights, rewrites=2, feeds=feeds)
    assert tools.ops(result) == ["MatMul", "MatMul", "Transpose"]
    one, two, _ = result.proto.graph.node
    assert one.input[1] == two.input[1]
    assert "w" in result.weights


def test_transposed_activations_stay(tools):
    model = tools.model("g (float[2,2] x) => (float[2,2] y) { p = Transpose <perm = [1, 0]> (x)  y = MatMul(x, p) }")
    tools.apply(PASS, model, rewrites=0)
