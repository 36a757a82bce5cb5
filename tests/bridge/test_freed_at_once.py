"""What is dropped is freed at once: nothing of ours waits for Python's garbage collector, which these tests disable.

torch.export leaves cycles of its own behind, which hold the module that was converted, and not what came of it.
"""

from __future__ import annotations

import copy
import gc
import weakref
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from freed import (
    BATCH,
    CPU,
    Decides,
    Holder,
    Net,
    Pairs,
    alive,
    caller_of,
    convert,
    no_collector,  # noqa: F401  (a fixture)
    parts,
)

import trtbridge as tb
from trtbridge.bridge import planner
from trtbridge.bridge.backends.plugin_nodes import require_ops
from trtbridge.bridge.dynamo import trtbridge_backend
from trtbridge.bridge.lanes import Lane
from trtbridge.bridge.model import OnnxModel
from trtbridge.bridge.runtime import RunningProgram

pytestmark = pytest.mark.usefixtures("no_collector")


def test_converted_and_called() -> None:
    module = convert()
    found = parts(module)
    module(torch.ones(2, 4))
    assert len(alive(found)) == len(found)
    del module
    assert alive(found) == []


class Counts(torch.nn.Module):
    """A plugin that is given a size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.trtbridge_freed.repeated(x + 1, 2 * x.shape[0] + 1)


@pytest.mark.parametrize("network", [Net, Counts])
def test_calls_leave_nothing_behind(network: type[torch.nn.Module]) -> None:
    module = tb.convert(network().eval(), (torch.ones(2, 4),), dynamic_shapes={"x": {0: BATCH}}, backend="onnxruntime")
    assert module.program.plugin_calls
    module(torch.ones(2, 4))
    gc.collect()
    before = tensors()
    for batch in (1, 2, 2, 4):
        module(torch.ones(batch, 4))
    assert tensors() == before, "they would be kept until the collector comes by"


def tensors() -> int:
    """How many there are."""
    return sum(type(one) is torch.Tensor for one in gc.get_objects())


def test_loaded_and_copied(tmp_path: Path) -> None:
    tb.save(convert(), tmp_path / "m.trtb")
    module = tb.load(tmp_path / "m.trtb")
    copied = copy.deepcopy(module)
    found, others = parts(module), parts(copied)
    del module
    assert alive(found) == ["Program"], "engines are shared"
    copied(torch.ones(2, 4))
    del copied
    assert alive([*found, *others]) == []


def test_a_bound_call_keeps_what_it_runs() -> None:
    module = convert()
    x = torch.ones(2, 4)
    expected = module(x)
    found = parts(module)
    call = module.bind(x)
    call()
    del module
    assert len(alive(found)) == len(found)
    torch.testing.assert_close(call(), expected)
    del call
    assert alive(found) == []


def test_what_a_refit_replaces() -> None:
    module = convert(refittable=True)
    old = [ref for ref in parts(module) if ref() is not module]
    module(torch.ones(2, 4))
    module.refit(Net())
    assert alive(old) == []
    module(torch.ones(2, 4))
    found = parts(module)
    with pytest.raises(tb.RefitError):
        module.refit({"first.weight": torch.ones(1)})
    del module
    assert alive(found) == []


@pytest.mark.parametrize(
    "x",
    [torch.ones(3, 4), torch.ones(9, 4), torch.ones(2, 4, dtype=torch.int64)],
    ids=["plugin fails", "out of range", "dtype"],
)
def test_after_a_call_that_failed(x: torch.Tensor) -> None:
    module = convert()
    found = parts(module)
    with pytest.raises(tb.TrtBridgeError) as caught:
        module(x)
    del caught, module
    assert alive(found) == []


def test_with_an_original() -> None:
    eager = Net().eval()
    module = tb.EngineModule(convert().program, CPU, eager=eager)
    module(torch.ones(9, 4))
    found = [*parts(module), weakref.ref(eager)]
    del module
    assert alive(found) == ["Net"]
    del eager
    assert alive(found) == []


def test_what_a_failed_load_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory for contexts, and an op that nobody registered."""
    module = convert()
    program = module.program
    found: list[Callable[[], Any]] = []

    class Fails(Lane):
        def __init__(self, executables: Sequence[Any], *others: Any) -> None:
            found.extend(weakref.ref(executable) for executable in executables if executable is not None)
            raise tb.ExecutionError("no memory")

    monkeypatch.setattr("trtbridge.bridge.lanes.Lane", Fails)
    with pytest.raises(tb.ExecutionError, match="no memory"):
        RunningProgram(program, CPU, None)
    assert found
    assert alive(found) == []


def test_errors_keep_no_frames(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.trtb"
    tb.save(convert(), damaged)
    with zipfile.ZipFile(damaged, "a") as archive:
        archive.comment = b"sha256:" + bytes(64)
    assert caller_of(lambda: tb.load(damaged), tb.ModelFileError)() is None
    assert caller_of(lambda: require_ops([{"op": "nobody::knows"}]), tb.PluginError)() is None
    complain = trtbridge_backend(cast(Any, None), [], options={"nothing": 1})
    assert caller_of(lambda: complain(), tb.OptionError)() is None
    assert caller_of(lambda: complain(), tb.OptionError)() is None, "the second time"


def test_a_function_that_cannot_be_traced_keeps_no_frames() -> None:
    assert caller_of(lambda: tb.convert(Decides(), (torch.ones(2),), backend="onnxruntime"), tb.ExportError)() is None


def test_a_conversion_lets_go_of_its_models(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Callable[[], Any]] = []
    export = planner.Planner._export

    def noted(self: planner.Planner, source: Any) -> OnnxModel:
        model = export(self, source)
        found.extend(map(weakref.ref, (self, source, source.program, model)))
        return model

    monkeypatch.setattr(planner.Planner, "_export", noted)
    for options in ({}, {"refittable": True}, {"check_export": False}):
        module = convert(**options)
        assert alive(found) == []
        del module
    assert len(found) >= 12


def test_a_conversion_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Callable[[], Any]] = []

    def fails(self: planner.Planner) -> Any:
        self.plan()
        found.extend(map(weakref.ref, (self, self.source, *self.models.values())))
        raise tb.BuildError("no")

    monkeypatch.setattr(planner.Planner, "build", fails)
    with pytest.raises(tb.BuildError) as caught:
        convert()
    del caught
    assert found
    assert alive(found) == []


def test_a_function_that_becomes_one_call_keeps_no_frames() -> None:
    """The error of the first trace, which failed, is needed during the second one."""

    def caller() -> Callable[[], Any]:
        holder = Holder()
        tb.convert(Pairs(), (torch.randn(5),), backend="onnxruntime")
        return weakref.ref(holder)

    caller()  # modules of torch are imported
    gc.collect()
    assert caller()() is None
