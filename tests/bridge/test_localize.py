"""localize over the stages of a conversion: passes, precision, engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch
from localize_nets import Net, run_repro, spoil
from torch import nn

import trtbridge as tb
from trtbridge.bridge import localize as localize_module
from trtbridge.bridge import precision as precision_module
from trtbridge.bridge.backends.base import BuildOptions, Engine, Progress, Segment
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend
from trtbridge.bridge.build import build_plan
from trtbridge.bridge.localize_engine import EngineCheck, _first_not_finite
from trtbridge.passes import Notes, Pass

pytestmark = pytest.mark.usefixtures("export_once")


def test_a_right_conversion_raises_no_alarm(net: nn.Module, converted: tb.EngineModule, tmp_path: Path) -> None:
    path = tmp_path / "net.trtb"
    tb.save(converted, path)
    report = tb.localize(net, path)
    assert not report.found, str(report)
    assert not tb.localize(net, converted, (torch.randn(7, 8),)).found, "of another size than it was exported with"
    assert [stage.name for stage in report.stages] == ["export", "passes", "engine onnxruntime"]
    assert all(stage.layers and max(stage.output_errors.values()) < 1e-5 for stage in report.stages)
    assert report.builds == 1
    assert report.first is None
    assert "nothing wrong in export, passes, engine onnxruntime" in str(report)


@pytest.mark.parametrize("precision", ["", "fp16"])
def test_a_norm_that_was_folded_into_a_convolution_is_still_a_layer(precision: str) -> None:
    torch.manual_seed(0)
    block = [nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *block).eval()
    for norm in (network[1], network[4]):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.running_mean)
    options = {"precision": precision} if precision else {}
    report = tb.localize(network, None, (torch.randn(2, 3, 9, 9),), backend="onnxruntime", **options)
    assert not report.found, str(report)
    last = ["Cast"] if precision else ["Relu"]
    for number, stage in enumerate(report.stages[1:]):
        half = bool(precision) and number > 0
        assert [layer.op_type for layer in stage.layers] == ["Conv", "Relu", "Conv", *(last if half else ["Relu"])]
        bound = 1e-3 if half else 1e-5
        assert all(layer.error is not None and layer.error < bound and not layer.wrong for layer in stage.layers)


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
    assert report.suspect.as_plugins == "", "a plugin does not go round a pass that is wrong"


class Pool(nn.Module):
    """torch.onnx forgets the divisor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 2, divisor_override=3)


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x + 1) * 2


@pytest.mark.parametrize(("model", "entry"), [(Pools(), "pool"), (Pool(), "aten.avg_pool2d.default")])
def test_what_goes_round_a_wrong_export(model: nn.Module, entry: str) -> None:
    x = torch.randn(1, 2, 8, 8)
    options: dict[str, Any] = {"backend": "onnxruntime", "check_export": False}
    report = tb.localize(model, None, (x,), **options)
    assert report.suspect is not None
    assert report.suspect.stage == "export"
    assert report.suspect.as_plugins == report.to_json()["suspect"]["as_plugins"] == entry
    assert f"as_plugins={entry!r} runs it in PyTorch meanwhile" in str(report)
    assert tb.localize(model, None, (x,), as_plugins=entry, **options).suspect is None


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
        super().__init__()
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


def _in_float16(proto: onnx.ModelProto) -> None:
    """Let an engine keep what its nodes make in float16's range, as kernels in halves do: beyond it is infinity."""
    graph, nodes = proto.graph, list(proto.graph.node)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    del graph.node[:]
    for node in nodes:
        graph.node.append(node)
        name = node.output[0]
        if node.op_type == "Cast" or types.get(name) not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            continue
        graph.node[-1].output[0] = f"{name}__wide"
        # In float32, for ONNX Runtime takes Casts to float16 and back out, and computes float16 in float32.
        graph.node.extend(
            onnx.parser.parse_graph(
                f"""g (float x) => (float y) {{
                {name}__float = Cast<to=1>({name}__wide)
                {name}__size = Abs({name}__float)
                {name}__most = Constant<value_float=65504.0>()
                {name}__zero = Constant<value_float=0.0>()
                {name}__over = Greater({name}__size, {name}__most)
                {name}__inf = Div({name}__float, {name}__zero)
                {name}__kept = Where({name}__over, {name}__inf, {name}__float)
                {name} = Cast<to={types[name]}>({name}__kept) }}"""
            ).node
        )


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_an_engine_that_overflows_is_traced_to_its_line(x, plant, monkeypatch, precision) -> None:
    """Its graph is right, or is taken for right: the engine's own inner values tell."""
    backend = plant(_in_float16)
    if precision is not None:  # all in float16 although the example overflows, and nobody sees it in the graph
        monkeypatch.setattr(precision_module, "overflowing", lambda ranges, margin: {})
        real = localize_module._Search._compare
        monkeypatch.setattr(localize_module._Search, "_compare", lambda *args: (real(*args)[0], None, None))
    report = tb.localize(Large().eval(), None, (30 * x,), backend="onnxruntime", precision=precision)
    assert report.suspect is not None, str(report)
    assert (report.suspect.stage, report.suspect.op_type) == ("engine onnxruntime", "Mul")
    assert report.suspect.words == "NaN or infinity in other places"
    assert report.suspect.origin.code == "z = y * y * 4e4"
    assert report.builds == len(backend.built) == 3


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_an_overflow_among_nodes_without_values_is_traced_to_its_node(x, plant, monkeypatch, precision) -> None:
    """Where the reference knows nothing between the first value and the last, the nodes tell by their own numbers."""
    backend = plant(_in_float16)
    real = localize_module._Search._check

    def sparse(self: Any, name: str, model: Any, export: Any) -> Any:
        check = real(self, name, model, export)
        points = check.examined.points
        examined = dataclasses.replace(check.examined, points=(points[0], points[-1]))
        return dataclasses.replace(check, examined=examined)

    monkeypatch.setattr(localize_module._Search, "_check", sparse)
    report = tb.localize(Large().eval(), None, (30 * x,), backend="onnxruntime", precision=precision)
    assert report.suspect is not None, str(report)
    assert (report.suspect.op_type, report.suspect.layer.tensor) == ("Mul", "output_0")
    assert len(report.suspect.nodes) > 4
    assert report.suspect.origin.code == "z = y * y * 4e4"
    assert report.builds == len(backend.built) == 3
    assert {"mul", "mul_1", "div"} <= set(backend.built[2])


