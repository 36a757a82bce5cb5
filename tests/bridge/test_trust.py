"""convert(check_passes=True) names the pass, node and Python line that change numbers; convert(dump_graphs=...)."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch

import trtbridge as tb
from trtbridge.passes import FoldConstants, Notes, Pass, RemoveDeadNodes


class Net(torch.nn.Module):
    """Two layers with an op between them that no backend has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(40, 40)
        self.second = torch.nn.Linear(40, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.first(x))
        z = torch.cummax(y, 1).values
        return self.second(torch.sigmoid(z)).softmax(-1), z


@dataclass(frozen=True)
class Swap(Pass):
    """Makes another op of every node of one op."""

    old: str
    new: str

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        found = [node for node in graph.nodes if node.op == self.old]
        for node in found:
            node.op = self.new
        return len(found)


NET = Net().eval()  # one for all tests, so that it is exported once

X = (torch.randn(4, 40, generator=torch.Generator().manual_seed(0)),)


def _convert(module: torch.nn.Module, args: tuple[torch.Tensor, ...] = X, **options: object) -> tb.EngineModule:
    return tb.convert(module.eval(), args, backend="onnxruntime", **options)


pytestmark = pytest.mark.usefixtures("export_once")


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_right_passes_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "trtbridge"):
        module = _convert(Net().to(dtype), (X[0].to(dtype),), check_passes=True)
    assert len(module.program.plugin_calls) == 1
    assert "compared by ONNX Runtime after every pass" in caplog.text
    assert "not compared" not in caplog.text


def test_the_first_pass_and_node_are_named(tmp_path: Path) -> None:
    passes = tb.DEFAULT.insert(Swap("Relu", "Abs"), after=FoldConstants).insert(
        Swap("Sigmoid", "Tanh"), before=RemoveDeadNodes
    )
    with pytest.raises(tb.PassError) as raised:
        _convert(NET, check_passes=True, passes=passes)
    text = str(raised.value)
    assert re.match(r"Swap changed the model's numbers: output 'output_0' changed by up to 0\.\d+, its largest", text)
    assert re.search(r"The first tensor that changed is 'relu': it changed by up to [\d.]+, its largest", text)
    assert "  made by Abs 'node_relu' (linear) -> relu\n  before  Relu 'node_relu' (linear) -> relu\n" in text
    assert re.search(
        r'  from ".*test_trust.py", line \d+ `y = torch.relu\(self.first\(x\)\)` \(aten.relu.default\)', text
    )
    before, after = (onnx.load(found) for found in re.findall(r"[\w/.-]+\.onnx", text))
    assert [[node.op_type for node in graph.graph.node][1] for graph in (before, after)] == ["Relu", "Abs"]


def test_a_node_behind_a_plugin_is_found() -> None:
    passes = tb.DEFAULT.insert(Swap("Sigmoid", "Tanh"), before=RemoveDeadNodes)
    with pytest.raises(tb.PassError, match=r"first tensor that changed is 'sigmoid'[^\n]*\n  made by Tanh"):
        _convert(NET, check_passes=True, passes=passes)
    assert _convert(NET, passes=passes).program.steps, "nobody notices without the check"


@dataclass(frozen=True)
class Coarse(Swap):
    """Says that it changes numbers."""

    allowed: float = 1.0

    @property
    def tolerance(self) -> float:
        return self.allowed


def test_a_pass_may_say_how_far_it_changes_numbers() -> None:
    passes = tb.DEFAULT.insert(Coarse("Sigmoid", "Tanh"), before=RemoveDeadNodes)
    _convert(NET, check_passes=True, passes=passes)
    passes = tb.DEFAULT.insert(Coarse("Sigmoid", "Tanh", 1e-3), before=RemoveDeadNodes)
    with pytest.raises(tb.PassError, match="Coarse changed the model's numbers"):
        _convert(NET, check_passes=True, passes=passes)


class Random(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + torch.randn_like(x)


def test_random_plugins_draw_the_same_numbers_every_time() -> None:
    passes = tb.DEFAULT.insert(Swap("Relu", "Abs"), before=RemoveDeadNodes)
    with pytest.raises(tb.PassError, match="made by Abs"):
        _convert(Random(), check_passes=True, passes=passes, check_export=False)
    assert _convert(Random(), check_passes=True, check_export=False).program.plugin_calls


def test_a_random_model_is_said_not_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[4] x) => (float[4] y) {'
    onnx.save(onnx.parser.parse_model(text + "r = RandomNormalLike(x)  y = Add(r, x) }"), tmp_path / "net.onnx")
    with caplog.at_level(logging.WARNING, "trtbridge.passes"):
        tb.convert(str(tmp_path / "net.onnx"), backend="onnxruntime", check_passes=True)
    assert "RandomNormalLike gives other numbers in every run" in caplog.text


def test_an_onnx_file_is_checked_on_random_numbers(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N,4] x, int64[2] i) => (float[N,2] y) {'
    model = onnx.parser.parse_model(text + "r = Relu(x)  y = Gather<axis = 1>(r, i) }")
    onnx.save(model, tmp_path / "net.onnx")
    shapes = {"x": {0: tb.Dim("N", min=1, opt=3, max=8)}}
    for old in ("Relu", "Sigmoid"):
        call = {
            "dynamic_shapes": shapes, "backend": "onnxruntime", "check_passes": True,
            "passes": tb.DEFAULT.insert(Swap(old, "Abs"), before=RemoveDeadNodes),
        }  # fmt: skip
        if old == "Relu":
            with pytest.raises(tb.PassError, match="made by Abs"):
                tb.convert(str(tmp_path / "net.onnx"), **call)
        else:
            tb.convert(str(tmp_path / "net.onnx"), **call)


def test_dumped_graphs(tmp_path: Path) -> None:
    folder = tmp_path / "graphs"
    _convert(NET, dump_graphs=folder)
    files = sorted(folder.glob("*.onnx"))
    assert [path.stem.partition("_")[2] for path in files][: len(tb.DEFAULT) + 1] == [
        "model", *(item.name for item in tb.DEFAULT)
    ]  # fmt: skip
    for path in files:
        loaded = onnx.load(path)
        onnx.checker.check_model(path)
        assert {"first.weight", "second.weight"} <= {tensor.name for tensor in loaded.graph.initializer}
        weight = next(t for t in loaded.graph.initializer if t.name == "first.weight")
        assert onnx.numpy_helper.to_array(weight).any()
    assert len(list(folder.glob("*.diff"))) == len(files) - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"check_passes": "yes"}, "check_passes='yes': must be True or False"),
        ({"dump_graphs": 3}, "dump_graphs=3: must be a folder"),
        ({"dump_graphs": __file__}, "must be a folder"),
        ({"passes": [FoldConstants()]}, "must be a passes.Pipeline"),
    ],
)
def test_wrong_options(options: dict[str, object], words: str) -> None:
    with pytest.raises(tb.OptionError, match=re.escape(words)):
        _convert(NET, **options)
