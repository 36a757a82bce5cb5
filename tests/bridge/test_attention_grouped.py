"""Attention with shared heads on a backend that takes it as one node only where keys and values are repeated."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.attention import AttentionReport
from trtbridge.bridge.attention_judge import DECOMPOSED, FUSED, REPEATED, Judge, Verdict, read_verdicts
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions, Engine, Progress, Refusal, Segment
from trtbridge.bridge.backends.onnxruntime import OnnxRuntimeBackend
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.module import EngineModule
from trtbridge.bridge.options import Options
from trtbridge.bridge.planner import Planner
from trtbridge.errors import BuildError

sys.path.insert(0, str(Path(__file__).parent))

from attention_forms import FORMS, Form

GROUPED = ("sdpa grouped", "repeat_kv")
WORDS = "attention operation was not supported by a dedicated kernel"


class _Choosy:
    """Builds as another backend does, but no node whose heads are shared: as TensorRT-RTX 1.6.1 does on an H200.

    Attributes:
        takes_none: it refuses nodes with repeated keys and values, too.
        may_recover: what fails now may be built next time.
        built: names of the segments that were built.
    """

    takes_none = may_recover = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.built: list[str] = []

    def build(self, segment: Segment, options: BuildOptions, progress: Progress | None = None) -> Engine:
        graph = segment.proto.graph
        shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.input)}
        nodes = [node for node in graph.node if node.op_type == "Attention"]
        if not self.takes_none:
            nodes = [node for node in nodes if len({shapes[name][1].dim_value for name in node.input[:3]}) > 1]
        if nodes:
            refused = [Refusal(node.name, node.op_type, tuple(node.output), WORDS) for node in nodes]
            raise BuildError(f"{segment.name}: {WORDS}", refused, graph_at_fault=not self.may_recover)
        self.built.append(segment.name)
        return super().build(segment, options, progress)  # type: ignore[misc]


class Choosy(_Choosy, OnnxRuntimeBackend):
    """One whose engines run here."""


def _choosy(takes_none: bool = False) -> Choosy:
    backend = Choosy()
    backend.takes_none = takes_none
    return backend


def _shapes() -> Any:
    return {"x": {0: tb.Dim("batch", min=1, opt=2, max=4), 1: tb.Dim("length", min=2, opt=10, max=32)}}


def _planner(form: Form, backend: Any, half: bool = False, shapes: Any = None, **options: Any) -> Planner:
    torch.manual_seed(0)
    module, args = form.module(), form.example()
    if half:
        module, args = module.half(), tuple(t.half() for t in args)
    return make_planner(module, args, None, shapes, backend, Options.make({"attention": "fused", **options}))


def _ops(planner: Planner) -> Counter[str]:
    return Counter(node.op_type for segment in planner.plan().segments for node in segment.proto.graph.node)


def _assert_right(planner: Planner, form: Form, dynamic: bool, tolerance: float = 1e-5) -> None:
    """The program computes what the module does."""
    program = planner.build()
    assert not program.plugin_calls
    torch.manual_seed(0)
    module = form.module()
    fast = EngineModule(program, torch.device("cpu"), None)
    with torch.no_grad():
        for args in [form.example(), *([form.example(3, 7), form.example(1, 2)] if dynamic else [])]:
            torch.testing.assert_close(fast(*args), module(*args), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize(("dynamic", "precision"), [(True, None), (False, None), (True, "fp16")])
def test_keys_and_values_are_repeated_where_shared_heads_are_refused(name, dynamic, precision):
    form, backend = FORMS[name], _choosy()
    planner = _planner(form, backend, shapes=_shapes() if dynamic else None, precision=precision)
    _assert_right(planner, form, dynamic, 3e-3 if precision else 1e-5)
    ops = _ops(planner)
    assert (ops["Attention"], ops["Softmax"], ops["Expand"]) == (1, 0, 2)
    report = planner.attention_report
    (group,) = report.groups
    assert (group.form, group.count) == (REPEATED, 1)
    assert f"does not take it with shared heads: {WORDS}" in group.reason
    assert (report.fused, report.repeated, report.decomposed, report.missed) == (1, 1, 0, {})
    assert "1 blocks as one node (1 with keys and values repeated), 0 in parts" in report.summary
    assert "1 fused, keys and values repeated: float" in str(report)
    assert AttentionReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert len(backend.built) == 2, "the block, and the model"
    assert "RepeatHeads" in [done.name for done in planner.passes]
    # No weight is another: what is repeated is what they make.
    written = _planner(form, get_backend("onnxruntime"), attention=None, precision=precision)
    sizes = [sum(w.nbytes for s in p.plan().segments for w in s.weights.values()) for p in (planner, written)]
    assert sizes[0] == sizes[1]


def test_shared_heads_stay_shared_where_they_are_taken():
    planner = _planner(FORMS["repeat_kv"], get_backend("onnxruntime"))
    assert (_ops(planner)["Attention"], _ops(planner)["Expand"]) == (1, 0)
    assert planner.attention_report.groups[0].form == FUSED
    assert "repeated" not in planner.attention_report.summary


@pytest.mark.parametrize("name", GROUPED)
def test_what_is_refused_in_both_forms_stays_in_parts(name):
    form, backend = FORMS[name], _choosy(takes_none=True)
    planner = _planner(form, backend, shapes=_shapes())
    _assert_right(planner, form, True)
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == (0, 1)
    (group,) = planner.attention_report.groups
    assert group.form == DECOMPOSED
    assert group.reason.count(WORDS) == 2
    assert "does not take the node" in group.reason
    assert "nor with keys and values repeated" in group.reason


@pytest.mark.parametrize("takes_none", [False, True])
def test_nodes_that_the_export_wrote_have_their_keys_and_values_repeated(takes_none):
    form, backend = FORMS["sdpa grouped"], _choosy(takes_none)
    planner = _planner(form, backend, shapes=_shapes(), opset=23)
    _assert_right(planner, form, True)
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == ((0, 1) if takes_none else (1, 0))
    if not takes_none:
        assert [group.form for group in planner.attention_report.groups] == [REPEATED]


@pytest.mark.parametrize("takes_none", [False, True])
@pytest.mark.parametrize("opset", [20, 23])
def test_what_only_the_whole_model_refuses_is_repeated_next(takes_none, opset, monkeypatch):
    """A judge that is wrong: the next round repeats, and the one behind that leaves the parts."""
    form, backend = FORMS["sdpa grouped"], _choosy(takes_none)
    planner = _planner(form, backend, opset=opset)
    monkeypatch.setattr(planner.attention.judge, "judge", lambda pair, measures: Verdict(FUSED, "surely"))
    assert (_ops(planner)["Attention"], _ops(planner)["Expand"]) == (1, 0)
    _assert_right(planner, form, False)
    assert _ops(planner)["Softmax"] == int(takes_none)
    assert list(planner.attention.repeated.values()) == [WORDS]
    if takes_none:
        return
    (group,) = planner.attention_report.groups
    assert (group.form, group.reason) == (REPEATED, f"in the whole model: {WORDS}")
    # What was learned is not learned twice.
    again = _planner(form, backend, opset=opset)
    again.recall(json.loads(json.dumps(planner.learned)))
    monkeypatch.setattr(again.attention.judge, "judge", lambda pair, measures: Verdict(FUSED, "surely"))
    assert _ops(again)["Expand"] == 2


# Measuring


class FakeClock:
    """Says what it is told, and counts."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = list(times), 0

    def __call__(self, backend: Any, engines: Any) -> list[float]:
        self.calls += 1
        assert len(engines) == 2
        return self.times


