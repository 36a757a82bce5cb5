"""The author's path on a GPU: the guide's Triton op, a new op in 15 lines, and what check() finds there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from guide import Guide, blocks
from helpers import DRY_RUN, Report

import trtbridge as tb
from trtbridge.plugins.check_report import CheckReport

ROOT = Path(__file__).parents[2]


def test_the_plugins_guide(backend: str, report: Report, tmp_path: Path) -> None:
    """Every file and command of the guide, those for a GPU included."""
    if not DRY_RUN:
        pytest.importorskip("triton")
    runner = Guide(tmp_path, gpu=not DRY_RUN)
    for block in blocks((ROOT / "docs" / "plugins.md").read_text()):
        assert runner.run(block) == ""
    found = re.search(r"the op, (.*): torch ([\d.]+) ms, Triton ([\d.]+) ms", runner.outputs[-1])
    if found:
        models = re.findall(r"the model: eager ([\d.]+) ms, converted ([\d.]+) ms", runner.outputs[-1])
        (eager, converted), (eager_plugin, converted_plugin) = models
        report(
            "authoring",
            op="edges::sobel",
            size=found[1],
            torch_ms=float(found[2]),
            triton_ms=float(found[3]),
            model_eager_ms=float(eager),
            model_converted_ms=float(converted),
            model_eager_plugin_ms=float(eager_plugin),
            model_converted_plugin_ms=float(converted_plugin),
        )


TRITON = """
import torch, triton, triton.language as tl
import trtbridge as tb

@triton.jit
def kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n).to(tl.float32)
    tl.store(y + i, (v / (1 + tl.abs(v))).to(y.dtype.element_ty), mask=i < n)

@tb.plugin("author::soft_sign", cpu=lambda x: x / (1 + x.abs()))
def soft_sign(x: torch.Tensor) -> torch.Tensor:
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel(): kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y
"""

TORCH = """
import torch
import trtbridge as tb

@tb.plugin("author::soft_sign")
def soft_sign(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.abs())
"""

USER = """
import sys
import torch
import trtbridge as tb
from my_ops import soft_sign

device = sys.argv[2]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 5)

    def forward(self, x):
        return soft_sign(self.layer(x)) * 3


net, x = Net().eval().to(device), torch.randn(4, 6, device=device)
dims = {"x": {0: tb.Dim("batch", min=1, opt=4, max=8)}}
fast = tb.convert(net, (x,), dynamic_shapes=dims, backend=sys.argv[1])
for batch in (4, 1, 7):
    x = torch.randn(batch, 6, device=device)
    torch.testing.assert_close(fast(x), net(x).detach(), rtol=1e-3, atol=1e-3)
report = tb.plugins.check(soft_sign, [(torch.randn(3, 5),), (torch.randn(2, 1025),)])
print(report)
assert report.ok
print("converted")
"""


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_the_authors_path(kind: str, backend: str, device: torch.device, tmp_path: Path) -> None:
    """A new op in at most 15 lines of a module of one's own runs in a converted model."""
    if kind == "triton":
        if DRY_RUN:
            pytest.skip("dry run on a CPU")
        pytest.importorskip("triton")
    module = TRITON if kind == "triton" else TORCH
    assert len([line for line in module.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_ops.py").write_text(module)
    (tmp_path / "use.py").write_text(USER)
    environment = Guide(tmp_path, gpu=True).environment
    done = subprocess.run(
        [sys.executable, "use.py", backend, str(device)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.endswith("converted\n")
    if not DRY_RUN:
        for check in ("stream", "cuda graph", "cuda against cpu"):
            assert re.search(rf"ok +{check}:", done.stdout), done.stdout


# Flaws that only a GPU shows.


def check(op: Any, samples: Any) -> CheckReport:
    return tb.plugins.check(op, samples, backends=())


def words(report: CheckReport, name: str, severity: str) -> str:
    found = [f for f in report.findings if f.check == name and f.severity == severity]
    assert found, str(report)
    return found[0].what


def test_work_on_another_stream_is_found(cuda: torch.device) -> None:
    other = torch.cuda.Stream(cuda)

    @tb.plugin("gpu_authoring_tests::elsewhere", fake=torch.empty_like)
    def elsewhere(x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            return x + 1
        with torch.cuda.stream(other):  # does not wait for the caller's stream
            result = x + 1
        torch.cuda.current_stream().wait_stream(other)
        return result

    assert "not work on the stream" in words(check(elsewhere, [(torch.randn(64),)]), "stream", "error")


def test_ops_that_no_graph_can_hold_are_found(cuda: torch.device) -> None:
    @tb.plugin("gpu_authoring_tests::waits", fake=torch.empty_like)
    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * (2.0 if x.sum().item() > 0 else 3.0)

    report = check(waits, [(torch.randn(64),)])
    assert "cannot be captured" in words(report, "cuda graph", "warning")
    assert report.ok
    # A capture that failed leaves the process usable.
    assert (torch.randn(8, device=cuda) + 1).isfinite().all()

    held: dict[str, torch.Tensor] = {}

    @tb.plugin("gpu_authoring_tests::remembers", fake=torch.empty_like)
    def remembers(x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and torch.cuda.is_current_stream_capturing() and "x" in held:
            return held["x"] + 1  # the value of an earlier call, which a replay then repeats
        if x.is_cuda and not torch.cuda.is_current_stream_capturing():
            held["x"] = x.clone()
        return x + 1

    assert "replay with other values" in words(check(remembers, [(torch.randn(64),)]), "cuda graph", "error")


def test_implementations_that_differ_are_found(cuda: torch.device) -> None:
    @tb.plugin("gpu_authoring_tests::differs", fake=torch.empty_like, cpu=lambda x: x + 2)
    def differs(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert "they differ" in words(check(differs, [(torch.randn(64),)]), "cuda against cpu", "error")


def test_pytorchs_own_ops_pass(cuda: torch.device) -> None:
    for op, sample in (
        ("aten::cummax", (torch.randn(3, 5), 1)),
        ("aten::hypot", (torch.randn(3, 5), torch.randn(3, 5))),
        ("aten::sort.stable", {"self": torch.randn(3, 5), "stable": True, "dim": -1}),
    ):
        report = check(op, [sample])
        assert report.ok, str(report)
        for name in ("stream", "cuda graph"):
            assert words(report, name, "ok")


def test_nonzero_is_checked_but_not_captured(cuda: torch.device) -> None:
    report = check("aten::nonzero", [(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]),)])
    assert report.ok, str(report)
    assert words(report, "stream", "ok")
    assert words(report, "cuda graph", "warning")


def test_shipped_ops_pass(cuda: torch.device) -> None:
    pytest.importorskip("triton")
    tb.plugins.load_shipped()
    boxes = torch.rand(50, 2).repeat(1, 2) * 50 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    samples: dict[str, Any] = {
        "trtbridge::batched_nms_padded": (boxes, torch.rand(50), torch.randint(3, (50,)), 0.5, 20),
        "trtbridge::deform_conv2d": {
            "input": torch.randn(1, 4, 9, 9), "weight": torch.randn(6, 4, 3, 3), "offset": torch.randn(1, 18, 9, 9),
            "mask": None, "bias": None, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1,
            "offset_groups": 1,
        },
    }  # fmt: skip
    for op, sample in samples.items():
        report = check(op, [sample])
        for name in ("stream", "cuda graph"):
            assert words(report, name, "ok"), str(report)
