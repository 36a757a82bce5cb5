"""New weights without a rebuild: what a refitted program computes is what a fresh one of the new weights computes."""

from __future__ import annotations

import copy
import json
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import get_backend
from trtbridge.bridge.backends.ort_session import WEIGHTS_PART

CPU = torch.device("cpu")


class Tied(nn.Module):
    """A small language model whose head is its embedding, with values at the start that invite rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))  # a product by one, a sum with zeros
        self.shift = nn.Parameter(torch.zeros(32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.encoder(self.embedding(ids)) * self.scale + self.shift)
        return hidden


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.gru(self.lstm(x)[0])[0]
        return made


class Plugins(nn.Module):
    """Plugins between engines read a weight, and a weight that is computed of one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.cummax(self.first(x), -1).values
        hidden = hidden + torch.linalg.matrix_exp(self.weight * 0.1) + torch.cummin(self.weight, 0).values
        made: torch.Tensor = self.last(hidden.relu())
        return made


class GivesWeights(nn.Module):
    """Weights are results themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.linear(x), self.weight, self.weight.t()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda t: self.one(t), lambda t: self.other(t) * 2, (x,))


class Computed(nn.Module):
    """What stands between parameters and what reads them: gates, sums with one, lookups by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(36, 36))
        self.gain = nn.Parameter(torch.zeros(36))
        self.table = nn.Parameter(torch.randn(11, 3))
        self.register_buffer("index", torch.arange(36 * 36) % 11)
        self.register_buffer("angles", torch.randn(36), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) * (1 + self.gain) + self.angles.cos()
        bias = self.table[self.index].view(36, 36, 3).permute(2, 0, 1)
        return torch.softmax(x + bias, -1)


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


IMAGE, IDS, MATRIX = torch.randn(2, 3, 12, 12), torch.arange(14).view(2, 7), torch.randn(8, 8)

CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any]]] = {
    "convolutions": (convolutions, IMAGE, {}),
    "convolutions in mixed precision": (convolutions, IMAGE, {"precision": "fp16"}),
    "convolutions in float16": (lambda: convolutions().half(), IMAGE.half(), {}),
    "convolutions in float64": (lambda: convolutions().double(), IMAGE.double(), {}),
    "transformer with tied weights": (Tied, IDS, {}),
    "transformer in bfloat16": (lambda: Tied().bfloat16(), IDS, {}),
    "transformer in mixed precision": (Tied, IDS, {"precision": "bf16"}),
    "transformer with checked passes": (Tied, IDS, {"check_passes": True}),
    "recurrent": (Recurrent, torch.randn(2, 5, 16), {}),
    "plugins": (Plugins, MATRIX, {}),
    "plugins in mixed precision": (Plugins, MATRIX, {"precision": "fp16"}),
    "weights as results": (GivesWeights, torch.randn(3, 4), {}),
    "branches": (Branches, torch.rand(3, 4), {}),
    "computed weights": (Computed, torch.randn(3, 36, 36), {}),
}
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


def renewed(module: nn.Module, seed: int = 1) -> nn.Module:
    """A copy with other weights; variances are positive."""
    new = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in new.named_buffers():
            if "running" in name and buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return new