@pytest.fixture(scope="module")
def pair() -> Any:
    """The block of a model in halves."""
    planner = _planner(FORMS["sdpa grouped"], get_backend("onnxruntime"), half=True)
    judge, seen = planner.attention.judge, []
    original = judge.judge
    judge.judge = lambda block, measures: seen.append(block) or original(block, measures)
    planner.plan()
    return seen[0]


def test_the_repeated_node_is_timed_against_the_parts_once(pair, tmp_path):
    clock = FakeClock(0.01, 0.02)
    verdict = Judge(_choosy(), BuildOptions(), tmp_path, clock, "a GPU").judge(pair)
    assert (verdict.form, verdict.fused_ms, verdict.decomposed_ms) == (REPEATED, 0.01, 0.02)
    assert verdict.reason.startswith("measured: it is the faster form; ")
    assert WORDS in verdict.reason
    assert list(read_verdicts(tmp_path / "attention.json").values()) == [verdict]
    never = FakeClock()
    backend = _choosy()
    assert Judge(backend, BuildOptions(), tmp_path, never, "a GPU").judge(pair) == verdict
    assert (clock.calls, never.calls, backend.built) == (1, 0, [])

    slower = Judge(_choosy(), BuildOptions(), None, FakeClock(0.02, 0.01), "a GPU").judge(pair)
    assert (slower.form, slower.fused_ms) == (DECOMPOSED, 0.02)
    assert WORDS in slower.reason, "what was timed as one node was not the node as it is"


def test_without_a_clock_the_repeated_node_is_the_rule(pair, tmp_path):
    verdict = Judge(_choosy(), BuildOptions(), tmp_path).judge(pair)
    assert verdict.form == REPEATED
    assert "not measured" in verdict.reason
    assert len(read_verdicts(tmp_path / "attention.json")) == 1


def test_a_refusal_that_may_pass_is_not_kept(pair, tmp_path):
    backend = _choosy()
    backend.may_recover = True
    verdict = Judge(backend, BuildOptions(), tmp_path, FakeClock(0.01, 0.02), "a GPU").judge(pair)
    assert verdict.form == REPEATED
    assert read_verdicts(tmp_path / "attention.json") == {}


@pytest.mark.rtx
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("name", GROUPED)
def test_tensorrt_rtx_builds_the_repeated_node(name, dtype, dynamic):
    pytest.importorskip("tensorrt_rtx")

    class ChoosyRtx(_Choosy, type(get_backend("tensorrt_rtx"))):  # type: ignore[misc]
        """TensorRT-RTX as on that GPU."""

    form, shapes = FORMS[name], _shapes() if dynamic else None
    args = tuple(t.to(dtype) for t in form.example())
    options = Options.make({"attention": "auto"})
    planner = make_planner(form.module().to(dtype), args, None, shapes, ChoosyRtx("tensorrt_rtx"), options)
    program = planner.build()
    assert not program.plugin_calls
    assert (_ops(planner)["Attention"], _ops(planner)["Softmax"]) == (1, 0)
    assert [group.form for group in planner.attention_report.groups] == [REPEATED]
