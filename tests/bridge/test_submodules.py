"""tb.convert_submodules: chosen parts of a copy are engines, the original is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trtbridge as tb

Same = Callable[..., None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor, *, extra: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        y = x + self.inner(x)
        return y if extra is None else y * extra["scale"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.first, self.second = Block(), Block()
        self.again = self.second  # one instance in two places
        self.unused = Block()
        self.head = nn.Linear(8, 3)
        self.register_buffer("scale", torch.full((1, 1, 8), 0.5))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.first(self.embed(ids), extra={"scale": self.scale})
        return {"y": self.head(self.again(self.second(x))), "x": x}


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 10, (rows, tokens))


def engines(model: nn.Module) -> list[str]:
    return sorted(p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, tb.EngineModule))


def test_by_class_with_sizes_from_samples(assert_same: Same) -> None:
    model = Model().train()
    before = {name: id(module) for name, module in model.named_modules()}
    fast: Any = tb.convert_submodules(
        model, Block, [(ids(2, 5),), {"ids": ids(3, 7)}], backend="onnxruntime", skip_failures=True
    )
    assert engines(fast) == ["again", "first", "second"]
    assert fast.again is fast.second
    report = fast.submodules_report
    assert list(report.converted) == ["first", "second"]
    assert list(report.skipped) == ["unused"]
    assert "does not call it" in report.skipped["unused"]
    assert "unused: stays as it is: InputError" in str(report)
    assert report.converted["first"].program.signature.dims == {"size0": (2, 2, 3), "size1": (5, 5, 7)}
    assert fast.head.weight is model.head.weight
    assert fast.scale is model.scale
    assert fast.training
    assert model.training
    assert not engines(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        for rows, tokens in ((2, 5), (3, 7), (2, 6)):
            x = ids(rows, tokens)
            assert_same(fast(x), model(x))
        with pytest.raises(tb.InputError, match="size0 from 2 to 3"):
            fast(ids(4, 5))


@pytest.mark.parametrize(
    ("select", "found"),
    [
        ("first", ["first"]),
        ("first.inner.*", ["first.inner.0", "first.inner.1", "first.inner.2"]),
        (["first.inner.0", "first"], ["first"]),
        (lambda path, module: path.endswith("inner") and path.startswith("first"), ["first.inner"]),
        ([nn.GELU, "head"], ["again.inner.1", "first.inner.1", "head", "second.inner.1"]),
    ],
    ids=["path", "pattern", "outermost", "function", "several"],
)
def test_selections(select: Any, found: list[str], assert_same: Same) -> None:
    model = Model().eval()
    model.unused = nn.Identity()
    x = ids(2, 5)
    fast = tb.convert_submodules(model, select, (x,), backend="onnxruntime")
    assert engines(fast) == found
    with torch.no_grad():
        assert_same(fast(x), model(x))


def test_given_shapes(assert_same: Same) -> None:
    model = Model().eval()
    rows, tokens = tb.Dim("rows", min=1, max=8), tb.Dim("tokens", min=1, max=16)
    fast = tb.convert_submodules(
        model, "first", (ids(2, 5),), dynamic_shapes={"first": {"x": {0: rows, 1: tokens}}}, backend="onnxruntime"
    )
    x = ids(7, 11)
    with torch.no_grad():
        assert_same(fast(x), model(x))
    with pytest.raises(tb.OptionError, match=r"names \['second'\]"):
        tb.convert_submodules(model, "first", (ids(2, 5),), dynamic_shapes={"second": {}}, backend="onnxruntime")


def test_what_is_wrong_is_named() -> None:
    model = Model().eval()
    x = (ids(2, 5),)
    with pytest.raises(tb.InputError, match=r"Submodule unused \(Block\): the model does not call it"):
        tb.convert_submodules(model, "unused", x, backend="onnxruntime")
    with pytest.raises(tb.OptionError, match=r"select='frist' selects no submodule of Model\. Did you mean 'first'"):
        tb.convert_submodules(model, "frist", x, backend="onnxruntime")
    with pytest.raises(tb.OptionError, match="must be a path"):
        tb.convert_submodules(model, 3, x, backend="onnxruntime")  # type: ignore[arg-type]
    with pytest.raises(tb.OptionError, match="no option 'opsets'"):
        tb.convert_submodules(model, "first", x, backend="onnxruntime", opsets=20)
    with pytest.raises(tb.InputError, match="got Tensor in it"):
        tb.convert_submodules(model, "first", [ids(2, 5)], backend="onnxruntime")  # type: ignore[list-item]


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x), extra={"scale": x})


def test_calls_unlike_one_another() -> None:
    model, x = Uneven().eval(), torch.randn(2, 8)
    with pytest.raises(tb.InputError, match=r"Submodule block \(Block\): it is called with other arguments"):
        tb.convert_submodules(model, "block", (x,), backend="onnxruntime")
    fast = tb.convert_submodules(model, ["block", "block.inner"], (x,), backend="onnxruntime", skip_failures=True)
    assert engines(fast) == []
    assert "other arguments" in fast.submodules_report.skipped["block"]
    torch.testing.assert_close(fast(x), model(x))


def test_the_copy_compiles(assert_same: Same) -> None:
    model = Model().eval()
    x = ids(2, 5)
    fast = tb.convert_submodules(model, ["first", "second"], (x,), backend="onnxruntime")
    torch._dynamo.reset()
    with torch.inference_mode():
        assert_same(torch.compile(fast, backend="eager", fullgraph=True)(x), model(x))
    program = torch.export.export(fast, (x,))
    assert sum("run_engine" in str(node.target) for node in program.graph.nodes) == 3
    assert_same(program.module()(x), model(x))
