"""Refittable engines of TensorRT-RTX, whose weights are inputs: all but running them, which tests/gpu does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions, Context, Engine, Segment
from trtbridge.bridge.backends.empty import EmptySafe
from trtbridge.bridge.backends.flavour import FLAVOURS
from trtbridge.bridge.backends.ort_session import WEIGHTS_PART, unpack
from trtbridge.bridge.backends.trt_blame import find_refusals
from trtbridge.bridge.backends.trt_build import Outcome
from trtbridge.bridge.backends.trt_run import ENGINE_PART
from trtbridge.bridge.backends.trt_weights import TABLE_PART, weight_inputs, weights_on_host, with_weight_inputs
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.model import TensorSpec
from trtbridge.bridge.options import Options
from trtbridge.passes.exchange import make_stand_in

pytestmark = pytest.mark.rtx


class Net(nn.Module):
    """Layers that take weights by different ways, a top-k that is rewritten for RTX, and a constant that is no weight.

    All of its parameters differ from those of another one, biases and norms too.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 32, 2, groups=2)
        self.groups, self.slope = nn.GroupNorm(4, 32), nn.PReLU(32)
        self.point = nn.Conv2d(32, 32, 1)
        self.lstm, self.last = nn.LSTM(32, 32, batch_first=True), nn.LayerNorm(32)
        self.table = nn.Embedding(32, 32)
        self.scale = nn.Parameter(torch.ones(1))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.2)
            self.norm.running_var.uniform_(0.5, 1.5)
        self.register_buffer("mask", torch.linspace(-1, 1, 32 * 32).view(32, 32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slope(self.groups(self.up(self.norm(self.conv(x)).relu())))
        x = self.point(x[:, :, :2, :2]).mean((2, 3))
        found = self.table(x.topk(1).indices[:, 0])
        made: torch.Tensor = self.last(self.lstm((x + found)[:, None])[0]) * self.scale @ self.mask
        return made


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
REFITTABLE = BuildOptions(refittable=True)


def _segment(module: nn.Module) -> Segment:
    options = Options.make({"refittable": True})
    planner = make_planner(module.eval(), (X,), None, None, get_backend("tensorrt_rtx"), options)
    (segment,) = planner.plan().segments
    return segment


@pytest.fixture(scope="module")
def segment() -> Segment:
    pytest.importorskip("tensorrt_rtx")
    return _segment(Net())


@pytest.fixture(scope="module")
def engine(segment: Segment) -> Engine:
    return get_backend("tensorrt_rtx").build(segment, REFITTABLE)


@pytest.fixture(scope="module")
def stripped(segment: Segment) -> Engine:
    return get_backend("tensorrt_rtx").build(segment, dataclasses.replace(REFITTABLE, strip_weights=True))


def _weights(engine: Engine) -> Mapping[str, ir.TensorProtocol]:
    table = onnx.ModelProto.FromString(bytes(engine.parts[TABLE_PART]))
    return unpack(table, memoryview(engine.parts[WEIGHTS_PART]), "test")


def _run(segment: Segment, engine: Engine) -> torch.Tensor:
    """What the parser gets, computed with the weights that lie beside the plan."""
    backend = get_backend("tensorrt_rtx")
    names = weight_inputs(FLAVOURS["tensorrt_rtx"], segment, REFITTABLE)
    proto = onnx.ModelProto()
    proto.CopyFrom(with_weight_inputs(backend.parsed(segment), names))
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:  # a constant that stays inside
            tensor.CopyFrom(ir.to_proto(ir.Tensor(segment.weights[tensor.name].numpy(), name=tensor.name)))
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {name: weight.numpy() for name, weight in _weights(engine).items()}
    (result,) = session.run(None, {"x": X.numpy(), **given})
    return torch.from_numpy(result)


def _bytes(engine: Engine, name: str) -> bytes:
    return bytes(engine.parts[name])


def test_weights_lie_beside_the_plan(segment: Segment, engine: Engine) -> None:
    found = _weights(engine)
    assert found.keys() == segment.refittable
    assert len(found) > 15
    for name, weight in found.items():
        assert weight.dtype == segment.weights[name].dtype
        assert np.array_equal(weight.numpy(), segment.weights[name].numpy())
    largest = max(found.values(), key=lambda weight: weight.nbytes).tobytes()
    assert largest in _bytes(engine, WEIGHTS_PART)
    assert largest[:256] not in _bytes(engine, ENGINE_PART)
    assert engine.info["refit"] == "inputs"
    assert not engine.info["stripped"]
    assert engine.info["weight_input_bytes"] == sum(weight.nbytes for weight in found.values())
    assert [spec.name for spec in engine.inputs] == ["x"]
    assert list(engine.info["profiles"][0]) == ["x"]


def test_the_network_computes_the_same(segment: Segment, engine: Engine) -> None:
    torch.testing.assert_close(_run(segment, engine), Net().eval()(X).detach(), atol=1e-4, rtol=1e-4)


def test_other_weights_leave_the_plan_alone(segment: Segment, engine: Engine) -> None:
    other = Net(1).eval()
    before = _bytes(engine, WEIGHTS_PART)
    made = get_backend("tensorrt_rtx").refit(engine, _segment(other).weights, torch.device("cpu"))
    assert made.parts[ENGINE_PART] is engine.parts[ENGINE_PART]
    assert _bytes(engine, WEIGHTS_PART) == before != _bytes(made, WEIGHTS_PART)
    torch.testing.assert_close(_run(segment, made), other(X).detach(), atol=1e-4, rtol=1e-4)
    assert (_run(segment, made) - _run(segment, engine)).abs().max() > 0.1


def test_without_weights(segment: Segment, engine: Engine, stripped: Engine) -> None:
    assert stripped.info["stripped"]
    assert len(stripped.parts[WEIGHTS_PART]) == 0
    assert not _weights(stripped)
    assert len(stripped.parts[ENGINE_PART]) == len(engine.parts[ENGINE_PART])
    with pytest.raises(tb.RefitError, match="without weights"):
        weights_on_host(stripped)
    filled = get_backend("tensorrt_rtx").refit(stripped, segment.weights, torch.device("cpu"))
    assert not filled.info["stripped"]
    assert _bytes(filled, WEIGHTS_PART) == _bytes(engine, WEIGHTS_PART)
    assert _bytes(filled, TABLE_PART) == _bytes(engine, TABLE_PART)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_weights_for_the_device_are_aligned(engine: Engine, kind: Callable[[bytes], Any]) -> None:
    changed = dataclasses.replace(engine, parts={**engine.parts, WEIGHTS_PART: kind(_bytes(engine, WEIGHTS_PART))})
    host, offsets = weights_on_host(changed)
    for name, weight in _weights(engine).items():
        assert offsets[name] % 256 == 0
        assert host[offsets[name] : offsets[name] + weight.nbytes].numpy().tobytes() == weight.tobytes()


def test_weights_that_do_not_fit(segment: Segment, engine: Engine) -> None:
    backend, name = get_backend("tensorrt_rtx"), min(segment.refittable)
    rest = {key: weight for key, weight in segment.weights.items() if key != name}
    with pytest.raises(tb.RefitError, match=name):
        backend.refit(engine, rest, torch.device("cpu"))
    odd = ir.Tensor(np.ones((2, 77), np.float32), name=name)
    with pytest.raises(tb.RefitError, match=r"FLOAT\[2, 77\]"):
        backend.refit(engine, {**rest, name: odd}, torch.device("cpu"))


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (WEIGHTS_PART, lambda data: data[:100], "is damaged"),
        (TABLE_PART, lambda data: b"\xff" + data[1:], f"{TABLE_PART} of the engine is damaged"),
        (WEIGHTS_PART, None, f"lacks {WEIGHTS_PART}"),
    ],
)
def test_damaged_parts(engine: Engine, part: str, change: Callable[[bytes], bytes] | None, words: str) -> None:
    parts = {name: data for name, data in engine.parts.items() if name != part}
    if change is not None:
        parts[part] = change(_bytes(engine, part))
    with pytest.raises(tb.ModelFileError, match=words):
        weights_on_host(dataclasses.replace(engine, parts=parts))


