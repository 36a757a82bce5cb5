"""CUDA graphs of whole programs, as far as a CPU shows them: what the program tells, options, callers' captures."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._higher_order_ops.scan import scan

import trtbridge as tb
from trtbridge.bridge import runtime
from trtbridge.bridge.program import EngineStep, Program
from trtbridge.bridge.runtime_steps import capture_problem
from trtbridge.plugins.driver import DriverError


class Pick(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0] > 0] * 2


def _program(module: torch.nn.Module, **options: Any) -> Program:
    return tb.convert(module, (torch.randn(5, 3),), backend="onnxruntime", **options).program


def test_programs_that_can_and_cannot_be_captured() -> None:
    class Plugin(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cummax(x, 0).values + 1

    assert capture_problem(_program(torch.nn.Linear(3, 3))) == ""
    batch = tb.Dim("batch", min=1, max=8)
    assert capture_problem(_program(Plugin(), dynamic_shapes={"x": {0: batch}})) == ""
    assert "depends on data" in capture_problem(_program(Pick()))


def test_an_op_whose_python_code_must_run_each_time() -> None:
    @tb.plugin("cuda_graph_tests::counted", cuda_graphs=False)
    def counted(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    class Counted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.cuda_graph_tests.counted(x) * 2

    class Looped(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def step(total: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return total + torch.ops.cuda_graph_tests.counted(row), row * 1

            return scan(step, torch.zeros(3), x)[0]

    looped = _program(Looped())
    assert [call.op for call in looped.plugin_calls] == ["trtbridge::run_program.default"]
    assert "cuda_graph_tests::counted.default says that no CUDA graph may hold it" in capture_problem(looped)

    program = _program(Counted())
    assert "cuda_graph_tests::counted.default says that no CUDA graph may hold it" in capture_problem(program)
    engine = dataclasses.replace(
        _program(torch.nn.Linear(3, 3)).engines[0], info={"plugins": [{"op": "cuda_graph_tests::counted.default"}]}
    )
    hosted = dataclasses.replace(program, steps=(EngineStep("segment0", engine),))
    assert "no CUDA graph may hold it" in capture_problem(hosted)


def test_on_a_cpu_there_are_none_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = tb.convert(torch.nn.Linear(3, 3), (torch.ones(2, 3),), backend="onnxruntime", cuda_graphs=True)
    for _ in range(3):
        assert module(torch.ones(2, 3)).shape == (2, 3)
    found = module.stats()
    assert (found.calls, found.plain_calls, found.contexts, found.captured_graphs) == (3, 3, 1, 0)
    running = module._running
    assert running is not None
    assert running.graph_refusal == "calls on cpu have none"
    assert "cuda_graphs=True, but calls run without CUDA graphs: calls on cpu have none" in caplog.text
    caplog.clear()
    tb.convert(torch.nn.Linear(3, 3), (torch.ones(2, 3),), backend="onnxruntime", cuda_graphs="auto")
    assert "CUDA graphs" not in caplog.text, "auto leaves the choice open"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cuda_graphs": "always"}, "cuda_graphs='always': must be a bool or \"auto\""),
        ({"max_graphs": 0}, "max_graphs=0: must be an int above 0"),
        ({"max_contexts": True}, "max_contexts=True"),
        ({"reuse_outputs": 1}, "reuse_outputs=1: must be True or False"),
        ({"overlap_kernels": "auto"}, "overlap_kernels='auto': must be True, False or None"),
        ({"overlap_kernels": 1}, "overlap_kernels=1: must be True, False or None"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(tb.OptionError, match=words):
        tb.convert(torch.nn.Linear(3, 3), (torch.ones(2, 3),), backend="onnxruntime", **options)
    with pytest.raises(tb.OptionError, match=words):
        tb.RuntimeOptions(**options)


@pytest.mark.parametrize("overlap", [None, False, True])
def test_kernels_of_a_callers_capture_wait(overlap: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they must not overlap; and where the driver refuses that, there is an error in place of wrong results."""
    assert [tb.RuntimeOptions(overlap_kernels=overlap).overlaps(name) for name in ("tensorrt_rtx", "tensorrt")] == (
        [False, True] if overlap is None else [overlap, overlap]
    )
    module = tb.convert(
        torch.nn.Linear(3, 3), (torch.ones(2, 3),), backend="onnxruntime", overlap_kernels=overlap
    )  # which may overlap, but for False
    x = torch.ones(2, 3)
    expected = module(x)
    running = module._running
    assert running is not None
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(runtime, "capture_of", lambda stream: (10 * stream, 100 * stream))
    monkeypatch.setattr(runtime, "wait_for_ends", asked.append)
    (result,) = running._run_in_capture([x])
    torch.testing.assert_close(result, expected)
    assert asked == ([700] if overlap is False else [])

    def refuse(graph: int) -> int:
        raise DriverError("cuGraphAddDependencies failed with CUresult 1")

    monkeypatch.setattr(runtime, "wait_for_ends", refuse)
    if overlap is False:
        with pytest.raises(tb.ExecutionError, match=r"cuGraphAddDependencies.*overlap_kernels=True leaves"):
            running._run_in_capture([x])
    else:
        running._run_in_capture([x])


def test_load_takes_run_time_options(tmp_path: Any) -> None:
    tb.save(tb.convert(torch.nn.Linear(3, 3), (torch.ones(2, 3),), backend="onnxruntime"), tmp_path / "m.trtb")
    assert tb.load(tmp_path / "m.trtb", max_contexts=1).options.max_contexts == 1
    with pytest.raises(tb.OptionError, match=r"no run-time option 'cuda_graph'\. Did you mean 'cuda_graphs'"):
        tb.load(tmp_path / "m.trtb", cuda_graph=True)
