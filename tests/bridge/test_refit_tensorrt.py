"""Engines that the builder itself makes refittable or streaming, as far as a machine without a GPU shows them."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.base import BuildOptions, Segment
from trtbridge.bridge.backends.tensorrt import TensorRtBackend
from trtbridge.bridge.backends.trt_refit import SKELETON_PART, make_skeleton, stream_weights
from trtbridge.bridge.convert import make_planner
from trtbridge.bridge.options import Options
from trtbridge.passes.exchange import make_stand_in, stand_in_name

pytestmark = pytest.mark.rtx


class Net(nn.Module):
    """Layers whose weights the parser takes in by different ways, and a large constant that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 32, 2, groups=2)
        self.groups, self.slope = nn.GroupNorm(4, 32), nn.PReLU(32)
        self.lstm, self.last = nn.LSTM(32, 32, batch_first=True), nn.LayerNorm(32)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.randn(32, 32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.slope(self.groups(self.up(self.norm(self.conv(x)).relu()))).mean((2, 3))
        made: torch.Tensor = self.last(self.lstm(x[:, None])[0]) * self.scale @ self.mask
        return made


X = torch.randn(2, 3, 8, 8)


def _segment() -> Segment:
    options = Options.make({"refittable": True})
    planner = make_planner(Net().eval(), (X,), None, None, get_backend("tensorrt_rtx"), options)
    (segment,) = planner.plan().segments
    return segment


@pytest.fixture(scope="module")
def segment() -> Segment:
    pytest.importorskip("tensorrt_rtx")
    return _segment()


def test_the_skeleton_holds_all_but_the_weights(segment: Segment) -> None:
    proto = onnx.ModelProto.FromString(zlib.decompress(make_skeleton(segment.proto, segment)))
    outside = {t.name for t in proto.graph.initializer if stand_in_name(t) is not None}
    assert outside == segment.refittable
    (mask,) = [t for t in proto.graph.initializer if list(t.dims) == [32, 32] and t.name not in outside]
    assert np.array_equal(onnx.numpy_helper.to_array(mask), segment.weights[mask.name].numpy())
    assert [n.op_type for n in proto.graph.node] == [n.op_type for n in segment.proto.graph.node]


@functools.cache
def _refitting() -> TensorRtBackend:
    """TensorRT-RTX as if its builder made refittable engines, as TensorRT's does."""
    backend = TensorRtBackend("tensorrt_rtx")
    backend.flavour = dataclasses.replace(backend.flavour, refits=True)
    return backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="seen to be refused with a GPU too, in other words")
def test_the_builder_of_rtx_makes_no_refittable_engines(segment: Segment) -> None:
    """Seen with 1.6.1 and 1.7.1, and why `Flavour.refits` is False; the error sends the planner on no search."""
    for options in (BuildOptions(refittable=True), BuildOptions(refittable=True, strip_weights=True)):
        with pytest.raises(tb.BuildError, match="not a refittable one") as caught:
            _refitting().build(segment, options)
        assert not caught.value.graph_at_fault
    assert SKELETON_PART not in _refitting().build(segment, BuildOptions()).parts


def test_weights_that_the_network_has_not_are_named(segment: Segment) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(segment.proto)
    spare = ir.Tensor(np.ones(3, np.float32), name="spare")  # nothing reads it, so the parser leaves it out
    proto.graph.initializer.append(make_stand_in("spare", spare))
    weights = {**segment.weights, "spare": spare}
    changed = dataclasses.replace(segment, proto=proto, weights=weights, refittable=segment.refittable | {"spare"})
    with pytest.raises(tb.BuildError, match="could not exchange them later: spare") as caught:
        _refitting().build(changed, BuildOptions(refittable=True))
    assert not caught.value.graph_at_fault


def test_rtx_builds_for_weight_streaming() -> None:
    pytest.importorskip("tensorrt_rtx")
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    fast = tb.convert(module, (torch.randn(4, 64),), backend="tensorrt_rtx", weight_streaming_bytes=1 << 16)
    assert fast.program.engines[0].info["weight_streaming_bytes"] == 1 << 16


class _Engine:
    """What `stream_weights` uses of an engine; it cannot be loaded without a GPU."""

    streamable_weights_size = 1000

    def __init__(self, fixed: int | None = None) -> None:
        self._budget, self._fixed = -1, fixed

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget if self._fixed is None else self._fixed

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        self._budget = value


@pytest.mark.parametrize(("asked", "set_"), [(0, 0), (400, 400), (5000, 1000)])
def test_the_budget_is_set_and_read_again(asked: int, set_: int) -> None:
    engine: Any = _Engine()
    stream_weights(engine, {"weight_streaming_bytes": asked})
    assert engine.weight_streaming_budget_v2 == set_


def test_a_budget_that_is_not_taken() -> None:
    engine: Any = _Engine(fixed=77)
    stream_weights(engine, {})
    with pytest.raises(tb.BackendError, match="keeps a budget of 77"):
        stream_weights(engine, {"weight_streaming_bytes": 5})
