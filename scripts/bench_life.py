"""Parts of scripts/bench.py: ways to get a module that is faster than converting it, and two GPUs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_models as models
import torch
from bench_common import BACKEND, DRY_RUN, ROOT, Keep, Row, Settings, stem, synchronize
from helpers import compare, leaves

import trtbridge as tb

LIFE_MODELS = ("resnet50", "bert_base")
REFIT_BOUND = 0.1
"""Most of a full convert's time that a refit may take."""
LEAST_COSINE = 0.99
CALLS = 30
TWO_GPUS = "two GPUs"
LEAST_SPEEDUP = 1.9
TORCHRUN = ROOT / "examples" / "torchrun_throughput.py"
LOAD = ("--batches", "64", "--batch-size", "256", "--width", "64", "--repeats", "30")
"""Some seconds of work, so that what is measured is not how processes start."""


def life(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Seconds and bytes of a full convert, of one from the cache, of a load and of a refit, each alone."""
    folder = settings.work / f"life_{stem(model)}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = models.example(model, settings, min(2, models.MOST_BATCH))
    eager = models.eager(model, settings)
    rows: list[Row] = []

    def add(way: str, make: Callable[[], Any], of: torch.nn.Module = eager, **facts: Any) -> Any:
        """Time a step and a first call of what it gives, which is compared with eager."""
        started = time.perf_counter()
        made = make()
        synchronize()
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        with torch.no_grad():
            found = leaves(made(*given.args, **given.kwargs))
            synchronize()
            first = time.perf_counter() - started
            expected = leaves(of(*given.args, **given.kwargs))
            calls = [_seconds(made, given) for _ in range(2 * CALLS)][CALLS:]
        rows.append({"way": way, "seconds": round(seconds, 3), "first_call_s": round(first, 3),
                     "call_ms": round(statistics.median(calls) * 1e3, 4), "bytes": made.program.size_bytes,
                     **compare(found, expected), **facts})  # fmt: skip
        if way != "convert" and any(row["way"] == "convert" for row in rows):
            whole = next(row["seconds"] for row in rows if row["way"] == "convert")
            rows[-1]["ratio"] = round(seconds / whole, 5)
        keep(rows)
        return made

    def convert(**options: Any) -> Any:
        return tb.convert(
            eager, given.args, given.kwargs, dynamic_shapes=models.case_named(model).dynamic_shapes, backend=BACKEND,
            cache_dir=folder / "cache", **options,
        )  # fmt: skip

    small = torch.nn.Linear(4, 4).to(models.here())
    tb.convert(small, (torch.ones(2, 4, device=models.here()),), backend=BACKEND)  # imports, and what is made once
    made = add("convert", convert)
    file = folder / "model.trtb"
    started = time.perf_counter()
    tb.save(made, file)
    saved = time.perf_counter() - started
    add("load", lambda: tb.load(file, models.here(), cache_dir=folder / "cache"), save_s=round(saved, 3),
        file_bytes=file.stat().st_size)  # fmt: skip
    if reason := lacks_cache():
        rows.append({"way": "cache", "skipped": reason})
    else:
        add("cache, first time", lambda: convert(cache=True))
        found = add("cache", lambda: convert(cache=True))
        rows[-1]["cache"] = found.program.info.get("cache")
    if reason := lacks_refit():
        rows.append({"way": "refit", "skipped": reason})
    else:
        changed = models.eager(model, settings)
        with torch.no_grad():
            for parameter in changed.parameters():
                if parameter.ndim:
                    parameter.copy_(parameter.flip(-1))  # other results, of the same size
        made = add("convert, refittable", lambda: convert(refittable=True))

        def refit() -> Any:
            made.refit(changed.state_dict())
            return made

        add("refit", refit, changed)
    keep(rows)
    return rows


def _seconds(module: Callable[..., Any], given: Any) -> float:
    """Of one call, waited for."""
    started = time.perf_counter()
    module(*given.args, **given.kwargs)
    synchronize()
    return time.perf_counter() - started


def lacks_cache() -> str:
    """Why the cache is not measured, "" where it is there."""
    if "cache" in {option.name for option in dataclasses.fields(tb.Options)}:
        return ""
    return "convert() has no option cache"


def lacks_refit() -> str:
    """Why a refit is not measured, "" where it is there."""
    if not hasattr(tb.EngineModule, "refit"):
        return "EngineModule has no refit"
    if "refittable" not in {option.name for option in dataclasses.fields(tb.Options)}:
        return "convert() has no option refittable"
    return ""


def gpus(unit: str, settings: Settings, keep: Keep) -> list[Row]:
    """An engine a process on one GPU and on two, by the example of torchrun."""
    if reason := lacks_gpus():
        return [{"way": unit, "skipped": reason}]
    rows: list[Row] = []
    for count in (1, 2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={count}",
            str(TORCHRUN),
            *LOAD,
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        row: Row = {"way": f"{count} processes", "status": done.returncode, "words": done.stdout[-600:]}
        row["throughput"] = throughput(done.stdout)
        if done.returncode:
            row["words"] += done.stderr[-600:]
        rows.append(row)
        keep(rows)
    if all(row["throughput"] for row in rows):
        rows[1]["ratio"] = round(rows[1]["throughput"] / rows[0]["throughput"], 4)
    return rows


def throughput(text: str) -> float | None:
    """The number that the example prints last, as a line of JSON with "throughput" in it; None without one."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("throughput"), (int, float)):
            return float(found["throughput"])
    return None


def lacks_gpus() -> str:
    """Why two GPUs are not measured, "" where they are."""
    if not TORCHRUN.exists():
        return f"there is no {TORCHRUN.relative_to(ROOT)}"
    if DRY_RUN:
        return "a dry run on a CPU"
    if torch.cuda.device_count() < 2:
        return f"{torch.cuda.device_count()} GPU here"
    return ""


def life_wrong(rows: Sequence[Row]) -> list[str]:
    """Wrong results, and a refit that takes long."""
    wrong = []
    for row in rows:
        if row.get("cosine", 1.0) < LEAST_COSINE:
            wrong.append(f"life, {row['unit']}, {row['way']}: cosine to eager {row['cosine']:.6f}")
        if row["way"] == "refit" and row.get("ratio", 0.0) > REFIT_BOUND:
            wrong.append(f"life, {row['unit']}: a refit takes {row['ratio']:.3f} of a full convert")
    return wrong


def gpus_wrong(rows: Sequence[Row]) -> list[str]:
    """Processes that failed or told no number, and two that are not nearly twice as fast."""
    wrong = [f"gpus, {row['way']}: {row['words'][-200:]}" for row in rows
             if "skipped" not in row and (row["status"] or not row["throughput"])]  # fmt: skip
    wrong += [f"gpus: two give {row['ratio']:.3f} of one" for row in rows if row.get("ratio", 2.0) < LEAST_SPEEDUP]
    return wrong
