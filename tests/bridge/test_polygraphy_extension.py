"""polygraphy run ... --trtbridge: found by its entry point, in the same words as Polygraphy's own runners."""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from polygraphy import config
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, DataLoader, RunResults
from polygraphy.logger import G_LOGGER

import trtbridge as tb
from trtbridge.bridge.polygraphy_extension import TrtBridgeRunner, TrtBridgeRunnerArgs, dynamic_shapes

if sys.version_info >= (3, 11):
    import tomllib

# Polygraphy's own way to its entry points, before Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:SelectableGroups dict interface:DeprecationWarning")

GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
net (float["n", 3] x, float["n", 3] y) => (float["n", 3] z, float["n", 3] last)
{ s = Add(x, y) z = Tanh(s) last = Mul(z, s) }
"""


def parsed(text: str) -> onnx.ModelProto:
    """A graph whose second input has a name that is no Python identifier."""
    model = onnx.parser.parse_model(text)
    model.graph.input[1].name = model.graph.node[0].input[1] = "y.1"
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(parsed(GRAPH), path)
    return path


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the metadata that pyproject.toml makes, whatever is installed here."""
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    root = Path(tb.__file__).parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    folder = tmp_path / "site" / "trtbridge_entry_points-0.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: trtbridge-entry-points\nVersion: 0.0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder.parent


def polygraphy(*arguments: str) -> int:
    """The command ``polygraphy``, in this process: 0 where it passes."""
    from polygraphy.tools import main

    before = G_LOGGER.module_severity
    try:
        return int(main(list(arguments)) or 0)
    finally:
        G_LOGGER.module_severity = before


def test_polygraphy_run_compares_with_onnxruntime(
    file: Path, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ["--trt-min-shapes", "x:[1,3]", "y.1:[1,3]", "--trt-opt-shapes", "x:[2,3]", "y.1:[2,3]"]
    shapes += ["--trt-max-shapes", "x:[8,3]", "y.1:[8,3]", "--input-shapes", "x:[5,3]", "y.1:[5,3]"]
    saved = tmp_path / "results.json"
    run = ["run", str(file), "--onnxrt", "--trtbridge", "--trtbridge-backend", "onnxruntime", *shapes]
    status = polygraphy(*run, "--atol", "1e-6", "--rtol", "1e-6", "--save-outputs", str(saved))
    said = capsys.readouterr().out
    assert status == 0, said
    assert "PASSED" in said
    assert "trtbridge-runner" in said
    results = RunResults.load(str(saved))
    assert list(results[1][1][0].keys()) == ["z", "last"]
    assert results[1][1][0]["z"].shape == (5, 3)


def test_a_script_is_made(file: Path, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh interpreter finds the option by the entry point alone, and writes a script that runs."""
    script = tmp_path / "script.py"
    command = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())", "run"]
    command += [str(file), "--onnxrt", "--trtbridge", "--trtbridge-backend", "onnxruntime", "--gen-script", str(script)]
    command += ["--input-shapes", "x:[4,3]", "y.1:[4,3]"]
    paths = [str(installed), str(Path(tb.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from trtbridge.bridge.polygraphy_extension import TrtBridgeRunner" in script.read_text()
    runpy.run_path(str(script))
    said = capsys.readouterr().out
    assert "z [dtype=float32, shape=(4, 3)]" in said
    assert "Pass Rate: 100.00%" in said


def test_results_of_compare_are_loaded_by_polygraphy_run(
    file: Path, installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, inputs = tmp_path / "out.json", tmp_path / "in.json"
    x = torch.randn(4, 3)
    assert tb.compare(file, file, (x, x), save_outputs=results, save_inputs=inputs).ok
    other = tmp_path / "other.onnx"
    onnx.save(parsed(GRAPH.replace("Tanh", "Sin")), other)
    shapes = ["--input-shapes", "x:[4,3]", "y.1:[4,3]", "--trtbridge-backend", "onnxruntime"]
    for model, passes in ((file, True), (other, False)):
        run = ["run", str(model), "--trtbridge", "--load-inputs", str(inputs), "--load-outputs", str(results)]
        status = polygraphy(*run, *shapes)
        assert (status == 0) == passes, capsys.readouterr().out
    assert "FAILED" in capsys.readouterr().out


def test_the_backend_chooses_the_tensorrt_of_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", False)
    for backend, rtx in (("tensorrt_rtx", True), ("onnxruntime", True), (None, True), ("tensorrt", False)):
        TrtBridgeRunnerArgs().parse_impl(argparse.Namespace(trtbridge_backend=backend, trtbridge_load=None))
        assert rtx == config.USE_TENSORRT_RTX, backend


def test_the_runner_by_itself(file: Path, tmp_path: Path) -> None:
    profile = {name: [[1, 3], [2, 3], [4, 3]] for name in ("x", "y.1")}
    runner = TrtBridgeRunner(str(file), "onnxruntime", profile, {"tf32": True})
    results = Comparator.run([OnnxrtRunner(SessionFromOnnx(str(file))), runner], DataLoader(iterations=3))
    assert all(bool(result) for result in Comparator.compare_accuracy(results))
    assert not runner.is_active
    saved = tmp_path / "net.trtb"
    shapes = {name: {0: tb.Dim("n", min=1, opt=2, max=4)} for name in ("x", "y.1")}
    tb.convert(file, dynamic_shapes=shapes, backend="onnxruntime").save(saved)
    for model in (str(saved), onnx.load(file), lambda: onnx.load(file)):
        with TrtBridgeRunner(model, "onnxruntime", profile) as runner:
            metadata = runner.get_input_metadata(use_numpy_dtypes=False)
            assert list(metadata) == ["x", "y.1"]
            feed = {"x": np.ones((2, 3), np.float32), "y.1": np.zeros((2, 3), np.float32)}
            outputs = runner.infer(feed)
            np.testing.assert_allclose(outputs["z"], np.tanh(np.ones((2, 3))), rtol=1e-6)
            tensors = runner.infer({name: torch.from_numpy(array) for name, array in feed.items()})
            assert isinstance(tensors["z"], torch.Tensor)
            assert runner.last_inference_time() > 0


def test_ranges_from_profiles(file: Path) -> None:
    assert dynamic_shapes(file, {}) == {"x": {0: 1}, "y.1": {0: 1}}
    dim = tb.Dim("n", min=1, opt=2, max=8)
    profile = {"y.1": [[1, 3], [2, 3], [8, 3]]}
    assert dynamic_shapes(file, profile) == {"x": {0: dim}, "y.1": {0: dim}}
    with pytest.raises(tb.OptionError, match="has rank 2"):
        dynamic_shapes(file, {"x": [[1], [2], [8]]})
