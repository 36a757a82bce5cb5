"""An EngineModule inside torch.compile and torch.export: one op, no graph break, the same numbers."""

from __future__ import annotations

import copy
import dataclasses
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import trtbridge as tb
from trtbridge.bridge.torch_op import OP, find_module

ENGINE_OP = torch.ops.trtbridge.run_engine.default


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    rest: Any
    nothing: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    y: torch.Tensor
    size: int = dataclasses.field(init=False, default=3)


class Pair(NamedTuple):
    first: torch.Tensor
    second: Any


class Structured(nn.Module):
    """Everything that arguments and results may be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, batch: dict[str, Any], flag: bool = True, none: Any = None) -> Result:
        y = self.linear(x) + batch["more"]
        pair = Pair(y.sum(dim=0), [Frozen(y * 2), None, (y.abs(), "text", 3)])
        output = BaseModelOutputWithPooling(last_hidden_state=y.flatten())
        return Result(y, {"pair": pair, "same": y, "output": output})


class Around(nn.Module):
    """A model that holds an engine among layers of its own."""

    def __init__(self, engine: nn.Module) -> None:
        super().__init__()
        self.engine = engine
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, Any]:
        result = self.engine(x * 2, {"more": more}, flag=True, none=None)
        return self.head(result.y), result


class Tensors(Around):
    """The same without classes that torch.export does not know."""

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, Any]:
        logits, result = super().forward(x, more)
        return logits, {"y": result.y, "pair": result.rest["pair"].first}


BATCH = tb.Dim("batch", min=1, opt=3, max=16)


@pytest.fixture(scope="module")
def structured() -> tuple[nn.Module, tb.EngineModule]:
    model = Structured().eval()
    shapes = {"x": {0: BATCH}, "batch": {"more": {0: BATCH}}}
    args = (torch.randn(3, 8), {"more": torch.randn(3, 8)})
    return model, tb.convert(model, args, {"flag": True, "none": None}, dynamic_shapes=shapes, backend="onnxruntime")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 8), torch.randn(rows, 8)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(
    structured: tuple[nn.Module, tb.EngineModule], backend: str, assert_same: Callable[..., None]
) -> None:
    model, engine = structured
    around, original = Around(engine), Around(model)
    original.head = around.head
    compiled = torch.compile(around, backend=backend, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 5, 7, 2):
            args = inputs(rows)
            result = compiled(*args)
            assert_same(result, original(*args))
            assert type(result[1].rest["pair"].second[0]) is Frozen
        assert graphs() == 2  # one size, then any size


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")
def test_compiled_with_inductor(
    structured: tuple[nn.Module, tb.EngineModule], assert_same: Callable[..., None]
) -> None:
    around = Around(structured[1])
    args = inputs(4)
    with torch.inference_mode():
        assert_same(torch.compile(around, fullgraph=True)(*args), around(*args))


def test_gradients_stop_at_the_engine(structured: tuple[nn.Module, tb.EngineModule]) -> None:
    around = Around(structured[1])
    x, more = inputs(3)
    eager = around(x.requires_grad_(), more)
    logits, result = torch.compile(around, backend="aot_eager", fullgraph=True)(x, more)
    assert logits.requires_grad
    assert eager[0].requires_grad
    assert not result.y.requires_grad
    assert not eager[1].y.requires_grad
    logits.sum().backward()
    assert x.grad is None
    assert around.head.weight.grad is not None


def test_bad_inputs_are_named_as_in_eager(structured: tuple[nn.Module, tb.EngineModule]) -> None:
    compiled = torch.compile(Around(structured[1]), backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(tb.InputError, match=r"batch from 1 to 16, got 17 in shape \(17, 8\)"):
        compiled(*inputs(17))
    other = torch.compile(structured[1], backend="eager", fullgraph=True)
    x, more = inputs(3)
    with torch.no_grad(), pytest.raises(Exception, match="fixed at True by convert"):
        other(x, {"more": more}, flag=False, none=None)
    with torch.no_grad(), pytest.raises(Exception, match=r"Input x: expected \(batch, 8\) float .* float64"):
        other(x.double(), {"more": more}, flag=True, none=None)


class Chosen(nn.Module):
    """A result whose size depends on data, and complex numbers."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kept = x[x > 0]
        return kept, kept * 2, z * 2


@pytest.fixture(scope="module")
def chosen() -> tb.EngineModule:
    args = (torch.randn(3, 8), torch.randn(2, 4, dtype=torch.complex64))
    return tb.convert(Chosen(), args, backend="onnxruntime")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sizes_that_depend_on_data(chosen: tb.EngineModule, backend: str, assert_same: Callable[..., None]) -> None:
    def call(x: torch.Tensor, z: torch.Tensor) -> Any:
        first, second, third = chosen(x, z)
        return first + second, torch.zeros(first.shape[0] + 1), third + 1

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for _ in range(3):
        args = (torch.randn(3, 8), torch.randn(2, 4, dtype=torch.complex64))
        with torch.no_grad():
            assert_same(compiled(*args), call(*args))
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its decompositions
def test_exports_with_its_bounds(
    structured: tuple[nn.Module, tb.EngineModule], assert_same: Callable[..., None]
) -> None:
    around = Tensors(structured[1]).eval()
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(around, inputs(3), dynamic_shapes=({0: batch}, {0: batch}))
    calls = [node for node in program.graph.nodes if node.target is ENGINE_OP]
    assert len(calls) == 1
    for exported in (program, program.run_decompositions()):
        for rows in (1, 7):
            args = inputs(rows)
            assert_same(exported.module()(*args), around(*args))
    wider = torch.export.Dim("batch", min=1, max=64)
    with pytest.raises(Exception, match="16"):
        torch.export.export(around, inputs(3), dynamic_shapes=({0: wider}, {0: wider}))


