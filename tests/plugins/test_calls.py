"""Plugin calls as data: every kind of argument survives the JSON template."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from trtbridge.errors import PluginError
from trtbridge.plugins import registry
from trtbridge.plugins.calls import decode, encode, encode_tensors, reads_numbers, texts
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
    tensors, template = encode_tensors(args, kwargs)
    results = call_op(find_op(op_name(op)), template, tensors, X.device)
    expected = op(*args, **kwargs)
    expected = list(expected) if isinstance(expected, (tuple, list)) else [expected]
    assert [r.dtype for r in results] == [e.dtype for e in expected]
    if op is not aten.empty_like.default:
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)


def test_numbers_that_come_as_tensors() -> None:
    template = '{"args":[{"tensor":0},[{"int":1}],[0]],"kwargs":{}}'
    assert reads_numbers(template)
    args, kwargs = decode(template, [X, torch.tensor(1)], X.device)
    assert args[1:] == [[1], [0]]
    assert kwargs == {}


def test_sizes_come_from_shapes() -> None:
    template = encode((3,), {}, lambda value: {"sym": "2*s0 + s1//2"}, symbols={"s0": (0, 1), "s1": (0, 0)})
    assert not reads_numbers(template)
    assert decode(template, [torch.zeros(6, 5)], X.device)[0] == [13]


def test_complex_tensors_travel_as_pairs() -> None:
    z = torch.view_as_complex(torch.randn(3, 4, 2))
    tensors, template = encode_tensors((z,), {"n": 5})
    assert tensors[0].shape == (3, 4, 2)
    (result,) = call_op(torch.ops.aten.fft_fft.default, template, tensors, X.device)
    assert torch.equal(torch.view_as_complex(result), torch.fft.fft(z, n=5))
    tensors, template = encode_tensors((z.conj(), 1 + 2j), {})
    (result,) = call_op(aten.mul.Scalar, template, tensors, X.device)
    assert torch.equal(torch.view_as_complex(result), z.conj() * (1 + 2j))


def test_results_are_flat() -> None:
    tensors, template = encode_tensors((X, [1, 1], 0), {})
    results = call_op(aten.split_with_sizes.default, template, tensors, X.device)
    assert [tuple(r.shape) for r in results] == [(1, 2), (1, 2)]
    _, template = encode_tensors((X,), {})
    (number,) = call_op(aten.numel.default, template, [X], X.device)
    assert number.item() == 4
    assert number.dtype == torch.int64


def test_names() -> None:
    assert op_name(aten.add.Tensor) == "aten::add.Tensor"
    assert node_type("aten::add.Tensor") == "aten_add_Tensor"
    assert node_type("aten::cummax.default") == "aten_cummax"
    assert find_op("aten::add.Tensor") is aten.add.Tensor


def test_functions_of_torch_that_are_no_ops() -> None:
    assert find_op("python::torch.cov") is torch.cov
    assert find_op("python::torch.Tensor.cov") is torch.Tensor.cov


@pytest.mark.parametrize("name", ["torch.os.system", "torch.load", "torch.hub.load", "torch.sys.exit", "torch.nothing"])
def test_a_saved_program_cannot_name_any_python_function(name: str) -> None:
    with pytest.raises(PluginError, match="not registered"):
        find_op(f"python::{name}")


@pytest.mark.parametrize("name", ["nowhere::op.default", "aten::cummax.nothing", "aten::no_such_op"])
def test_missing_ops_are_named(name: str) -> None:
    with pytest.raises(PluginError, match=f"{name}.*not registered.*Import"):
        find_op(name)


def test_arguments_without_a_json_form() -> None:
    with pytest.raises(PluginError, match=r"of type object .* cannot be stored"):
        encode_tensors((X, X), {"alpha": object()})


def test_unknown_tags_are_named() -> None:
    with pytest.raises(PluginError, match="unknown tag 'quaternion'"):
        decode('{"args":[{"quaternion":0}],"kwargs":{}}', [X], X.device)


def test_texts_are_read_without_the_tensors() -> None:
    template = '{"args":["a program",[{"complex":0},{"int":1},{"sym":"s0"}],3],"kwargs":{},"symbols":{"s0":[0,2]}}'
    assert texts(template) == ["a program"]


def test_custom_ops_run_one_at_a_time_where_torch_loses_count(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, []

    @torch.library.custom_op("trtbridge_test_turns::slow", mutates_args=())
    def slow(x: torch.Tensor) -> torch.Tensor:
        nonlocal running
        running += 1
        most.append(running)
        time.sleep(0.02)  # others may run
        running -= 1
        return x * 2

    op = torch.ops.trtbridge_test_turns.slow.default
    tensors, template = encode_tensors((X,), {})

    def together() -> int:
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            for (result,) in pool.map(lambda _: call_op(op, template, tensors, X.device), range(8)):
                assert torch.equal(result, X * 2)
        return max(most)

    monkeypatch.setattr(registry, "_TORCH_RACES", True)
    assert together() == 1
    monkeypatch.setattr(registry, "_TORCH_RACES", False)
    assert together() > 1


@pytest.mark.parametrize("races", [True, False], ids=["before 2.13", "2.13"])
def test_a_note_of_torch_that_another_thread_took_out(monkeypatch: pytest.MonkeyPatch, races: bool) -> None:
    """As torch does where an op of the caller's runs beside one of ours, from 2.13 on while something is exported: the
    call is made again."""
    calls: list[torch.Tensor] = []
    missing = 2

    def annotate() -> None:
        del {}["custom"]

    @torch.library.custom_op(f"trtbridge_test_turns::noted_{races}", mutates_args=("x",))
    def noted(x: torch.Tensor) -> None:
        calls.append(x.clone())
        x.add_(1)
        if len(calls) <= missing:
            annotate()

    template = json.dumps(json.loads(encode_tensors((X,), {})[1]) | {"writes": [0]})
    monkeypatch.setattr(registry, "_TORCH_RACES", races)
    given = X.clone()
    op = getattr(torch.ops.trtbridge_test_turns, f"noted_{races}").default
    (written,) = call_op(op, template, [given], X.device)
    assert torch.equal(given, X)
    assert torch.equal(written, X + 1)
    assert len(calls) == 3
    assert all(torch.equal(x, X) for x in calls), "each begins with what was given"

    calls.clear()
    missing = 100
    with pytest.raises(KeyError, match="custom"):
        call_op(op, template, [given], X.device)
    assert len(calls) == 6


def test_a_key_error_of_the_ops_own_is_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    @torch.library.custom_op("trtbridge_test_turns::lacking", mutates_args=())
    def lacking(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise KeyError("custom")

    tensors, template = encode_tensors((X,), {})
    monkeypatch.setattr(registry, "_TORCH_RACES", True)
    with pytest.raises(KeyError, match="custom"):
        call_op(torch.ops.trtbridge_test_turns.lacking.default, template, tensors, X.device)
    assert len(calls) == 1