def test_infinity_begins_where_all_that_is_read_is_finite() -> None:
    """A mask's own infinity is none that begins."""
    graph = onnx.parser.parse_graph(
        "g (float[2] x, bool[2] m, float low) => (float[2] y) "
        "{ a = Where(m, x, low) b = Softmax(a) c = Div(b, x) d = Mul(c, x) y = Add(d, x) }"
    )
    inf = float("inf")
    values = {"x": [0.0, 1.0], "low": [-inf], "a": [0.0, -inf], "b": [1.0, 0.0], "c": [inf, 0.0]}
    known = {name: torch.tensor(numbers) for name, numbers in values.items()}
    known |= {"m": torch.tensor([True, False]), "d": torch.tensor([float("nan"), 0.0])}
    found = _first_not_finite(list(graph.node), known)
    assert found is not None
    assert list(found.output) == ["c"]
    assert _first_not_finite(list(graph.node), {name: t for name, t in known.items() if name not in "cd"}) is None


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


def test_fewer_marks_where_all_are_too_many(net: nn.Module, x: torch.Tensor, plant: Any) -> None:
    def choosy(proto: onnx.ModelProto) -> None:
        if len(proto.graph.output) > 4:
            raise tb.BuildError("too many outputs")
        for node in proto.graph.node:
            node.op_type = "Sigmoid" if node.op_type == "Tanh" else node.op_type

    backend = plant(choosy)
    report = tb.localize(net, None, (x,), backend="onnxruntime")
    assert any("tensors marked as outputs fails: too many outputs" in note for note in report.stage.notes)
    assert report.suspect is not None, str(report)
    assert report.suspect.origin.code == "return self.head(torch.tanh(x))"
    assert len(backend.built) == 2, "the one that failed is counted, and so none is left for the suspect alone"
    assert report.builds == 3


@pytest.mark.rtx
def test_marked_engines_and_suspects_alone_build_with_tensorrt_rtx(
    net: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Built here, and taken for engines that give zeros, as they cannot run here."""
    pytest.importorskip("tensorrt_rtx")
    built = []

    def build(self: EngineCheck, plan: Any, inputs: Any) -> dict[str, torch.Tensor]:
        self.builds += 1
        (engine,) = build_plan(plan, self.backend, self.options).engines
        assert engine.info["layers"]
        built.append({spec.name for spec in engine.outputs})
        shapes = {name: self.graph.reference.types[self.graph.keys[name]][0] for name in built[-1]}
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    monkeypatch.setattr(EngineCheck, "_build", build)
    monkeypatch.setattr(localize_module, "why_not_here", lambda module: "")
    monkeypatch.setattr(localize_module._Search, "_given_errors", lambda *_: {"output_0": (1.0, "all zeros")})
    report = tb.localize(net, None, (x,), backend="tensorrt_rtx", precision="fp16", repro=tmp_path)
    assert report.builds == 3, "with the conversion itself"
    assert built[0] >= {"layer_norm", "linear", "gelu", "add", "tanh", "output_0"}
    assert built[1] == {"layer_norm"}
    assert report.suspect is not None
    assert (report.suspect.stage, report.suspect.layer.tensor) == ("engine tensorrt_rtx", "layer_norm")
    assert 'backend="tensorrt_rtx"' in (tmp_path / "run.py").read_text()
