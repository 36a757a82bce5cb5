"""The option as_plugins: what a user wants as plugins, though the backend could take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn

import trtbridge as tb

aten = torch.ops.aten


class Block(nn.Module):
    """Two linear layers around a norm, and a dropout: (N, 8) float32 to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.dropout(self.norm(self.first(x)).relu()))


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def stack() -> nn.Module:
    torch.manual_seed(0)
    return Stack().eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def plugins_of(model: Any, args: tuple[Any, ...] = (X,), **options: Any) -> list[str]:
    """The ops of the plugins, in order."""
    return [note.op for note in tb.explain(model, args, **{"backend": "onnxruntime"} | options).plugins]


NORM, LINEAR, RELU = "aten::layer_norm.default", "aten::linear.default", "aten::relu.default"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("aten::layer_norm", [NORM] * 2),
        ("aten::layer_norm.default", [NORM] * 2),
        ("aten.layer_norm", [NORM] * 2),
        ("aten.layer_norm.default", [NORM] * 2),
        (aten.layer_norm, [NORM] * 2),
        (aten.layer_norm.default, [NORM] * 2),
        ([aten.relu, "blocks.1.norm"], [RELU, NORM, RELU]),
        ("blocks.0", [LINEAR, NORM, RELU, LINEAR]),  # the dropout does nothing, and goes
        ("blocks.*.first", [LINEAR] * 2),
        ("aten::*norm", [NORM] * 2),
        (lambda view: view.module == "blocks.1.second", [LINEAR]),
        (lambda view: view.file == __file__ and view.op_type == RELU, [RELU] * 2),
        ((), []),
    ],
)
def test_what_an_entry_means(stack: nn.Module, entry: Any, expected: list[str]) -> None:
    assert plugins_of(stack, as_plugins=entry) == expected
    module = tb.convert(stack, (X,), backend="onnxruntime", as_plugins=entry)
    with torch.no_grad():
        torch.testing.assert_close(module(X), stack(X))


def test_the_backend_is_left_the_rest(stack: nn.Module) -> None:
    explanation = tb.explain(stack, (X,), backend="tensorrt_rtx", as_plugins="aten::layer_norm")
    (note, _) = explanation.plugins
    assert note.reason == "as_plugins names it: 'aten::layer_norm'"
    assert "leave it out of as_plugins" in note.ways
    assert explanation.converts
    program = tb.convert(stack, (X,), backend="tensorrt_rtx", as_plugins="aten::layer_norm").program
    assert len(program.engines) == 3
    assert program.info["options"] == {"as_plugins": ["aten::layer_norm"]}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("aten::layernorm", r"'aten::layernorm' is no op type.*Close are: 'aten::layer_norm'"),
        ("blocks.0.nrom", r"Close are: 'blocks.[01].norm'"),
        ("layer_norm", "is no op type"),  # the name of a call, which nobody gave it
        ("aten::dropout", "is no op type"),  # it does nothing here
        (lambda view: False, "<lambda>' is true for no node"),
        (3, "as_plugins=3: must be op types, module paths, patterns or functions"),
        (["aten::relu", None], "must be op types, module paths, patterns or functions"),
    ],
)
def test_what_fits_nothing_is_an_error(stack: nn.Module, entry: Any, words: str) -> None:
    with pytest.raises(tb.OptionError, match=words):
        tb.convert(stack, (X,), backend="onnxruntime", as_plugins=entry)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, 1, *x.shape)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def test_a_plugin_that_a_pass_could_write_in_other_ops() -> None:
    assert plugins_of(Attention()) == []
    assert plugins_of(Attention(), as_plugins="aten::scaled_dot_product_attention") == [
        "aten::scaled_dot_product_attention.default"
    ]


class WritesToAView(nn.Module):
    """Of its two reads of a row one is written to."""

    def __init__(self, other: bool = True) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[0].add_(1)
        return y + x[1] if self.other else y


