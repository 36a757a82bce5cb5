"""localize over the stages of a conversion: passes, precision, engines; what it takes, says and writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge import localize as localize_module
from trtbridge.bridge import localize_stage
from trtbridge.bridge.backends.base import BuildOptions, Engine, Progress, Segment
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend
from trtbridge.bridge.model import OnnxModel, origin_of
from trtbridge.nodes import OP_ATTRIBUTE
from trtbridge.passes import Notes, Pass

pytestmark = pytest.mark.usefixtures("export_once")


class Net(nn.Module):
    """x: (N, 8) to (N, 3)."""

    def __init__(self, approximate: str = "none", more: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)
        self.approximate, self.more = approximate, more

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.more:
            x = (x + 1.0) - 1.0
        y = self.norm(x)
        y = nn.functional.gelu(self.up(y), approximate=self.approximate)
        x = x + self.down(y)
        return self.head(torch.tanh(x))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return Net().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 8) * 2


@pytest.fixture(scope="module")
def graph(net: nn.Module) -> OnnxModel:
    return tb.export(net, (torch.randn(4, 8),))


@pytest.fixture(scope="module")
def converted(net: nn.Module) -> tb.EngineModule:
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
    return tb.convert(net, (torch.randn(4, 8),), dynamic_shapes=shapes, backend="onnxruntime")


def spoil(model: onnx.ModelProto, op_type: str = "Tanh", to: str = "Sigmoid") -> None:
    next(node for node in model.graph.node if node.op_type == op_type).op_type = to


def spoiled(model: OnnxModel, op_type: str = "Tanh", to: str = "Sigmoid") -> OnnxModel:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    spoil(proto, op_type, to)
    return dataclasses.replace(model, proto=proto)


def run_repro(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, str(folder / "run.py")], capture_output=True, text=True, env=environment, cwd="/"
    )


# Stages


def test_a_right_conversion_raises_no_alarm(net: nn.Module, converted: tb.EngineModule, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    tb.save(converted, path)
    report = tb.localize(net, path)
    assert not report.found, str(report)
    assert [stage.name for stage in report.stages] == ["export", "passes", "engine onnxruntime"]
    assert all(stage.layers and max(stage.output_errors.values()) < 1e-5 for stage in report.stages)
    assert report.builds == 1
    assert report.first is None
    assert "nothing wrong in export, passes, engine onnxruntime" in str(report)


@dataclasses.dataclass(frozen=True)
class Careless(Pass):
    """Doubles a bias: a pass with a bug."""

    def apply(self, graph: gs.Graph, notes: Notes) -> int:
        for node in graph.nodes:
            if node.op == "Gemm" and not node.inputs[2].name.startswith("doubled"):
                node.inputs[2] = notes.constant(notes.values(node.inputs[2]) * 2, "doubled")
                return 1
        return 0


def test_a_pass_with_a_bug_is_named(net: nn.Module, x: torch.Tensor) -> None:
    passes = tb.DEFAULT.insert(Careless(), after=type(tb.DEFAULT.passes[0]))
    report = tb.localize(net, None, (x,), backend="onnxruntime", passes=passes, check_export=False)
    assert report.suspect is not None
    assert report.suspect.stage == "pass Careless"
    assert report.suspect.op_type == "Gemm"
    assert "self.up(y)" in report.suspect.origin.code
    assert [stage.name for stage in report.stages] == ["export", "pass Careless"]


def test_half_precision_raises_no_alarm(net: nn.Module, x: torch.Tensor) -> None:
    mixed = tb.localize(net, None, (x,), backend="onnxruntime", precision="fp16")
    assert not mixed.found, str(mixed)
    assert "precision fp16" in [stage.name for stage in mixed.stages]
    assert "float16" in {layer.precision for layer in mixed.layers}
    half = Net().eval().half()
    report = tb.localize(half, tb.export(half, (x.half(),)), (x.half(),), golden=True)
    assert not report.found, str(report)
    assert report.source == "torch Net in float64"


class Large(nn.Module):
    """Its sum of squares leaves float16."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        z = y * y * 4e4
        z = z / (z.sum(-1, keepdim=True) + 1.0)
        return self.head(z)


def test_what_overflows_in_half_precision_is_named(x: torch.Tensor) -> None:
    model = Large().eval()
    half = Large().eval()
    half.load_state_dict(model.state_dict())
    report = tb.localize(model, tb.export(half.half(), (x.half(),)), (x,))
    assert report.suspect is not None
    assert (report.suspect.op_type, report.suspect.words) == ("Mul", "NaN or infinity in other places")
    assert report.suspect.origin.code == "z = y * y * 4e4"
    assert report.first is not None
    assert report.first.precision == "float16"
    # A converted copy says no more than its signature.
    engine = tb.localize(model, tb.convert(half, (x.half(),), backend="onnxruntime"), (x,))
    assert engine.suspect is not None, str(engine)
    assert engine.suspect.origin == report.suspect.origin


