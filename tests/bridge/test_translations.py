"""torch.onnx's table of translations is made once, and neither exports nor other callers notice."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

import trtbridge as tb
from trtbridge.bridge import export as export_module
from trtbridge.bridge.translations import shared_translations, translations


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.gelu(self.conv(x))
        return y.mean((2, 3)).softmax(1), y.topk(2).values


ARGS = (torch.ones(1, 3, 8, 8),)


def contents(table: ONNXRegistry) -> dict[object, list[int]]:
    return {target: [id(one.onnx_function) for one in found] for target, found in table.functions.items()}


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_exports_are_the_same(opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def exported() -> str:
        return onnx.printer.to_text(tb.export(Net().eval(), ARGS, opset=opset).proto)

    torch.manual_seed(0)
    shared = exported()
    monkeypatch.setattr(export_module, "shared_translations", lambda opset: torch.no_grad())
    torch.manual_seed(0)
    assert exported() == shared


def test_a_conversion_makes_no_table_and_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tb.export(Net().eval(), ARGS)  # registers ops of ours, which makes another table
    table, original = translations(20), ONNXRegistry.__dict__["from_torchlib"]
    before = contents(table)

    def never(cls: type[ONNXRegistry], opset_version: int = 0) -> ONNXRegistry:
        raise AssertionError("made again")

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(never))
    tb.export(Net().eval(), ARGS)
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", original)
    assert translations(20) is table
    assert contents(table) == before


def test_others_are_left_alone() -> None:
    original = ONNXRegistry.__dict__["from_torchlib"]
    with shared_translations(20):
        mine, copy = ONNXRegistry.from_torchlib(opset_version=20), translations(20)
        assert mine is not copy
        assert contents(mine) == contents(copy)
        mine.functions["aten::relu"].clear()
        assert copy.functions["aten::relu"], "what one does with its table is no other's business"
        assert ONNXRegistry.from_torchlib(opset_version=18).opset_version == 18
        assert ONNXRegistry.from_torchlib().functions, "as others call it"
    assert ONNXRegistry.__dict__["from_torchlib"] is original
    assert contents(ONNXRegistry.from_torchlib(opset_version=20)) == contents(translations(20))


def test_a_failed_export_leaves_nothing_behind() -> None:
    original = ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(ZeroDivisionError), shared_translations(20):
        1 / 0  # noqa: B018
    assert ONNXRegistry.__dict__["from_torchlib"] is original


def test_new_ops_make_a_new_table() -> None:
    before = translations(20)
    assert translations(20) is before
    library = torch.library.Library("trtbridge_test_translations", "DEF")
    library.define("new(Tensor x) -> Tensor")
    assert translations(20) is not before, "torch.onnx may translate what torch knows since"
    assert translations(18) is not translations(20)
