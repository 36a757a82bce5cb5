"""Weights that products read directly."""

from __future__ import annotations

import numpy as np

from trtbridge.passes.prepare_quantization import PrepareQuantization

PASS = PrepareQuantization()


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
