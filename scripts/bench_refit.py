"""What new weights cost: a refit beside a rebuild and a full conversion, and what files without weights weigh.

    python scripts/bench_refit.py [--backend NAME] [--models resnet50 bert-base] [--repeats 5] [--write FILE]

Every model has random weights. For each the module is converted with and without ``refittable=True``, then refitted
with other weights, and the outputs compared with eager. Times are medians of wall seconds over --repeats:

* convert: ``tb.convert`` of the new module, engines loaded; once a repeat;
* rebuild: the part of it that a conversion with everything else remembered would still do, its stages ``build`` and the
  load of the engines;
* refit: ``module.refit(new)``, with the load of the engines where these cannot take weights in place; ``of which
  weights`` is `refit_program` alone;
* call, call when refittable: one call, waited for, of the module converted without and with ``refittable=True``:
  kernels cannot be made for weights that may change.

The backend is the first of tensorrt, tensorrt_rtx and onnxruntime that runs here. Exit status: 0, or 1 where outputs
are wrong after a refit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import trtbridge as tb
from trtbridge.bridge.backends import all_statuses
from trtbridge.bridge.program import Program
from trtbridge.bridge.refit import refit_program
from trtbridge.bridge.runtime import RunningProgram

ROOT = Path(__file__).resolve().parent.parent
TITLES = {"resnet50": "ResNet-50, (1, 3, 224, 224)", "bert-base": "BERT-base, (1, 128)"}
LIMIT = 1e-3
"""Largest L2 norm of the outputs' error over that of eager's."""

CALLS = 30

Row = dict[str, Any]


def model(name: str, seed: int) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """A model with random weights, and its example."""
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    made: torch.nn.Module
    if name == "resnet50":
        made = ResNetForImageClassification(ResNetConfig(num_labels=1000, return_dict=False)).eval()
        for key, buffer in made.named_buffers():
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return made, (torch.randn(1, 3, 224, 224),)
    made = BertModel(BertConfig(return_dict=False)).eval()
    return made, (torch.randint(0, 30000, (1, 128)),)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of an action and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def call_seconds(module: tb.EngineModule, args: tuple[Any, ...]) -> float:
    """Median time of a call, after as many that are not counted: kernels are compiled and CUDA graphs captured then."""
    return statistics.median([timed(lambda: module(*args))[0] for _ in range(2 * CALLS)][CALLS:])


def measure(name: str, backend: str, repeats: int) -> Row:
    """One model's row."""
    device = torch.device("cpu" if backend == "onnxruntime" else "cuda")
    module, args = model(name, 0)
    new, _ = model(name, 1)
    module, new, args = module.to(device), new.to(device), tuple(t.to(device) for t in args)
    times: dict[str, list[float]] = {key: [] for key in ("plain", "convert", "rebuild", "refit", "weights")}
    fast = tb.convert(module, args, backend=backend, refittable=True)
    for _ in range(repeats):
        times["plain"].append(timed(lambda: tb.convert(new, args, backend=backend))[0])
        seconds, made = timed(lambda: tb.convert(new, args, backend=backend, refittable=True))
        times["convert"].append(seconds)
        load, _ = timed(lambda program=made.program: RunningProgram(program, device, None))
        times["rebuild"].append(made.program.info["stage_seconds"]["build"] + load)
        del made
        times["refit"].append(timed(lambda: fast.refit(new))[0])
        times["weights"].append(timed(lambda: refit_program(fast.program, new, device))[0])
    with torch.no_grad():
        expected, got = new(*args)[0].double(), fast(*args)[0].double()
    row: Row = {key: statistics.median(values) for key, values in times.items()}
    row |= {"model": name, "error": float((got - expected).norm() / expected.norm())}
    stripped = tb.convert(module, args, backend=backend, strip_weights=True)
    plain = tb.convert(module, args, backend=backend)
    row |= {"call": call_seconds(plain, args), "call_refittable": call_seconds(fast, args)}
    with tempfile.TemporaryDirectory() as folder:
        for key, program in (("plain", plain), ("refittable", fast), ("stripped", stripped)):
            path = Path(folder) / f"{key}.trtb"
            tb.save(program, path)
            row[f"{key}_bytes"] = path.stat().st_size
        small = Program.load(Path(folder) / "stripped.trtb")
        row["fill"] = statistics.median(timed(lambda: refit_program(small, module, device))[0] for _ in range(repeats))
    return row


def report(rows: list[Row], backend: str, repeats: int) -> str:
    """The page."""
    where = torch.cuda.get_device_name() if backend != "onnxruntime" else f"CPU, {os.cpu_count()} cores"
    status = next(status for status in all_statuses() if status.name == backend)
    lines = [
        "# What new weights cost",
        "",
        f"Made by `python scripts/bench_refit.py` with {backend} {status.version} on {where}; torch "
        f"{torch.__version__}, Python {platform.python_version()}. Medians of {repeats} runs, in seconds. The head of "
        "the script says what each column is.",
        "",
        "| model | convert | convert, refittable | rebuild | refit | of which weights | refit / convert "
        "| refit / rebuild | error after refit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {TITLES[row['model']]} | {row['plain']:.2f} | {row['convert']:.2f} | {row['rebuild']:.2f} "
            f"| {row['refit']:.2f} | {row['weights']:.2f} | {row['refit'] / row['convert']:.3f} "
            f"| {row['refit'] / row['rebuild']:.2f} | {row['error']:.1e} |"
        )
    lines += [
        "",
        "| model | file | refittable | without weights | seconds to fill it | call, ms | call when refittable, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[f'{key}_bytes'] / 1e6:.2f} MB" for key in ("plain", "refittable", "stripped"))
        calls = " | ".join(f"{row[key] * 1e3:.3f}" for key in ("call", "call_refittable"))
        lines.append(f"| {TITLES[row['model']]} | {sizes} | {row['fill']:.2f} | {calls} |")
    if backend == "onnxruntime":
        lines += [
            "",
            "ONNX Runtime has no engine to build: its *rebuild* copies the weights and makes two sessions, one of them "
            "only to ask whether the graph is taken, and a *refit* makes the other. What a refit saves there is the "
            "conversion. TensorRT's builders take far longer than a session does; that is not measured here, for want "
            "of a GPU.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    usable = [status.name for status in all_statuses() if status.can_build and status.can_run]
    parser.add_argument("--backend", choices=usable, default=usable[0])
    parser.add_argument("--models", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there; default: print it")
    options = parser.parse_args()
    rows = [measure(name, options.backend, options.repeats) for name in options.models]
    text = report(rows, options.backend, options.repeats)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.write is not None:
        options.write.write_text(text)
    else:
        print(text)
    wrong = [row["model"] for row in rows if not row["error"] < LIMIT]
    if wrong:
        print(f"wrong after a refit: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
