"""What TensorRT-RTX refuses is written in other ops, and becomes a plugin only where that does not help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.options import Options
from trtbridge.bridge.plan import Plan
from trtbridge.passes import refused_rules, refused_windows
from trtbridge.passes.numbers import run
from trtbridge.passes.refused_fragment import Fragment


def _module(function: Callable[..., Any]) -> torch.nn.Module:
    class Model(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    return Model()


def _plan(function: Callable[..., Any], args: tuple[torch.Tensor, ...], backend: str = "tensorrt_rtx") -> Plan:
    planner = make_planner(_module(function), args, None, None, get_backend(backend), Options.make({}))
    plan, refusals = planner.settled_plan()
    assert not any(refusals.values()), refusals
    return plan


def _ops(plan: Plan) -> list[str]:
    return [call.op for call in (*plan.plugin_calls, *plan.hosted_calls)]


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x[mask] = -1.5
    return x + 1


FLOATS, INTS = torch.randn(3, 10), torch.randint(-1000, 1000, (5, 6))
BYTES = torch.randint(0, 256, (5, 6), dtype=torch.uint8)
# Each of these was a plugin, or several, on TensorRT-RTX.
ONE_ENGINE: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "fold": (lambda x: F.fold(F.unfold(x, 3, padding=1) * 2, (6, 6), 3, padding=1), (torch.randn(1, 2, 6, 6),)),
    "adaptive max pool": (lambda x: F.adaptive_max_pool2d(x * 2, 5) + 1, (torch.randn(1, 2, 7, 8),)),
    "adaptive average pool, 3-D": (lambda x: F.adaptive_avg_pool3d(x * 2, (2, 3, 2)), (torch.randn(1, 2, 7, 8, 5),)),
    "dilated max pool": (lambda x: F.max_pool2d(x * 2, 3, 2, 1, dilation=2), (torch.randn(1, 2, 9, 9),)),
    "max pool with indices": (
        lambda x: F.max_pool2d(x * 2, 3, 2, 1, return_indices=True), (torch.randn(2, 3, 9, 9).relu(),)),
    "cross entropy": (lambda x, t: F.cross_entropy(x * 2, t), (torch.randn(4, 7), torch.randint(0, 7, (4,)))),
    "masked assignment": (_masked, (torch.randn(2, 5, 4), torch.rand(2, 5) > 0.5)),
    "antialiased interpolation": (
        lambda x: F.interpolate(x * 2, (5, 6), mode="bicubic", antialias=True), (torch.randn(1, 2, 13, 15),)),
    "real Fourier transforms": (lambda x: torch.fft.irfft(torch.fft.rfft(x * 2) * 2), (FLOATS,)),
    "Fourier transform of two axes": (lambda x: torch.fft.fftn(x * 2, dim=(1, 2)).real, (torch.randn(2, 6, 5),)),
    "bits": (lambda x, y: (x & y) | ((x ^ 5) & 3), (INTS, INTS.flip(0))),
    "shifts": (lambda x: (x >> 3) + (~x << 2), (INTS,)),
    "shifts of int32": (lambda x: (x >> 3) + (~x << 2), (INTS.int(),)),
    "bytes": (lambda x, y: (((x + y) * 3).clamp(10, 200) & (y ^ 255)).float() / 255, (BYTES, BYTES.flip(0))),
    "bytes compared and moved": (
        lambda x, y: torch.where(x > 100, x, y).T.reshape(2, -1)[:, 1:], (BYTES, BYTES.flip(0))),
    "int8 codes": (lambda x, y: torch.where(y > 3, (x & 15) << 4, ~(x >> 4)) + 7 - (x // 3).clamp(-5, 5),
                   (BYTES.char(), BYTES.char().flip(0))),
    "running product": (lambda x: torch.cumprod(x * 2, 1), (FLOATS,)),
    "scatter add": (lambda x, i: torch.zeros(4, 6).scatter_add(0, i, x) + 1,
                    (torch.randn(4, 6), torch.randint(0, 4, (4, 6)))),
    "index add": (lambda x, i: torch.zeros(4, 6).index_add(0, i, x) + 1, (torch.randn(3, 6), torch.tensor([2, 0, 2]))),
    "buckets": (lambda x: torch.bucketize(x * 2, torch.tensor([-1.0, 0.0, 0.5])), (FLOATS,)),
    "attention of five axes": (
        lambda q, k: F.scaled_dot_product_attention(q * 2, k, k),
        (torch.randn(2, 2, 3, 4, 8), torch.randn(2, 2, 3, 5, 8))),
    "einsum with capitals": (
        lambda x, y: torch.einsum("bhqGk,bhkd->bhqGd", x, y), (torch.randn(1, 2, 3, 2, 4), torch.randn(1, 2, 4, 5))),
}  # fmt: skip


@pytest.mark.rtx
@pytest.mark.parametrize("case", ONE_ENGINE)
def test_no_plugin_any_more(case: str, assert_same: Callable[..., None]) -> None:
    pytest.importorskip("tensorrt_rtx")
    function, args = ONE_ENGINE[case]
    plan = _plan(function, args)
    assert _ops(plan) == []
    (segment,) = plan.segments
    # TensorRT runs on a GPU only; ONNX Runtime says whether what it gets computes the same.
    feeds = {f"args_{index}": arg.numpy() for index, arg in enumerate(args)}
    found = run(segment.proto, segment.weights, feeds)
    expected = function(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for spec, tensor in zip(segment.outputs, expected, strict=True):
        assert_same(torch.from_numpy(np.asarray(found[spec.name])), tensor)


@pytest.mark.rtx
@pytest.mark.parametrize(
    "case", ["fold", "max pool with indices", "bits", "shifts", "bytes", "real Fourier transforms"]
)
def test_it_builds_as_one_engine(case: str, convert_both: Callable[..., Any]) -> None:
    function, args = ONE_ENGINE[case]
    _, built = convert_both(_module(function), [(args, {})])
    assert not built.program.plugin_calls
    assert len(built.program.engines) == 1


def test_what_a_backend_takes_stays_as_it_is() -> None:
    function, args = ONE_ENGINE["fold"]
    plan = _plan(function, args, "onnxruntime")
    (segment,) = plan.segments
    assert "Col2Im" in {node.op_type for node in segment.proto.graph.node}


def test_torch_ops_without_an_onnx_op_need_no_plugin_anywhere(assert_same: Callable[..., None]) -> None:
    function, args = ONE_ENGINE["adaptive max pool"]
    fast = tb.convert(_module(function), args, backend="onnxruntime")
    assert not fast.program.plugin_calls
    assert_same(fast(*args), function(*args))


def _in_vain(f: Fragment) -> None:
    """A right rewrite that the parser refuses as well."""
    refused_windows.col2im(f)
    f.result(f.op("SequenceAt", f.op("SequenceConstruct", f.results[0]), f.const(0, np.int64)))


def _wrong(f: Fragment) -> None:
    refused_windows.col2im(f)
    f.result(f.op("Add", f.results[0], f.const(1, np.float32)))


def _broken(f: Fragment) -> None:
    raise ValueError("a mistake")


def _refused_again(f: Fragment) -> None:
    """A right rewrite with a node for which there is a rule, too."""
    refused_windows.col2im(f)
    mask = f.op("BitwiseNot", f.op("BitwiseNot", f.const(0, np.int64)))
    f.result(f.op("Add", f.results[0], f.cast(mask, onnx.TensorProto.FLOAT)))


@pytest.mark.rtx
@pytest.mark.parametrize("rule", [_in_vain, _wrong, _broken])
def test_a_rewrite_that_does_not_help_ends_as_a_plugin(
    rule: Callable[[Fragment], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(refused_rules.RULES, "Col2Im", rule)  # type: ignore[arg-type]
    function, args = ONE_ENGINE["fold"]
    plan = _plan(function, args)
    assert _ops(plan) == ["aten::col2im.default"]
    (call,) = (*plan.plugin_calls, *plan.hosted_calls)
    assert call.origin.file == __file__


@pytest.mark.rtx
def test_a_rewrite_may_need_another(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(refused_rules.RULES, "Col2Im", _refused_again)  # type: ignore[arg-type]
    assert _ops(_plan(*ONE_ENGINE["fold"])) == []


@pytest.mark.rtx
def test_one_call_in_part_is_a_plugin_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two refused calls the one without a rewrite is the only plugin."""
    pytest.importorskip("tensorrt_rtx")

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.bucketize(x, torch.tensor([0.0, 1.0])), torch.hstack((x, x))

    assert _ops(_plan(function, (FLOATS,))) == ["aten::hstack.default"]


