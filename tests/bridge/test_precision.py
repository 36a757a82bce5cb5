"""convert(precision=..., keep_fp32=...): what stays in float32, and how far the rest is from it.

ONNX Runtime's CPU kernels compute in float32, so what the rounding does is seen with ONNX's own reference
implementation, which rounds every tensor to its type.
"""

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
from onnx.reference import ReferenceEvaluator
from torch import nn
from typer.testing import CliRunner

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.calibration import TensorRange, calibrate, overflowing
from trtbridge.bridge.cli import app
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.export import export
from trtbridge.bridge.options import Options
from trtbridge.bridge.planner import Planner
from trtbridge.bridge.precision import NodeView, PrecisionReport, convert_precision, kept_by_user
from trtbridge.errors import OptionError
from trtbridge.passes import FoldShapes, FuseBatchNorm


def _planner(model: Any, args: tuple[Any, ...] = (), backend: str = "onnxruntime", **options: Any) -> Planner:
    return make_planner(model, args, None, None, get_backend(backend), Options.make(options))


def _rounded(planner: Planner, args: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """The outputs with every tensor rounded to its type."""
    (segment,) = planner.plan().segments
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in segment.weights:
            tensor.CopyFrom(onnx.numpy_helper.from_array(segment.weights[tensor.name].numpy(), tensor.name))
    onnx.checker.check_model(proto, full_check=True)
    feeds = {value.name: tensor.numpy() for value, tensor in zip(proto.graph.input, args, strict=True)}
    with np.errstate(all="ignore"):
        results = dict(
            zip([v.name for v in proto.graph.output], ReferenceEvaluator(proto).run(None, feeds), strict=True)
        )
    return [results[spec.name] for spec in planner.plan().signature.outputs]


def _cosine(mine: Any, wanted: torch.Tensor) -> float:
    a = torch.as_tensor(mine).double().flatten()
    return float(torch.nn.functional.cosine_similarity(a, wanted.detach().double().flatten(), dim=0))


def _report(planner: Planner) -> PrecisionReport:
    planner.plan()
    assert planner.precision is not None
    return planner.precision


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, 10)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def _bert(attention: str = "sdpa") -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100
    )
    config._attn_implementation = attention
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return transformers.BertModel(config).eval(), (torch.randint(0, 100, (2, 12)), mask)