def make(case: str, seed: int = 0, **options: Any) -> tuple[nn.Module, tb.EngineModule, torch.Tensor]:
    factory, example, own = CASES[case]
    torch.manual_seed(seed)
    module = factory().eval()
    return (
        module,
        tb.convert(module, (example,), backend="onnxruntime", **{"refittable": True, **own, **options}),
        example,
    )


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def assert_near(actual: Any, expected: Any, case: str) -> None:
    precision = CASES[case][2].get("precision")
    for mine, wanted in zip(tensors(actual), tensors(expected), strict=True):
        limit = {"fp16": 5e-3, "bf16": 3e-2}.get(precision, TOLERANCE.get(wanted.dtype, 1e-5))
        error = (mine.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < limit, f"{case}: {error}"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_refitted_program_is_a_fresh_one(case: str) -> None:
    module, fast, example = make(case)
    before = fast(example)
    assert_near(before, module(example), case)
    new = renewed(module)
    fresh = tb.convert(new, (example,), backend="onnxruntime", refittable=True, **CASES[case][2])
    assert fast.program.info.get("refitted") is None
    fast.refit(new)
    assert_near(fast(example), new(example), case)
    changed = [not torch.equal(a, b) for a, b in zip(tensors(before), tensors(fast(example)), strict=True)]
    assert all(changed)
    for mine, wanted in zip(tensors(fast(example)), tensors(fresh(example)), strict=True):
        assert torch.equal(mine, wanted)
    assert fast.program.info["refitted"] == 1
    fast.refit(module.state_dict())  # and back
    for mine, wanted in zip(tensors(fast(example)), tensors(before), strict=True):
        assert torch.equal(mine, wanted)
    assert fast.program.info["refitted"] == 2


@pytest.mark.parametrize("case", ["convolutions", "plugins", "computed weights", "transformer in bfloat16"])
@torch.no_grad()
def test_it_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    module, fast, example = make(case)
    new, newer = renewed(module), renewed(module, 2)
    fast.refit(new)
    tb.save(fast, tmp_path / "new.trtb")
    loaded = tb.load(tmp_path / "new.trtb")
    assert torch.equal(loaded(example), fast(example))
    assert loaded.program.info["refitted"] == 1
    loaded.refit(newer)
    assert_near(loaded(example), newer(example), case)
    assert_near(fast(example), new(example), case)  # it shares nothing with the other
    assert torch.equal(tb.load(tmp_path / "new.trtb", weights=newer)(example), loaded(example))


@torch.no_grad()
def test_a_copy_of_the_module_keeps_its_weights() -> None:
    module, fast, example = make("convolutions")
    other = copy.deepcopy(fast)
    fast.refit(renewed(module))
    assert_near(other(example), module(example), "convolutions")


@torch.no_grad()
def test_the_original_may_change_and_go() -> None:
    module, fast, example = make("transformer with tied weights")
    new = renewed(module)
    expected = new(example)
    fast.refit(new)
    for parameter in new.parameters():
        parameter.zero_()
    assert_near(fast(example), expected, "transformer with tied weights")


def test_no_rewrite_hangs_on_values() -> None:
    """Products by one, sums with zeros and tensors that happen to be equal stay apart."""

    class Coincidence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)  # weight and variance are ones, bias and mean are zeros
            self.one, self.zero = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.norm(x) * self.one + self.zero
            return made

    module = Coincidence().eval()
    fast = tb.convert(module, (torch.randn(3, 8),), backend="onnxruntime", refittable=True)
    assert fast.program.recipes is not None
    assert {recipe.parameter for recipe in fast.program.recipes.weights.values()} == {
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "one", "zero",
    }  # fmt: skip
    plain = tb.convert(module, (torch.randn(3, 8),), backend="onnxruntime")
    assert "Mul" not in _op_types(plain)  # a rewrite that knows the values drops the product by one
    assert _op_types(fast) == ["BatchNormalization", "Mul", "Add"]


def _op_types(module: tb.EngineModule) -> list[str]:
    parts = [engine.parts["model.onnx"] for engine in module.program.engines]
    return [node.op_type for part in parts for node in onnx.ModelProto.FromString(bytes(part)).graph.node]


def test_what_is_computed_of_weights_alone_is_no_node() -> None:
    _, fast, _ = make("recurrent")
    assert set(_op_types(fast)) <= {"LSTM", "GRU", "Transpose", "Reshape", "Concat", "Squeeze", "Shape", "Slice"}
    assert fast.program.recipes is not None
    assert len(fast.program.recipes.parts) >= 9  # gates in another order, both directions in one
    _, fast, _ = make("computed weights")
    assert "Gather" not in _op_types(fast)


def test_what_would_grow_is_computed_in_the_engine() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.randn(1, 4096))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.row.repeat(64, 1)

    fast = tb.convert(Spread().eval(), (torch.randn(2, 64),), backend="onnxruntime", refittable=True)
    assert fast.program.size_bytes < 100_000


# What does not fit