def test_exports_data_dependent_sizes(chosen: tb.EngineModule, assert_same: Callable[..., None]) -> None:
    args = (torch.randn(3, 8), torch.randn(2, 4, dtype=torch.complex64))
    program = torch.export.export(chosen, args)
    assert [int(r.lower) for r in program.range_constraints.values()] == [0]
    assert [int(r.upper) for r in program.range_constraints.values()] == [24]
    assert_same(list(program.module()(*args)), list(chosen(*args)))


def test_an_exported_program_in_another_process(tmp_path: Path, structured: tuple[nn.Module, tb.EngineModule]) -> None:
    class Plain(nn.Module):
        def __init__(self, engine: nn.Module) -> None:
            super().__init__()
            self.engine = engine

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.engine(x) + 1

    around = Plain(tb.convert(nn.Linear(4, 2), (torch.ones(1, 4),), backend="onnxruntime"))
    program = torch.export.export(around, (torch.ones(1, 4),))
    tb.save(around.engine, tmp_path / "engine.trtb")
    torch.export.save(program, tmp_path / "around.pt2")
    torch.save(around(torch.ones(1, 4)), tmp_path / "expected.pt")
    code = """
import torch, trtbridge as tb
tb.load("engine.trtb")  # not kept
program = torch.export.load("around.pt2")
try:
    program.module()(torch.ones(1, 4))
except tb.BackendError as error:
    print(error)
engine = tb.load("engine.trtb")
torch.testing.assert_close(program.module()(torch.ones(1, 4)), torch.load("expected.pt"))
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "tb.load(path)" in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("same\n"), done.stdout + done.stderr


def test_handles_are_weak_and_own(tmp_path: Path) -> None:
    engine = tb.convert(nn.Linear(4, 2), (torch.ones(1, 4),), backend="onnxruntime")
    x = torch.randn(1, 4)
    expected = engine(x)
    handle = engine._handle
    tb.save(engine, tmp_path / "m.trtb")
    copied, loaded = copy.deepcopy(engine), tb.load(tmp_path / "m.trtb")
    assert len({handle, copied._handle, loaded._handle}) == 3
    (found,) = ENGINE_OP([x], copied._handle)
    torch.testing.assert_close(found, expected)
    tb.save(copied, tmp_path / "copied.trtb")
    alive = weakref.ref(engine)
    program = torch.export.export(engine, (x,))
    compiled = torch.compile(engine, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    del engine, compiled
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    with pytest.raises(tb.BackendError, match="No living EngineModule"):
        program.module()(x)
    again = tb.load(tmp_path / "m.trtb")
    assert find_module(handle) is again
    torch.testing.assert_close(program.module()(x), expected)


def test_opcheck(structured: tuple[nn.Module, tb.EngineModule]) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ENGINE_OP, (list(inputs(3)), structured[1]._handle), test_utils=tests)


def test_the_op_is_not_offered_as_a_plugin() -> None:
    assert OP not in [op.name for op in tb.plugins.list_ops()]


def test_autocast_does_not_reach_into_an_engine(structured: tuple[nn.Module, tb.EngineModule]) -> None:
    _, engine = structured
    x, more = inputs(3)
    compiled = torch.compile(engine, backend="eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside, traced = (
            engine(x, {"more": more}, flag=True, none=None),
            compiled(x, {"more": more}, flag=True, none=None),
        )
    outside = engine(x, {"more": more}, flag=True, none=None)
    torch.testing.assert_close(inside.y, outside.y, rtol=0, atol=0)
    torch.testing.assert_close(traced.y, outside.y, rtol=0, atol=0)


# Threads


def test_calls_go_on_while_another_thread_traces() -> None:
    """torch tells all threads that something is being compiled, and replaces Module.__call__; engines are not moved."""
    engine = tb.convert(torch.nn.Linear(4, 2), (torch.ones(3, 4),), backend="onnxruntime")
    x = torch.randn(3, 4)
    expected = engine(x)
    tracing, called = threading.Event(), threading.Event()

    class Slow(torch.nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            tracing.set()
            assert called.wait(60)
            return y * 2

    with ThreadPoolExecutor(1) as threads:
        traced = threads.submit(torch.export.export, Slow(), (torch.ones(2),), strict=False)
        assert tracing.wait(60)
        try:
            assert torch.compiler.is_compiling(), "else this test tests nothing"
            result = engine(x)
        finally:
            called.set()
        program = traced.result()
    assert torch.equal(result, expected)
    assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 2.0))


def test_conversions_in_threads_wait_for_one_another() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU()) for width in (2, 3, 5, 7)]
    x = torch.randn(3, 4)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda model: tb.convert(model, (x,), backend="onnxruntime"), models))
    for model, fast in zip(models, made, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
