"""The trtbridge command: what it makes, what it says, and the exit status."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import trtbridge as tb
from trtbridge.bridge.backends import BACKENDS
from trtbridge.bridge.cli import app
from trtbridge.bridge.cli_display import Stages
from trtbridge.bridge.cli_options import BackendName
from trtbridge.bridge.cli_run import describe_tensor
from trtbridge.bridge.text import size_text

MODELS = """
import torch
import trtbridge as tb


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(6, 3)

    def forward(self, x, scale=None):
        y = self.layer(x)
        return {"y": y if scale is None else y * scale, "parts": (x.sum(1), y > 0), "count": x.shape[0]}


def net():
    return Net(), (torch.randn(4, 6),)


def scaled():
    return Net(), (torch.randn(4, 6),), {"scale": torch.tensor([2.0])}


def options():
    dims = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    options = {"backend": "onnxruntime", "tf32": True}
    return {"model": Net(), "args": (torch.randn(4, 6),), "dynamic_shapes": dims, **options}


class Cummax(torch.nn.Module):
    def forward(self, x):
        return torch.cummax(x * 2, 1).values + 1


def plugin():
    return Cummax(), (torch.randn(2, 5),)


class Factory:
    @staticmethod
    def make():
        return net()


def unknown_option():
    return {"model": Net(), "args": (torch.randn(4, 6),), "opsett": 20}


def no_model():
    return {"args": ()}


def raises():
    raise ValueError("no weights at /nowhere")


def exits():
    raise SystemExit(0)


def needs(x):
    return x


def number():
    return 3


def bare_args():
    return Net(), torch.randn(4, 6)


def bare_kwargs():
    return Net(), (), torch.randn(4, 6)


