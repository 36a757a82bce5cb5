"""RepeatHeads: shared heads of Attention nodes repeated, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from trtbridge.passes import RepeatHeads

RNG = np.random.default_rng(0)
HEAD = "g (float[b,4,l,16] q, float[b,2,s,16] k, float[b,2,s,16] v{more}) => (float[b,4,l,16] y)"


def _random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


FEEDS = {"q": _random(3, 4, 5, 16), "k": _random(3, 2, 7, 16), "v": _random(3, 2, 7, 16)}
PASS = RepeatHeads(frozenset({"one"}))


def _model(tools, text, more="", head=HEAD):
    model = tools.model(f"{head.replace('{more}', more)} {{ {text} }}", 23)
    for node, name in zip([n for n in model.graph.node if n.op_type == "Attention"], ("one", "two"), strict=False):
        node.name = name
    return model


@pytest.mark.parametrize(
    ("text", "more", "feeds"),
    [
        ("y = Attention(q, k, v)", "", {}),
        ("y = Attention<scale=0.3, is_causal=1>(q, k, v)", "", {}),
        ("y = Attention(q, k, v, m)", ", float[b,4,l,s] m", {"m": _random(3, 4, 5, 7)}),
    ],
)
def test_every_head_of_queries_gets_its_keys_and_values(tools, text, more, feeds):
    result = tools.apply(PASS, _model(tools, text, more), rewrites=1, feeds=FEEDS | feeds, tolerance=1e-6)
    ops = ["Unsqueeze", "Expand", "Reshape"]
    assert tools.ops(result) == [*ops, *ops, "Attention"]
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in result.proto.graph.value_info
    }
    node = result.proto.graph.node[-1]
    assert [shapes[name] for name in node.input[1:3]] == [["b", 4, "s", 16]] * 2
    assert (node.name, node.output[0]) == ("one", "y")


def test_keys_that_two_nodes_read_are_repeated_once(tools):
    model = _model(tools, "a = Attention(q, k, v) y = Attention(a, k, v)")
    result = tools.apply(RepeatHeads(frozenset({"one", "two"})), model, rewrites=2, feeds=FEEDS, tolerance=1e-6)
    assert tools.ops(result).count("Expand") == 2


def test_only_nodes_that_are_named_are_touched(tools):
    model = _model(tools, "a = Attention(q, k, v) y = Attention(a, k, v)")
    result = tools.apply(RepeatHeads(frozenset({"two"})), model, rewrites=1, feeds=FEEDS, tolerance=1e-6)
    assert tools.ops(result)[0] == "Attention"
    tools.apply(RepeatHeads(frozenset({"other"})), model, rewrites=0)


LEFT = {
    "three axes": (
        "g (float[b,l,64] q, float[b,s,32] k, float[b,s,32] v) => (float[b,l,64] y)",
        "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)",
        "other than four axes",
    ),
    "heads not fixed": (
        "g (float[b,4,l,16] q, float[b,h,s,16] k, float[b,h,s,16] v) => (float[b,4,l,16] y)",
        "y = Attention(q, k, v)",
        "not fixed",
    ),
    "no multiple": (
        "g (float[b,4,l,16] q, float[b,3,s,16] k, float[b,3,s,16] v) => (float[b,4,l,16] y)",
        "y = Attention(q, k, v)",
        "cannot share",
    ),
    "past keys": (
        "g (float[b,4,l,16] q, float[b,2,s,16] k, float[b,2,s,16] v, float[b,2,p,16] c, float[b,2,p,16] d)"
        " => (float[b,4,l,16] y)",
        'y = Attention(q, k, v, "", c, d)',
        "past keys",
    ),
    "present keys": (HEAD.replace("{more}", ""), "y, c, d = Attention(q, k, v)", "gives more"),
    "no shared heads": (
        "g (float[b,4,l,16] q, float[b,4,s,16] k, float[b,4,s,16] v) => (float[b,4,l,16] y)",
        "y = Attention(q, k, v)",
        None,
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(tools, name):
    head, text, reason = LEFT[name]
    tools.apply(PASS, _model(tools, text, head=head), rewrites=0, refused=reason)
