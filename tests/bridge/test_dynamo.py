"""torch.compile(backend="trtbridge"): engines for dynamo's graphs, else eager and a word about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge import dynamo

LOGGER = "trtbridge.bridge.dynamo"
# Another helper's or the machine's TensorRT plays no part: tensors on a CPU run in ONNX Runtime.


@pytest.fixture(autouse=True)
def _fresh_dynamo(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    torch._dynamo.reset()
    caplog.set_level(logging.INFO, logger=LOGGER)
    yield
    torch._dynamo.reset()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    """What the backend has logged so far, at one level."""

    def read(level: int) -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno == level]

    return read


Log = Callable[[int], list[str]]
Same = Callable[..., None]


def compile(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="trtbridge", options=options)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(x)
        return {"logits": self.head(features.flatten(1)), "features": features}


def test_it_is_a_backend_by_name() -> None:
    assert "trtbridge" in torch._dynamo.list_backends()


def test_every_batch_size_with_two_engines(log: Log, assert_same: Same) -> None:
    model = Cnn().eval()
    compiled = compile(model)
    with torch.inference_mode():
        for rows in (4, 2, 7, 15, 3):  # torch itself guards convolutions on a CPU at 16
            x = torch.randn(rows, 3, 8, 8)
            assert_same(compiled(x), model(x))
    engines = log(logging.INFO)
    assert len(engines) == 2  # the first size alone, then any size
    assert "1 engine(s)" in engines[0]
    assert "onnxruntime" in engines[0]
    assert not log(logging.WARNING)


def test_a_dimension_marked_with_bounds_is_one_engine(log: Log, assert_same: Same) -> None:
    model = Cnn().eval()
    compiled = compile(model)
    with torch.no_grad():
        for rows in (4, 2, 8):
            x = torch.randn(rows, 3, 8, 8)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=8)
            assert_same(compiled(x), model(x))
    assert len(log(logging.INFO)) == 1


def test_a_size_beyond_the_range_runs_in_eager_and_says_so(log: Log, assert_same: Same) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    compiled = torch.compile(model, backend="trtbridge", dynamic=True, options={"max_size": 10})
    with torch.no_grad():
        for rows in (4, 10, 11, 12, 5):
            x = torch.randn(rows, 8)
            assert_same(compiled(x), model(x))
    (warning,) = log(logging.WARNING)
    assert "got 11 in shape (11, 8)" in warning
    assert "max_size" in warning
    assert len(log(logging.INFO)) == 1
    strict = torch.compile(model, backend="trtbridge", dynamic=True, options={"max_size": 10, "on_failure": "raise"})
    with torch.no_grad():
        strict(torch.randn(4, 8))
        with pytest.raises(tb.InputError, match="got 11"):
            strict(torch.randn(11, 8))


def test_a_dimension_of_one_possible_size_is_static(log: Log, assert_same: Same) -> None:
    model = Cnn().eval()
    compiled = torch.compile(model, backend="trtbridge", dynamic=True)  # height and width, too, but the head takes 8
    with torch.no_grad():
        for rows in (4, 2):
            x = torch.randn(rows, 3, 8, 8)
            assert_same(compiled(x), model(x))
    assert any("of one possible size" in line for line in log(logging.INFO))
    assert not log(logging.WARNING)


def test_bert(log: Log, assert_same: Same) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config).eval()
    compiled = torch.compile(model, backend="trtbridge", dynamic=True, fullgraph=True)
    with torch.inference_mode():
        for rows, tokens in ((2, 7), (3, 11), (5, 6)):
            ids = torch.randint(0, 100, (rows, tokens))
            mask = torch.ones_like(ids)
            mask[0, 3:] = 0
            actual, expected = (m(input_ids=ids, attention_mask=mask) for m in (compiled, model))
            assert type(actual) is type(expected)
            assert_same(actual, expected, rtol=1e-4, atol=1e-4)
    assert not log(logging.WARNING)
    assert len(log(logging.INFO)) == 1


def test_graph_breaks_make_several_engines(log: Log, assert_same: Same) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x.relu())

    model = Broken().eval()
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert_same(compile(model)(x), model(x))
    assert len(log(logging.INFO)) == 2
    assert not log(logging.WARNING)


def test_half_precision_and_options_of_convert(log: Log, assert_same: Same) -> None:
    model = Cnn().half().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float16)
    with torch.inference_mode():
        assert_same(compile(model, opset=21)(x), model(x), rtol=1e-2, atol=1e-2)
    assert len(log(logging.INFO)) == 1
    mixed = Cnn().eval()
    x = x.float()
    with torch.inference_mode():
        actual, expected = compile(mixed, precision="fp16")(x), mixed(x)
    assert_same(actual, expected, rtol=1e-2, atol=1e-2)
    assert not torch.equal(actual["logits"], expected["logits"])
    assert len(log(logging.INFO)) == 2


def test_autocast(log: Log, assert_same: Same) -> None:
    model = Cnn().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compile(model)(x), model(x)
    assert actual["logits"].dtype is torch.bfloat16
    assert_same(actual, expected, rtol=3e-2, atol=3e-2)
    assert len(log(logging.INFO)) == 1


def test_gradients_run_in_eager_and_say_so(log: Log) -> None:
    model = Cnn().eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = compile(model)
    compiled(x)["logits"].sum().backward()
    assert model.head.weight.grad is not None
    (warning,) = log(logging.WARNING)
    assert "gradients are on" in warning
    assert "test_dynamo.py:" in warning
    with torch.no_grad():
        compiled(x)
    assert len(log(logging.INFO)) == 1


@pytest.mark.parametrize("change", ["in place", "data", "replaced"])
def test_changed_weights_are_noticed(change: str, log: Log, assert_same: Same) -> None:
    model = nn.Linear(8, 4).eval()
    x = torch.randn(2, 8)
    compiled = compile(model)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
        if change == "in place":
            model.weight.mul_(2)
        elif change == "data":
            model.weight.data = torch.randn(4, 8)
        else:
            model.weight = nn.Parameter(torch.randn(4, 8))
        assert_same(compiled(x), model(x))
        assert_same(compiled(x), model(x))
    engines, warnings = log(logging.INFO), log(logging.WARNING)
    # Either the backend notices, or dynamo's own guards do and there is a second engine.
    assert (len(engines), len(warnings)) in ((1, 1), (2, 0))
    assert all("a weight was changed" in warning for warning in warnings)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


def writes_to_a_view(x: torch.Tensor) -> torch.Tensor:
    x[0].mul_(2)
    return x + 1


def returns_a_view(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[:1], x + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Writes(), "it writes to its input"),
        (lambda: writes_to_a_view, "it writes to its input"),
        (lambda: returns_a_view, "it returns a view of its input"),
        (lambda: lambda x: torch.arange(8) * 2, ""),
    ],
    ids=["buffer", "view", "returned view", "no input"],
)
def test_what_cannot_be_an_engine_runs_in_eager(
    make: Callable[[], Any], words: str, log: Log, assert_same: Same
) -> None:
    model, same = make(), make()
    compiled = compile(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 8)
            y = x.clone()
            assert_same(compiled(x), same(y))
            assert_same(x, y)
    warnings = log(logging.WARNING)
    assert any(words in warning for warning in warnings), warnings
    assert len(warnings) == 1
    assert "runs in PyTorch because" in warnings[0]


def test_a_graph_that_does_not_convert_runs_in_eager(log: Log, assert_same: Same) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)

    x = torch.randn(2, 8)
    assert_same(compile(call, plugin_host="engine")(x), call(x))
    (warning,) = log(logging.WARNING)
    assert "UnsupportedOpError" in warning
    torch._dynamo.reset()
    with pytest.raises(tb.UnsupportedOpError, match="bessel"):
        compile(call, plugin_host="engine", on_failure="raise")(x)


def test_raising_instead(log: Log) -> None:
    with torch.no_grad(), pytest.raises(tb.TrtBridgeError, match="returns a view of its input"):
        compile(returns_a_view, on_failure="raise")(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opsets": 20}, r"no option 'opsets'. Did you mean 'opset'.*torch.compile takes these as well: .*max_size"),
        ({"opset": 3}, "opset=3"),
        ({"max_size": 0}, "max_size=0"),
        ({"on_failure": "ignore"}, "on_failure='ignore'"),
        ({"dynamic_shapes": {}}, "mark_dynamic"),
        ({"backend": "tensorflow"}, "tensorflow"),
    ],
)
def test_wrong_options_raise(options: dict[str, Any], words: str) -> None:
    with torch.no_grad(), pytest.raises(tb.OptionError, match=words):
        compile(nn.Linear(8, 4), **options)(torch.randn(2, 8))


def test_modes_are_refused() -> None:
    with torch.no_grad(), pytest.raises(tb.OptionError, match="has no modes"):
        torch.compile(nn.Linear(8, 4), backend="trtbridge", mode="max-autotune")(torch.randn(2, 8))


def test_numbers_that_are_sizes(log: Log, assert_same: Same) -> None:
    def call(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.sum(dim=0) / x.shape[0]) @ y[: x.shape[0]].T.reshape(8, -1) + x.shape[0]

    compiled = torch.compile(call, backend="trtbridge", dynamic=True)
    for rows in (3, 5, 9):
        x, y = torch.randn(rows, 8), torch.randn(16, 8)
        assert_same(compiled(x, y), call(x, y))
    assert not log(logging.WARNING)


def test_other_numbers_are_fixed(log: Log, assert_same: Same) -> None:
    compiled = torch.compile(lambda x, n, f: x * n + f, backend="trtbridge", dynamic=True)
    for number, other in ((3, 0.5), (3, 0.5), (4, 0.5), (3, 0.25), (3, 0.5)):
        x = torch.randn(2, 8)
        assert_same(compiled(x, number, other), x * number + other)
    assert len(log(logging.INFO)) == 1
    warnings = log(logging.WARNING)
    assert len(warnings) == 1
    assert "is fixed at 3" in warnings[0]


def test_random_numbers_stay_random(log: Log) -> None:
    compiled = compile(nn.Dropout(0.5).train())
    x = torch.ones(100, 8)
    with torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))


def test_errors_name_lines_of_the_model(assert_same: Same) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(x * 2, dim=1)[0]

    found: list[tb.EngineModule] = []
    real = dynamo.convert

    def spy(*args: Any, **kwargs: Any) -> tb.EngineModule:
        found.append(real(*args, **kwargs))
        return found[-1]

    x = torch.randn(2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "convert", spy)
        assert_same(compile(call)(x), call(x))
    ((plugin,),) = [module.program.plugin_calls for module in found]
    assert plugin.origin.file == __file__
    assert "torch.cummax" in plugin.origin.code