class Mlp(nn.Module):
    """Two layers and a normalization; the second layer has the weights of the first."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.second(self.norm(torch.relu(self.first(x)))), -1)


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.99999), ("bf16", 0.999)])
def test_a_convolutional_network(precision, limit):
    model, x = ResNet().eval(), torch.randn(2, 3, 32, 32)
    planner = _planner(model, (x,), precision=precision)
    report = _report(planner)
    assert not planner.calls, "rounding makes no plugins"
    assert report.casts == 2, "one at each end"
    (result,) = _rounded(planner, (x,))
    assert result.dtype == np.float32
    assert _cosine(result, model(x)) > limit


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.99999), ("bf16", 0.999)])
def test_a_transformer(attention, precision, limit):
    model, args = _bert(attention)
    planner = _planner(model, args, precision=precision)
    report = _report(planner)
    assert not planner.calls
    assert {"LayerNormalization", "Softmax"} <= {node.op_type for node in report.kept}
    # In and out of each normalization and each softmax at most, and the results.
    kept = sum(node.op_type in ("LayerNormalization", "Softmax") for node in report.kept)
    assert report.casts <= 2 * kept + 2
    expected = model(*args)
    for mine, wanted in zip(_rounded(planner, args), (expected[0], expected[1]), strict=True):
        assert np.isfinite(mine).all()
        assert _cosine(mine, wanted) > limit


def test_convert_runs_in_onnxruntime(assert_same):
    model, x = Mlp().eval(), torch.randn(3, 32)
    fast = tb.convert(model, (x,), backend="onnxruntime", precision="fp16")
    assert_same(fast(x), model(x), rtol=2e-3, atol=2e-3)


def test_shared_weights_stay_shared_and_take_half_the_room():
    model, x = Mlp().eval(), torch.randn(3, 32)
    (segment,) = _planner(model, (x,), precision="fp16").plan().segments
    assert [(w.dtype.name, tuple(w.shape.numpy())) for w in segment.weights.values()] == [("FLOAT16", (32, 32))]
    (name,) = segment.weights
    assert [node.op_type for node in segment.proto.graph.node if name in node.input] in (
        ["Gemm"] * 2,
        ["MatMul"] * 2,
        ["Transpose"],
    )
    expected = model.first.weight.detach().half().numpy()
    values = segment.weights[name].numpy()
    assert np.array_equal(values, expected) or np.array_equal(values, expected.T)
    full = _planner(model, (x,)).plan().segments[0]
    assert sum(w.nbytes for w in full.weights.values()) == 2 * sum(w.nbytes for w in segment.weights.values())


class Overflowing(nn.Module):
    """A layer whose results float16 cannot hold, between two that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.large, self.after = (nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            self.large.weight.mul_(3e4)
            self.before.weight.mul_(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.norm(self.large(self.before(x))))


def test_what_overflows_stays(monkeypatch, caplog):
    model, x = Overflowing().eval(), torch.randn(4, 16)
    planner = _planner(model, (x,), precision="fp16")
    with caplog.at_level(logging.INFO, logger="trtbridge"):
        report = _report(planner)
    (result,) = _rounded(planner, (x,))
    assert _cosine(result, model(x)) > 0.99999
    large = [node for node in report.kept if node.origin.module == "large"]
    assert large
    assert all("on the example" in node.reason for node in large)
    assert "large" in str(report)
    assert "before" not in {node.origin.module for node in report.kept}
    assert any(record.getMessage() == report.summary for record in caplog.records)
    # Without the measurement it does overflow, so the test is about that.
    monkeypatch.setattr("trtbridge.bridge.precision.overflowing", lambda ranges, margin: {})
    blind = _planner(model, (x,), precision="fp16")
    assert _cosine(_rounded(blind, (x,))[0], model(x)) != pytest.approx(1, abs=0.01)


def test_digits_keep_their_accuracy():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels))
    train, test = order[:1400], order[1400:]
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10), nn.LogSoftmax(-1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            torch.nn.functional.nll_loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        before = model(images[test]).argmax(1)
    right = (before == labels[test]).float().mean()
    assert right >= 0.97
    for precision, most in (("fp16", 0), ("bf16", 2)):
        (scores,) = _rounded(_planner(model, (images[test],), precision=precision), (images[test],))
        after = torch.tensor(scores).argmax(1)
        assert int((after != before).sum()) <= most


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_engines_are_strongly_typed(precision):
    pytest.importorskip("tensorrt_rtx")
    bert, args = _bert()
    for model, example in ((ResNet().eval(), (torch.randn(2, 3, 32, 32),)), (bert, args)):
        planner = _planner(model, example, "tensorrt_rtx", precision=precision)
        program = planner.build()
        assert len(program.engines) == 1
        assert not program.plugin_calls
        assert not planner.refused.half, "nothing is refused in 16 bits"


@pytest.mark.rtx
def test_what_the_builder_refuses_in_16_bits_stays_in_32():
    pytest.importorskip("tensorrt_rtx")
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 4, 2)).eval()
    planner = _planner(model, (torch.randn(2, 8, 9),), "tensorrt_rtx", precision="bf16")
    program = planner.build()
    assert not program.plugin_calls
    assert [node.op_type for node in planner.precision.kept] == ["ConvTranspose"]
    assert "refuses it in 16 bits" in planner.precision.kept[0].reason


