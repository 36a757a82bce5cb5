"""``out_of_range="eager"``: the original runs where sizes fit no profile, and nothing else is forgiven."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import trtbridge as tb


class Net(torch.nn.Module):
    """Tells the modes that it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        made = self.drop(self.linear(x))
        if not torch.compiler.is_compiling():
            self.seen.append((self.drop.training, torch.is_grad_enabled(), made.dtype))
        return {"sum": made + y[:1], "y": y * 2}


BATCH = tb.Dim("batch", profiles=[(1, 1, 1), (8, 16, 32)])


def arguments(x: int, y: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(x, 4), torch.randn(x if y is None else y, 4)


@pytest.fixture(scope="module")
def converted() -> tuple[Net, tb.EngineModule]:
    torch.manual_seed(0)
    net = Net().train()
    module = tb.convert(
        net,
        arguments(1),
        dynamic_shapes={"x": {0: BATCH}, "y": {0: BATCH}},
        backend="onnxruntime",
        out_of_range="eager",
        check_export=False,
    )
    return net, module


@pytest.fixture
def net(converted: tuple[Net, tb.EngineModule]) -> Net:
    """An original of its own for each test."""
    net = Net().train()
    net.load_state_dict(converted[0].state_dict())
    return net


@pytest.fixture
def fast(converted: tuple[Net, tb.EngineModule], net: Net) -> tb.EngineModule:
    return tb.EngineModule(converted[1].program, "cpu", eager=net)


def test_convert_keeps_the_original_by_reference(converted: tuple[Net, tb.EngineModule]) -> None:
    net, module = converted
    before = len(net.seen)
    module(*arguments(8))
    assert (module.out_of_range, module.eager_calls, len(net.seen)) == ("eager", 0, before)
    module(*arguments(4))
    assert (module.eager_calls, len(net.seen)) == (1, before + 1)


def test_sizes_in_range_run_the_engines(net: Net, fast: tb.EngineModule, assert_same: Callable[..., None]) -> None:
    assert fast.out_of_range == "eager"
    expected = copy.deepcopy(net).eval()
    for size in (1, 8, 32):
        args = arguments(size)
        with torch.no_grad():
            assert_same(fast(*args), expected(*args))
    assert (fast.eager_calls, net.seen) == (0, [])


@pytest.mark.parametrize(
    "args",
    [arguments(4), arguments(40), arguments(8, 16), (torch.randn(1, 4), torch.randn(1, 1))],
    ids=["between profiles", "above all", "dims that disagree", "a static dimension"],
)
def test_sizes_outside_run_the_original(
    net: Net, fast: tb.EngineModule, args: tuple[torch.Tensor, ...], assert_same: Callable[..., None]
) -> None:
    expected = copy.deepcopy(net).eval()
    with torch.no_grad():
        assert_same(fast(*args), expected(*args))
    found = fast(y=args[1], x=args[0].clone().requires_grad_())
    assert not found["sum"].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert fast(*args)["sum"].dtype == torch.float32, "as for the engines, the caller's autocast does not count"
    assert net.seen == [(False, False, torch.float32)] * 3, "in eval mode, without gradients"
    assert net.training
    assert net.drop.training, "and put back"
    assert fast.eager_calls == 3


def test_only_modules_in_training_are_put_back(net: Net, fast: tb.EngineModule) -> None:
    net.linear.eval()
    fast(*arguments(4))
    assert [module.training for module in (net, net.linear, net.drop)] == [True, False, True]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((torch.randn(4, 4).double(), torch.randn(4, 4)), "expected torch.float32"),
        ((torch.randn(4), torch.randn(4, 4)), "expected rank 2"),
        ((torch.randn(4, 4),), "missing y"),
        ((torch.randn(4, 4), None), "y"),
        ((torch.randn(4, 4, device="meta"), torch.randn(4, 4)), "expected it on cpu"),
    ],
    ids=["dtype", "rank", "missing", "no tensor", "device"],
)
def test_all_else_stays_an_error(net: Net, fast: tb.EngineModule, args: Any, words: str) -> None:
    with pytest.raises(tb.InputError, match=words) as caught:
        fast(*args)
    assert not isinstance(caught.value, tb.OutOfRangeError)
    assert (fast.eager_calls, net.seen) == (0, [])