def test_what_can_be_no_plugin(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(tb.OptionError, match="'aten::select' means select: select is a view"):
        tb.convert(WritesToAView(other=False), (X,), backend="onnxruntime", as_plugins="aten::select")
    assert plugins_of(WritesToAView(), as_plugins="aten::select") == ["aten::select.int"]
    assert "'aten::select' means select, too, which stays as it is: select is a view" in caplog.text


def test_in_a_model_of_mixed_precision(stack: nn.Module) -> None:
    module = tb.convert(stack, (X,), backend="onnxruntime", precision="fp16", as_plugins="aten::layer_norm")
    assert [spec.dtype.name for call in module.program.plugin_calls for spec in call.output_specs if spec] == [
        "FLOAT"
    ] * 2
    with torch.no_grad():
        torch.testing.assert_close(module(X), stack(X), rtol=1e-2, atol=1e-2)


def test_nothing_else_becomes_one_without_fallback(stack: nn.Module) -> None:
    assert plugins_of(stack, as_plugins="aten::relu", fallback=False) == [RELU] * 2


def test_conversions_that_differ_in_it_share_no_cache(stack: nn.Module, tmp_path: Path) -> None:
    def converted(**options: Any) -> tb.EngineModule:
        return tb.convert(stack, (X,), backend="onnxruntime", cache=True, cache_dir=tmp_path, **options)

    assert [call.op for call in converted(as_plugins="blocks.0.norm").program.plugin_calls] == [NORM]
    assert converted().program.plugin_calls == ()
    again = converted(as_plugins="blocks.0.norm")
    assert [call.op for call in again.program.plugin_calls] == [NORM]
    assert again.program.info["cache"]["hits"] == 2


def test_a_saved_program_keeps_it(stack: nn.Module, tmp_path: Path) -> None:
    tb.save(tb.convert(stack, (X,), backend="onnxruntime", as_plugins="aten::layer_norm"), tmp_path / "m.trtb")
    module = tb.load(tmp_path / "m.trtb")
    assert [call.op for call in module.program.plugin_calls] == [NORM] * 2
    with torch.no_grad():
        torch.testing.assert_close(module(X), stack(X))


def test_weights_of_such_plugins_are_exchanged(stack: nn.Module) -> None:
    module = tb.convert(stack, (X,), backend="onnxruntime", refittable=True, as_plugins=["blocks.0", "aten::linear"])
    other = Stack().eval()
    module.refit(other)
    with torch.no_grad():
        torch.testing.assert_close(module(X), other(X))


def test_localize_takes_it(stack: nn.Module) -> None:
    report = tb.localize(stack, inputs=((X,), {}), backend="onnxruntime", as_plugins="aten::layer_norm")
    assert report.suspect is None
    module = tb.convert(stack, (X,), backend="onnxruntime", as_plugins=lambda view: view.module == "blocks.1.norm")
    assert tb.localize(stack, module, ((X,), {})).suspect is None


class Broken(nn.Module):
    """Dynamo makes two graphs of it; a norm is in the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.norm(x)


def test_in_torch_compile(caplog: pytest.LogCaptureFixture) -> None:
    model = Broken().eval()
    options = {"backend": "onnxruntime", "on_failure": "raise", "as_plugins": [aten.layer_norm], "precision": "fp16"}
    compiled = torch.compile(model, backend="trtbridge", options=options | {"keep_fp32": "Gemm"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-2, atol=1e-2)
    # Each graph leaves out what is meant for the other.
    left_out = [record.getMessage() for record in caplog.records if "an entry is left out" in record.getMessage()]
    assert len(left_out) == 2
    assert "as_plugins: 'aten::layer_norm' is no op type" in left_out[0]
    assert "keep_fp32: 'Gemm' is no op type" in left_out[1]


def test_in_parts_of_a_model(stack: nn.Module) -> None:
    def converted(**options: Any) -> nn.Module:
        return tb.convert_submodules(stack, nn.Linear, (X,), backend="onnxruntime", **options)

    copied = tb.convert_submodules(stack, "blocks.*", (X,), backend="onnxruntime", as_plugins="norm")
    engines = copied.submodules_report.converted
    assert [[call.op for call in engine.program.plugin_calls] for engine in engines.values()] == [[NORM]] * 2
    parts = tb.convert_submodules(
        stack, [nn.LayerNorm, "blocks.1.second"], (X,), backend="onnxruntime", as_plugins=[aten.linear, aten.layer_norm]
    )
    ops = {path: engine.program.plugin_calls[0].op for path, engine in parts.submodules_report.converted.items()}
    assert ops == {"blocks.0.norm": NORM, "blocks.1.norm": NORM, "blocks.1.second": LINEAR}
    with torch.no_grad():
        torch.testing.assert_close(parts(X), stack(X))
    with pytest.raises(tb.OptionError, match=r"Submodule blocks.1.second .*'aten::tanh' is no op type"):
        converted(as_plugins=[aten.tanh, aten.linear])


FILE = """
    <ir_version: 8, opset_import: ["" : 20]>
    f (float[3, 8] x) => (float[3, 8] y)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}>
    {
        n = LayerNormalization<axis = -1>(x, scale)
        r = Relu(n)
        m = Mul(r, x)
        y = Relu(m)
    }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(FILE)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    path = tmp_path / "f.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("LayerNormalization", ["node_n"]),
        ("node_y", ["node_y"]),
        (["Relu", "*_m"], ["node_r", "node_m", "node_y"]),
        (lambda view: view.op_type == "Mul", ["node_m"]),
    ],
)
def test_of_a_file(file: Path, entry: Any, expected: list[str]) -> None:
    module = tb.convert(file, backend="onnxruntime", as_plugins=entry)
    assert [call.name for call in module.program.plugin_calls] == expected
    expected_result = tb.convert(file, backend="onnxruntime")(X)
    torch.testing.assert_close(module(X), expected_result)


def test_of_a_file_what_fits_nothing(file: Path) -> None:
    with pytest.raises(tb.OptionError, match=r"'LayerNorm' is no op type.*Close are: 'LayerNormalization'"):
        tb.convert(file, backend="onnxruntime", as_plugins="LayerNorm")