# Engines


class Planted(OnnxRuntimeBackend):
    """Engines with an error: ONNX Runtime builds what a function has spoiled."""

    def __init__(self, spoil: Any) -> None:
        self.spoil, self.built = spoil, []

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        proto = onnx.ModelProto()
        proto.CopyFrom(segment.proto)
        self.spoil(proto)
        self.built.append([value.name for value in proto.graph.output])
        engine = super().build(dataclasses.replace(segment, proto=proto), options, progress)
        # As TensorRT's: an engine does not hold its graph.
        right = super().build(segment, options)
        return dataclasses.replace(engine, info={**engine.info, "graph": len(right.parts)})


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let localize convert with, and build in, engines that hold an error and that do not tell their graphs."""

    def use(spoil: Any) -> Planted:
        backend = Planted(spoil)
        monkeypatch.setattr(localize_module, "choose_backend", lambda name: (backend, "planted"))
        monkeypatch.setattr(localize_module, "plan_of", lambda program: None)
        return backend

    return use


def test_an_engine_with_a_wrong_kernel(net: nn.Module, x: torch.Tensor, plant: Any, tmp_path: Path) -> None:
    def wrong(proto: onnx.ModelProto) -> None:
        for node in proto.graph.node:
            node.op_type = "Sigmoid" if node.op_type == "Tanh" else node.op_type

    backend = plant(wrong)
    report = tb.localize(net, None, (x,), backend="onnxruntime", repro=tmp_path / "repro")
    assert report.suspect is not None, str(report)
    assert (report.suspect.stage, report.suspect.op_type) == ("engine onnxruntime", "Tanh")
    assert report.suspect.origin.code == "return self.head(torch.tanh(x))"
    assert report.builds == len(backend.built) == 3
    assert backend.built[2] == [report.suspect.layer.tensor], "the last engine is the suspect alone"
    assert report.suspect.layer.own_error is not None
    assert report.suspect.layer.own_error > 0.1
    assert run_repro(tmp_path / "repro").returncode == 0, "the graph is right, it is the engine that is not"


def test_an_error_that_marks_make_vanish_lies_in_a_fusion(net: nn.Module, x: torch.Tensor, plant: Any) -> None:
    def wrong(proto: onnx.ModelProto) -> None:
        names = [value.name for value in proto.graph.output]
        gelu = next((node for node in proto.graph.node if node.op_type == "Gelu"), None)
        if gelu is not None and gelu.output[0] not in names:
            gelu.op_type = "Relu"  # as if it were fused with its neighbours, wrongly
            del gelu.attribute[:]

    backend = plant(wrong)
    report = tb.localize(net, None, (x,), backend="onnxruntime")
    assert report.found
    assert report.stage.wrong
    assert len(backend.built) <= 3
    assert any("the error lies in a fusion" in note for note in report.stage.notes)
    assert report.suspect is not None, str(report)
    assert report.suspect.layer.tensor == "linear_1", "the first mark behind the gelu"
    assert any("the error begins between 'linear_1' and the mark before it" in note for note in report.stage.notes)


def test_a_spoiled_program_is_localized_in_its_own_graph(net: nn.Module, converted: tb.EngineModule) -> None:
    (step,) = converted.program.steps
    proto = onnx.ModelProto.FromString(bytes(step.engine.parts["model.onnx"]))
    spoil(proto)
    engine = dataclasses.replace(step.engine, parts={**step.engine.parts, "model.onnx": proto.SerializeToString()})
    program = dataclasses.replace(converted.program, steps=(dataclasses.replace(step, engine=engine),))
    report = tb.localize(net, tb.EngineModule(program))
    assert report.suspect is not None, str(report)
    assert (report.suspect.stage, report.suspect.op_type) == ("engine onnxruntime", "Sigmoid")
    assert report.suspect.origin.code == "return self.head(torch.tanh(x))"
    assert report.builds <= 3


def test_engines_that_cannot_run_here_are_said_so(net: nn.Module, x: torch.Tensor) -> None:
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("they run here")
    report = tb.localize(net, None, (x,), backend="tensorrt_rtx")
    assert not report.found, str(report)
    named = {stage.name: stage for stage in report.stages}
    assert any(note.startswith("not run:") for note in named["engine tensorrt_rtx"].notes)
    assert named["passes"].layers


# What it takes


def test_an_onnx_file_is_compared_by_the_names_of_its_tensors(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, tmp_path: Path
) -> None:
    graph.save(tmp_path / "right.onnx")
    spoiled(graph).save(tmp_path / "wrong.onnx")
    report = tb.localize(tmp_path / "right.onnx", tmp_path / "wrong.onnx")
    assert report.suspect is not None
    assert report.suspect.op_type == "Sigmoid"
    assert report.source == "right.onnx in ONNX Runtime"
    assert not tb.localize(tmp_path / "right.onnx", None, (x,), backend="onnxruntime").found
    of_module = tb.localize(net, tmp_path / "wrong.onnx", {"x": x})
    assert of_module.suspect is not None
    assert of_module.suspect.origin.code == "return self.head(torch.tanh(x))"


def test_another_version_of_the_module_is_aligned(net: nn.Module, x: torch.Tensor) -> None:
    other = Net(approximate="tanh", more=True).eval()
    other.load_state_dict(net.state_dict())
    report = tb.localize(net, tb.export(other, (x,)), (x,))
    assert report.suspect is not None, str(report)
    assert report.suspect.op_type == "Gelu"
    assert "nn.functional.gelu(" in report.suspect.origin.code


class Smooth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        z = torch.ops.tests_localize.smooth(y)
        return torch.cat([y, z], 1)


def _smooth(name: str, share: float) -> None:
    @torch.library.custom_op(f"tests_localize::{name}", mutates_args=())
    def smooth(x: torch.Tensor) -> torch.Tensor:
        return x * share + x.mean() * (1 - share)

    smooth.register_fake(torch.empty_like)


def test_a_plugin_whose_kernel_is_off(x: torch.Tensor, tmp_path: Path) -> None:
    for name, share in (("smooth", 0.5), ("smooth_off", 0.45)):
        if not hasattr(torch.ops.tests_localize, name):
            _smooth(name, share)
    model = Smooth()
    graph = tb.export(model, (x,))
    assert not tb.localize(model, graph, (x,)).found
    plugin = next(node for node in graph.proto.graph.node if node.domain == "trtbridge")
    for attribute in plugin.attribute:
        if attribute.name == OP_ATTRIBUTE:
            attribute.s = b"tests_localize::smooth_off.default"
    report = tb.localize(model, graph, (x,), repro=tmp_path)
    assert report.suspect is not None
    assert report.suspect.op_type.startswith("trtbridge::")
    assert report.suspect.origin.code == "z = torch.ops.tests_localize.smooth(y)"
    code = (tmp_path / "run.py").read_text()
    assert "trtbridge.bridge.repro" in code
    own = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_localize\n"
    own += "for n, s in (('smooth', 0.5), ('smooth_off', 0.45)): test_localize._smooth(n, s)\n"
    (tmp_path / "run.py").write_text(code.replace("import os, sys\n", f"import os, sys\n{own}"))
    done = run_repro(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "relative error" in done.stdout


def test_random_calls_do_not_hide_what_follows(x: torch.Tensor) -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + torch.rand_like(x)
            return torch.tanh(x)

    graph = tb.export(Noisy(), (x,))
    right = tb.localize(Noisy(), graph, (x,))
    assert not right.found, str(right)
    assert any("draws random numbers" in note for note in right.stage.notes)
    report = tb.localize(Noisy(), spoiled(graph), (x,))
    assert report.suspect is not None
    assert report.suspect.op_type == "Sigmoid"


def test_a_transpose_that_moved_is_no_error() -> None:
    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(x.transpose(0, 1))
            return torch.tanh(y) * 2

    graph = tb.export(Square(), (torch.randn(4, 4),))
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    transpose, relu = (next(n for n in proto.graph.node if n.op_type == op) for op in ("Transpose", "Relu"))
    # x -> Transpose -> Relu becomes x -> Relu -> Transpose, each keeping its origin and the name of what it makes.
    middle, last = transpose.output[0], relu.output[0]
    relu.input[0], transpose.input[0] = transpose.input[0], middle
    relu.output[0], transpose.output[0] = middle, last
    nodes = [relu, transpose, *(n for n in proto.graph.node if n.op_type not in ("Transpose", "Relu"))]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    moved = dataclasses.replace(graph, proto=proto)
    x = torch.randn(4, 4)
    report = tb.localize(Square(), moved, (x,))
    assert not report.found, str(report)
    assert any(layer.wrong for layer in report.layers), "a value in another form is seen, and not blamed"


def test_few_values_are_held_at_a_time(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = spoiled(graph)
    at_once = tb.localize(net, wrong, (x,))
    monkeypatch.setattr(localize_stage, "CHUNK_BYTES", 1)
    one_by_one = tb.localize(net, wrong, (x,))
    assert at_once.to_json() == one_by_one.to_json()


def test_a_graph_that_cannot_run_is_localized_all_the_same(net: nn.Module, graph: OnnxModel, x: torch.Tensor) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    node = next(node for node in proto.graph.node if node.op_type == "Tanh")
    node.op_type = "Concat"
    node.attribute.append(onnx.helper.make_attribute("axis", 5))
    report = tb.localize(net, dataclasses.replace(graph, proto=proto), (x,))
    assert report.suspect is not None
    assert report.suspect.node == node.name
    assert "ONNX Runtime cannot run it" in report.suspect.words
    assert any("cannot be run as a whole" in note for note in report.stage.notes)


# What it says and writes


def test_the_report_as_json_and_text(net: nn.Module, graph: OnnxModel, x: torch.Tensor) -> None:
    report = tb.localize(net, spoiled(graph), (x,))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["found"]
    assert data["suspect"]["op_type"] == "Sigmoid"
    assert data["suspect"]["origin"]["line"] == report.suspect.origin.line  # type: ignore[union-attr]
    layers = data["stages"][-1]["layers"]
    wrong = next(layer for layer in layers if layer["tensor"] == data["suspect"]["layer"])
    assert wrong["own_error"] > 0.1
    assert wrong["growth"] > 1e4
    text = str(report)
    assert "first wrong: Sigmoid" in text
    assert "test_localize.py" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_repro_runs_by_itself(dtype: torch.dtype, x: torch.Tensor, tmp_path: Path) -> None:
    model = Net().eval().to(dtype)
    report = tb.localize(model, spoiled(tb.export(model, (x.to(dtype),))), (x.to(dtype),), repro=tmp_path / "repro")
    assert report.repro_dir == tmp_path / "repro"
    assert sorted(path.name for path in report.repro_dir.iterdir()) == [
        "expected.npz", "inputs.npz", "model.onnx", "run.py",
    ]  # fmt: skip
    done = run_repro(report.repro_dir)
    assert done.returncode == 1, done.stderr
    assert "relative error" in done.stdout
    graph = onnx.load(report.repro_dir / "model.onnx")
    assert [node.op_type for node in graph.graph.node] == ["Sigmoid"]
    # With the right op it says so.
    graph.graph.node[0].op_type = "Tanh"
    onnx.save(graph, report.repro_dir / "model.onnx")
    assert run_repro(report.repro_dir).returncode == 0
    code = (report.repro_dir / "run.py").read_text().splitlines()
    assert {line.split()[1] for line in code if line.startswith("import ")} == {"os,", "numpy", "onnxruntime"}


def test_a_repro_of_an_engine_builds_it(net: nn.Module, graph: OnnxModel, x: torch.Tensor, tmp_path: Path) -> None:
    report = tb.localize(net, spoiled(graph), (x,))
    assert report.repro is not None
    dataclasses.replace(report.repro, backend="onnxruntime").save(tmp_path)
    assert "trtbridge.convert(" in (tmp_path / "run.py").read_text()
    done = run_repro(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "tanh: relative error" in done.stdout


def test_a_repro_in_bfloat16_has_inputs_in_float32(x: torch.Tensor, tmp_path: Path) -> None:
    model = Net().eval().bfloat16()
    wrong = spoiled(tb.export(model, (x.bfloat16(),)))
    report = tb.localize(model, wrong, (x.bfloat16(),), repro=tmp_path)
    assert report.suspect is not None, str(report)
    held = np.load(tmp_path / "inputs.npz")
    assert {name: held[name].dtype for name in held.files} == {"add__float32": np.float32}
    graph = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [node.op_type for node in graph.graph.node] == ["Cast", "Sigmoid"]


def test_what_is_no_model_is_refused(
    net: nn.Module, graph: OnnxModel, x: torch.Tensor, converted: tb.EngineModule
) -> None:
    with pytest.raises(tb.InputError, match="takes what convert"):
        tb.localize(net, 3, (x,))  # type: ignore[arg-type]
    with pytest.raises(tb.InputError, match="Give inputs"):
        tb.localize(net)
    with pytest.raises(tb.OptionError, match="tolerance=-1"):
        tb.localize(net, converted, (x,), tolerance=-1)
    with pytest.raises(tb.TrtBridgeError, match="are they the same model"):
        tb.localize(Two(), converted, (x, x))
    with pytest.raises(tb.TrtBridgeError, match="no repro to save"):
        tb.localize(net, graph, (x,)).save_repro("nowhere")


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_every_node_knows_its_line(graph: OnnxModel) -> None:
    """What all of this hangs on: every node of an export knows its line."""
    lines: Sequence[int] = [origin_of(node).line for node in graph.proto.graph.node]
    assert all(lines)
    assert np.unique(lines).size >= 4