def _file(folder: Path, text: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


FOLD = """g (float[batch,18,25] x) => (float[batch,2,5,5] z) <int64[2] size = {5,5}, int64[2] block = {3,3}>
    { [one] y = Col2Im <pads = [1,1,1,1]> (x, size, block) [two] z = Relu (y) }"""


@pytest.mark.rtx
def test_nodes_of_an_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    shapes = {"x": {0: tb.Dim("batch", min=1, opt=2, max=4)}}
    built = tb.convert(_file(tmp_path, FOLD), dynamic_shapes=shapes, backend="tensorrt_rtx")
    assert not built.program.plugin_calls
    assert len(built.program.engines) == 1


@pytest.mark.rtx
def test_a_node_of_a_file_whose_rewrite_is_refused_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setitem(refused_rules.RULES, "Col2Im", _in_vain)  # type: ignore[arg-type]
    path = _file(tmp_path, FOLD.replace("batch", "2"))
    options = Options.make({"plugin_host": "segments"})
    planner = make_planner(path, (), None, None, get_backend("tensorrt_rtx"), options)
    plan, refusals = planner.settled_plan()
    assert not any(refusals.values())
    assert [call.op for call in plan.plugin_calls] == ["trtbridge::onnx_node.default"]
    assert list(planner.nodes) == ["one"]
