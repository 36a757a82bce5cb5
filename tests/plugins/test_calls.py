"""Plugin calls as data: every kind of argument survives the JSON template."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trtbridge.errors import PluginError
from trtbridge.plugins.calls import decode, encode
from trtbridge.plugins.registry import call_op, find_op, node_type, op_name

aten = torch.ops.aten
X = torch.tensor([[3.0, -1.0], [2.0, 5.0]])


@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        (aten.cummax.default, (X, -1), {}),
        (aten.cat.default, ([X, X], 1), {}),
        (aten.clamp.default, (X, None, 1.5), {}),
        (aten.clamp.default, (X, float("-inf"), 1), {}),
        (aten.to.dtype, (X, torch.float16), {}),
        (aten.zeros_like.default, (X,), {"dtype": torch.int32, "device": torch.device("cpu")}),
        (aten.empty_like.default, (X,), {"memory_format": torch.contiguous_format}),
        (aten.sum.dim_IntList, (X, [0, 1], True), {"dtype": torch.float64}),
        (aten.index.Tensor, (X, [None, torch.tensor([1, 0])]), {}),
        (aten.div.Tensor_mode, (X, X + 1), {"rounding_mode": "floor"}),
        (aten.unbind.int, (X, 1), {}),
    ],
)
def test_calls_give_what_the_op_gives(op: Any, args: Any, kwargs: Any) -> None:
    tensors, template = encode(op, args, kwargs, lambda value: isinstance(value, torch.Tensor))
    results = call_op(find_op(op_name(op)), template, tensors, X.device)
    expected = op(*args, **kwargs)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    assert [r.dtype for r in results] == [e.dtype for e in expected]
    if op is not aten.empty_like.default:
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


def test_numbers_that_come_as_tensors() -> None:
    tensors, template = encode(
        aten.roll.default, (X, [torch.tensor(1)], [0]), {}, lambda v: isinstance(v, torch.Tensor)
    )
    assert len(tensors) == 2
    args, kwargs = decode(template, tensors, X.device)
    assert args[1:] == [[1], [0]]
    assert kwargs == {}


def test_names() -> None:
    assert op_name(aten.add.Tensor) == "aten::add.Tensor"
    assert node_type(aten.add.Tensor) == "aten_add_Tensor"
    assert node_type(aten.cummax.default) == "aten_cummax"
    assert find_op("aten::add.Tensor") is aten.add.Tensor


@pytest.mark.parametrize("name", ["nowhere::op.default", "aten::cummax.nothing", "aten::no_such_op"])
def test_missing_ops_are_named(name: str) -> None:
    with pytest.raises(PluginError, match=f"{name}.*not registered.*Import"):
        find_op(name)


def test_arguments_without_a_json_form() -> None:
    with pytest.raises(PluginError, match="cannot be stored"):
        encode(aten.add.Tensor, (X, X), {"alpha": object()}, lambda value: isinstance(value, torch.Tensor))