def test_misfits_are_named_and_nothing_changes() -> None:
    module, fast, example = make("transformer with tied weights")
    before = fast(example)
    state = module.state_dict()

    def refused(changes: dict[str, Any], *words: str, without: str = "") -> None:
        given = {name: tensor for name, tensor in {**state, **changes}.items() if name != without}
        with pytest.raises(tb.RefitError) as caught:
            fast.refit(given)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert torch.equal(fast(example), before)
        assert "refitted" not in fast.program.info

    refused({}, "missing: scale", without="scale")
    refused({"lora.weight": torch.ones(1)}, "unknown: lora.weight")
    refused({"shift": torch.zeros(33)}, "shift: expected (32) float, got (33) float")
    refused({"shift": torch.zeros(32).half()}, "shift", "float16", ".to(torch.float32)")
    refused({"shift": torch.empty(32, device="meta")}, "shift", "meta")
    refused({"shift": np.zeros(32, np.float32)}, "shift", "ndarray")
    refused({"head.weight": torch.zeros(50, 32)}, "head.weight", "embedding.weight", "tied")
    refused({"shift": torch.zeros(33), "more": torch.ones(1)}, "shift", "unknown: more")
    with pytest.raises(tb.RefitError, match="not int"):
        fast.refit(3)  # type: ignore[arg-type]
    with pytest.raises(tb.RefitError, match=r"(?s)missing: .*merged"):
        fast.refit(nn.ModuleDict({"base": module}))


def test_what_is_built_in_may_not_differ() -> None:
    module, fast, example = make("computed weights")
    before = fast(example)
    for name in ("index", "angles"):  # in the state dict, and not in it
        new = copy.deepcopy(module)
        setattr(new, name, getattr(new, name).flip(0))
        with pytest.raises(tb.RefitError, match=f"{name}: it is built into the engines"):
            fast.refit(new)
    assert torch.equal(fast(example), before)


def test_numbers_beyond_the_precision_are_refused() -> None:
    module, fast, example = make("convolutions in mixed precision")
    before = fast(example)
    with torch.no_grad():
        module.get_submodule("3").weight.mul_(1e7)  # type: ignore[operator]
    with pytest.raises(tb.RefitError, match=r"3\.weight: there are numbers that float16 cannot hold"):
        fast.refit(module)
    assert torch.equal(fast(example), before)
    large = nn.Linear(8, 8).eval()
    with torch.no_grad():
        large.weight.mul_(1e7)
    with pytest.raises(tb.RefitError, match=r"keep_fp32"):
        tb.convert(large, (torch.zeros(1, 8),), backend="onnxruntime", refittable=True, precision="fp16")


def test_one_name_of_a_tied_weight_is_enough() -> None:
    """As in safetensors files, which hold each tensor once."""
    module, fast, example = make("transformer with tied weights")
    new = renewed(module)
    for name in ("head.weight", "embedding.weight"):
        state = new.state_dict()
        del state[name]
        fast.refit(module)
        fast.refit(state)
        assert_near(fast(example), new(example).detach(), "transformer with tied weights")
    del state["head.weight"]
    with pytest.raises(tb.RefitError, match=r"missing: embedding\.weight, head\.weight"):
        fast.refit(state)


def test_unused_tensors_do_not_matter() -> None:
    module, fast, example = make("convolutions")
    state = module.state_dict()
    state["1.num_batches_tracked"] += 5  # counts in training; nothing reads it here
    fast.refit(state)
    del state["1.num_batches_tracked"]
    fast.refit(state)
    assert_near(fast(example), module(example), "convolutions")


def test_a_program_that_was_not_made_for_it(tmp_path: Path) -> None:
    module = convolutions().eval()
    fast = tb.convert(module, (IMAGE,), backend="onnxruntime")
    with pytest.raises(tb.RefitError, match="refittable=True"):
        fast.refit(module)
    tb.save(fast, tmp_path / "plain.trtb")
    with pytest.raises(tb.RefitError, match="refittable=True"):
        tb.load(tmp_path / "plain.trtb", weights=module)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    module = nn.Linear(4, 4).eval()
    for options in ({"precision": "int8"}, {"precision": "fp8+fp16"}):
        with pytest.raises(tb.OptionError, match="8-bit weights"):
            tb.convert(module, (torch.ones(1, 4),), backend="onnxruntime", refittable=True, **options)
    with pytest.raises(tb.OptionError, match="weight_streaming_bytes is for TensorRT"):
        tb.convert(module, (torch.ones(1, 4),), backend="onnxruntime", weight_streaming_bytes=1)
    with pytest.raises(tb.OptionError, match="weight_streaming_bytes=-1"):
        tb.convert(module, (torch.ones(1, 4),), weight_streaming_bytes=-1)
    tb.export(module, (torch.ones(1, 4),)).save(tmp_path / "net.onnx")
    with pytest.raises(tb.OptionError, match="for torch modules"):
        tb.convert(tmp_path / "net.onnx", backend="onnxruntime", strip_weights=True)