def test_keep_fp32_by_module_type_pattern_and_predicate():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4)).eval()
    proto = export(model, (torch.randn(2, 4),)).proto
    modules = {name: NodeView.of(node).module for node in proto.graph.node for name in node.output}

    def chosen(entry: Any) -> set[str]:
        return {modules[name] for name in kept_by_user(proto, entry)}

    assert chosen("1") == {"1.0", "1.1"}
    assert chosen("1.0") == {"1.0"}
    assert chosen(["0", "2"]) == {"0", "2"}
    assert chosen("1.?") == {"1.0", "1.1"}
    assert chosen("Relu") == {"1.1"}
    assert chosen(lambda node: node.op_type == "Relu" and node.file and node.line) == {"1.1"}
    assert chosen(()) == set()


def test_keep_fp32_is_kept_and_reported():
    model, args = _bert()
    planner = _planner(model, args, precision="fp16", keep_fp32=("encoder.layer.1", "Gelu"))
    report = _report(planner)
    kept = [node for node in report.kept if "keep_fp32" in node.reason]
    assert {node.origin.module.split(".")[2] for node in kept if node.op_type != "Gelu"} == {"1"}
    assert sum(node.op_type == "Gelu" for node in kept) == 2
    (segment,) = planner.plan().segments
    narrow = {name for name, weight in segment.weights.items() if weight.dtype.name == "FLOAT16"}
    assert narrow
    assert len(narrow) < len(segment.weights)


def test_a_batch_norm_that_is_named_is_not_folded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    args = (torch.randn(2, 3, 8, 8),)
    ops = [n.op_type for n in _planner(model, args, precision="fp16").plan().segments[0].proto.graph.node]
    assert "BatchNormalization" not in ops
    for entry in ("1", "BatchNormalization"):
        planner = _planner(model, args, precision="fp16", keep_fp32=entry)
        assert [node.op_type for node in _report(planner).kept] == ["BatchNormalization"]
    everywhere = FuseBatchNorm(everywhere=True)
    passes = tb.DEFAULT.insert(everywhere, after=FoldShapes)
    asked = Options.make({"precision": "fp16", "keep_fp32": "Relu", "passes": passes})
    assert everywhere in asked.pipeline.passes, "what a user adds is not left out"
    assert FuseBatchNorm() not in asked.pipeline.passes


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("encoder.layer.1.atention", "'encoder.layer.1.attention'"),
        ("Softmx", "'Softmax'"),
        ("encoder.layer.12", "encoder.layer.1"),
    ],
)
def test_an_entry_that_fits_nothing(entry, words):
    model, args = _bert()
    with pytest.raises(OptionError, match=f"keep_fp32: '{entry}' is no op type") as caught:
        _planner(model, args, precision="fp16", keep_fp32=entry).plan()
    assert words in str(caught.value)


