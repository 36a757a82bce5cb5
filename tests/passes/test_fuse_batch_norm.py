"""FuseBatchNorm."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes.fuse_batch_norm import FuseBatchNorm

X = {"x": np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)}
NORM = "float[2] s = {2, 0.5}, float[2] b = {1, -1}, float[2] m = {0.3, -0.2}, float[2] v = {4, 0.25}"


@pytest.mark.parametrize("bias", ["", ", c", ", zeros"])
def test_a_batch_norm_goes_into_the_convolution(tools, bias):
    weight = np.random.default_rng(1).standard_normal((2, 2, 3, 3)).astype(np.float32)
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,2,2] y) <{NORM}, float[2] c = {{3, 4}}, "
        f"float[2] zeros = {{0, 0}}> {{ a = Conv(x, w{bias})  "
        "n = BatchNormalization <epsilon = 0.01> (a, s, b, m, v)  y = Relu(n) }"
    )
    weights = tools.stand_in(model, "w", weight)
    if "c" in bias:
        tools.apply(FuseBatchNorm(), model, weights, rewrites=0, refused="adds a bias anyway")
    fold = FuseBatchNorm(everywhere="c" in bias)
    result = tools.apply(fold, model, weights, rewrites=1, feeds=X, tolerance=1e-6)
    assert tools.ops(result) == ["Conv", "Relu"]
    (conv, _) = result.proto.graph.node
    factor = np.array([2, 0.5]) / np.sqrt(np.array([4, 0.25]) + 0.01)
    shift = ((np.array([3, 4]) if "c" in bias else 0) - np.array([0.3, -0.2])) * factor + np.array([1, -1])
    np.testing.assert_allclose(tools.initializer(result, conv.input[2]), shift, rtol=1e-6)


def test_a_transposed_convolution_and_an_output_by_name(tools):
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ a = ConvTranspose(x, w)  y = BatchNormalization(a, s, b, m, v) }"
    )
    result = tools.apply(FuseBatchNorm(), model, rewrites=1, feeds=X, tolerance=1e-6)
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
    tools.apply(FuseBatchNorm(), model, rewrites=0, refused=reason)


def test_a_weight_that_others_read_is_not_doubled(tools):
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ a = Conv(x, w)  n = BatchNormalization(a, s, b, m, v)  y = Conv(n, w) }"
    )
    tools.apply(FuseBatchNorm(), model, rewrites=0, refused="others read")
    tools.apply(FuseBatchNorm(everywhere=True), model, rewrites=1, feeds=X, tolerance=1e-5)


def test_in_a_branch_with_a_weight_of_the_outer_graph(tools):
    model = tools.model(
        f"g (float[1,2,4,4] x, bool c) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ y = If<then_branch = t () => (float[1,2,4,4] to) { a = Conv(x, w)  "
        "to = BatchNormalization(a, s, b, m, v) }, else_branch = f () => (float[1,2,4,4] eo) { eo = Neg(x) }>(c) }"
    )
    result = tools.apply(FuseBatchNorm(), model, rewrites=1, feeds={**X, "c": np.array(True)}, tolerance=1e-6)
    assert "BatchNormalization" not in str(result.proto)


def test_a_convolution_outside_of_the_branch_stays(tools):
    model = tools.model(
        f"g (float[1,2,4,4] x, bool c) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ a = Conv(x, w)  y = If<then_branch = t () => (float[1,2,4,4] to) "
        "{ to = BatchNormalization(a, s, b, m, v) }, else_branch = f () => (float[1,2,4,4] eo) { eo = Neg(x) }>(c) }"
    )
    tools.apply(FuseBatchNorm(), model, rewrites=0)


def test_builds(tools, rtx_refusal):
    model = tools.model(
        f"g (float[1,2,4,4] x) => (float[1,2,4,4] y) <{NORM}, float[2,2,1,1] w = {{1, 2, 3, 4}}> "
        "{ a = Conv(x, w)  y = BatchNormalization(a, s, b, m, v) }"
    )
    result = tools.apply(FuseBatchNorm(), model, rewrites=1)
    assert tools.ops(result) == ["Conv"]
    assert rtx_refusal(result.proto) is None
