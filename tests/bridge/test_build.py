"""Several segments at a time: the same program, the first error, no more than may be, interrupted where told to."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge import build
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions
from trtbridge.bridge.backends.shape_values import shaped_by_values
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.options import Options


class Three(torch.nn.Module):
    """Three segments between two plugins."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.hypot(torch.relu(x), x)
        return torch.exp(torch.hypot(torch.sigmoid(x), x))


def test_results_come_in_order_and_no_more_than_allowed_at_once() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work(index: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 * (6 - index))
        with lock:
            running -= 1
        return index

    assert build._for_each(work, 6, 3) == list(range(6))
    assert most == 3


def test_the_error_is_that_of_the_lowest_number_whichever_comes_first() -> None:
    started = []

    def work(index: int) -> int:
        started.append(index)
        time.sleep(0.2 if index == 1 else 0.01)
        if index in (1, 2):
            raise ValueError(index)
        return index

    with pytest.raises(ValueError, match="1"):
        build._for_each(work, 40, 3)
    assert len(started) < 40, "after an error nothing more is started"


def test_an_interrupted_build_stops_the_others() -> None:
    stopped = threading.Event()

    def work(index: int) -> bool:
        if index == 0:
            raise KeyboardInterrupt
        return stopped.wait(30)

    with pytest.raises(KeyboardInterrupt):
        build._for_each(work, 2, 2, stopped.set)
    assert stopped.is_set()


def test_progress_is_that_of_all_and_ends_what_is_stopped() -> None:
    seen: list[tuple[str, float]] = []
    shares = build._Shares(lambda phase, fraction: seen.append((phase, fraction)), 2)
    first, second = shares.of(0), shares.of(1)
    first("Parsing", 0.5)
    second("Parsing", 1.0)
    first("Parsing", 0.25)  # a new phase of the same engine begins: the whole does not go back
    assert seen == [("build: Parsing", 0.25), ("build: Parsing", 0.75), ("build: Parsing", 0.75)]
    shares.stop()
    with pytest.raises(tb.BuildError, match="interrupted"):
        second("Parsing", 1.0)


@pytest.mark.rtx
def test_a_program_built_at_once_is_the_one_built_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt_rtx")
    options = Options.make({"plugin_host": "segments"})
    planner = make_planner(Three(), (torch.randn(4, 8),), None, None, backend, options)
    plan, refusals = planner.settled_plan()
    assert list(refusals) == ["segment0", "segment1", "segment2"]
    assert not any(refusals.values())
    assert backend.builds_apart(BuildOptions(), parse_only=False)
    assert not backend.builds_apart(BuildOptions(isolate=False), parse_only=True)
    assert not get_backend("tensorrt").builds_apart(BuildOptions(), parse_only=False), "it times kernels on the GPU"
    programs = []
    for count in (1, 3):
        monkeypatch.setattr(build, "_at_once", lambda segments, count=count: count)
        programs.append(build.build_plan(plan, backend, BuildOptions()))
    for one, other in zip(programs[0].steps, programs[1].steps, strict=True):
        assert one.name == other.name
    for one, other in zip(programs[0].engines, programs[1].engines, strict=True):
        assert (one.inputs, one.outputs) == (other.inputs, other.outputs)
        assert one.info["layers"] == other.info["layers"]


def test_memory_bounds_how_many_are_built_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = make_planner(
        torch.nn.Linear(512, 512), (torch.randn(1, 512),), None, None, get_backend("onnxruntime"), Options.make({})
    )
    segments = planner.plan().segments
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(build, "_free_bytes", lambda: 1 << 40)
    assert build._at_once(segments) == build._MOST_AT_ONCE
    monkeypatch.setattr(build, "_free_bytes", lambda: (3 << 30) + (64 << 20))
    assert build._at_once(segments) == 3
    monkeypatch.setattr(build, "_free_bytes", lambda: 0)
    assert build._at_once(segments) == 1
    monkeypatch.undo()
    assert build._free_bytes() > 0


