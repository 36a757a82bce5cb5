"""The ops that ship, on a GPU: their Triton kernels against the references, in CUDA graphs, and in converted models.

On a machine without a GPU but with Triton the kernels run interpreted, on small sizes (Triton 3.6 wants numpy < 2.4)::

    TRTBRIDGE_GPU_TESTS_ON_CPU=1 TRITON_INTERPRET=1 python -m pytest tests/gpu/test_shipped_ops.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DRY_RUN

import trtbridge as tb
from trtbridge.plugins import batched_nms as nms_module
from trtbridge.plugins import deformable_attention as attention_module
from trtbridge.plugins import deformable_convolution as convolution_module
from trtbridge.plugins import selective_scan as scan_module
from trtbridge.plugins import triton_support

pytestmark = pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="no CUDA device")

ops = torch.ops.trtbridge
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(DRY_RUN, reason="dry run on a CPU: this is about CUDA alone")

Call = tuple[Any, ...]


@pytest.fixture(autouse=True)
def _kernels_run(device: torch.device) -> None:
    """Without Triton these tests would compare the references with themselves."""
    if not triton_support.use_kernel(torch.empty(1, device=device)):
        pytest.skip("no Triton here" if not triton_support.triton_installed() else "TRITON_INTERPRET=1 is not set")


def close(got: torch.Tensor, exact: torch.Tensor, factor: float = 2.0) -> None:
    """Within a few roundings of the result's dtype, relative to the largest; float32 within 1e-5."""
    assert got.shape == exact.shape
    tolerance = max(factor * torch.finfo(got.dtype).eps, 1e-5)
    scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(got.double().cpu(), exact.double().cpu(), rtol=tolerance, atol=tolerance * scale)


def exactly(call: Call) -> list[Any]:
    """The same arguments in float64 on the CPU, so that a reference gives what a kernel should."""
    return [
        (value.double() if value.is_floating_point() else value).cpu() if isinstance(value, torch.Tensor) else value
        for value in call
    ]


# Arguments. Those of a size are the same for every dtype, up to rounding.


def attention_call(
    n: int, q: int, heads: int, dim: int, points: int, levels: list[tuple[int, int]], dtype: torch.dtype, device: Any
) -> Call:
    shapes = torch.tensor(levels)
    sizes = shapes.prod(1)
    value = torch.randn(n, int(sizes.sum()), heads, dim)
    locations = torch.rand(n, q, heads, len(levels), points, 2) * 1.4 - 0.2
    weights = torch.rand(n, q, heads, len(levels) * points).softmax(-1).view(n, q, heads, len(levels), points)
    starts = sizes.cumsum(0) - sizes
    return (
        value.to(device, dtype), shapes.to(device), starts.to(device),
        locations.to(device, dtype), weights.to(device, dtype),
    )  # fmt: skip