def test_engines_that_are_not_refittable_have_their_weights_inside(segment: Segment) -> None:
    built = get_backend("tensorrt_rtx").build(segment, BuildOptions())
    assert built.parts.keys() == {ENGINE_PART}
    assert "refit" not in built.info
    assert get_backend("tensorrt_rtx").refit(built, {}, torch.device("cpu")) is built


# What cannot be an input


def _small(node: onnx.NodeProto, weight: np.ndarray, shape: Sequence[int], name: str = "w") -> Segment:
    """A segment of one node with an input (2, 8) and one weight."""
    x = TensorSpec("x", ir.DataType.FLOAT, (2, 8), ((2, 2, 2), (8, 8, 8)))
    y = TensorSpec("y", ir.DataType.FLOAT, tuple(shape), tuple((size, size, size) for size in shape))
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(shape))]
    tensor = ir.Tensor(weight, name=name)
    graph = helper.make_graph([node], "small", values, results, [make_stand_in(name, tensor)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return Segment("small", proto, {name: tensor}, (x,), (y,), refittable=frozenset({name}))


def test_weights_that_are_sizes_are_named() -> None:
    pytest.importorskip("tensorrt_rtx")
    made = _small(helper.make_node("Reshape", ["x", "w"], ["y"], "reshape"), np.array([4, 4]), (4, 4))
    with pytest.raises(tb.BuildError, match="cannot be exchanged later: w") as caught:
        get_backend("tensorrt_rtx").build(made, REFITTABLE)
    assert not caught.value.graph_at_fault
    assert get_backend("tensorrt_rtx").build(made, BuildOptions()).parts


def test_empty_and_unread_weights_stay_inside() -> None:
    flavour = FLAVOURS["tensorrt_rtx"]
    empty = _small(helper.make_node("Concat", ["x", "w"], ["y"], "join", axis=1), np.ones((2, 0), np.float32), (2, 8))
    assert not weight_inputs(flavour, empty, REFITTABLE)
    unread = _small(helper.make_node("Relu", ["x"], ["y"], "relu"), np.ones(3, np.float32), (2, 8))
    assert not weight_inputs(flavour, unread, REFITTABLE)
    read = _small(helper.make_node("Add", ["x", "w"], ["y"], "add"), np.ones(8, np.float32), (2, 8))
    assert weight_inputs(flavour, read, REFITTABLE) == {"w"}
    assert not weight_inputs(flavour, read, BuildOptions())
    assert not weight_inputs(FLAVOURS["tensorrt"], read, REFITTABLE)
    assert with_weight_inputs(read.proto, frozenset()) is read.proto


def test_a_refusal_says_that_weights_are_inputs() -> None:
    made = _small(helper.make_node("Add", ["x", "w"], ["y"], "add"), np.ones(8, np.float32), (2, 8))
    entry = {"index": 0, "name": "add", "op": "Add", "reason": "no constant"}
    (plain,) = find_refusals(FLAVOURS["tensorrt"], Outcome([entry]), made)
    (told,) = find_refusals(FLAVOURS["tensorrt"], Outcome([entry]), made, {"w"})
    assert plain.reason == "no constant"
    assert "w is no constant of the engine but an input" in told.reason


def test_weights_beside_the_engine_are_not_streamed() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(tb.OptionError, match="leave out one of weight_streaming_bytes and refittable"):
        tb.convert(nn.Linear(4, 4), (torch.ones(2, 4),), backend="tensorrt_rtx", refittable=True,
                   weight_streaming_bytes=0)  # fmt: skip


# Programs


def test_a_program_keeps_and_takes_weights_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    module, other = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)), nn.Linear(2, 2)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    batch = tb.Dim("batch", profiles=[(1, 1, 1), (2, 8, 32)])
    sizes: dict[str, int] = {}
    for name, options in (("whole", {}), ("stripped", {"strip_weights": True})):
        fast = tb.convert(module, (torch.ones(2, 64),), dynamic_shapes=({0: batch},), backend="tensorrt_rtx",
                          refittable=True, **options)  # type: ignore[arg-type]  # fmt: skip
        fast.save(tmp_path / f"{name}.trtb")
        sizes[name] = (tmp_path / f"{name}.trtb").stat().st_size
        report = fast.inspect()
        assert report.engines[0].refit == "inputs"
        assert "refittable: weights are its inputs" in str(report)
        assert report.engines[0].profiles == 2
        assert fast.stats().weights_bytes == 4 * (2 * 64 * 512 + 512 + 64)
    assert sizes["whole"] - sizes["stripped"] > 4 * 2 * 64 * 512
    if torch.cuda.is_available():
        return  # tests/gpu goes on
    loaded = tb.load(tmp_path / "stripped.trtb", weights=other)
    (engine,) = loaded.program.engines
    found = [weight.numpy() for weight in _weights(engine).values()]
    for parameter in other.parameters():
        expected = parameter.detach().numpy()
        assert any(np.array_equal(f, expected) or np.array_equal(f, expected.T) for f in found)
    whole = tb.load(tmp_path / "whole.trtb")
    whole.refit(other.state_dict())
    assert _bytes(whole.program.engines[0], WEIGHTS_PART) == _bytes(engine, WEIGHTS_PART)
    whole.save(tmp_path / "other.trtb")
    again = tb.load(tmp_path / "other.trtb").program.engines[0]
    assert _bytes(again, WEIGHTS_PART) == _bytes(engine, WEIGHTS_PART)


