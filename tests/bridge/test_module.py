"""EngineModule as a citizen of PyTorch, on the CPU; tests/gpu repeats what concerns streams and devices."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import trtbridge as tb


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        best, index = torch.cummax(self.linear(x), dim=1)
        return {"y": torch.where(keep, best, -best), "index": index + ids}


Pair = tuple[torch.nn.Module, tb.EngineModule]
ARGS = (torch.linspace(-1, 1, 24).view(3, 8), torch.arange(24).view(3, 8), torch.arange(24).view(3, 8) % 3 == 0)
SHAPES = {name: {0: tb.Dim("batch", min=1, opt=3, max=5)} for name in ("x", "ids", "keep")}


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, tb.EngineModule]:
    model = Model().eval()
    return model, tb.convert(model, ARGS, dynamic_shapes=SHAPES, backend="onnxruntime")


def test_non_contiguous_inputs(pair: Pair, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    strided = tuple(torch.stack([t, t], dim=-1).flatten(1)[:, ::2] for t in ARGS)
    assert not any(t.is_contiguous() for t in strided)
    assert_same(fast(*strided), model(*strided))
    transposed = (ARGS[0].T.contiguous().T, *ARGS[1:])
    assert_same(fast(*transposed), model(*transposed))


def test_keywords_and_positions_mix(pair: Pair, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    expected = model(*ARGS)
    assert_same(fast(keep=ARGS[2], x=ARGS[0], ids=ARGS[1]), expected)
    assert_same(fast(ARGS[0], keep=ARGS[2], ids=ARGS[1]), expected)


def test_outputs_are_fresh(pair: Pair) -> None:
    _, fast = pair
    first = fast(*ARGS)
    kept = first["y"].clone()
    second = fast(ARGS[0] * 2, *ARGS[1:])
    assert first["y"].data_ptr() != second["y"].data_ptr()
    assert torch.equal(first["y"], kept)


def test_inference_mode_and_autocast(pair: Pair, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    expected = model(*ARGS)
    with torch.inference_mode():
        assert_same(fast(*ARGS), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(*ARGS), expected)
    gradient = (ARGS[0].clone().requires_grad_(), *ARGS[1:])
    assert not fast(*gradient)["y"].requires_grad


def test_inside_another_module(pair: Pair, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    outer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Identity())
    outer.fast = fast
    assert list(fast.state_dict()) == []
    assert list(fast.parameters()) == []
    assert [key for key in outer.state_dict() if key.startswith("fast")] == []
    outer.train().eval().requires_grad_(False)
    assert_same(outer.fast(*ARGS), model(*ARGS))
    assert outer.to("cpu").fast is fast


def test_moving_explains_itself(pair: Pair) -> None:
    _, fast = pair
    with pytest.raises(tb.TrtBridgeError, match=r"cannot move from cpu to meta.*tb.load\(path, device="):
        torch.nn.Sequential(fast).to("meta")
    with pytest.raises(tb.TrtBridgeError, match=r"cannot change to torch.float16.*Convert a module of that dtype"):
        fast.half()


def test_deepcopy_shares_the_engines(pair: Pair, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    copied = copy.deepcopy(torch.nn.ModuleDict({"fast": fast}))["fast"]
    assert copied is not fast
    assert copied.program is fast.program
    assert_same(copied(*ARGS), model(*ARGS))
    with pytest.raises(tb.TrtBridgeError, match=r"not pickled.*tb.save"):
        pickle.dumps(fast)


def test_eight_threads_at_once(pair: Pair) -> None:
    model, fast = pair
    start = threading.Barrier(8)

    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for _ in range(20):
            n = int(torch.randint(1, 6, (), generator=generator))
            args = (torch.randn(n, 8, generator=generator), ARGS[1][:1].expand(n, 8), ARGS[2][:1].expand(n, 8))
            if not torch.allclose(fast(*args)["y"], model(*args)["y"], atol=1e-5):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_later_changes_of_the_module_do_not_reach_the_engine(assert_same: Callable[..., None]) -> None:
    model = Model().eval()
    fast = tb.convert(model, ARGS, backend="onnxruntime")
    before = fast(*ARGS)
    with torch.no_grad():
        model.linear.weight.zero_()
    assert_same(fast(*ARGS), before)


def test_save_and_load(pair: Pair, tmp_path: Path, assert_same: Callable[..., None]) -> None:
    model, fast = pair
    path = tmp_path / "model.trtb"
    tb.save(fast, path)
    loaded = tb.load(path)
    assert_same(loaded(*ARGS), model(*ARGS))
    assert loaded.inspect() == fast.inspect()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("model")] == ["model.trtb"]


@pytest.mark.parametrize("place", ["start", "middle", "end", "cut"])
def test_damaged_file(pair: Pair, tmp_path: Path, place: str) -> None:
    path = tmp_path / "model.trtb"
    tb.save(pair[1], path)
    data = bytearray(path.read_bytes())
    if place == "cut":
        data = data[: len(data) // 2]
    else:
        at = {"start": 0, "middle": data.index(b"engines/0/weights.bin") + 40, "end": len(data) - 8}[place]
        data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(tb.ModelFileError, match=r"model.trtb.*damaged"):
        tb.load(path)


def test_save_keeps_the_old_file_when_it_fails(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(tb.ModelFileError, match="Cannot write"):
        tb.save(pair[1], tmp_path / "absent" / "model.trtb")
    path = tmp_path / "model.trtb"
    path.write_bytes(b"old")
    fixed = tb.convert(Odd(), (torch.ones(2), Opaque()), backend="onnxruntime")
    with pytest.raises(tb.ModelFileError, match=r"Opaque.*no JSON form"):
        tb.save(fixed, path)
    assert path.read_bytes() == b"old"


class Opaque:
    """A constant argument that JSON cannot hold."""

    def __repr__(self) -> str:
        return "Opaque()"


class Odd(torch.nn.Module):
    def forward(self, x: torch.Tensor, extra: Opaque) -> torch.Tensor:
        return x + 1


def test_loading_without_the_plugin_says_which(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "model.trtb"
    tb.save(pair[1], path)
    path.write_bytes(path.read_bytes().replace(b"aten::cummax", b"gone::cummax"))
    with pytest.raises(tb.ModelFileError, match="damaged"):
        tb.load(path)  # the zip's own checksum sees it
    program = copy.copy(pair[1].program)
    (call,) = program.plugin_calls
    object.__setattr__(call, "op", "gone::cummax.default")
    try:
        with pytest.raises(tb.PluginError, match=r"'gone::cummax.default' is not registered.*Import"):
            tb.EngineModule(program)
    finally:
        object.__setattr__(call, "op", "aten::cummax.default")


@pytest.mark.rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_engine_without_a_gpu_is_built_saved_and_inspected(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    phases: list[tuple[str, float]] = []
    fast = tb.convert(
        Model(), ARGS, dynamic_shapes=SHAPES, backend="tensorrt_rtx", progress=lambda *event: phases.append(event)
    )
    tb.save(fast, tmp_path / "model.trtb")
    loaded = tb.load(tmp_path / "model.trtb")
    text = str(loaded.inspect())
    for word in ("tensorrt_rtx 1.", "segment0: engine of", "layers", "plugin aten::cummax.default", "batch in [1, 5]"):
        assert word in text
    assert "tensorrt_rtx" in repr(loaded)
    with pytest.raises(tb.BackendError, match=r"run on a CUDA device, and torch sees none here.*onnxruntime"):
        loaded(*ARGS)
    assert copy.deepcopy(loaded).program is loaded.program
    stages = [name for name, _ in phases]
    # "parse" comes where there are several engines: not where the plugin is inside one (TensorRT-RTX from 1.7 on).
    assert list(dict.fromkeys(s for s in stages if ":" not in s and s != "parse")) == [
        *("trace", "export", "passes", "verify", "partition", "build")
    ]
    builds = [fraction for name, fraction in phases if name.startswith("build: ")]
    assert len(builds) > 10, "the builder's own phases are reported"
    assert 0.0 <= min(builds) <= max(builds) <= 1.0


def test_a_shape_seen_before_lets_nothing_else_pass() -> None:
    """Calls with known shapes are checked at a glance: kinds still count, and sizes as a whole."""

    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    batch = tb.Dim("batch", min=1, max=8)
    shapes = {"x": {0: batch}, "y": {0: batch}}
    module = tb.convert(Both(), (torch.ones(2, 3), torch.ones(2, 3)), dynamic_shapes=shapes, backend="onnxruntime")
    two, three = torch.ones(2, 3), torch.ones(3, 3)
    for _ in range(2):
        torch.testing.assert_close(module(two, two), two + two)
        torch.testing.assert_close(module(three, y=three), three + three)
        torch.testing.assert_close(module(three, three), three + three)
        with pytest.raises(tb.InputError, match=r"Input x: expected torch\.float32, got torch\.float64"):
            module(two.double(), two)
        with pytest.raises(tb.InputError, match="they must agree"):
            module(two, three)
        with pytest.raises(tb.InputError, match="expected a tensor"):
            module(two, 3.0)
        with pytest.raises(tb.InputError, match="missing y"):
            module(two)
