"""Several optimization profiles in TensorRT's hands: built for real, chosen by a stand-in for its execution context."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.backends import get_backend, trt_build
from trtbridge.bridge.backends.flavour import FLAVOURS, JitCache
from trtbridge.bridge.backends.trt_profiles import select_profile
from trtbridge.bridge.model import TensorSpec
from trtbridge.bridge.profiles import EngineProfiles

BATCH = tb.Dim("batch", profiles=[(1, 1, 1), (8, 16, 32)])
SEQ = tb.Dim("seq", profiles=[(2, 4, 8), (10, 12, 20)])


class Model(torch.nn.Module):
    """Two dims, a derived one, a plugin, and a result with a computed size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, _ = torch.cummax(self.linear(x).relu(), 1)
        return torch.cat([values, y], 0).softmax(-1), y[1:].tanh()


class Rows(torch.nn.Module):
    """A size that depends on data between two segments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x.sum(1) > 0].relu() @ torch.ones(6, 2)


@pytest.mark.rtx
def test_engines_with_several_profiles_are_built() -> None:
    """TensorRT-RTX 1.6 has the plugin between two engines, 1.7 inside one."""
    pytest.importorskip("tensorrt_rtx")
    model, args = Model().eval(), (torch.randn(1, 3, 8), torch.randn(3, 3, 8))
    shapes = {"x": {0: BATCH, 1: SEQ}, "y": {0: 2 * BATCH + 1, 1: SEQ}}
    built = tb.convert(model, args, dynamic_shapes=shapes, backend="tensorrt_rtx", check_export=False)
    engines = built.program.engines
    assert len(engines) + len(built.program.plugin_calls) in (1, 3)
    assert [len(engine.info["profiles"]) for engine in engines] == [2] * len(engines)
    assert [profile["y"][0] for profile in engines[-1].info["profiles"]] == [[3, 3, 3], [17, 33, 65]]
    assert str(built.inspect()).count("2 profiles") == len(engines)


@pytest.mark.rtx
def test_profiles_beside_sizes_that_depend_on_data_are_built() -> None:
    pytest.importorskip("tensorrt_rtx")
    fixed_in_each = tb.Dim("batch", profiles=[(1, 1, 1), (8, 8, 8)])
    built = tb.convert(
        Rows(), (torch.randn(8, 6),), dynamic_shapes={"x": {0: fixed_in_each}}, max_data_size=8, backend="tensorrt_rtx"
    )
    assert built.program.engines[0].info["profiles"] == [{"x": [[1, 1, 1], [6, 6, 6]]}, {"x": [[8, 8, 8], [6, 6, 6]]}]
    for engine in built.program.engines[1:]:
        assert len(engine.info["profiles"]) == 1, "what follows depends on data alone"


@pytest.mark.rtx
def test_the_builder_gets_every_profile_and_static_inputs_stay_static() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x, y = network.add_input("x", trt.float32, (-1, 3)), network.add_input("y", trt.float32, (1, 3))
    network.mark_output(network.add_elementwise(x, y, trt.ElementWiseOperation.SUM).get_output(0))
    config = builder.create_builder_config()
    profiles: Any = [{"x": [[n, n, n], [3, 3, 3]], "y": [[1, 1, 1], [3, 3, 3]]} for n in (1, 8, 4)]
    assert trt_build._add_profiles(builder, network, config, profiles) == ""
    assert config.num_optimization_profiles == 3
    fresh = builder.create_builder_config()
    assert trt_build._add_profiles(builder, network, fresh, profiles[:1]) == ""
    assert fresh.num_optimization_profiles == 0, "nothing varies"


def _profiles() -> EngineProfiles:
    ranges = [{"b": (1, 1, 1)}, {"b": (2, 4, 8)}, {"b": (6, 16, 32)}]
    return EngineProfiles.of([TensorSpec.make("x", ir.DataType.FLOAT, ("b", 3), {"b": (1, 16, 32)}, ranges)])


def test_a_job_for_the_builder_is_json() -> None:
    job = trt_build.Job("tensorrt_rtx", True, [], _profiles().to_json(), False, None, None, [], False)
    read = trt_build.Job(**json.loads(json.dumps(vars(job))))
    assert read.profiles == [{"x": [[*r], [3, 3, 3]]} for r in ((1, 1, 1), (2, 4, 8), (6, 16, 32))]


class _Context:
    """What is used of an execution context."""

    def __init__(self, works: bool = True) -> None:
        self.active_optimization_profile = 0
        self.calls: list[tuple[int, int]] = []
        self._works = works

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.calls.append((index, stream))
        if self._works:
            self.active_optimization_profile = index
        return self._works


STREAM: Any = SimpleNamespace(cuda_stream=7)


def test_a_context_is_switched_when_the_profile_changes_and_only_then() -> None:
    context: Any = _Context()
    sizes = (1, 2, 3, 32, 6, 10, 1)
    switched = [select_profile(context, _profiles(), [(size, 3)], STREAM) for size in sizes]
    assert switched == [False, True, False, True, True, True, True]
    assert context.calls == [(1, 7), (2, 7), (1, 7), (2, 7), (0, 7)]


def test_shapes_that_no_profile_takes_are_named() -> None:
    context: Any = _Context()
    words = r"\[\(33, 3\)\]; it takes profile 0: x \(1, 3\); profile 1: x \(2 to 8 \(tuned for 4\), 3\)"
    with pytest.raises(tb.ExecutionError, match=words):
        select_profile(context, _profiles(), [(33, 3)], STREAM)
    assert context.calls == []
    with pytest.raises(tb.ExecutionError, match="refused to switch to profile 1 of 3"):
        select_profile(_Context(works=False), _profiles(), [(2, 3)], STREAM)  # type: ignore[arg-type]


def test_a_capture_is_no_time_for_a_switch() -> None:
    context: Any = _Context()
    assert select_profile(context, _profiles(), [(1, 3)], STREAM, capturing=True) is False
    with pytest.raises(tb.ExecutionError, match=r"need profile 1 and the context has profile 0.*call the module once"):
        select_profile(context, _profiles(), [(2, 3)], STREAM, capturing=True)
    assert context.calls == []


def test_an_engine_with_one_profile_needs_no_switch() -> None:
    single = EngineProfiles.of([TensorSpec.make("x", ir.DataType.FLOAT, ("b",), {"b": (1, 2, 4)})])
    context: Any = object()  # nothing of it is touched, not even for shapes that TensorRT itself will refuse
    assert select_profile(context, single, [(9,)], STREAM) is False


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_kernel_specialization_is_for_tensorrt_rtx(backend: str) -> None:
    with pytest.raises(tb.OptionError, match="kernel_specialization is for TensorRT"):
        get_backend(backend).check_runtime(tb.RuntimeOptions(kernel_specialization="eager"))
    get_backend("tensorrt_rtx").check_runtime(tb.RuntimeOptions(kernel_specialization="eager"))


def test_an_unknown_kernel_specialization_is_refused() -> None:
    with pytest.raises(tb.OptionError, match=r"kernel_specialization='fast'.*'lazy', 'eager', 'none'"):
        tb.convert(Rows(), (torch.randn(8, 6),), backend="tensorrt_rtx", kernel_specialization="fast")
    assert tb.Options.make({"kernel_specialization": "lazy"}).runtime.kernel_specialization == "lazy"


@pytest.mark.rtx
@pytest.mark.parametrize("strategy", [None, "lazy", "eager", "none"])
def test_the_runtime_config_gets_the_strategy(strategy: str | None) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    config = SimpleNamespace(create_runtime_cache=SimpleNamespace, set_runtime_cache=lambda cache: None)
    engine: Any = SimpleNamespace(create_runtime_config=lambda: config)
    JitCache(FLAVOURS["tensorrt_rtx"], engine, None, strategy)
    found = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
    known = trt.DynamicShapesKernelSpecializationStrategy.__members__
    assert found == (None if strategy is None else known[strategy.upper()])