instance = Net()
"""

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
net (float["n", 3] x, float["n", 3] y) => (float["n", 3] z) { s = Add(x, y) z = Relu(s) }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with models, and no trace of them in the process afterwards."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def call(*arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result


def flat(text: str) -> str:
    """Text of a box or a table as one line."""
    return re.sub(r"[\s│]+", " ", text)


def convert(source: str, *arguments: str, backend: str = "onnxruntime") -> Result:
    return call("convert", source, "--backend", backend, *arguments)


class TestHelp:
    @pytest.mark.parametrize("option", ["-h", "--help"])
    @pytest.mark.parametrize("command", ["convert", "explain", "run", "doctor"])
    def test_each_command_shows_an_example(self, command: str, option: str) -> None:
        text = call(command, option).stdout
        assert f"trtbridge {command} " in text.partition("Examples:")[2]

    def test_no_option_is_cut_off_in_a_narrow_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        text = call("convert", "-h").stdout
        assert "…" not in text
        for option in ("--compute-capability", "--optimization-level", "--workspace-mb", "--timeout-s", "--force"):
            assert option in text

    def test_main_help_lists_commands_and_an_example(self) -> None:
        text = call("-h").stdout
        for word in ("convert", "explain", "run", "doctor", "plugins", "Example:"):
            assert word in text

    def test_help_and_version_import_no_torch(self) -> None:
        code = (
            "import sys; from typer.testing import CliRunner; from trtbridge.bridge.cli import app\n"
            "for a in ('-h', '--version', 'convert -h'): assert CliRunner().invoke(app, a.split()).exit_code == 0\n"
            "heavy = {'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules); assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

    def test_version(self) -> None:
        assert call("--version").stdout == f"trtbridge {tb.__version__}\n"

    def test_backend_names_are_those_of_the_library(self) -> None:
        assert [name.value for name in BackendName] == ["auto", *BACKENDS]


class TestConvert:
    def test_then_run_equals_torch(self, folder: Path) -> None:
        result = convert("models.py:net", "--dim", "x:0=batch:1:4:8")
        assert "Net on onnxruntime" in result.stdout
        assert "batch in [1, 8], tuned for 4" in result.stdout
        assert re.search(r"wrote net\.trtb \(\d+\.\d KiB\)", result.stdout)
        stages = ["load", "trace", "export", "passes", "verify", "partition", "build", "save"]
        assert re.findall(r"^\w+", result.stderr, re.M) == stages
        assert "\x1b" not in result.output

        x = torch.randn(3, 6)
        np.savez("in.npz", x=x.numpy())
        shown = call("run", "net.trtb", "--inputs", "in.npz", "--output", "out.npz").stdout
        assert re.search(r"^y +\(3, 3\) +float32", shown, re.M)
        assert re.search(r"^parts\[1\] +\(3, 3\) +bool", shown, re.M)
        assert "count = 3" in shown
        import models  # type: ignore[import-not-found]

        expected = models.Net()(x)
        with np.load("out.npz") as out:
            assert set(out.files) == {"y", "parts[0]", "parts[1]", "count"}
            np.testing.assert_allclose(out["y"], expected["y"].detach().numpy(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(out["parts[0]"], expected["parts"][0].numpy(), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(out["parts[1]"], expected["parts"][1].numpy())
            assert out["count"] == 3

    @pytest.mark.parametrize("source", ["models:net", "models:Factory.make", "sub/../models.py:net"])
    def test_ways_to_name_a_function(self, source: str, folder: Path) -> None:
        (folder / "sub").mkdir()
        convert(source, "-o", "sub/out.trtb")
        assert tb.load("sub/out.trtb").program.source == "Net"

    def test_kwargs_of_the_function(self) -> None:
        convert("models.py:scaled")
        assert tb.load("scaled.trtb").program.signature.labels == ("x", "scale")

    def test_options_of_the_function_and_of_the_command_line(self) -> None:
        call("convert", "models.py:options", "-d", "x:0=rows:2:3:5")
        program = tb.load("options.trtb").program
        assert program.backend == "onnxruntime"
        assert program.engines[0].info["tf32"] is True
        assert dict(program.signature.dims) == {"rows": (2, 3, 5)}

    def test_all_options_reach_the_build(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        arguments = [
            "--opset",
            "21",
            "--tf32",
            "--optimization-level",
            "1",
            "--workspace-mb",
            "64",
            "--timeout-s",
            "300",
        ]
        arguments += ["--compute-capability", "8.9", "--compute-capability", "12.0", "--cache-dir", "kernels"]
        convert("models.py:net", *arguments, backend="tensorrt_rtx")
        program = tb.load("net.trtb").program
        assert program.engines[0].info["target"] == "8.9, 12.0"
        assert program.engines[0].info["tf32"] is True
        assert program.info["opset"] == 21
        assert Path("kernels").is_dir()

    def test_onnx_file_with_dims(self) -> None:
        onnx.save(onnx.parser.parse_model(GRAPH), "net.onnx")
        convert("net.onnx", "--dim", "x:0=batch:1:2:4", "--dim", "y:0=batch")
        shown = call("run", "net.trtb", "--size", "batch=4", "--seed", "5", "-o", "out.npz").stdout
        assert re.search(r"^output +\(4, 3\) +float32", shown, re.M)
        generator = torch.Generator().manual_seed(5)
        x, y = (torch.randn(4, 3, generator=generator) for _ in range(2))
        with np.load("out.npz") as out:
            np.testing.assert_allclose(out["output"], (x + y).relu().numpy(), rtol=1e-6)

    def test_onnx_file_with_a_fixed_dim(self) -> None:
        onnx.save(onnx.parser.parse_model(GRAPH), "net.onnx")
        convert("net.onnx", "--dim", "x:0=5", "--dim", "y:0=5")
        assert tb.load("net.trtb").program.signature.inputs[0].shape == (5, 3)

    def test_existing_output_is_kept_without_force(self) -> None:
        Path("net.trtb").write_text("precious")
        result = call("convert", "models.py:net", status=1)
        assert "net.trtb exists" in result.stderr
        assert "--force" in result.stderr
        assert Path("net.trtb").read_text() == "precious"
        convert("models.py:net", "--force")
        assert tb.load("net.trtb").program.source == "Net"

    @pytest.mark.parametrize(("output", "words"), [("missing/a.trtb", "no folder missing"), (".", "is a folder")])
    def test_output_that_cannot_be_written_is_told_at_once(self, output: str, words: str) -> None:
        result = call("convert", "models.py:net", "-o", output, status=1)
        assert words in result.stderr
        assert "load" not in result.stderr

    def test_verbose_shows_passes_and_leaves_logging_alone(self) -> None:
        import logging

        result = convert("models.py:net", "-v")
        assert "INFO trtbridge.bridge.stages: export took" in result.stderr
        assert re.search(r"(DEBUG|INFO) trtbridge.passes: \w+: \d+ rewrites", result.stderr)
        logger = logging.getLogger("trtbridge")
        assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
        assert "INFO" not in convert("models.py:net", "-o", "quiet.trtb").stderr

    def test_a_file_named_like_a_module_in_use(self, folder: Path) -> None:
        (folder / "json.py").write_text(MODELS)
        convert("json.py:net")
        assert sys.modules["json"] is json


class TestConvertErrors:
    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("nothing", "neither module:function, nor file.py:function, nor an .onnx file"),
            ("models.py", "Name the function too: models.py:FUNCTION"),
            ("models.py:not a name", "neither module:function"),
            ("net.trtb", "converted already: trtbridge run takes it"),
            ("weights.pt", "Weights alone are no model"),
        ],
    )
    def test_source_that_is_none_is_a_usage_error(self, source: str, words: str) -> None:
        assert words in flat(call("convert", source, status=2).stderr)

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("no_such_module:net", "There is no module 'no_such_module'"),
            ("missing.py:net", "There is no file missing.py"),
            ("models.py:missing", "has no 'missing'. Its functions: net, scaled"),
            ("models.py:raises", "models.py:raises() failed: ValueError: no weights at /nowhere"),
            ("models.py:exits", 'belongs under `if __name__ == "__main__":`'),
            ("models.py:needs", "cannot be called without arguments"),
            ("models.py:number", "returned a value of type int"),
            ("models.py:bare_args", "a single argument is written (model, (x,))"),
            ("models.py:bare_kwargs", "kwargs is a Tensor; it must be a dict"),
            ("models.py:no_model", "returned a dict without 'model'"),
            ("models.py:instance", "is a Net, not a function"),
            ("models.py:unknown_option", "Did you mean 'opset'?"),
            ("broken.py:net", "import broken.py failed: ModuleNotFoundError: No module named 'no_such_dependency'"),
            ("broken:net", "import broken failed: ModuleNotFoundError: No module named 'no_such_dependency'"),
            ("syntax.py:net", "SyntaxError"),
            ("missing.onnx", "There is no file missing.onnx"),
            ("corrupt.onnx", "corrupt.onnx is not a valid ONNX model, or is damaged"),
        ],
    )
    def test_source_that_fails(self, source: str, words: str, folder: Path) -> None:
        (folder / "broken.py").write_text("import no_such_dependency\n")
        (folder / "syntax.py").write_text("def net(:\n")
        (folder / "corrupt.onnx").write_text("not an ONNX file")
        files = set(folder.iterdir())
        result = call("convert", source, "-o", "out.trtb", status=1)
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert {path for path in folder.iterdir() if path.suffix == ".trtb"} <= files

    def test_error_of_the_function_names_its_line(self) -> None:
        line = MODELS[: MODELS.index("raise ValueError")].count("\n") + 1
        result = call("convert", "models.py:raises", status=1)
        assert f'models.py", line {line}, in raises: raise ValueError("no weights at /nowhere")' in result.stderr
        assert "--debug" in result.stderr
        assert "Traceback (most recent call last)" in call("convert", "models.py:raises", "--debug", status=1).stderr

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--dim", "x"], "'x' is not INPUT:AXIS=NAME:MIN:OPT:MAX"),
            (["--dim", "x:first=batch:1:2:3"], "is not INPUT:AXIS=NAME:MIN:OPT:MAX"),
            (["--dim", "x:0=batch:1:8"], "after = comes NAME:MIN:OPT:MAX"),
            (["--dim", "x:0=batch:1:1:1,2:8"], "several profiles follow one another"),
            (["--dim", "x:0=batch:1:1:1,4:2:8"], "profile 1 is (4, 2, 8)"),
            (["--dim", "x:0=batch:4:2:8"], "needs 1 <= min <= opt <= max"),
            (["--dim", "x:0=2b:1:2:8"], "not a Python identifier"),
            (["--dim", "x:0=batch"], "'batch' has no range"),
            (["--dim", "x:0=b:1:2:3", "--dim", "x:1=b:1:2:4"], "'b' is given with two ranges"),
            (["--backend", "tensorflow"], "'tensorflow' is not one of 'auto', 'tensorrt'"),
            (["--compute-capability", "89"], "'89' is no compute capability"),
            (["--optimization-level", "9"], "--optimization-level"),
            (["--workspace-mb", "0"], "--workspace-mb"),
            (["--opset", "new"], "opset"),
            (["--no-such-option"], "No such option"),
        ],
    )
    def test_usage(self, arguments: list[str], words: str) -> None:
        assert words in flat(call("convert", "models.py:net", *arguments, status=2).stderr)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--dim", "z:0=batch:1:2:8"], "dynamic_shapes names ['z']"),
            (["--dim", "x:7=batch:1:2:8"], "7 is no dimension of a rank 2 tensor"),
            (["--opset", "9"], "must be an ONNX opset from 18 to 25"),
            (["--timeout-s", "0"], "must be a positive number of seconds"),
            (["--cache-dir", "models.py"], "cache folder models.py cannot be written"),
        ],
    )
    def test_options_that_do_not_fit(self, arguments: list[str], words: str) -> None:
        assert words in call("convert", "models.py:net", *arguments, status=1).stderr

    def test_dim_does_not_join_dynamic_shapes_of_another_form(self, folder: Path) -> None:
        (folder / "tuples.py").write_text(
            "import models, trtbridge as tb\n"
            "def top():\n    return {**models.options(), 'dynamic_shapes': (None,)}\n"
            "def inner():\n    return {**models.options(), 'dynamic_shapes': {'x': (tb.Dim('a', 1, 2, 8), None)}}\n"
        )
        for function, words in (("top", "dynamic_shapes is no dict"), ("inner", "the two cannot be joined")):
            result = call("convert", f"tuples.py:{function}", "--dim", "x:0=batch:1:2:8", status=1)
            assert words in result.stderr

    def test_unexpected_error_is_called_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("[bold]not markup[/bold]")

        monkeypatch.setattr("trtbridge.bridge.convert.convert", fail)
        result = call("convert", "models.py:net", status=1)
        assert "error (unexpected ZeroDivisionError): [bold]not markup[/bold]" in result.stderr


class TestExplain:
    def test_says_what_becomes_what(self) -> None:
        result = call("explain", "models.py:plugin", "--backend", "onnxruntime")
        assert "plugin aten::cummax.default between segments" in result.stdout
        assert "torch.cummax(x * 2, 1)" in result.stdout
        assert result.stdout.rstrip().endswith("converts")
        assert re.findall(r"^\w+", result.stderr, re.M) == [
            *("load", "trace", "export", "passes", "verify", "partition", "parse")
        ]

    def test_options_about_plugins(self) -> None:
        assert "--no-fallback" in call("convert", "-h").stdout
        result = call("explain", "models.py:plugin", "--backend", "onnxruntime", "--plugin-host", "inside", status=1)
        assert "plugin_host='inside': must be" in result.stderr.replace("\n", " ")
        for option in (("--plugin-host", "segments"), ("--max-data-size", "10"), ("--no-fallback",)):
            assert "converts" in call("explain", "models.py:plugin", "--backend", "onnxruntime", *option).stdout
        named = ("--as-plugin", "aten::add", "--as-plugin", "aten.mul*")
        result = call("explain", "models.py:plugin", "--backend", "onnxruntime", *named)
        assert "because as_plugins names it: 'aten.mul*'" in result.stdout
        assert "because as_plugins names it: 'aten::add'" in result.stdout

    def test_status_1_where_it_does_not_convert(self) -> None:
        graph = (
            '<ir_version: 10, opset_import: ["" : 20, "mine" : 1]> g (float[2] x) => (float[2] y) { y = mine.Op(x) }'
        )
        onnx.save(onnx.parser.parse_model(graph), "custom.onnx")
        result = call("explain", "custom.onnx", "--backend", "onnxruntime", status=1)
        assert "does not convert" in result.stdout
        assert "error" not in result.stderr


class TestRun:
    def test_random_inputs_depend_on_the_seed_alone(self) -> None:
        convert("models.py:net")
        first, again, other = (call("run", "net.trtb", "--seed", seed).stdout for seed in ("1", "1", "2"))
        assert first == again
        assert first != other

    def test_random_inputs_of_every_kind(self) -> None:
        graph = """<ir_version: 10, opset_import: ["" : 20]>
            g (bool[3] b, int64[50] i, float16[3] h, uint8[50] u)
                => (bool[3] c, int64[50] j, float16[3] k, uint8[50] v) {
                c = Not(b) j = Identity(i) k = Neg(h) v = Identity(u) }"""
        onnx.save(onnx.parser.parse_model(graph), "kinds.onnx")
        convert("kinds.onnx")
        call("run", "kinds.trtb", "-o", "out.npz")
        with np.load("out.npz") as out:
            assert {name: out[name].dtype.name for name in out.files} == {
                "c": "bool", "j": "int64", "k": "float16", "v": "uint8"
            }  # fmt: skip
            assert set(out["j"]) == {0, 1}
        call("run", "kinds.trtb", "-o", "out.npz", "--force", "--int-max", "1000")
        with np.load("out.npz") as out:
            assert out["j"].max() > 100
            assert out["v"].max() > 100

    def test_bfloat16_travels_as_float32(self, folder: Path) -> None:
        (folder / "half.py").write_text(
            "import torch\ndef make():\n    return torch.nn.ReLU(), (torch.randn(2, 3, dtype=torch.bfloat16),)\n"
        )
        convert("half.py:make")
        np.savez("in.npz", input=np.array([[-1, 2, 0.5], [3, -4, 1.25]], np.float32))
        assert "bfloat16" in call("run", "make.trtb", "-i", "in.npz", "-o", "out.npz").stdout
        with np.load("out.npz") as out:
            np.testing.assert_array_equal(out["output"], [[0, 2, 0.5], [3, 0, 1.25]])
            assert out["output"].dtype == np.float32

    def test_latency(self) -> None:
        convert("models.py:net")
        shown = call("run", "net.trtb", "--iterations", "5").stdout
        assert re.search(r"latency: median \d+\.\d{3} ms, from .* over 5 calls", shown)
        assert "latency" not in call("run", "net.trtb").stdout

    def test_imports_what_registers_a_plugin_op(self, folder: Path) -> None:
        (folder / "ops.py").write_text(
            "import torch\n"
            "@torch.library.custom_op('cli_test::twice', mutates_args=())\n"
            "def twice(x: torch.Tensor) -> torch.Tensor:\n    return x * 2\n"
            "@twice.register_fake\n"
            "def _(x):\n    return torch.empty_like(x)\n"
        )
        (folder / "uses.py").write_text(
            "import torch, ops\n"
            "class Twice(torch.nn.Module):\n    def forward(self, x):\n        return torch.ops.cli_test.twice(x) + 1\n"
            "def make():\n    return Twice(), (torch.randn(3),)\n"
        )
        run = [sys.executable, "-c", "from trtbridge.bridge.cli import main; main()"]
        subprocess.run([*run, "convert", "uses.py:make", "-b", "onnxruntime"], check=True, timeout=300)
        done = subprocess.run([*run, "run", "make.trtb"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1
        assert "cli_test::twice" in done.stderr
        done = subprocess.run(
            [*run, "run", "make.trtb", "--import", "ops.py"], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    def test_errors(self, folder: Path) -> None:
        convert("models.py:net", "--dim", "x:0=batch:1:4:8")
        np.savez("wrong.npz", y=np.zeros((4, 6), np.float32))
        np.savez("double.npz", x=np.zeros((4, 6)))
        np.savez("text.npz", x=np.array(["a"]))
        (folder / "objects.npz").write_text("no zip")
        np.save("one.npy", np.zeros(3))
        for arguments, words in (
            (["missing.trtb"], "There is no file missing.trtb"),
            (["models.py"], "is no trtbridge program, or is damaged"),
            (["net.trtb", "--size", "seq=3"], "no such dynamic dimension; it has batch from 1 to 8"),
            (["net.trtb", "--size", "batch=9"], "batch from 1 to 8, got 9"),
            (["net.trtb", "--inputs", "missing.npz"], "There is no file missing.npz"),
            (["net.trtb", "--inputs", "objects.npz"], "is no .npz file"),
            (["net.trtb", "--inputs", "one.npy"], "is no .npz file"),
            (["net.trtb", "--inputs", "wrong.npz"], "Missing: x (x: (batch, 6) float). Unexpected: y."),
            (["net.trtb", "--inputs", "double.npz"], "expected torch.float32, got torch.float64"),
            (["net.trtb", "--inputs", "text.npz"], "Input x: can't convert np.ndarray of type"),
            (["net.trtb", "--inputs", "double.npz", "--size", "batch=2"], "--size is for random inputs"),
            (["net.trtb", "--output", "models.py"], "models.py exists"),
            (["net.trtb", "--output", "missing/out.npz"], "no folder missing"),
            (["net.trtb", "--import", "missing_ops"], "There is no module 'missing_ops'"),
        ):
            assert words in call("run", *arguments, status=1).stderr
        for arguments, words in ((["--size", "batch"], "is not NAME=VALUE"), (["-n", "0"], "--iterations")):
            assert words in flat(call("run", "net.trtb", *arguments, status=2).stderr)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="engines run here")
    def test_engine_that_cannot_run_here(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        result = convert("models.py:net", backend="tensorrt_rtx")
        assert "layers, tensorrt_rtx" in result.stdout
        assert "try it on a machine with an NVIDIA GPU: trtbridge run net.trtb" in result.stdout
        assert "engines run on a CUDA device, and torch sees none here" in call("run", "net.trtb", status=1).stderr

    @pytest.mark.skipif(os.name != "posix", reason="file modes")
    def test_output_file_has_the_usual_mode_and_no_part_stays(self, folder: Path) -> None:
        convert("models.py:net")
        before = set(folder.iterdir())
        call("run", "net.trtb", "-o", "out.npz")
        assert set(folder.iterdir()) - before == {folder / "out.npz"}
        (folder / "plain").touch()
        assert stat.S_IMODE((folder / "out.npz").stat().st_mode) == stat.S_IMODE((folder / "plain").stat().st_mode)


class TestDoctor:
    def test_table(self) -> None:
        text = call("doctor").stdout
        for word in ("trtbridge", "Python", "torch", "onnx", "CPUExecutionProvider", "cache", *BACKENDS):
            assert word in text
        assert torch.__version__ in text
        assert "--backend auto takes: tensorrt" in text

    def test_json(self, tmp_path: Path) -> None:
        facts = json.loads(call("doctor", "--json").stdout)
        assert [backend["name"] for backend in facts["backends"]] == list(BACKENDS)
        assert facts["backends"][-1]["can_run"] is True
        assert facts["torch"]["version"] == torch.__version__
        assert facts["cache"] == {"folder": str(tmp_path / "cache"), "writable": True, "error": ""}

    def test_cache_that_cannot_be_written(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRTBRIDGE_CACHE_DIR", str(folder / "models.py"))
        cache = json.loads(call("doctor", "--json").stdout)["cache"]
        assert not cache["writable"]
        assert "cannot be written" in cache["error"]

    def test_status_1_where_nothing_builds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from trtbridge.bridge.backends.base import BackendStatus

        nothing = [BackendStatus(name, reason=f"The backend {name!r} is not installed.") for name in BACKENDS]
        monkeypatch.setattr("trtbridge.bridge.backends.all_statuses", lambda: iter(nothing))
        text = call("doctor", status=1).stdout
        assert "takes: nothing. No backend can build here" in text

    def test_broken_torch_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import importlib

        real = importlib.import_module

        def broken(name: str, package: str | None = None) -> object:
            if name == "torch":
                raise OSError("libc10.so: wrong ELF class")
            return real(name, package)

        monkeypatch.setattr("importlib.import_module", broken)
        text = call("doctor", status=1).stdout
        assert "cannot be imported: OSError: libc10.so: wrong ELF class" in text

    def test_driver_without_a_torch_that_fits(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        tool = folder / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho '580.65.06, NVIDIA H200'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        facts = json.loads(call("doctor", "--json").stdout)
        assert facts["driver"] == {"version": "580.65.06", "gpus": ["NVIDIA H200"]}
        assert "nvidia-smi lists NVIDIA H200, but torch sees no GPU" in facts["hint"]


class TestProgress:
    def feed(self, stages: Stages) -> None:
        with stages:
            for report in (("export", 0.0), ("export", 1.0), ("build", 0.0), ("build: [Timing] nodes", 0.5)):
                stages(*report)
            stages("build: inner", 0.25)
            stages("build: done", 1.0)
            stages("build", 1.0)

    def test_plain_lines_without_a_terminal(self) -> None:
        file = io.StringIO()
        self.feed(Stages(Console(file=file)))
        assert re.fullmatch(r"export    \d\.\d\d s\nbuild     \d\.\d\d s\n", file.getvalue())

    def test_plain_lines_while_a_long_build_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trtbridge.bridge.cli_display._PLAIN_INTERVAL_S", 0.0)
        file = io.StringIO()
        self.feed(Stages(Console(file=file)))
        percentages = re.findall(r"build +(\d+)% after 0 s", file.getvalue())
        assert percentages == ["50", "50", "100"], "an inner phase does not take the bar back"
        assert "[Timing] nodes" in file.getvalue()

    def test_bar_on_a_terminal(self) -> None:
        file = io.StringIO()
        self.feed(Stages(Console(file=file, force_terminal=True, width=100, color_system=None)))
        assert "\x1b[" in file.getvalue()
        assert re.search(r"\+ build +\d\.\d\d s", file.getvalue())

    @pytest.mark.parametrize("terminal", [True, False])
    def test_a_stage_that_fails_is_marked(self, terminal: bool) -> None:
        file = io.StringIO()
        stages = Stages(Console(file=file, force_terminal=terminal))

        def fail() -> None:
            with stages:
                stages("export", 0.0)
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            fail()
        assert re.search(r"export .*failed", file.getvalue())

    @pytest.mark.skipif(os.name != "posix", reason="signals")
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupt_stops_the_child_and_leaves_no_file(self, number: int, status: int, folder: Path) -> None:
        pytest.importorskip("tensorrt_rtx")
        (folder / "sleeper.py").write_text(
            "import os, pathlib, time\n"
            "print('[\"Sleeping\", 0.5]', flush=True)\n"
            "pathlib.Path('pid.part').write_text(str(os.getpid()))\n"
            "os.replace('pid.part', 'pid')\n"
            "time.sleep(120)\n"
        )
        # In place of the real builder, which is too quick to be interrupted.
        (folder / "slow.py").write_text(
            "from models import net\nfrom trtbridge.bridge.backends import trt_build\ntrt_build.__name__ = 'sleeper'\n"
        )
        (folder / "tmp").mkdir()
        # A shell that runs this in the background leaves SIGINT ignored, and so would the child.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from trtbridge.bridge.cli import main; main()"
        )
        command = [sys.executable, "-c", code, "convert", "slow.py:net", "-b", "tensorrt_rtx", "-o", "out.trtb"]
        environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            deadline = time.monotonic() + 120
            while not (folder / "pid").exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "build     failed" in errors
        assert "Traceback" not in errors
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "pid").read_text()), 0)
        assert not list(folder.glob("*.trtb*"))
        assert not list((folder / "tmp").glob("trtbridge-*"))


def test_installed_command_without_a_terminal(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = Path(sys.executable).with_name("trtbridge")
    if not command.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run(
        [str(command), "convert", "models.py:net", "-b", "tensorrt_rtx"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert re.search(r"^build +\d+\.\d\d s$", done.stderr, re.M)
    assert "Net on tensorrt_rtx" in done.stdout
    assert tb.load("net.trtb").program.backend == "tensorrt_rtx"


def test_statistics_leave_nan_out() -> None:
    nan = float("nan")
    assert describe_tensor(torch.tensor([1.0, nan, 3.0])) == ("(3)", "float32", "2", "1", "3", "1")
    assert describe_tensor(torch.tensor([nan])) == ("(1)", "float32", "-", "-", "-", "1")
    assert describe_tensor(torch.empty(0, 2)) == ("(0, 2)", "float32", "-", "-", "-", "0")
    assert describe_tensor(torch.tensor(True)) == ("()", "bool", "1", "1", "1", "0")
    assert describe_tensor(torch.tensor([2**40, 0])) == ("(2)", "int64", "5.49756e+11", "0", "1099511627776", "0")
    assert describe_tensor(torch.tensor([3 + 4j])) == ("(1)", "complex64", "5", "5", "5", "0")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 30, "3.0 GiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text
