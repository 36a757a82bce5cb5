"""precision="auto": what stays in float32 is measured, reported and meets the tolerance; the rounding behind it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge import precision_search
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.cli import app
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import export
from trtbridge.bridge.options import PRECISIONS, Options
from trtbridge.bridge.planner import Planner
from trtbridge.bridge.precision import PrecisionReport, convert_precision
from trtbridge.bridge.precision_request import _REQUESTS
from trtbridge.bridge.precision_search import relative_change
from trtbridge.bridge.rounding import RoundedModel, narrow_places
from trtbridge.errors import InputError, OptionError


class Offset(nn.Module):
    """Layers that bear rounding, and an offset that is added and taken away, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        self.away = Add(-300.0)
        self.there = Add(300.0)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.away(self.there(self.body(x))))


class Add(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.full((16,), number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.number


def _planner(model: Any, args: tuple[Any, ...] = (), **options: Any) -> Planner:
    return make_planner(model, args, None, None, get_backend("onnxruntime"), Options.make(options))


def _report(planner: Planner) -> PrecisionReport:
    planner.plan()
    assert planner.precision is not None
    return planner.precision


@pytest.mark.parametrize(("precision", "limit"), [("auto", 2e-3), ("auto+bf16", 2e-2)])
def test_what_the_tolerance_needs_stays(precision, limit):
    model, x = Offset().eval(), torch.randn(8, 16)
    report = _report(_planner(model, (x,), precision=precision, precision_tolerance=limit))
    kept = {module.module for module in report.modules if module.kept}
    assert {"there"} <= kept <= {"there", "away"}
    assert report.error is not None
    assert report.error <= limit
    assert report.tolerance == limit
    errors = {module.module: module.error for module in report.modules}
    assert errors["there"] > limit > errors["body.0.0"]
    assert [module.error for module in report.modules] == sorted(errors.values(), reverse=True)
    reasons = {node.reason for node in report.kept if node.origin.module == "there"}
    assert all("by itself it changes the outputs by" in reason for reason in reasons)
    assert "float32: there, 1 nodes" in str(report)
    assert PrecisionReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert "body.0.0" not in {node.origin.module for node in report.kept}


def test_a_loose_tolerance_keeps_nothing():
    report = _report(_planner(Offset().eval(), (torch.randn(8, 16),), precision="auto", precision_tolerance=0.9))
    assert not report.modules
    assert not report.kept
    assert report.runs == 2
    assert 0 < report.error < 0.9


def test_what_nothing_but_float32_meets():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    report = _report(_planner(model, (torch.randn(4, 8),), precision="auto", precision_tolerance=1e-9))
    assert report.error == 0
    assert all(module.kept for module in report.modules)
    assert report.converted == 0


def test_the_default_is_a_hundredth_on_the_example():
    report = _report(_planner(Offset().eval(), (torch.randn(8, 16),), precision="auto"))
    assert report.tolerance == 0.01
    assert report.error < 0.01
    assert report.calibration == "measured on the example"


def test_the_worst_sample_counts():
    class Gain(nn.Module):
        """Rounding matters where the first number is large."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.there, self.away = nn.Linear(1, 4), nn.Linear(1, 4)
            self.away.load_state_dict(self.there.state_dict())

        def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.there(offset) - self.away(offset)

    model, x = Gain().eval(), torch.randn(2, 4)
    samples = [(x, torch.zeros(2, 1)), {"x": x, "offset": torch.full((2, 1), 500.0)}]
    planner = _planner(model, (x, torch.zeros(2, 1)), precision="auto", calibration=iter(samples))
    report = _report(planner)
    assert report.calibration == "measured on 2 samples"
    assert any(module.kept for module in report.modules)
    assert report.error <= 0.01
    easy = _report(_planner(model, (x, torch.zeros(2, 1)), precision="auto"))
    assert not easy.modules


def test_keep_fp32_is_kept_too_and_not_searched():
    planner = _planner(
        Offset().eval(), (torch.randn(8, 16),), precision="auto", keep_fp32=["there", "away"], precision_tolerance=2e-3
    )
    report = _report(planner)
    assert not report.modules
    assert {node.reason for node in report.kept} == {"keep_fp32 names it: 'there'", "keep_fp32 names it: 'away'"}


def test_many_modules_are_searched_in_few_parts(monkeypatch):
    monkeypatch.setattr(precision_search, "MOST_PARTS", 3)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))).eval()
    report = _report(_planner(model, (torch.randn(4, 8),), precision="auto", precision_tolerance=1e-5))
    assert [module.module for module in sorted(report.modules, key=lambda m: m.module)] == ["0 to 1", "2 to 3", "4"]
    assert sum(module.nodes for module in report.modules) == 10


def test_a_file_is_searched_by_node(tmp_path: Path):
    text = (
        '<ir_version: 10, opset_import: ["": 17]> g (float[N,2] x) => (float[N,2] y) '
        "<float[2,2] w = {1.1,0.3,0.2,1.2}, float[1] c = {900}> "
        "{ [one] a = MatMul(x, w)  [two] b = Add(a, c)  [three] d = Sub(b, c)  [four] y = MatMul(d, w) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    dims = {"x": {0: tb.Dim("batch", min=1, opt=2, max=8)}}
    planner = make_planner(
        tmp_path / "net.onnx", (), None, dims, get_backend("onnxruntime"), Options.make({"precision": "auto"})
    )
    report = _report(planner)
    assert report.calibration == "measured on random inputs"
    assert "two" in {module.module for module in report.modules if module.kept}
    assert {"one", "four"} <= {module.module for module in report.modules if not module.kept}


def test_plugins_are_run_while_searching():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.cummax(self.one(x), 1).values)

    model, x = Net().eval(), torch.randn(4, 8)
    planner = _planner(model, (x,), precision="auto", precision_tolerance=2e-4)
    report = _report(planner)
    assert len(planner.plan().plugin_calls) == 1
    assert report.modules
    assert report.error <= 2e-4


def test_what_is_random_is_refused(tmp_path: Path):
    text = (
        '<ir_version: 10, opset_import: ["": 17]> g (float[2,2] x) => (float[2,2] y) '
        "{ [one] a = MatMul(x, x)  [two] r = RandomNormalLike(a)  [three] y = Add(a, r) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    with pytest.raises(OptionError, match="its numbers are random"):
        _planner(tmp_path / "net.onnx", precision="auto").plan()


def test_what_cannot_be_run_is_refused(monkeypatch):
    monkeypatch.setattr("trtbridge.bridge.calibration.MOST_WEIGHT_BYTES", 10)
    with pytest.raises(OptionError, match=r"fails: its weights of .* would be held twice\nUse precision"):
        _planner(Offset().eval(), (torch.randn(2, 16),), precision="auto").plan()


def test_another_round_measures_nothing_again(monkeypatch):
    calls = []
    real = precision_search.search
    monkeypatch.setattr("trtbridge.bridge.precision.search", lambda *args: calls.append(1) or real(*args))
    planner = _planner(Offset().eval(), (torch.randn(8, 16),), precision="auto")
    planner.plan()
    planner.refused.half.add("node_linear")
    planner.plan()
    assert len(calls) == 1
    assert "the backend refuses it in 16 bits" in {node.reason for node in planner.precision.kept}


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([], "calibration holds no sample"),
        ([(torch.randn(2, 3),)], "calibration, sample 0: Input x: expected size 8 "),
        ([{"x": torch.randn(8, 16)}, {"z": torch.randn(8, 16)}], "calibration, sample 1: .*missing x"),
        ([np.zeros((8, 16))], "sample 0 is a ndarray"),
    ],
)
def test_samples_that_do_not_fit(samples, words):
    with pytest.raises(InputError, match=words):
        _planner(Offset().eval(), (torch.randn(8, 16),), precision="fp16", calibration=samples).plan()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "auto", "precision_tolerance": 0}, "precision_tolerance=0: must be above 0"),
        ({"precision": "fp16", "precision_tolerance": 0.1}, 'left out unless precision is "auto"'),
        ({"calibration": [()]}, "left out unless precision is given"),
        ({"precision": "fp16", "calibration": torch.zeros(2)}, "must be an iterable of samples"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(OptionError, match=words):
        Options.make(options)
    assert tuple(_REQUESTS) == PRECISIONS


def test_the_command_line_takes_a_tolerance(tmp_path: Path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))\n"
        "    return model.eval(), (torch.randn(2, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["convert", "net.py:make", "--backend", "onnxruntime", "--precision", "auto", "--tolerance"]
    done = CliRunner().invoke(app, [*command, "1e-9"])
    assert done.exit_code == 0, done.output
    assert "precision auto: 0 nodes in 16 bits" in " ".join(done.output.split())
    wrong = CliRunner().invoke(app, [*command, "-1", "--force"])
    assert wrong.exit_code == 1
    assert "must be above 0" in wrong.output


def test_the_command_line_takes_samples(tmp_path: Path, monkeypatch):
    text = (
        '<ir_version: 9, opset_import: ["": 20]> g (float[2,2] x) => (float[2,2] y) '
        "<float[2,2] w = {1,2,3,4}> { y = MatMul(x, w) }"
    )
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(text), "net.onnx")
    np.savez("one.npz", x=np.full((2, 2), 25.4, np.float32))
    np.savez("other.npz", z=np.zeros((2, 2), np.float32))
    command = ["explain", "net.onnx", "--backend", "onnxruntime", "--precision", "int8", "--calibration"]
    done = CliRunner().invoke(app, [*command, "one.npz"])
    assert done.exit_code == 0, done.output
    assert "1 products in 8 bits, 0 not; ranges: measured on 1 sample" in " ".join(done.output.split())
    wrong = CliRunner().invoke(app, [*command, "one.npz", "--calibration", "other.npz"])
    assert wrong.exit_code == 1
    assert "calibration, sample 1: " in wrong.output
    missing = CliRunner().invoke(app, [*command, "none.npz"])
    assert missing.exit_code == 1
    assert "no file none.npz" in missing.output


def _converted(model: nn.Module, x: torch.Tensor, target: str) -> tuple[Any, dict[str, Any]]:
    exported = export(model, (x,))
    converted, _ = convert_precision(exported, exported, Options.make({"precision": target, "calibration": [(x,)]}))
    return exported, narrow_places(exported.proto, converted.proto)


@pytest.mark.parametrize(("target", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_is_that_of_the_type(target, dtype):
    """A product of one number and elementwise ops: each result is that of torch in the type itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(x) * 1.7)

    model, x = Net().eval(), torch.linspace(-2, 2, 101)[:, None]
    exported, places = _converted(model, x, target)
    (mine,) = RoundedModel(exported, places, {"fp16": "float16", "bf16": "bfloat16"}[target])([x])
    wide = model.layer.weight.detach().to(dtype).double() * x.to(dtype).double()
    product = wide.to(dtype).double() * torch.tensor(1.7).to(dtype).double()
    # ONNX Runtime's tanh in float32 may be a bit off before it is rounded, so one step of the type is allowed.
    wanted = torch.tanh(product.to(dtype).double()).float()
    assert torch.equal(mine, mine.to(dtype).float())
    step = torch.finfo(dtype).eps
    assert float(((mine - wanted) / wanted.abs().clamp(min=1e-3)).abs().max()) <= step
    assert not torch.equal(mine, model(x)), "it rounds"


def test_groups_round_by_themselves_and_overflow_is_seen():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.one(x), self.two(x) * 1e5

    model, x = Net().eval(), torch.randn(3, 4)
    exported = export(model, (x,))
    converted, _ = convert_precision(exported, exported, Options.make({"precision": "bf16"}))
    places = narrow_places(exported.proto, converted.proto)
    one, two = ([n for n in places if (f"{part}" in n)] for part in ("node_linear", "node_mul"))
    groups = [[name for name in places if name == "node_linear"], [n for n in places if n != "node_linear"]]
    assert one
    assert two
    rounded = RoundedModel(exported, places, "float16", groups)
    wanted = model(x)
    none = rounded([x], [False, False])
    torch.testing.assert_close(none, list(wanted), rtol=1e-6, atol=1e-6)
    first, second = rounded([x], [True, False])
    assert not torch.equal(first, none[0])
    assert torch.equal(second, none[1])
    first, second = rounded([x], [False, True])
    assert torch.equal(first, none[0])
    assert torch.isinf(second).any(), "1e5 is beyond float16"


def test_the_measure():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert relative_change([b], [a]) == pytest.approx(0.1)
    assert relative_change([a, b], [a, b]) == 0
    infinite = torch.tensor([torch.inf, torch.nan, 1.0])
    assert relative_change([infinite], [infinite]) == 0
    assert relative_change([torch.tensor([torch.inf])], [torch.tensor([1.0])]) == float("inf")
    assert relative_change([torch.tensor([1.0])], [torch.tensor([torch.inf])]) == float("inf")
    assert relative_change([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_change([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0.5
    assert relative_change([torch.tensor([1, 2]), a], [torch.tensor([1, 3]), a]) == 0, (
        "floats count where there are some"
    )


def test_what_stays_above_the_tolerance_is_said(monkeypatch, caplog):
    found = precision_search.Found({}, (), 0.5, 3)
    monkeypatch.setattr("trtbridge.bridge.precision.search", lambda *args: found)
    with caplog.at_level(logging.WARNING, logger="trtbridge"):
        _planner(Offset().eval(), (torch.randn(8, 16),), precision="auto").plan()
    assert "the error is 0.5, above the tolerance of 0.01" in caplog.text
