"""The whole pipeline on models of many kinds: numbers through ONNX Runtime, engines through TensorRT-RTX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import trtbridge as tb
from trtbridge.bridge.plan import PluginCall

pytestmark = pytest.mark.rtx
BATCH = tb.Dim("batch", min=1, opt=2, max=6)


class Cnn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.down = torch.nn.Conv2d(8, 16, 3, stride=2, bias=False)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.max_pool2d(self.stem(x), 2)
        return self.head(self.drop(self.down(x).mean((2, 3))))


def test_cnn_with_a_dynamic_batch(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 3, 24, 20),), {}) for n in (1, 6, 3)]
    fast, built = convert_both(Cnn(), calls, {"x": {0: BATCH}})
    assert [type(step).__name__ for step in built.program.steps] == ["EngineStep"]
    assert fast.program.signature.inputs[0].shape == ("batch", 3, 24, 20)
    assert fast.program.signature.outputs[0].ranges[0] == (1, 2, 6)


class MaskedEncoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=~mask)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def test_transformer_with_masks_and_two_dynamic_dims(convert_both: Callable[..., Any]) -> None:
    def call(batch: int, length: int) -> Any:
        mask = torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1))
        return (torch.randint(0, 50, (batch, length)), mask), {}

    seq = tb.Dim("seq", min=2, opt=8, max=16)
    dims = {0: BATCH, 1: seq}
    _, built = convert_both(MaskedEncoder(), [call(2, 8), call(1, 2), call(6, 16)], {"ids": dims, "mask": dims})
    assert built.program.signature.dims == {"batch": (1, 2, 6), "seq": (2, 8, 16)}


class Lstm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        return self.rnn(x, state)


def test_lstm_with_nested_state(convert_both: Callable[..., Any]) -> None:
    def call(batch: int) -> Any:
        return (torch.randn(batch, 7, 8), (torch.randn(4, batch, 16), torch.randn(4, batch, 16))), {}

    shapes = {"x": {0: BATCH}, "state": ({1: BATCH}, {1: BATCH})}
    fast, _ = convert_both(Lstm(), [call(2), call(5)], shapes)
    assert fast.program.signature.labels == ("x", "state[0]", "state[1]")


@dataclasses.dataclass
class Detection:
    boxes: torch.Tensor
    best: torch.Tensor | None
    count: int
    extra: dict[str, Any]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Structured(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, batch: dict[str, Any], *, scale: float, flag: torch.Tensor | None = None) -> Detection:
        hidden = self.linear(batch["image"]) * self.scale * scale
        boxes = hidden + batch["pair"].left[:, :1].to(hidden.dtype)
        if flag is not None:
            boxes = torch.where(flag, boxes, -boxes)
        return Detection(
            boxes, None, batch["image"].shape[0], {"ids": [batch["pair"].right + 1], "mode": batch["mode"]}
        )


def test_dict_inputs_and_dataclass_output(convert_both: Callable[..., Any]) -> None:
    def call(n: int) -> Any:
        pair = Pair(torch.arange(n * 3, dtype=torch.int32).view(n, 3), torch.arange(n))
        batch = {"image": torch.randn(n, 4), "pair": pair, "mode": "train", "none": None}
        return (batch,), {"scale": 0.5, "flag": torch.arange(4) % 2 == 0}

    shapes = {"batch": {"image": {0: BATCH}, "pair": ({0: BATCH}, {0: BATCH})}}
    fast, _ = convert_both(Structured(), [call(3), call(1)], shapes)
    result = fast(call(4)[0][0], **call(4)[1])
    assert isinstance(result, Detection)
    assert result.count == 4, "a size that follows a dynamic dimension comes back as a number"


def test_bf16_weights(convert_both: Callable[..., Any]) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 8)
    )
    calls = [((torch.randn(n, 32, dtype=torch.bfloat16),), {}) for n in (2, 5)]
    # bfloat16 has 8 bits of mantissa, and ONNX Runtime computes the widened graph.
    fast, _ = convert_both(model.to(torch.bfloat16), calls, ({0: BATCH},), tolerance=3e-2)
    assert fast(*calls[0][0]).dtype == torch.bfloat16


def test_fp16_weights(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 3, 24, 20, dtype=torch.float16),), {}) for n in (2, 5)]
    convert_both(Cnn().half(), calls, ({0: BATCH},), tolerance=5e-3)


class PluginInTheMiddle(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = torch.cummax(self.first(x), dim=1)
        return self.second(values.relu()), indices


def _kinds(module: tb.EngineModule) -> list[str]:
    return [step.op if isinstance(step, PluginCall) else "engine" for step in module.program.steps]


def test_plugin_in_the_middle(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 5, 8),), {}) for n in (2, 6)]
    _, built = convert_both(PluginInTheMiddle(), calls, {"x": {0: BATCH}})
    assert _kinds(built) == ["engine", "aten::cummax.default", "engine"]
    (call,) = built.program.plugin_calls
    assert call.origin.file == __file__
    assert "torch.cummax" in call.origin.code


@torch.library.custom_op("trtbridge_tests::scaled_flip", mutates_args=())
def scaled_flip(x: torch.Tensor, scale: float, dims: list[int]) -> torch.Tensor:
    return torch.flip(x, dims) * scale


@scaled_flip.register_fake
def _(x: torch.Tensor, scale: float, dims: list[int]) -> torch.Tensor:
    return torch.empty_like(x)


class ParallelPlugins(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = scaled_flip(self.left(x), math.pi, [1])
        right = torch.cummin(self.right(x), dim=-1).values
        return self.join(torch.cat([left.tanh(), right.sigmoid()], dim=-1)).view(x.shape[0], -1)


def test_two_plugins_in_parallel(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 5, 8),), {}) for n in (2, 6)]
    _, built = convert_both(ParallelPlugins(), calls, {"x": {0: BATCH}})
    kinds = _kinds(built)
    assert kinds[0] == kinds[-1] == "engine"
    assert sorted(kinds[1:3]) == ["aten::cummin.default", "trtbridge_tests::scaled_flip.default"]
    assert len(kinds) == 4, "plugins of the same depth share their segments"


class PluginFirstAndLast(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_flip(self.linear(scaled_flip(x, 2.0, [0])), -1.0, [1])


def test_plugin_first_and_last(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 8),), {}) for n in (2, 6)]
    _, built = convert_both(PluginFirstAndLast(), calls, {"x": {0: BATCH}})
    flip = "trtbridge_tests::scaled_flip.default"
    assert _kinds(built) == [flip, "engine", flip]


class OnlyPlugin(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scaled_flip(x, 3.0, [0]), x


def test_plugin_alone_and_forwarded_input(assert_same: Callable[..., None]) -> None:
    x = torch.randn(3, 4)
    fast = tb.convert(OnlyPlugin(), (x,), backend="onnxruntime")
    assert _kinds(fast) == ["trtbridge_tests::scaled_flip.default"]
    results = fast(x)
    assert_same(results, OnlyPlugin()(x))
    assert results[1].data_ptr() != x.data_ptr(), "a forwarded input comes back as a copy that is safe to write to"


class NarrowTypes(torch.nn.Module):
    def forward(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        longs = torch.cummax(x * 2.0, dim=1).values  # a plugin whose tensors are float64
        return longs + 1.0, i * 2 + 1, torch.argmax(x.flatten())


def test_types_that_tensorrt_lacks(convert_both: Callable[..., Any]) -> None:
    calls = [((torch.randn(n, 4, dtype=torch.float64), torch.arange(4, dtype=torch.int16)), {}) for n in (2, 5)]
    fast, _ = convert_both(NarrowTypes(), calls, {"x": {0: BATCH}}, tolerance=1e-6)
    assert [t.dtype for t in fast(*calls[0][0])] == [torch.float64, torch.int16, torch.int64]


class ManyCasts(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        best = torch.cummax(x.double() * 2, dim=1).values
        return best.float() + 1, best.long() + 1, torch.cummin(best, dim=1).values.half() * 2


def test_plugin_results_of_a_type_that_tensorrt_lacks_read_in_several(convert_both: Callable[..., Any]) -> None:
    convert_both(ManyCasts(), [((torch.arange(8.0).view(2, 4),), {})])


def test_dims_that_stand_in_derived_dims_alone(assert_same: Callable[..., None]) -> None:
    pairs = torch.nn.Flatten(0)
    fast = tb.convert(pairs, (torch.ones(4, 3),), dynamic_shapes=({0: 2 * tb.Dim("n", max=5)},), backend="onnxruntime")
    assert fast.program.signature.outputs[0].ranges == ((6, 12, 30),)
    assert_same(fast(torch.ones(10, 3)), torch.ones(30))
    with pytest.raises(tb.InputError, match=r"2\*n with n from 1 to 5, got 3"):
        fast(torch.ones(3, 3))


class TwoGigabytes(torch.nn.Module):
    """Two weights of 1.1 GB: over protobuf's limit together."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16384, 17000, bias=False)
        self.down = torch.nn.Linear(17000, 16384, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.mark.slow
def test_over_two_gigabytes(convert_both: Callable[..., Any]) -> None:
    model = TwoGigabytes()
    assert sum(p.nbytes for p in model.parameters()) > 2**31
    convert_both(model, [((torch.randn(1, 16384),), {})], tolerance=1e-3)


def test_derived_and_shared_dims(assert_same: Callable[..., None]) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return x + y + z.view(2, -1).sum(0, keepdim=True).T

    n = tb.Dim("n", min=1, opt=4, max=9)
    shapes = {"x": {0: n}, "y": {0: n}, "z": {0: 2 * n}}
    fast = tb.convert(
        Model(), (torch.randn(3, 2), torch.randn(3, 2), torch.randn(6)), dynamic_shapes=shapes, backend="onnxruntime"
    )
    args = (torch.randn(9, 2), torch.randn(9, 2), torch.randn(18))
    assert_same(fast(*args), Model()(*args))
    with pytest.raises(tb.InputError, match=r"Input z: .*n is 8 in dimension 0, but 9 in x"):
        fast(torch.randn(9, 2), torch.randn(9, 2), torch.randn(16))


def test_tied_weights_stand_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(100, 32)
            self.head = torch.nn.Linear(32, 100, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    model = Tied()
    exported = tb.export(model, (torch.arange(5)[None],))
    assert [weight.nbytes for weight in exported.weights.values()] == [100 * 32 * 4]
    (weight,) = exported.weights.values()
    assert weight.raw.data_ptr() == model.embed.weight.data_ptr(), "weights are shared with the module, not copied"


def test_model_output_and_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=60
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 60, (2, 6))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dims = {0: BATCH, 1: tb.Dim("seq", min=2, opt=6, max=12)}
    fast = tb.convert(model, (), kwargs, dynamic_shapes=dict.fromkeys(kwargs, dims), backend="onnxruntime")
    other = torch.randint(0, 60, (3, 9))
    result = fast(input_ids=other, attention_mask=torch.ones_like(other))
    expected = model(input_ids=other, attention_mask=torch.ones_like(other))
    assert type(result) is type(expected)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result["pooler_output"], expected["pooler_output"], rtol=1e-4, atol=1e-5)
