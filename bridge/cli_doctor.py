"""``trtbridge doctor``: what is installed, and what can build and run here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import CacheError, TrtBridgeError
from .text import size_text

PACKAGES = ("onnx", "onnxscript", "onnx-ir", "onnx-graphsurgeon", "polygraphy", "numpy")


def examine() -> dict[str, Any]:
    """The facts, JSON-ready. Never raises: what is broken is what it is for."""
    facts: dict[str, Any] = {
        "trtbridge": _version("trtbridge"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "driver": _driver(),
        "torch": _torch(),
        "packages": {name: _version(name) for name in PACKAGES},
        "onnxruntime": _onnxruntime(),
    }
    facts["backends"], facts["auto"] = _backends(facts["torch"])
    facts["cache"] = _cache()
    facts["hint"] = _hint(facts)
    return facts


def can_build(facts: dict[str, Any]) -> bool:
    """Whether some backend can build here."""
    return any(backend["can_build"] for backend in facts["backends"])


def show(facts: dict[str, Any], console: Console) -> None:
    """Print the facts."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    console.print(table)
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("backend", "version", "builds here", "runs here"):
        table.add_column(heading, no_wrap=True)
    for backend in facts["backends"]:
        devices = f" ({', '.join(backend['devices'])})" if backend["devices"] else ""
        table.add_row(
            backend["name"],
            backend["version"] or "-",
            _yes_no(backend["can_build"]),
            _yes_no(backend["can_run"]).append(devices),
        )
    console.print(table)
    for backend in facts["backends"]:
        if backend["reason"]:
            console.print(Text(f"{backend['name']}: {backend['reason']}"), soft_wrap=True)
    console.print()
    console.print(Text(f"--backend auto takes: {facts['auto']}"), soft_wrap=True)
    if facts["hint"]:
        console.print(Text(facts["hint"], style="yellow"), soft_wrap=True)


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    torch, cache, ort = facts["torch"], facts["cache"], facts["onnxruntime"]
    rows = [
        ("trtbridge", facts["trtbridge"] or "not installed"),
        ("Python", f"{facts['python']['version']} ({facts['python']['executable']})"),
        ("platform", facts["platform"]),
        ("NVIDIA driver", facts["driver"]["version"] or "none found"),
    ]
    if torch["error"]:
        rows.append(("torch", f"cannot be imported: {torch['error']}"))
    else:
        cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "a CPU build"
        rows.append(("torch", f"{torch['version']} ({cuda})"))
        for index, gpu in enumerate(torch["gpus"]):
            memory = size_text(gpu["memory_bytes"])
            rows.append((f"GPU {index}", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"))
        if not torch["gpus"]:
            rows.append(("GPU", "torch sees none"))
    rows += [(name, version or "not installed") for name, version in facts["packages"].items()]
    rows.append(("onnxruntime", ort["error"] or f"{ort['version']} ({', '.join(ort['providers'])})"))
    writable = "writable" if cache["writable"] else f"not usable: {cache['error']}"
    rows.append(("cache", f"{cache['folder']} ({writable})"))
    return rows


def _yes_no(value: bool) -> Text:
    return Text("yes", style="green") if value else Text("no", style="red")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> dict[str, Any]:
    """Version of the kernel's NVIDIA driver and the GPUs that it knows, as nvidia-smi says."""
    found: dict[str, Any] = {"version": "", "gpus": []}
    program = shutil.which("nvidia-smi")
    if program is None:
        return found
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return found
    if done.returncode == 0:
        lines = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
        found["gpus"] = [name for _, name in lines]
        found["version"] = lines[0][0] if lines else ""
    return found


def _torch() -> dict[str, Any]:
    found: dict[str, Any] = {"version": "", "cuda": None, "gpus": [], "error": ""}
    try:
        torch = importlib.import_module("torch")
        found["version"] = str(torch.__version__)
        found["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                gpu = torch.cuda.get_device_properties(index)
                capability = f"{gpu.major}.{gpu.minor}"
                found["gpus"].append(
                    {"name": gpu.name, "compute_capability": capability, "memory_bytes": gpu.total_memory}
                )
    except Exception as error:  # A broken installation can raise anything.
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def _onnxruntime() -> dict[str, Any]:
    found: dict[str, Any] = {"version": "", "providers": [], "error": ""}
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        found["version"] = str(onnxruntime.__version__)
        found["providers"] = list(onnxruntime.get_available_providers())
    except Exception as error:  # A broken installation can raise anything.
        found["error"] = f"cannot be imported: {type(error).__name__}: {error}"
    return found


def _backends(torch: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """What each backend can do, and which one "auto" takes and why."""
    from .backends import BACKENDS, all_statuses, choose_backend

    if torch["error"]:
        why = "torch cannot be imported; install it first: https://pytorch.org/get-started"
        unknown = {"version": "", "can_build": False, "can_run": False, "reason": why, "devices": []}
        return [{"name": name, **unknown} for name in BACKENDS], f"nothing, because {why}"
    backends = [{**vars(status), "devices": list(status.devices)} for status in all_statuses()]
    try:
        chosen, reason = choose_backend("auto")
    except TrtBridgeError as error:
        return backends, f"nothing. {error}"
    return backends, f"{chosen.name} ({reason})"


def _cache() -> dict[str, Any]:
    variable = "TRTBRIDGE_CACHE_DIR"
    folder = os.environ.get(variable) or platformdirs.user_cache_dir("trtbridge", appauthor=False)
    found = {"folder": str(Path(folder)), "writable": False, "error": ""}
    try:
        from .cache import resolve_cache_dir

        found["writable"] = resolve_cache_dir(None) is not None
        if not found["writable"]:
            found["error"] = (
                f"it cannot be written, so compiled kernels are not kept; set ${variable} to another folder"
            )
    except (CacheError, ImportError) as error:
        found["error"] = str(error)
    return found


def _hint(facts: dict[str, Any]) -> str:
    torch, driver = facts["torch"], facts["driver"]
    if driver["gpus"] and not torch["gpus"] and not torch["error"]:
        build = f"is built for CUDA {torch['cuda']}" if torch["cuda"] else "is a CPU build"
        return (
            f"nvidia-smi lists {', '.join(driver['gpus'])}, but torch sees no GPU: torch {torch['version']} {build}. "
            "Install a build of torch that fits the driver: https://pytorch.org/get-started"
        )
    return ""