class SharedMask(torch.nn.Module):
    """Two layers that choose with the same mask: one NonZero in the graph."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x.index_put((mask,), torch.relu(x[mask]) + 1)
        return x


class UnlikeCalls(torch.nn.Module):
    """Calls of several kinds that choose with the same mask, and one that reads what was chosen."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        chosen = x[mask] + (x > 0)[mask] + x.sum(1)[mask][:, None]
        y = torch.relu(x)
        y[mask] = chosen
        return y * mask[:, None]


@pytest.mark.rtx
@pytest.mark.parametrize(("model", "plugins"), [(SharedMask(), 6), (UnlikeCalls(), 4)])
def test_calls_that_share_a_refused_node_are_plugins_in_one_round(model: torch.nn.Module, plugins: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    args = (torch.randn(6, 4), torch.tensor([True, False, True, True, False, True]))
    planner = make_planner(
        model,
        args,
        None,
        None,
        get_backend("tensorrt_rtx"),
        Options.make({"max_data_size": 6, "plugin_host": "segments"}),
    )
    exports = []
    export = type(planner.source).to_onnx

    class Counted(type(planner.source)):  # type: ignore[misc]
        def to_onnx(self, plugins):  # type: ignore[no-untyped-def]
            exports.append(sorted(plugins))
            return export(self, plugins)

    object.__setattr__(planner.source, "__class__", Counted)
    plan, refusals = planner.settled_plan()
    assert not any(refusals.values())
    assert len(plan.plugin_calls) == plugins
    assert len(exports) == 2, "one export to ask, one with all that was refused"


class TwoScatters(torch.nn.Module):
    """One that the parser refuses, one that it takes, and a weight that is not written into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.linear(x)
        y[:, 1] = x[:, 0]
        return y, torch.zeros(2, 4, dtype=torch.int32).scatter_add_(-1, places, torch.ones_like(places).int())


@pytest.mark.rtx
def test_a_node_that_the_parser_takes_is_not_blamed_for_another_of_its_op() -> None:
    """The parser names no node for a reduction that it lacks, so each ScatterElements is asked about alone."""
    pytest.importorskip("tensorrt_rtx")
    args = (torch.randn(2, 4, 64), torch.randint(0, 4, (2, 4)))
    planner = make_planner(TwoScatters(), args, None, None, get_backend("tensorrt_rtx"), Options.make({}))
    plan, refusals = planner.settled_plan()
    assert not any(refusals.values())
    assert plan.plugin_calls == ()
    assert {site.call for site in planner.rewrites.sites} == {"scatter_add_"}


class CutByValue(torch.nn.Module):
    """Sizes that are values of an input, as those of images that are given with their shapes."""

    def forward(self, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        first, second = sizes.tolist()
        torch._check(first > 0)
        torch._check(first <= 8)
        torch._check(second > 0)
        torch._check(second <= 8)
        return torch.relu(x)[:first].sum(0) + torch.relu(x + 1)[:second].sum(0)


@pytest.mark.rtx
def test_sizes_that_are_values_are_found_in_one_round() -> None:
    pytest.importorskip("tensorrt_rtx")
    args = (torch.randn(8, 4), torch.tensor([3, 5]))
    options = Options.make({"max_data_size": 8, "plugin_host": "segments"})
    planner = make_planner(CutByValue(), args, None, None, get_backend("tensorrt_rtx"), options)
    program = planner.build()
    assert [call.op for call in program.plugin_calls] == ["aten::slice.Tensor"] * 2
    assert set(planner.calls) == {call.origin.call for call in program.plugin_calls}
    fast = tb.convert(CutByValue(), args, backend="onnxruntime")
    torch.testing.assert_close(fast(*args), CutByValue()(*args))


def test_what_is_computed_from_sizes_is_no_value() -> None:
    import onnx.parser

    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[n] x, int64[1] k) => (float[m] y, float[p] z, float[q] w) {
            s = Shape(x)  r = Reshape(x, s)  y = Expand(r, s)
            twice = Add(k, k)  z = Expand(x, twice)
            size = Shape(z)  w = Expand(x, size) }"""
    )
    found = shaped_by_values(model.graph, ["x", "k"])
    assert [list(node.output) for node in found] == [["z"]]
