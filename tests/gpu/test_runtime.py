"""EngineModule where it runs: streams, lifetimes, checks of inputs, threads, plugins, files, caches and CUDA graphs."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DRY_RUN, Report, leaves
from torch.nn import functional as F

import trtbridge as tb

BATCH = tb.Dim("batch", min=1, opt=4, max=16)
SLEEP_CYCLES = 400_000_000  # at about 2 GHz, some 0.2 s on the GPU

Example = tuple[torch.Tensor, ...]


class Net(torch.nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Fn(torch.nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: torch.Tensor) -> Any:
        return self.fn(*args)


@torch.library.custom_op("trtbridge_gpu_tests::bend", mutates_args=())
def bend(x: torch.Tensor, strength: float, twice: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A user's op with attributes and two results."""
    bent = torch.sin(x * strength)
    return (bent * 2 if twice else bent.clone()), bent.sum(-1)


@bend.register_fake
def _(x: torch.Tensor, strength: float, twice: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1])


@dataclass
class Scores:
    """A result with names."""

    logits: torch.Tensor
    best: torch.Tensor
    note: str


def picture(batch: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(seed)).to(device)


def close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Same shapes and dtypes, and values within a tolerance relative to the largest."""
    ours, theirs = leaves(got), leaves(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        scale = max(1.0, float(b.abs().max())) if b.is_floating_point() and b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale)


def convert(module: torch.nn.Module, example: Example, backend: str, **options: Any) -> tb.EngineModule:
    """Convert with the first dimension of every argument dynamic."""
    shapes = tuple({0: BATCH} for _ in example)
    if isinstance(module, Fn):
        return tb.convert(module, example, dynamic_shapes={"args": shapes}, backend=backend, **options)
    return tb.convert(module, example, dynamic_shapes=shapes, backend=backend, **options)


@pytest.fixture(scope="session")
def eager(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    return Net().eval().to(device)


@pytest.fixture(scope="session")
def net(eager: torch.nn.Module, backend: str, device: torch.device) -> tb.EngineModule:
    """The small network, converted."""
    return convert(eager, (picture(4, device),), backend)


def cummax_net(x: torch.Tensor) -> torch.Tensor:
    values, indices = torch.cummax(F.relu(x @ x.transpose(1, 2)), 2)
    return torch.tanh(values) + indices.to(values.dtype) * 0.1


@pytest.fixture(scope="session")
def plugin_net(backend: str, device: torch.device) -> tb.EngineModule:
    """A plugin between two segments."""
    return convert(Fn(cummax_net), (torch.randn(4, 8, 8, device=device),), backend)


@dataclass(frozen=True)
class Subject:
    """A converted module and the shape of its input behind the batch."""

    module: tb.EngineModule
    shape: tuple[int, ...]

    def input(self, batch: int, device: torch.device) -> torch.Tensor:
        return torch.randn(batch, *self.shape, device=device)


@pytest.fixture(params=["one engine", "plugin between engines"])
def subject(request: pytest.FixtureRequest, net: tb.EngineModule, plugin_net: tb.EngineModule) -> Subject:
    """Each of the two, in turn."""
    return Subject(net, (3, 24, 24)) if request.param == "one engine" else Subject(plugin_net, (8, 8))


# Numbers and what comes back


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_results_are_those_of_pytorch(
    net: tb.EngineModule, eager: torch.nn.Module, device: torch.device, batch: int
) -> None:
    x = picture(batch, device, batch)
    y = net(x)
    close(y, eager(x).detach())
    assert not y.requires_grad
    kept = y.clone()
    net(picture(batch, device, 99))
    assert torch.equal(y, kept), "a later call must not change an earlier result"


def test_a_module_on_the_cpu_becomes_one_on_the_gpu(backend: str, cuda: torch.device) -> None:
    torch.manual_seed(1)
    module = Net()
    converted = convert(module, (picture(4, torch.device("cpu")),), backend)
    assert module.training
    assert next(module.parameters()).device.type == "cpu"
    assert converted.device == cuda
    x = picture(5, cuda)
    close(converted(x), module.eval().to(cuda)(x).detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_modules(eager: torch.nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    module = copy.deepcopy(eager).to(dtype)
    converted = convert(module, (picture(4, device).to(dtype),), backend)
    x = picture(7, device, 3).to(dtype)
    y = converted(x)
    assert y.dtype == dtype
    close(y, module(x).detach(), 0.02 if dtype == torch.float16 else 0.06)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_networks(backend: str, device: torch.device, kind: str) -> None:
    torch.manual_seed(2)
    module = getattr(torch.nn, kind)(12, 20, num_layers=2, bidirectional=True, batch_first=True).to(device).eval()
    converted = tb.convert(
        module, (torch.randn(4, 9, 12, device=device),), dynamic_shapes=({0: BATCH},), backend=backend
    )
    x = torch.randn(6, 9, 12, device=device)
    with torch.no_grad():
        close(converted(x), module(x), 1e-3)


def test_dicts_go_in_and_dataclasses_come_out(backend: str, device: torch.device) -> None:
    class Classifier(torch.nn.Module):
        def forward(self, batch: dict[str, torch.Tensor], *, scale: torch.Tensor) -> Scores:
            logits = batch["image"].flatten(1) * scale + batch["prior"]
            return Scores(logits, logits.argmax(1), "made here")

    def arguments(size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        image = torch.randn(size, 2, 5, device=device)
        return {"image": image, "prior": torch.randn(10, device=device)}, torch.rand((), device=device)

    batch, scale = arguments(4)
    converted = tb.convert(
        Classifier(),
        (batch,),
        {"scale": scale},
        dynamic_shapes={"batch": {"image": {0: BATCH}}},
        backend=backend,
    )
    batch, scale = arguments(9)
    got, expected = converted(batch, scale=scale), Classifier()(batch, scale=scale)
    assert isinstance(got, Scores)
    assert got.note == "made here"
    close([got.logits, got.best], [expected.logits, expected.best])


def test_integer_and_bool_inputs(backend: str, device: torch.device) -> None:
    table = torch.nn.Embedding(50, 8).to(device)

    def embed(ids: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
        words = table(ids) * mask.unsqueeze(-1)
        return words.sum(1), ids + shift, mask & (shift > 1)

    def arguments(size: int) -> Example:
        ids = torch.randint(0, 50, (size, 6), device=device)
        return ids, ids > 20, torch.randint(0, 4, (size, 6), device=device, dtype=torch.int32)

    class Embedder(Fn):
        def __init__(self) -> None:
            super().__init__(embed)
            self.table = table

    converted = convert(Embedder(), arguments(4), backend)
    given = arguments(11)
    close(converted(*given), [t.detach() for t in embed(*given)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16], ids=str)
def test_types_that_engines_lack(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    def compute(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + x, y * x.to(y.dtype)

    def arguments(size: int) -> Example:
        return torch.randint(0, 20, (size, 5), device=device).to(dtype), torch.randn(size, 5, device=device)

    converted = convert(Fn(compute), arguments(4), backend)
    given = arguments(6)
    close(converted(*given), compute(*given))


def test_forwarded_inputs_and_constants_are_copies(backend: str, device: torch.device) -> None:
    constant = torch.arange(3.0, device=device)
    converted = convert(Fn(lambda x: (x, constant * 1, x + 1)), (torch.randn(4, 3, device=device),), backend)
    x = torch.randn(5, 3, device=device)
    before = x.clone()
    for result in converted(x):
        result.zero_()
    close([x, *converted(x)], [before, before, constant, before + 1])


# Inputs: strides, checks


def test_inputs_in_any_layout(net: tb.EngineModule, eager: torch.nn.Module, device: torch.device) -> None:
    storage = torch.randn(2 * 6 * 3 * 24 * 24 + 1, device=device)
    layouts = {
        "transposed": picture(6, device).transpose(2, 3),
        "sliced": torch.randn(12, 3, 24, 24, device=device)[::2],
        "channels last": picture(6, device).contiguous(memory_format=torch.channels_last),
        "expanded": picture(1, device).expand(6, 3, 24, 24),
        "unaligned": storage[1 : 1 + 6 * 3 * 24 * 24].view(6, 3, 24, 24),
        "reversed": picture(6, device).flip(0),
    }
    for name, x in layouts.items():
        before = x.clone()
        close(net(x), eager(x).detach())
        assert torch.equal(x, before), name


WRONG = {
    "dtype": (lambda x: x.half(), r"Input x: expected torch\.float32, got torch\.float16"),
    "rank": (lambda x: x[0], "Input x: expected rank 4"),
    "static size": (lambda x: x[:, :, :20], r"Input x: expected size 24 in dimension 2"),
    "empty": (lambda x: x[:0], "Input x: dimension 0 is batch.*from 1 to 16, got 0"),
    "too large": (lambda x: x.repeat(5, 1, 1, 1), "Input x: dimension 0 is batch.*from 1 to 16, got 20"),
    "no tensor": (lambda x: 3.0, "Input x: expected a tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_named(net: tb.EngineModule, eager: torch.nn.Module, device: torch.device, what: str) -> None:
    spoil, words = WRONG[what]
    with pytest.raises(tb.InputError, match=words):
        net(spoil(picture(4, device)))
    close(net(picture(3, device)), eager(picture(3, device)).detach())


def test_inputs_on_another_device_are_named(net: tb.EngineModule, cuda: torch.device) -> None:
    with pytest.raises(tb.InputError, match=f"Input x: expected it on {cuda}, got cpu"):
        net(picture(4, torch.device("cpu")))


def test_all_wrong_inputs_are_named_at_once(backend: str, device: torch.device) -> None:
    converted = convert(Fn(torch.add), (torch.randn(4, 3, device=device), torch.randn(4, 3, device=device)), backend)
    with pytest.raises(tb.InputError) as caught:
        converted(torch.randn(4, 3, 1, device=device), torch.zeros(4, 3, device=device, dtype=torch.int64))
    assert "args[0]" in str(caught.value)
    assert "args[1]" in str(caught.value)
    with pytest.raises(tb.InputError, match="batch is 5"):
        converted(torch.randn(4, 3, device=device), torch.randn(5, 3, device=device))


# Streams and lifetimes


@pytest.fixture(params=["default", "side"])
def stream(request: pytest.FixtureRequest, cuda: torch.device) -> torch.cuda.Stream:
    """The stream of the caller."""
    return torch.cuda.default_stream() if request.param == "default" else torch.cuda.Stream()


def test_work_is_ordered_with_the_callers_stream(
    subject: Subject, stream: torch.cuda.Stream, cuda: torch.device
) -> None:
    with torch.cuda.stream(stream):
        old, new = subject.input(4, cuda), subject.input(4, cuda)
        expected = subject.module(new)
        subject.module(old)
        x = old.clone()
        stream.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(new)  # the engine must not read before this
        y = subject.module(x)
        after = y * 2  # and this must not read before the engine has written
        x.zero_()  # nor may this come before the engine has read
    stream.synchronize()
    close(after, expected * 2)


def test_a_call_returns_before_the_work_is_done(
    net: tb.EngineModule, stream: torch.cuda.Stream, cuda: torch.device
) -> None:
    with torch.cuda.stream(stream):
        x = picture(4, cuda)
        for _ in range(3):
            net(x)
        stream.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        net(x)
        assert not stream.query(), "the call waited for the work before it"
    stream.synchronize()


def test_inputs_live_until_they_were_read(
    net: tb.EngineModule, eager: torch.nn.Module, stream: torch.cuda.Stream, cuda: torch.device
) -> None:
    with torch.cuda.stream(stream):
        x = picture(16, cuda, 5)
        expected = eager(x).detach()
        net(x)
        stream.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        y = net(x.clone())  # freed as soon as the call returns
        junk = [torch.full_like(x, float("nan")) for _ in range(8)]
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            junk += [torch.full_like(x, float("nan")) for _ in range(8)]
    torch.cuda.synchronize()
    close(y, expected)
    assert len(junk) == 16


def test_results_live_until_they_were_read(net: tb.EngineModule, stream: torch.cuda.Stream, cuda: torch.device) -> None:
    with torch.cuda.stream(stream):
        first, second = picture(16, cuda, 6), picture(16, cuda, 7)
        expected = net(first).clone()
        net(second)
        stream.synchronize()
        y = net(first)
        torch.cuda._sleep(SLEEP_CYCLES)
        late = y * 1
        del y  # its memory may be given to the next call only behind the line above
        for _ in range(4):
            net(second)
    stream.synchronize()
    close(late, expected)


def test_memory_does_not_grow(net: tb.EngineModule, cuda: torch.device) -> None:
    def run() -> tuple[int, int]:
        for index in range(100):
            net(picture(1 + index % 16, cuda))
        gc.collect()
        torch.cuda.synchronize()
        torch.empty(1, device=cuda)  # lets the allocator take back what waited for events
        return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]

    run()
    allocated, free = run()
    again, free_again = run()
    assert again == allocated
    if "PYTEST_XDIST_WORKER" not in os.environ:  # else other processes take memory of the same GPU
        assert free - free_again < 64 << 20


# Under what a caller may switch on


def test_modes_of_pytorch(net: tb.EngineModule, eager: torch.nn.Module, device: torch.device) -> None:
    x = picture(4, device, 8)
    expected = eager(x).detach()
    with torch.inference_mode():
        close(net(x), expected)
        close(net(x.clone()), expected)
    with torch.no_grad():
        close(net(x), expected)
    with torch.autocast(device.type, torch.bfloat16):
        close(net(x), expected)
    y = net(x.clone().requires_grad_())
    assert not y.requires_grad
    close(y, expected)


def test_plugins_under_autocast(plugin_net: tb.EngineModule, device: torch.device) -> None:
    x = torch.randn(4, 8, 8, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        y = plugin_net(x)
    close(y, cummax_net(x))


@pytest.mark.parametrize("own_streams", [False, True])
def test_threads(subject: Subject, own_streams: bool, device: torch.device) -> None:
    if own_streams and DRY_RUN:
        pytest.skip("dry run on a CPU: this is about CUDA alone")
    converted = subject.module
    inputs = [subject.input(1 + index, device) for index in range(16)]
    expected = [converted(x).clone() for x in inputs]
    if device.type == "cuda":
        torch.cuda.synchronize()

    def work(thread: int) -> None:
        if not own_streams:
            for index in range(40):
                pick = (thread * 5 + index) % 16
                close(converted(inputs[pick]), expected[pick])
            return
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for index in range(40):
                pick = (thread * 5 + index) % 16
                y = converted(inputs[pick])
                stream.synchronize()
                close(y, expected[pick])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_inside_another_module(net: tb.EngineModule, eager: torch.nn.Module, device: torch.device) -> None:
    torch.manual_seed(3)
    whole = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), net, torch.nn.Linear(10, 2)).to(device).eval()
    reference = torch.nn.Sequential(whole[0], eager, whole[2])
    x = picture(4, device)
    with torch.no_grad():
        close(whole(x), reference(x))
    assert net.state_dict() == {}
    assert list(net.parameters()) == []
    assert set(whole.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    whole.load_state_dict(whole.state_dict())
    x.requires_grad_()
    loss = whole[2](whole[1](x)).sum()
    loss.backward()  # through what stands behind it
    assert whole[2].weight.grad is not None


def test_moving_explains_itself(net: tb.EngineModule, cuda: torch.device) -> None:
    with pytest.raises(tb.TrtBridgeError, match=r"cannot move from cuda:0 to cpu(.|\n)*tb\.load"):
        net.to("cpu")
    with pytest.raises(tb.TrtBridgeError, match=r"cannot move"):
        torch.nn.Sequential(net).cpu()
    with pytest.raises(tb.TrtBridgeError, match="Convert a module of that dtype"):
        net.half()
    assert net.to(cuda) is net


def test_deepcopy_outlives_the_original(eager: torch.nn.Module, backend: str, device: torch.device) -> None:
    original = convert(eager, (picture(4, device),), backend)
    copied = copy.deepcopy(torch.nn.Sequential(original))
    x = picture(5, device)
    expected = original(x).clone()
    del original
    gc.collect()
    close(copied(x), expected)


def test_a_device_that_is_not_the_current_one(eager: torch.nn.Module, backend: str, cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1)
    module = copy.deepcopy(eager).to(other)
    converted = convert(module, (picture(4, other),), backend, device=other)
    assert torch.cuda.current_device() == 0
    x = picture(6, other)
    close(converted(x), module(x).detach())
    with pytest.raises(tb.InputError, match=r"expected it on cuda:1, got cuda:0"):
        converted(picture(4, cuda))


# Plugins between engines


def parallel(x: torch.Tensor) -> torch.Tensor:
    a, b = F.relu(x) + 0.5, torch.tanh(x) * 2
    return torch.cummax(a, 1).values @ torch.cummin(b, 1).values.transpose(1, 2)


def first_and_last(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.cummax(x, 1)
    mixed = F.gelu(values * 2 + 1)
    lowest, places = torch.cummin(mixed, 2)
    return lowest, indices + places


def users_op(x: torch.Tensor) -> torch.Tensor:
    bent, sums = torch.ops.trtbridge_gpu_tests.bend(x * 2, 0.7, True)
    return F.softmax(bent, -1) + sums.unsqueeze(-1)


def only_a_plugin(x: torch.Tensor) -> torch.Tensor:
    return torch.cummax(x, 1).values


PLUGIN_MODELS = [cummax_net, parallel, first_and_last, users_op, only_a_plugin]


@pytest.mark.parametrize("fn", PLUGIN_MODELS, ids=lambda fn: fn.__name__)
def test_plugins(fn: Callable[..., Any], backend: str, device: torch.device, report: Report) -> None:
    converted = convert(Fn(fn), (torch.randn(4, 8, 8, device=device),), backend)
    program = converted.program
    report("plugins", model=fn.__name__, segments=len(program.engines), plugins=len(program.plugin_calls))
    for batch in (1, 4, 16):
        x = torch.randn(batch, 8, 8, device=device)
        close(converted(x), fn(x))
    if device.type == "cuda":
        x = torch.randn(4, 8, 8, device=device)
        expected = fn(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = converted(x)
        side.synchronize()
        close(y, expected)


def test_half_precision_plugins(backend: str, device: torch.device) -> None:
    x = torch.randn(4, 8, 8, device=device).half()
    converted = convert(Fn(users_op), (x,), backend)
    close(converted(x), users_op(x), 0.02)


def test_a_triton_kernel_is_a_plugin(backend: str, cuda: torch.device) -> None:
    pytest.importorskip("triton")
    from triton_ops import double_plus_one

    converted = convert(Fn(lambda x: torch.tanh(double_plus_one(x * 3))), (torch.randn(4, 8, 8, device=cuda),), backend)
    x = torch.randn(7, 8, 8, device=cuda)
    close(converted(x), torch.tanh(x * 6 + 1))


def test_a_failing_plugin_says_which(backend: str, device: torch.device) -> None:
    @torch.library.custom_op("trtbridge_gpu_tests::moody", mutates_args=())
    def moody(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:
            raise ValueError("not three")
        return x.clone()

    moody.register_fake(torch.empty_like)
    converted = convert(Fn(lambda x: moody(x * 2) + 1), (torch.randn(4, 3, device=device),), backend)
    with pytest.raises(tb.ExecutionError, match=r"trtbridge_gpu_tests::moody(.|\n)*not three"):
        converted(torch.ones(3, 3, device=device))
    close(converted(torch.ones(2, 3, device=device)), torch.full((2, 3), 3.0, device=device))


# Files and caches


def test_save_and_load(plugin_net: tb.EngineModule, device: torch.device, tmp_path: Path) -> None:
    path = tmp_path / "model.trtb"
    tb.save(plugin_net, path)
    loaded = tb.load(path, device)
    x = torch.randn(9, 8, 8, device=device)
    assert torch.equal(loaded(x), plugin_net(x))
    assert str(loaded.inspect()) == str(plugin_net.inspect())
    if device.type == "cuda":
        with pytest.raises(tb.BackendError, match="CUDA"):
            tb.load(path, "cpu")
        with pytest.raises(tb.BackendError, match="no device cuda:99"):
            tb.load(path, "cuda:99")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(tb.ModelFileError, match="damaged"):
        tb.load(path, device)


FIRST_CALL = """
import json, sys, time, torch
import trtbridge as tb
path, device, cache = sys.argv[1:]
x = torch.ones(4, 3, 24, 24, device=device)
started = time.perf_counter()
module = tb.load(path, device, cache_dir=cache)
loaded = time.perf_counter()
y = module(x)
total = float(y.sum())
print(json.dumps({"load": loaded - started, "call": time.perf_counter() - loaded, "sum": total}))
"""


def test_kernels_are_kept_between_processes(backend: str, cuda: torch.device, tmp_path: Path, report: Report) -> None:
    if backend != "tensorrt_rtx":
        pytest.skip(f"{backend} compiles no kernels at the first call")
    torch.manual_seed(4)
    body = [torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.GELU()) for _ in range(6)]
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5, padding=2), *body, torch.nn.Conv2d(16, 4, 3, stride=2))
    tb.save(convert(module.to(cuda), (picture(4, cuda),), backend, cache_dir=tmp_path / "other"), tmp_path / "m.trtb")
    cache = tmp_path / "cache"

    def first_call() -> dict[str, float]:
        command = [sys.executable, "-c", FIRST_CALL, str(tmp_path / "m.trtb"), str(cuda), str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (cache / "jit").glob("*.bin")}

    cold = first_call()
    files = kept()
    assert len(files) == 1
    assert min(files.values()) > 0
    warm = first_call()
    report(
        "jit cache",
        cold_load_s=round(cold["load"], 3),
        cold_call_s=round(cold["call"], 3),
        warm_load_s=round(warm["load"], 3),
        warm_call_s=round(warm["call"], 3),
        kib=round(sum(files.values()) / 1024, 1),
    )
    assert kept() == files
    assert warm["sum"] == cold["sum"]


def _flipped(data: bytes) -> bytes:
    """One bit in each 200 bytes changed: the library takes such kernels, and crashes."""
    changed = bytearray(data)
    for place in range(100, len(changed), 200):
        changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", [lambda _: b"not kernels" * 100, _flipped], ids=["other", "flipped"])
def test_a_damaged_kernel_cache_does_no_harm(
    eager: torch.nn.Module, backend: str, damage: Callable[[bytes], bytes], cuda: torch.device, tmp_path: Path
) -> None:
    if backend != "tensorrt_rtx":
        pytest.skip(f"{backend} compiles no kernels at the first call")
    converted = convert(eager, (picture(4, cuda),), backend, cache_dir=tmp_path)
    x = picture(4, cuda)
    expected = converted(x).clone()
    tb.save(converted, tmp_path / "m.trtb")
    (kept,) = (tmp_path / "jit").glob("*.bin")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    close(tb.load(tmp_path / "m.trtb", cuda, cache_dir=tmp_path)(x), expected)
    assert kept.read_bytes() != damage(whole), "made anew"


# CUDA graphs of the caller


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Capture a call as PyTorch's documentation says: warm up on a side stream, then capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def test_the_callers_cuda_graph(subject: Subject, cuda: torch.device) -> None:
    converted = copy.deepcopy(subject.module)
    static = subject.input(4, cuda)
    graph, outputs = capture(lambda: converted(static))
    for _ in range(3):
        x = subject.input(4, cuda)
        static.copy_(x)
        graph.replay()
        close(outputs, converted(x))
        # Calls with another shape in between use the same engine, and must not disturb the graph.
        converted(subject.input(9, cuda))


def test_two_cuda_graphs_of_one_module(net: tb.EngineModule, eager: torch.nn.Module, cuda: torch.device) -> None:
    converted = copy.deepcopy(net)
    small, large = picture(2, cuda), picture(16, cuda)
    graph_small, y_small = capture(lambda: converted(small))
    graph_large, y_large = capture(lambda: converted(large))
    for seed in range(3):
        small.copy_(picture(2, cuda, 10 + seed))
        large.copy_(picture(16, cuda, 20 + seed))
        graph_large.replay()
        graph_small.replay()
        close([y_small, y_large], [eager(small).detach(), eager(large).detach()])


def test_two_calls_in_one_cuda_graph(net: tb.EngineModule, eager: torch.nn.Module, cuda: torch.device) -> None:
    converted = copy.deepcopy(net)
    one, two = picture(4, cuda), picture(4, cuda, 1)
    graph, outputs = capture(lambda: converted(one) - converted(two))
    one.copy_(picture(4, cuda, 40))
    graph.replay()
    close(outputs, (eager(one) - eager(two)).detach())


def test_a_replay_and_calls_on_another_stream_do_not_collide(
    net: tb.EngineModule, eager: torch.nn.Module, cuda: torch.device
) -> None:
    converted = copy.deepcopy(net)
    static, other = picture(16, cuda, 30), picture(16, cuda, 31)
    graph, outputs = capture(lambda: converted(static))
    expected, expected_other = eager(static).detach(), eager(other).detach()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        graph.replay()
        with torch.cuda.stream(side):
            y = converted(other)
        torch.cuda.synchronize()
        close(outputs, expected)
        close(y, expected_other)


def test_call_overhead(net: tb.EngineModule, plugin_net: tb.EngineModule, device: torch.device, report: Report) -> None:
    """What a call costs the CPU; a number for the report."""
    for name, converted, x in (
        ("one engine", net, picture(1, device)),
        ("two engines and a plugin", plugin_net, torch.randn(1, 8, 8, device=device)),
    ):
        times = []
        for _ in range(20 if DRY_RUN else 200):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            converted(x)
            times.append(time.perf_counter() - started)
        report("overhead", model=name, cpu_us_per_call=round(1e6 * sorted(times)[len(times) // 2], 1))
        assert converted(x).shape[0] == 1