def test_a_predicate_that_fits_nothing():
    proto = export(nn.ReLU(), (torch.randn(2),)).proto
    with pytest.raises(OptionError, match="'<lambda>' is true for no node"):
        kept_by_user(proto, lambda node: node.op_type == "Conv")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp4"}, "precision='fp4': must be None"),
        ({"precision": "fp16", "keep_fp32": 3}, "keep_fp32=3: must be op types"),
        ({"keep_fp32": "Softmax"}, "left out unless precision"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(OptionError, match=words):
        Options.make(options)


def test_a_file_by_node_name(tmp_path: Path):
    text = (
        '<ir_version: 10, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) '
        "<float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> "
        "{ [one] a = MatMul(x, w)  [two] b = Relu(a)  [three] y = MatMul(b, w) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "net.onnx")
    dims = {"x": {0: tb.Dim("batch", min=1, opt=2, max=8)}}
    options = Options.make({"precision": "fp16", "keep_fp32": "three"})
    planner = make_planner(tmp_path / "net.onnx", (), None, dims, get_backend("onnxruntime"), options)
    report = _report(planner)
    assert report.calibration == "measured on random inputs"
    assert [(node.op_type, node.output) for node in report.kept] == [("MatMul", "y")]
    assert report.converted == 2


def test_a_model_in_16_bits_is_left_alone(caplog):
    model, x = Mlp().eval().half(), torch.randn(2, 32).half()
    planner = _planner(model, (x,), precision="fp16")
    plain = _planner(model, (x,)).plan().segments[0].proto.graph.node
    assert [node.op_type for node in planner.plan().segments[0].proto.graph.node] == [node.op_type for node in plain]
    assert _report(planner).converted == 0
    assert "nothing in the model is float32" in caplog.text


def test_the_report_survives_json():
    model, args = _bert()
    report = _report(_planner(model, args, precision="fp16"))
    again = PrecisionReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert "LayerNormalization: it sums squares; from embeddings.LayerNorm" in str(again)


def test_measuring():
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x * 1e4, torch.where(x > 0, x, -torch.inf), x * 1e-6, x[:0] * 2

    x = torch.tensor([1.0, -20.0, 0.0, 0.5])
    model = export(Net(), (x,))
    ranges = calibrate(model, [x])
    assert ranges["x"] == TensorRange(20.0, 0.0, 0.0, True)
    large, masked, small, empty = (ranges[spec.name] for spec in model.signature.outputs)
    assert large == TensorRange(2e5, 0.0, 0.0, True)
    assert masked == TensorRange(1.0, 0.0, 0.0, False)
    assert small.largest == pytest.approx(2e-5)
    assert small.subnormal_share == 1.0
    assert empty == TensorRange(0.0, 0.0, 0.0, True)
    assert TensorRange.of(torch.tensor([3e-8, 1e-9, 0.0, 1.0])).lost_share == pytest.approx(1 / 3)
    names = [spec.name for spec in model.signature.outputs]
    assert set(overflowing(ranges, 1.0)) == {names[0], names[2]}
    assert names[0] in overflowing({names[0]: TensorRange(2e4, 0, 0, True)}, 4.0)


def test_what_cannot_be_measured_is_said(monkeypatch, caplog):
    monkeypatch.setattr("trtbridge.bridge.calibration.MOST_WEIGHT_BYTES", 10)
    model, x = Mlp().eval(), torch.randn(2, 32)
    report = _report(_planner(model, (x,), precision="fp16"))
    assert report.calibration.startswith("not measured: its weights of")
    assert "what may overflow is not known" in caplog.text


def test_a_plugin_keeps_its_types():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.cummax(self.layer(x), 1).values)

    model, x = Net().eval(), torch.randn(2, 4)
    planner = _planner(model, (x,), precision="fp16")
    (call,) = planner.plan().plugin_calls
    assert call.output_specs[0] is not None
    assert call.output_specs[0].dtype.name == "FLOAT"
    fast = tb.convert(model, (x,), backend="onnxruntime", precision="fp16")
    torch.testing.assert_close(fast(x), model(x), rtol=5e-3, atol=5e-3)


def test_converting_does_not_touch_the_model_given():
    model = export(Mlp().eval(), (torch.randn(2, 32),))
    before, weights = model.proto.SerializeToString(), dict(model.weights)
    options = Options.make({"precision": "bf16"})
    converted, report = convert_precision(model, model, options)
    assert report.converted > 0
    assert {weight.dtype.name for weight in converted.weights.values()} == {"BFLOAT16"}
    assert model.proto.SerializeToString() == before
    assert dict(model.weights) == weights


def test_the_command_line_takes_both(tmp_path: Path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 4), (torch.randn(2, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["convert", "net.py:make", "--backend", "onnxruntime", "--precision", "fp16"]
    wrong = CliRunner().invoke(app, [*command, "--keep-fp32", "Gem"])
    assert wrong.exit_code == 1
    assert "'Gemm'" in wrong.output
    done = CliRunner().invoke(app, [*command, "--keep-fp32", "Gemm"])
    assert done.exit_code == 0, done.output