def test_a_failure_half_way_leaves_the_old_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module, fast, example = make("plugins")
    before = fast(example)
    assert len(fast.program.engines) > 1
    backend = type(get_backend("onnxruntime"))
    calls = []

    def broken(self: Any, engine: Any, *rest: Any) -> Any:
        calls.append(engine)
        if len(calls) == 2:
            raise tb.RefitError("a full disk, say")
        return original(self, engine, *rest)

    original = backend.refit
    monkeypatch.setattr(backend, "refit", broken)
    with pytest.raises(tb.RefitError, match="full disk"):
        fast.refit(renewed(module))
    assert len(calls) == 2
    assert torch.equal(fast(example), before)


@torch.no_grad()
def test_calls_and_refits_from_threads() -> None:
    """Each call has the one set of weights or the other, never some of both."""
    module, fast, example = make("plugins")
    new = renewed(module)
    olds = fast(example)
    fast.refit(new)
    news = fast(example)
    wrong: list[torch.Tensor] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            found = fast(example)
            if not (torch.equal(found, olds) or torch.equal(found, news)):
                wrong.append(found)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(10):
        fast.refit(new if turn % 2 else module)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(fast(example), news)


# Files without weights


@pytest.mark.parametrize("case", ["convolutions", "transformer in mixed precision", "plugins", "weights as results"])
@torch.no_grad()
def test_files_without_weights(case: str, tmp_path: Path) -> None:
    module, whole, example = make(case)
    stripped = tb.convert(module, (example,), backend="onnxruntime", strip_weights=True, **CASES[case][2])
    for mine, wanted in zip(tensors(stripped(example)), tensors(whole(example)), strict=True):
        assert torch.equal(mine, wanted)  # it has its weights here
    tb.save(stripped, tmp_path / "small.trtb")
    tb.save(whole, tmp_path / "whole.trtb")
    assert _weight_bytes(tmp_path / "small.trtb") == 0 < _weight_bytes(tmp_path / "whole.trtb")
    assert "refitted" not in stripped.program.info
    empty = tb.load(tmp_path / "small.trtb")
    with pytest.raises(tb.RefitError, match=r"tb\.load\(path, weights="):
        empty(example)
    new = renewed(module)
    for loaded in (tb.load(tmp_path / "small.trtb", weights=new.state_dict()), empty):
        loaded.refit(new)
        for mine, wanted in zip(tensors(loaded(example)), tensors(new(example)), strict=True):
            assert_near(mine, wanted, case)
        tb.save(loaded, tmp_path / "again.trtb")  # what came without weights is saved without
        assert (tmp_path / "again.trtb").stat().st_size == (tmp_path / "small.trtb").stat().st_size


def _weight_bytes(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        names = [entry for entry in archive.infolist() if entry.filename.endswith(WEIGHTS_PART)]
        constants = [entry for entry in archive.infolist() if entry.filename.startswith("constants/")]
        return sum(entry.file_size for entry in [*names, *constants])


def test_constants_that_are_no_weights_stay_in_a_stripped_file(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("mask", torch.randn(64, 64).sign(), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.linear(x) @ self.mask
            return made

    module, x = Masked().eval(), torch.randn(2, 64)
    tb.save(tb.convert(module, (x,), backend="onnxruntime", strip_weights=True), tmp_path / "small.trtb")
    assert _weight_bytes(tmp_path / "small.trtb") == 64 * 64 * 4
    torch.testing.assert_close(tb.load(tmp_path / "small.trtb", weights=module)(x), module(x).detach())


def test_the_manifest_holds_the_recipes_and_old_files_are_read(tmp_path: Path) -> None:
    module, fast, example = make("recurrent")
    tb.save(fast, tmp_path / "net.trtb")
    with zipfile.ZipFile(tmp_path / "net.trtb") as archive:
        manifest = json.loads(archive.read("manifest.json"))
        parts = {name: archive.read(name) for name in archive.namelist() if name != "manifest.json"}
    assert set(manifest["recipes"]["parameters"]["types"]) == {name for name, _ in module.named_parameters()}
    del manifest["recipes"], manifest["sealed"]  # as before there were any
    for name in [name for name in parts if name.startswith("recipes/")]:
        del parts[name], manifest["sha256"][name]
    with zipfile.ZipFile(tmp_path / "old.trtb", "w") as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, data in parts.items():
            archive.writestr(name, data)
    old = tb.load(tmp_path / "old.trtb")
    assert torch.equal(old(example), fast(example))
    with pytest.raises(tb.RefitError, match="refittable=True"):
        old.refit(module)
