"""RemoveDeadNodes."""

from __future__ import annotations

import numpy as np

from trtbridge.passes import RemoveDeadNodes


def test_removes_what_no_output_needs(tools):
    model = tools.model(
        "g (float[2] x, float[2] unused) => (float[2] y) <float[2] k = {1, 2}> "
        "{ y = Relu(x)  b = Exp(y)  c = Add(b, k) }"
    )
    feeds = {"x": np.ones(2, np.float32), "unused": np.ones(2, np.float32)}
    result = tools.apply(RemoveDeadNodes(), model, rewrites=2, feeds=feeds)
    assert tools.ops(result) == ["Relu"]
    assert [value.name for value in result.proto.graph.input] == ["x", "unused"]
    assert not result.proto.graph.initializer


def test_weights_go_with_their_last_reader(tools):
    model = tools.model("g (float[2,300] x) => (float[2,300] y) { y = Add(x, w)  b = Mul(x, v)  c = Mul(x, w) }")
    weights = tools.stand_in(model, "w", np.ones(300, np.float32)) | tools.stand_in(
        model, "v", np.ones(300, np.float32)
    )
    result = tools.apply(RemoveDeadNodes(), model, weights, rewrites=2)
    assert list(result.weights) == ["w"]
    assert result.weights["w"] is weights["w"]


def test_trims_unread_optional_outputs(tools):
    model = tools.model(
        "g (float[1,1,4,4] x) => (float[1,1,2,2] y, float[1,1,4,4] z) <float[4] s = {1, 1, 1, 1}> "
        "{ y, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)  d, m = Dropout(x) "
        "  z, u, v = LayerNormalization(d, s) }"
    )
    feeds = {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)}
    result = tools.apply(RemoveDeadNodes(), model, rewrites=3, feeds=feeds)
    assert [len(node.output) for node in result.proto.graph.node] == [1, 1, 1]


def test_leaves_outputs_that_are_read_or_not_optional(tools):
    model = tools.model(
        "g (float[4] x) => (float[2] y, int64[1] i, float[4] d, bool[4] m) <int64[1] k = {1}> "
        "{ y, r = Split<num_outputs = 2>(x)  t, i = TopK(x, k)  d, m = Dropout(x) }"
    )
    tools.apply(RemoveDeadNodes(), model, rewrites=0, feeds={"x": np.arange(4, dtype=np.float32)})


def test_plugin_nodes_stay(tools):
    model = tools.model("g (float[2] x) => (float[2] y) { y = Relu(x)  a = Exp(x)  p = trtbridge.log(a) }")
    result = tools.apply(RemoveDeadNodes(), model, rewrites=0, refused="side effects")
    assert tools.ops(result) == ["Relu", "Exp", "log"]


def test_subgraphs(tools):
    model = tools.model(
        """g (float[2] x, bool c) => (float[2] y) {
        a = Neg(x)  used = Abs(x)
        y = If<then_branch = t () => (float[2] to) { dead = Exp(a)  to = Exp(used) },
               else_branch = e () => (float[2] eo) { eo = Identity(used) }>(c)
        z = If<then_branch = t () => (float[2] to) { to = Exp(a) },
               else_branch = e () => (float[2] eo) { eo = Neg(a) }>(c)
        }"""
    )
    feeds = {"x": np.ones(2, np.float32), "c": np.array(True)}
    result = tools.apply(RemoveDeadNodes(), model, rewrites=3, feeds=feeds)
    assert tools.ops(result) == ["Abs", "If"]


def test_dynamic_shapes_and_loop(tools):
    model = tools.model(
        """g (float[N] x) => (float[N] y) <int64 n = {3}, bool c = {1}> {
        dead = Neg(x)
        y = Loop<body = b (int64 i, bool ci, float[N] s) => (bool co, float[N] so)
            { co = Identity(ci)  so = Add(s, x)  d = Exp(s) }>(n, c, x)
        }"""
    )
    result = tools.apply(RemoveDeadNodes(), model, rewrites=2, feeds={"x": np.ones(3, np.float32)})
    assert tools.ops(result) == ["Loop"]