def convolution_call(
    n: int,
    channels: int,
    out_channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    options: tuple[list[int], list[int], list[int], int, int],
    dtype: torch.dtype,
    device: Any,
    extras: bool = True,
) -> Call:
    stride, padding, dilation, groups, offset_groups = options
    out = [
        (a + 2 * p - d * (k - 1) - 1) // s + 1
        for a, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    taps = offset_groups * kernel[0] * kernel[1]
    tensors: list[torch.Tensor | None] = [
        torch.randn(n, channels, *size),
        torch.randn(out_channels, channels // groups, *kernel) / (channels // groups * kernel[0] * kernel[1]) ** 0.5,
        torch.randn(n, 2 * taps, *out) * 2,
        torch.rand(n, taps, *out) if extras else None,
        torch.randn(out_channels) if extras else None,
    ]
    return (*(None if tensor is None else tensor.to(device, dtype) for tensor in tensors), *options)


def nms_call(count: int, classes: int, dtype: torch.dtype, device: Any, shift: float = 0.0) -> Call:
    """Boxes on integer coordinates that every dtype holds exactly (bfloat16 up to 256), so that all decide alike."""
    low = torch.randint(0, 150, (count, 2))
    boxes = torch.cat([low, low + torch.randint(0, 100, (count, 2))], 1) + shift
    scores = torch.randint(0, 200, (count,)) / 256
    return boxes.to(device, dtype), scores.to(device, dtype), torch.randint(0, classes, (count,)).to(device)


def scan_call(n: int, dim: int, states: int, length: int, full: bool, dtype: torch.dtype, device: Any) -> Call:
    sequence = [torch.randn(n, dim, length), torch.randn(n, dim, length) if full else torch.rand(n, dim, length)]
    matrices = [-torch.rand(dim, states) * 4, torch.randn(n, states, length), torch.randn(n, states, length)]
    extras = [torch.randn(dim), torch.randn(n, dim, length), torch.randn(dim) - 3] if full else [None] * 3
    tensors = [*sequence, *matrices, *extras]
    # As in Mamba, what is a parameter stays in float32.
    moved = [None if t is None else t.to(device, dtype if t.dim() == 3 else torch.float32) for t in tensors]
    return (*moved, full)


ATTENTION = [
    (1, 1, 1, 1, 1, [(1, 1)]),
    (2, 7, 3, 33, 4, [(5, 7), (3, 3), (1, 2)]),
    (1, 33, 2, 32, 3, [(12, 17), (6, 9), (3, 5), (2, 3)]),
    (3, 5, 1, 128, 2, [(4, 4)]),
]
PLAIN: tuple[list[int], list[int], list[int], int, int] = ([1, 1], [0, 0], [1, 1], 1, 1)
CONVOLUTION = [
    (1, 1, 1, (1, 1), (1, 1), PLAIN),
    (2, 6, 4, (9, 13), (3, 3), ([1, 2], [1, 2], [1, 2], 2, 3)),
    (1, 33, 7, (7, 5), (3, 2), ([2, 1], [1, 1], [1, 1], 1, 1)),
    (3, 8, 8, (6, 6), (3, 3), ([1, 1], [1, 1], [1, 1], 4, 2)),
]
SCAN = [(1, 1, 1, 1), (2, 3, 16, 33), (1, 7, 5, 7), (1, 2, 7, 300), (1, 2, 130, 20)]
NMS = [(1, 1), (7, 2), (33, 1), (70, 3)]
THRESHOLDS = [0.0, 0.3, 0.5, 0.7]
if DRY_RUN:
    DTYPES, THRESHOLDS = DTYPES[:2], THRESHOLDS[1:2]  # the interpreter is slow
else:
    levels = [(100, 134), (50, 67), (25, 34), (13, 17)]
    ATTENTION += [(2, 301, 8, 32, 4, levels), (1, 2049, 7, 24, 3, levels)]
    CONVOLUTION += [(2, 256, 256, (56, 56), (3, 3), ([1, 1], [1, 1], [1, 1], 1, 1))]
    CONVOLUTION += [(1, 130, 65, (57, 55), (5, 5), ([2, 2], [2, 2], [1, 1], 5, 2))]
    SCAN += [(2, 129, 16, 2048), (1, 64, 33, 1001), (1, 5, 1, 5000)]
    NMS += [(1000, 1), (1023, 80), (4001, 1), (9001, 3)]


# Numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION)
def test_deformable_attention(case: Any, dtype: torch.dtype, device: torch.device) -> None:
    call = attention_call(*case, dtype, device)
    close(ops.deformable_attention(*call), attention_module.reference(*exactly(call)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("case", CONVOLUTION)
def test_deform_conv2d(case: Any, extras: bool, dtype: torch.dtype, device: torch.device) -> None:
    call = convolution_call(*case, dtype, device, extras)
    close(ops.deform_conv2d(*call), convolution_module.reference(*exactly(call)), factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("case", NMS)
def test_batched_nms(case: Any, threshold: float, dtype: torch.dtype, device: torch.device) -> None:
    boxes, scores, idxs = nms_call(*case, dtype, device)
    count = len(boxes)
    expected, number = nms_module.reference(boxes.cpu().float(), scores.cpu(), idxs.cpu(), threshold, count)
    kept = int(number)
    got = ops.batched_nms(boxes, scores, idxs, threshold)
    assert torch.equal(got.cpu(), expected[:kept])
    assert torch.equal(ops.batched_nms(boxes, scores, idxs, threshold, 5), got[:5])
    for limit in (5, count + 100):
        padded, found = ops.batched_nms_padded(boxes, scores, idxs, threshold, limit)
        assert int(found) == min(kept, limit)
        assert torch.equal(padded[: int(found)], got[:limit])
        assert (padded[int(found) :] == -1).all()


@pytest.mark.parametrize("shift", [2.0**20, 2.0**22])
def test_batched_nms_at_large_coordinates(shift: float, device: torch.device) -> None:
    boxes, scores, idxs = nms_call(200, 1000, torch.float32, device, shift)
    idxs = idxs * 1_000_000_007
    near = nms_module.reference(boxes.cpu() - shift, scores.cpu(), idxs.cpu(), 0.4, 200)
    got = ops.batched_nms_padded(boxes, scores, idxs, 0.4, 200)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, near, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("case", SCAN)
def test_selective_scan(case: Any, full: bool, dtype: torch.dtype, device: torch.device) -> None:
    call = scan_call(*case, full, dtype, device)
    expected, expected_state = scan_module.reference(*exactly(call))
    y, state = ops.selective_scan_with_state(*call)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    close(y, expected)
    close(state, expected_state)
    assert torch.equal(ops.selective_scan(*call), y)


def test_softplus_keeps_the_digits_of_small_steps(device: torch.device) -> None:
    """log(1 + eˣ) in float32 would be 4 % off at x = -14; Mamba's steps begin at 0.001."""
    call = list(scan_call(1, 4, 8, 65, True, torch.float32, device))
    call[1] = torch.linspace(-20, 25, 65, device=device).expand(1, 4, 65)
    call[5] = call[6] = call[7] = None
    y, _ = scan_module.reference(*exactly(tuple(call)))
    torch.testing.assert_close(ops.selective_scan(*call).double().cpu()[..., 0], y[..., 0], rtol=1e-5, atol=0)
    close(ops.selective_scan(*call), y)


def test_nothing_to_do(device: torch.device) -> None:
    value, shapes, starts, locations, weights = attention_call(2, 5, 2, 4, 3, [(3, 3)], torch.float16, device)
    assert ops.deformable_attention(value, shapes, starts, locations[:, :0], weights[:, :0]).shape == (2, 0, 8)
    assert not ops.deformable_attention(value[:, :0], shapes * 0, starts, locations, weights).any()
    empty = convolution_call(0, 4, 6, (5, 5), (3, 3), PLAIN, torch.float16, device)
    assert ops.deform_conv2d(*empty).shape == (0, 6, 3, 3)
    assert ops.batched_nms(*nms_call(0, 1, torch.float16, device), 0.5).shape == (0,)
    padded, found = ops.batched_nms_padded(*nms_call(0, 1, torch.float16, device), 0.5, 3)
    assert (padded.tolist(), int(found)) == ([-1, -1, -1], 0)
    assert ops.selective_scan(*scan_call(2, 3, 4, 0, True, torch.float16, device)).shape == (2, 3, 0)


def test_invalid_points_count_as_zero(device: torch.device) -> None:
    value, shapes, starts, locations, weights = attention_call(*ATTENTION[1], torch.float32, device)
    value[:, 0] = float("inf")  # what is not asked for must not leak in
    call = list(convolution_call(1, 4, 6, (5, 5), (3, 3), PLAIN, torch.float32, device))
    call[0][:, :, 0, 0] = float("inf")
    for invalid in (float("nan"), float("inf"), -float("inf"), 1e30):
        far = torch.full_like(locations, invalid)
        assert not ops.deformable_attention(value, shapes, starts, far, weights).any()
        call[2] = torch.full_like(call[2], invalid)
        assert torch.equal(ops.deform_conv2d(*call), call[4][:, None, None].expand(1, 6, 3, 3))


def test_any_memory_layout(device: torch.device) -> None:
    """Transposed, sliced and expanded arguments give what contiguous ones give."""

    def strange(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        padded = value.new_zeros([2 * size + 1 for size in reversed(value.shape)])
        view = padded[tuple(slice(1, None, 2) for _ in value.shape)].permute(*reversed(range(value.dim())))
        return view.copy_(value)

    half = torch.float16
    for op, call in (
        (ops.deformable_attention, attention_call(*ATTENTION[1], half, device)),
        (ops.deform_conv2d, convolution_call(*CONVOLUTION[1], half, device)),
        (ops.batched_nms, (*nms_call(33, 2, half, device), 0.5)),
        (ops.selective_scan, scan_call(*SCAN[1], True, half, device)),
    ):
        got = op(*map(strange, call))
        assert got.is_contiguous()
        assert torch.equal(got, op(*call))


@needs_gpu
def test_a_large_batch_of_convolutions_goes_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = convolution_call(7, 8, 6, (20, 20), (3, 3), PLAIN, torch.float32, device)
    expected = ops.deform_conv2d(*call)
    monkeypatch.setattr(convolution_module, "_COLUMN_BYTES", 3 * 8 * 9 * 18 * 18 * 4)
    close(ops.deform_conv2d(*call), expected)


# Against others


@needs_gpu
def test_deform_conv2d_and_torchvision(device: torch.device) -> None:
    theirs = pytest.importorskip("torchvision").ops.deform_conv2d
    for case, extras in itertools.product(CONVOLUTION, (True, False)):
        call = convolution_call(*case, torch.float32, device, extras)
        image, weight, offset, mask, bias, stride, padding, dilation, *_ = call
        close(ops.deform_conv2d(*call), theirs(image, offset, weight, bias, stride, padding, dilation, mask), 100.0)


@needs_gpu
@pytest.mark.parametrize("count", [1, 100, 4000])
@pytest.mark.parametrize("classes", [1, 20])
def test_batched_nms_and_torchvision(count: int, classes: int, device: torch.device) -> None:
    theirs = pytest.importorskip("torchvision").ops
    boxes, _, idxs = nms_call(count, classes, torch.float32, device)
    scores = torch.randperm(count).to(device) / count  # torchvision leaves the order of equal scores open
    for threshold in (0.25, 0.5):
        got = ops.batched_nms(boxes, scores, idxs, threshold)
        assert torch.equal(got, theirs.batched_nms(boxes, scores, idxs, threshold))
        got = ops.batched_nms(boxes, scores, idxs * 0, threshold)
        assert torch.equal(got, theirs.nms(boxes, scores, threshold))


# In CUDA graphs


def capturable(dtype: torch.dtype, device: Any) -> dict[str, tuple[Callable[..., Any], Callable[[], Call]]]:
    """Each op whose result has a fixed size, with a maker of fresh arguments."""
    plan = ([1, 1], [1, 1], [1, 1], 1, 1)
    return {
        "deformable_attention": (
            ops.deformable_attention,
            lambda: attention_call(2, 100, 8, 32, 4, [(16, 17), (8, 9)], dtype, device),
        ),
        "deform_conv2d": (
            ops.deform_conv2d,
            lambda: convolution_call(2, 32, 33, (28, 27), (3, 3), plan, dtype, device),
        ),
        "batched_nms_padded": (ops.batched_nms_padded, lambda: (*nms_call(5000, 3, dtype, device), 0.5, 300)),
        "batched_nms_padded, few": (ops.batched_nms_padded, lambda: (*nms_call(100, 3, dtype, device), 0.5, 300)),
        "selective_scan": (ops.selective_scan_with_state, lambda: scan_call(2, 65, 16, 300, True, dtype, device)),
    }


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(capturable(torch.float32, "cpu")))
def test_in_a_cuda_graph(name: str, dtype: torch.dtype, device: torch.device) -> None:
    op, fresh = capturable(dtype, device)[name]
    static = fresh()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*static)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # nothing is read back to the host
    try:
        op(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = op(*static)
    for _ in range(3):
        new = fresh()
        for old, value in zip(static, new, strict=True):
            if isinstance(old, torch.Tensor):
                old.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = op(*new)
        for got, wanted in zip(
            held if isinstance(held, (tuple, list)) else [held],
            expected if isinstance(expected, (tuple, list)) else [expected],
            strict=True,
        ):
            assert torch.equal(got, wanted)


# In converted models


class Attention(torch.nn.Module):
    """Deformable attention between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.where, self.weights = torch.nn.Linear(32, 2 * 2 * 3 * 2), torch.nn.Linear(32, 2 * 2 * 3)
        self.register_buffer("shapes", torch.tensor([(4, 5), (2, 3)]))
        self.register_buffer("starts", torch.tensor([0, 20]))

    def forward(self, queries: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        n, q = queries.shape[:2]
        values = self.values(pixels).view(n, -1, 2, 16)
        where = self.where(queries).sigmoid().view(n, q, 2, 2, 3, 2)
        weights = self.weights(queries).view(n, q, 2, 6).softmax(-1).view(n, q, 2, 2, 3)
        return self.out(ops.deformable_attention(values, self.shapes, self.starts, where, weights))


class Convolution(torch.nn.Module):
    """A deformable convolution with offsets and masks of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.offsets = torch.nn.Conv2d(16, 27, 3, stride=2, padding=1)
        self.weight = torch.nn.Parameter(torch.randn(8, 16, 3, 3) / 12)
        self.bias = torch.nn.Parameter(torch.randn(8))
        self.head = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        offset, mask = self.offsets(x).split([18, 9], 1)
        return self.head(ops.deform_conv2d(x, self.weight, offset, mask.sigmoid(), self.bias, [2, 2], [1, 1]).relu())


class Detector(torch.nn.Module):
    """The best 20 boxes; whatever runs its layers is exact, so that none of them changes places."""

    def forward(
        self, boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices, count = ops.batched_nms_padded(boxes * 2, scores * 0.5, idxs, 0.5, 20)
        return boxes[indices.clamp(min=0)] * (indices >= 0)[:, None], count


class FreeDetector(torch.nn.Module):
    """As many of the best boxes as there are."""

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor) -> torch.Tensor:
        return ops.batched_nms(boxes * 2, scores * 0.5, idxs, 0.5)


class Mixer(torch.nn.Module):
    """The part of a Mamba block around the scan."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = torch.nn.Linear(16, 64), torch.nn.Linear(32, 16)
        self.parameters_of_x, self.steps = torch.nn.Linear(32, 4 + 32), torch.nn.Linear(4, 32)
        self.a_log, self.d = torch.nn.Parameter(torch.rand(32, 16)), torch.nn.Parameter(torch.randn(32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, gate = self.inner(tokens).chunk(2, -1)
        low, b, c = self.parameters_of_x(x).split([4, 16, 16], -1)
        args = (x.mT, (low @ self.steps.weight.T).mT, -self.a_log.exp(), b.mT, c.mT, self.d, gate.mT, self.steps.bias)
        return self.out(ops.selective_scan(*args, True).mT)


def models(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[torch.nn.Module, Callable[[int], Call], Any]]:
    """Each op in a model, with a maker of arguments for a size, and what is dynamic."""

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(device, dtype)

    size = tb.Dim("size", min=2, opt=8, max=64)

    def boxes(n: int) -> Call:
        return nms_call(n, 2, dtype, device)

    return {
        "attention": (Attention(), lambda n: (some(2, n, 32), some(2, 26, 32)), ({1: size}, None)),
        "convolution": (Convolution(), lambda n: (some(n, 3, 21, 19),), ({0: size},)),
        "padded nms": (Detector(), boxes, ({0: size}, {0: size}, {0: size})),
        "nms": (FreeDetector(), boxes, ({0: size}, {0: size}, {0: size})),
        "scan": (Mixer(), lambda n: (some(2, n, 16),), ({1: size},)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", list(models(torch.float32, torch.device("cpu"))))
def test_in_a_converted_model(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    model, fresh, shapes = models(dtype, device)[name]
    model = model.eval().to(device, dtype)
    fast = tb.convert(model, fresh(8), dynamic_shapes=shapes, backend=backend)
    for n in (8, 2) if DRY_RUN else (8, 2, 33, 64):
        call = fresh(n)
        with torch.no_grad():
            expected = model(*call)
        got = fast(*call)
        for ours, theirs in zip(
            got if isinstance(got, (tuple, list)) else [got],
            expected if isinstance(expected, (tuple, list)) else [expected],
            strict=True,
        ):
            assert ours.dtype == theirs.dtype
            if theirs.is_floating_point():
                close(ours, theirs, factor=10.0 if dtype == torch.float16 else 1000.0)
            else:
                assert torch.equal(ours, theirs)
