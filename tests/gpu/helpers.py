"""What the GPU tests, their conftest and scripts/gpu_check.py share."""

from __future__ import annotations

import datetime as dt
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trtbridge.bridge.backends import all_statuses
from trtbridge.bridge.structure import flatten

ROOT = Path(__file__).parents[2]
DRY_RUN = os.environ.get("TRTBRIDGE_GPU_TESTS_ON_CPU") == "1"
GPU_BACKENDS = ("tensorrt", "tensorrt_rtx")
PACKAGES = (
    "torch", "tensorrt-rtx-cu13", "tensorrt", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnx-graphsurgeon",
    "transformers", "timm", "torchvision", "triton", "numpy", "pytest",
)  # fmt: skip

Report = Callable[..., None]
"""The fixture ``report``: ``report("models", model="resnet50", batch=1, ours_ms=0.4)`` adds a row to a table."""


def usable_backends() -> tuple[str, ...]:
    """Names of the backends that can run on a GPU here; for a dry run that of the one for CPUs."""
    if DRY_RUN:
        return ("onnxruntime",)
    if not torch.cuda.is_available():
        return ()
    return tuple(status.name for status in all_statuses() if status.name in GPU_BACKENDS and status.can_run)


def leaves(value: Any) -> list[torch.Tensor]:
    """All tensors in a result."""
    return flatten(value)[0]


def compare(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> dict[str, float]:
    """Smallest cosine similarity of any output, each flattened and in float64, and the largest absolute difference.

    Both are NaN where an output has NaN or infinity in other places than it should, so that no bound holds.
    """
    assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in expected]
    cosines, errors = [1.0], [0.0]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device == theirs.device
        if ours.numel():
            a, b = ours.double().flatten(), theirs.double().flatten()
            cosines.append(float(torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-300)))
            errors.append(float((a - b).abs().max()))
    # Of tensors, since min() and max() of Python's pass over NaN.
    smallest, largest = (
        torch.tensor(cosines, dtype=torch.float64).min(),
        torch.tensor(errors, dtype=torch.float64).max(),
    )
    return {"cosine": float(smallest), "max_abs_error": float(largest)}


def environment() -> dict[str, Any]:
    """Where and when a run took place."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs",
        "versions": versions,
        "source": source_digest(),
        "dry_run": DRY_RUN,
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["device"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        found["cuda"] = torch.version.cuda
        found["devices"] = torch.cuda.device_count()
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
            found["driver"] = done.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            found["driver"] = "unknown"
    return found


def source_digest() -> str:
    """A digest of the package's Python files, which ties a report to the code it is about."""
    digest = hashlib.sha256()
    files = [path for folder in ("bridge", "passes", "plugins") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*files, *ROOT.glob("*.py")]):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
