"""Part of scripts/bench.py: where the time of a call goes, by kinds of work, in the engine and in eager PyTorch.

The engine's layers are timed by its own profiler, eager's kernels by torch's. Both wait between what they time, so that
sums are above what a call takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import bench_models as models
import torch
from bench_beside import BATCHES
from bench_common import DRY_RUN, Example, Keep, Row, Settings, program_file, synchronize

import trtbridge as tb

WHERE_MODELS = ("vit_base_patch16", "bert_base", "unet", "resnet50", "convnext_tiny")
"""Those of docs/bench.md that inductor is faster on, one of each kind."""
KINDS = {
    "attention": ("attention", "softmax", "attn"),
    "convolutions": ("conv", "cudnn"),
    "products": ("linear", "addmm", "mm", "matmul"),
    "norms": ("norm",),
    "rest": ("",),
}
"""What in the name of an op tells its kind; the first that fits counts."""
SLOWEST = "slowest"
"""The way, with its batch, of the row that lists layers."""
_CALLS = 20
_LISTED = 8


def where(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Milliseconds a call of each kind of work, at batch 1 and the largest, and the layers that take the most."""
    module = tb.load(program_file(settings, model), models.here(), cuda_graphs=False)
    eager = models.eager(model, settings)
    rows: list[Row] = []
    for batch in BATCHES:
        given = models.example(model, settings, batch)
        profile = module.profile(given.args, given.kwargs)
        ours = _by_kind(("" if one.origin is None else one.origin.op, one.time_ms) for one in profile.layers)
        theirs = _by_kind(_kernels(eager, given))
        for kind in KINDS:
            rows.append({"way": f"{kind} {batch}", "batch": batch, "kind": kind, "ours_ms": round(ours[kind], 5),
                         "eager_ms": round(theirs[kind], 5), "call_ms": round(profile.call_ms, 5)})  # fmt: skip
        slowest = sorted(profile.layers, key=lambda one: -one.time_ms)[:_LISTED]
        layers = [{"op": one.kind if one.origin is None else one.origin.op, "module": one.module,
                   "nodes": len(one.nodes), "ms": round(one.time_ms, 5)} for one in slowest]  # fmt: skip
        rows.append({"way": f"{SLOWEST} {batch}", "batch": batch, "of": len(profile.layers), "layers": layers})
        keep(rows)
    return rows


def kind_of(op: str) -> str:
    """The kind of work of an op, by its name."""
    return next(kind for kind, words in KINDS.items() if any(word in op for word in words))


def _by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for op, ms in times:
        found[kind_of(op)] += ms
    return found


def _kernels(eager: torch.nn.Module, given: Example) -> list[tuple[str, float]]:
    """The ops of an eager call that gave kernels to the device, each with their milliseconds a call."""
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CPU] if DRY_RUN else [kind.CPU, kind.CUDA]
    with torch.no_grad():
        for _ in range(3):
            eager(*given.args, **given.kwargs)
        synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(_CALLS):
                eager(*given.args, **given.kwargs)
            synchronize()
    events: Any = profiler.key_averages()
    if DRY_RUN:
        return [(event.key, event.self_cpu_time_total / 1e3 / _CALLS) for event in events]
    # Kernels are listed by themselves, too: those count that an op gave to the device.
    ops = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    return [(event.key, event.self_device_time_total / 1e3 / _CALLS) for event in ops]


def where_wrong(rows: Sequence[Row]) -> list[str]:
    """Nothing: that something else is faster is no fault."""
    return []