def test_one_line_in_the_log_and_a_count(fast: tb.EngineModule, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="trtbridge.bridge.out_of_range"):
        for size in (4, 5, 40):
            fast(*arguments(size))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the original Net runs" in record.message
    assert "batch 4 (in x)" in record.message
    assert "\n" not in record.message
    assert fast.eager_calls == 3
    assert str(fast.inspect()).endswith("sizes outside: the original Net runs (3 calls so far)")


def test_the_original_is_no_part_of_the_module(net: Net, fast: tb.EngineModule) -> None:
    assert list(fast.state_dict()) == []
    assert list(fast.modules()) == [fast]
    outer = torch.nn.Sequential(fast).train()
    assert net.training
    outer.eval()
    assert net.training, "its mode is its owner's"
    net.linear.weight.data.zero_()
    net.linear.bias.data.zero_()
    x, y = arguments(4)
    torch.testing.assert_close(fast(x, y)["sum"], y[:1].expand(4, 4)), "not a copy"
    copied = copy.deepcopy(fast)
    copied(x, y)
    assert (copied.eager_calls, fast.eager_calls, len(net.seen)) == (1, 1, 2)


def test_what_the_original_raises_passes(fast: tb.EngineModule, net: Net) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(torch.randn(1, 5), torch.randn(1, 4))
    assert net.training


def test_calls_from_threads_overlap(net: Net, fast: tb.EngineModule) -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(*_: Any) -> None:
        both.wait()

    net.linear.register_forward_hook(meet)  # each waits for the other within the module
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fast(*arguments(4))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [training for training, _, _ in net.seen] == [False, False]
    assert net.training
    assert fast.eager_calls == 2


def test_files(net: Net, fast: tb.EngineModule, tmp_path: Path, assert_same: Callable[..., None]) -> None:
    path = tmp_path / "m.trtb"
    tb.save(fast, path)
    loaded = tb.load(path)
    assert loaded.out_of_range == "error"
    with pytest.raises(tb.OutOfRangeError, match="No profile takes batch 4"):
        loaded(*arguments(4))
    assert loaded.eager_calls == 0
    with pytest.raises(tb.OptionError, match=r"not in the file: .*tb.load\(path, eager=model\)"):
        tb.load(path, out_of_range="eager")
    with pytest.raises(tb.OptionError, match="leave one of them out"):
        tb.load(path, out_of_range="error", eager=net)
    with pytest.raises(tb.OptionError, match='must be "error" or "eager"'):
        tb.load(path, out_of_range="Eager")
    with pytest.raises(tb.OptionError, match=r"must be a torch.nn.Module, got function"):
        tb.load(path, eager=lambda x, y: x)  # type: ignore[arg-type]
    again = tb.load(path, eager=net)
    args = arguments(4)
    with torch.no_grad():
        assert_same(again(*args), net.eval()(*args))
    assert again.eager_calls == 1


def test_without_it_sizes_outside_are_errors(net: Net) -> None:
    shapes = {"x": {0: BATCH}, "y": {0: BATCH}}
    fast = tb.convert(net, arguments(1), dynamic_shapes=shapes, backend="onnxruntime", check_export=False)
    assert (fast.out_of_range, fast.eager_calls) == ("error", 0)
    for args in (arguments(4), arguments(40), arguments(8, 16)):
        with pytest.raises(tb.OutOfRangeError):
            fast(*args)


def test_it_is_refused_where_there_is_no_original(tmp_path: Path, net: Net) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", info[:1], info[1:])), tmp_path / "m.onnx")
    with pytest.raises(tb.OptionError, match=r"an \.onnx file is none"):
        tb.convert(tmp_path / "m.onnx", backend="onnxruntime", out_of_range="eager")
    with pytest.raises(tb.OptionError, match=r'out_of_range=.*must be "error" or "eager"'):
        tb.convert(net, arguments(1), backend="onnxruntime", out_of_range="ignore")


def test_the_original_must_be_where_the_engines_run(net: Net, fast: tb.EngineModule, tmp_path: Path) -> None:
    tb.save(fast, tmp_path / "m.trtb")
    elsewhere = copy.deepcopy(net).to("meta")
    with pytest.raises(tb.OptionError, match="run on cpu, and the original Net is on meta"):
        tb.load(tmp_path / "m.trtb", eager=elsewhere)
    net.to("meta")
    with pytest.raises(tb.ExecutionError, match="moved to meta; the engines are on cpu"):
        fast(*arguments(4))
    assert fast.eager_calls == 0