def test_engines_come_from_the_cache_with_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    def convert() -> Any:
        torch.manual_seed(0)
        return tb.convert(nn.Linear(8, 8), (torch.ones(2, 8),), backend="tensorrt_rtx", refittable=True, cache=True,
                          cache_dir=tmp_path).program  # fmt: skip

    first, second = convert(), convert()
    assert second.info["cache"]["hits"] == 1
    assert _bytes(second.engines[0], WEIGHTS_PART) == _bytes(first.engines[0], WEIGHTS_PART)
    assert second.engines[0].info["refit"] == "inputs"


def test_a_plugin_between_engines_takes_weights_too() -> None:
    pytest.importorskip("tensorrt_rtx")

    class Plugins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.rand(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.cummax(self.first(x), -1).values + torch.cummin(self.weight, 0).values
            return made

    fast = tb.convert(Plugins(), (torch.ones(8, 8),), backend="tensorrt_rtx", refittable=True, plugin_host="segments")
    program = fast.program
    assert program.recipes is not None
    assert program.recipes.constants
    refittable = [engine for engine in program.engines if engine.info.get("refit")]
    assert refittable
    assert all(engine.info["refit"] == "inputs" for engine in refittable)


# Running


class _Executable:
    """Takes other weights in place, or not."""

    device, workspace_bytes = torch.device("cpu"), 0

    def __init__(self, in_place: bool) -> None:
        self.in_place, self.taken = in_place, list[Engine]()

    def new_context(self, workspace: torch.Tensor | None = None) -> Context:
        return lambda inputs: list(inputs)

    def exchange(self, engine: Engine) -> Callable[[], None] | None:
        return (lambda: self.taken.append(engine)) if self.in_place else None


def test_engines_that_may_be_empty_pass_weights_on(engine: Engine) -> None:
    inner = _Executable(in_place=True)
    put = EmptySafe(engine, inner).exchange(engine)
    assert put is not None
    assert not inner.taken
    put()
    assert inner.taken == [engine]
    assert EmptySafe(engine, _Executable(in_place=False)).exchange(engine) is None
