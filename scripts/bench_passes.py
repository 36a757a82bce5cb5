"""What each graph pass does for latency, accuracy and size: the default pipeline beside it less, and plus, that pass.

    python scripts/bench_passes.py --json FILE [--minutes 4] [--models NAME ...] [--passes NAME ...] [--workers 6]
    python scripts/bench_passes.py --render FILE ...       docs/bench-passes.md, of the records of one or more runs
    python scripts/bench_passes.py --cost [--json FILE]    docs/bench-passes-cost.md: the pipeline's own time and memory

Every model is converted with the default pipeline, twice (the second says what noise is), and once less each pass
that rewrote something in it: a pass that rewrote nothing cannot matter. Then in a newer opset, which some fusions need,
without and with each pass that can be added and rewrites something. Conversions run several at once, each in a process
of its own. Then the clock: one model after the other, its variants in turns, medians over --repeats batches of calls,
replayed from a CUDA graph where that works.

Models come in turns of --at-once, those first that say most. With --minutes no turn begins that would end later, by the
time of the one before it; the record has what is done, and the same command goes on from there.

On a GPU the backend is TensorRT-RTX, and without one with --no-clock, which says what converts and what plugins it
has. With TRTBRIDGE_GPU_TESTS_ON_CPU=1 everything is a dry run of small models with ONNX Runtime.

Exit status: 0 no pass hurts by more than noise, 1 one does, or a conversion failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from bench_passes_render import ADDED, AGAIN, ALL, BASE, NEWER, NEWER_OPSET, latest, problems, render  # noqa: E402

DRY_RUN = os.environ.get("TRTBRIDGE_GPU_TESTS_ON_CPU") == "1"
BACKEND = "onnxruntime" if DRY_RUN else "tensorrt_rtx"
FUSIONS = (
    "FuseLayerNorm", "FuseRmsNorm", "FuseGroupNorm", "FuseGelu", "FuseSilu", "FuseRotaryEmbedding", "FoldRanges",
)  # fmt: skip
"""Passes that can be added to the default pipeline and are for engines."""

Row = dict[str, Any]


# One conversion, in a process of its own.


def convert(model: str, variant: str, dtype: str, place: Path) -> None:
    """Convert a model with the default pipeline, or that less a pass; leaves ``place.json`` and ``place.trtb``."""
    import bench_passes_models as models
    import torch

    import trtbridge as tb

    case = models.case_named(model)
    # TensorRT-RTX builds without a GPU, too; then there is no clock.
    device = torch.device("cuda" if torch.cuda.is_available() and not DRY_RUN else "cpu")
    kind = models.zoo.DTYPES[dtype]
    row: Row = {"model": model, "variant": variant, "dtype": dtype, "error": ""}
    passes = pipeline_of(variant)
    chosen: dict[str, Any] = {"dynamic_shapes": case.dynamic_shapes, "backend": BACKEND, "passes": passes}
    if variant.startswith((ADDED, NEWER)):
        # Exporters write attention as one node from opset 23 on, which is no matter of these passes.
        chosen |= {"opset": NEWER_OPSET, "attention": "decomposed"}
    try:
        module = case.module().to(device, kind)
        args, kwargs = case.example(2, 0, kind, device)
        started = time.perf_counter()
        if isinstance(case, models.needs.FileCase):
            case.write(module, place.with_suffix(".onnx"))
            made = tb.convert(place.with_suffix(".onnx"), **chosen)
        else:
            made = tb.convert(module, args, kwargs, **chosen)
        row["convert_s"] = time.perf_counter() - started
        info = made.program.info
        rewrites: dict[str, int] = {}
        for item in info["passes"]:  # behind what is rewritten because it was refused, some passes run once more
            if item["name"] not in rewrites or item["name"] == "RewriteRefused":
                rewrites[item["name"]] = rewrites.get(item["name"], 0) + item["rewrites"]
        row |= {
            "stage_s": info["stage_seconds"],
            "rewrites": rewrites,
            "engine_bytes": made.program.size_bytes,
            "segments": len(made.program.engines),
            "plugins": len(made.program.plugin_calls),
        }
        made.save(place.with_suffix(".trtb"))
    except Exception as error:  # the words are the finding
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"
    place.with_suffix(".json").write_text(json.dumps(row))


def pipeline_of(variant: str) -> Any:
    """The passes of a variant."""
    import trtbridge as tb
    from trtbridge import passes

    pipeline = tb.DEFAULT
    if variant in (BASE, AGAIN, NEWER):
        return pipeline
    if variant.startswith((ADDED, ALL)):
        for name in FUSIONS if variant == ALL else (variant.removeprefix(ADDED),):
            pipeline = pipeline.insert(getattr(passes, name)(), before=passes.RemoveDeadNodes)
        return pipeline
    return pipeline.without(getattr(passes, variant))


def convert_all(jobs: Sequence[tuple[str, str]], options: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Convert what is not in the work folder yet, several at once."""

    def one(job: tuple[str, str]) -> Row:
        stem = "".join(letter if letter.isalnum() else "_" for letter in f"{job[0]} {options.dtype} {job[1]}")
        place = options.work / stem
        record = place.with_suffix(".json")
        known = json.loads(record.read_text()) if record.exists() else None
        if known is None or not (known["error"] or place.with_suffix(".trtb").exists()):
            record.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--worker", *job, options.dtype, str(place)]
            threads = str(max(1, (os.cpu_count() or 1) // options.workers))
            environment = {"OMP_NUM_THREADS": threads, **os.environ}
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=options.convert_timeout, env=environment,
                    check=False,
                )  # fmt: skip
                problem = "" if record.exists() else f"ended with status {done.returncode}: {done.stderr[-500:]}"
            except subprocess.TimeoutExpired:
                problem = f"took longer than {options.convert_timeout:.0f} s"
            if problem:
                record.write_text(json.dumps({"model": job[0], "variant": job[1], "dtype": options.dtype,
                                              "error": problem}))  # fmt: skip
        row: Row = json.loads(record.read_text())
        say(f"{job[0]}, {job[1]}: {row['error'].partition(chr(10))[0] or 'converted'}")
        return row | {"file": str(place.with_suffix(".trtb"))}

    with ThreadPoolExecutor(options.workers) as pool:
        return dict(zip(jobs, pool.map(one, jobs), strict=True))


# The clock.


def measure(model: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Latency and cosine to eager of the variants of one model, written into their rows."""
    import bench_passes_models as models
    import torch
    from helpers import compare, leaves

    import trtbridge as tb

    case, kind = models.case_named(model), models.zoo.DTYPES[options.dtype]
    device = torch.device("cpu" if DRY_RUN else "cuda")
    batch = case.batches[-1]
    args, kwargs = case.example(batch, 1, kind, device)
    module = case.module().to(device)
    full_args, full_kwargs = models.zoo.cast_inputs((args, kwargs), torch.float32, device)
    with torch.no_grad():
        expected = leaves(module(*full_args, **full_kwargs))
    runs: list[tuple[Row, Callable[[], Any]]] = []
    for row in rows:
        try:
            fast = tb.load(row["file"], device)
            found = [
                tensor.float() if tensor.is_floating_point() else tensor for tensor in leaves(fast(*args, **kwargs))
            ]
            row |= {"batch": batch, **compare(found, expected)}
            call = _captured(lambda fast=fast: fast(*args, **kwargs), row)
            runs.append((row, call))
        except Exception as error:  # one variant that fails is a finding, too
            row["error"] = f"{type(error).__name__}: {error}"
    times: list[list[float]] = [[] for _ in runs]
    calls = [max(1, min(200, round(30 / max(_milliseconds(call, 3), 1e-3)))) for _, call in runs]
    for _ in range(options.repeats):
        for position, (_, call) in enumerate(runs):
            times[position].append(_milliseconds(call, calls[position]))
    for (row, _), values in zip(runs, times, strict=True):
        row["ms"] = statistics.median(values)


def _captured(call: Callable[[], Any], row: Row) -> Callable[[], Any]:
    """The call as a replay of a CUDA graph where it can be captured."""
    import torch

    row["cuda_graph"] = False
    if DRY_RUN:
        return call
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            held = call()
    except Exception:  # some engine or plugin does not allow it
        torch.cuda.synchronize()
        return call
    row["cuda_graph"] = True
    return lambda: (graph.replay(), held, call)  # The graph runs kernels of engines that must stay alive.


def _milliseconds(call: Callable[[], Any], calls: int) -> float:
    """Time of one call, from a batch of them."""
    import torch

    if DRY_RUN:
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - started) * 1e3 / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


# The whole run.


def bench(options: argparse.Namespace) -> int:
    """Convert and measure models, some at a time, and write the record after each."""
    import bench_passes_models as models
    from helpers import environment

    options.work.mkdir(parents=True, exist_ok=True)
    wanted = options.models or [""]
    names = [case.name for case in models.CASES if not case.missing and any(part in case.name for part in wanted)]
    record: Row = {"rows": []}
    if options.json.exists():
        record = json.loads(options.json.read_text())
    record["environment"] = environment()
    asked = sorted(options.passes)
    bases = [row for row in record["rows"] if (row["dtype"], row["variant"]) == (options.dtype, BASE)]
    done = {row["model"] for row in bases if row.get("asked", []) in ([], asked)}
    left = [name for name in names if name not in done]
    began, longest = time.perf_counter(), 0.0
    while left:
        started = time.perf_counter()
        if options.minutes and longest and started - began + longest > 60 * options.minutes:
            break
        turn, left = left[: options.at_once], left[options.at_once :]
        for name, rows in _converted(turn, options).items():
            if not options.no_clock:
                measure(name, [row for row in rows if not row["error"]], options)
            for row in rows:
                Path(row.pop("file")).unlink(missing_ok=True)
            rows[0]["asked"] = asked
            record["rows"] = [row for row in record["rows"] if (row["model"], row["dtype"]) != (name, options.dtype)]
            record["rows"] += rows
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
            say(f"{name}: " + ", ".join(f"{row['variant']} {row['ms']:.4f} ms" for row in rows if "ms" in row))
        longest = max(longest, time.perf_counter() - started)
    say(render([record], None))
    if left:
        say(f"Not measured yet: {', '.join(left)}. The same command goes on there.")
    return int(bool(problems(latest([record]))))


def _converted(names: Sequence[str], options: argparse.Namespace) -> dict[str, list[Row]]:
    """All variants of some models that matter, by model, the default pipeline first."""
    import bench_passes_models as models

    from trtbridge import DEFAULT

    def is_asked(kind: str) -> bool:
        return not options.passes or kind in options.passes

    files = {name for name in names if isinstance(models.case_named(name), models.needs.FileCase)}
    wants_more = any(map(is_asked, FUSIONS))
    jobs = [(name, BASE) for name in names]
    jobs += [(name, AGAIN) for name in names]
    # A file has the opset that it has.
    jobs += [(name, variant) for name in names if wants_more and name not in files for variant in (NEWER, ALL)]
    first = convert_all(jobs, options)
    jobs = []
    for name in names:
        rewrites = first[name, BASE].get("rewrites", {})
        kinds = dict.fromkeys(item.name for item in DEFAULT)
        jobs += [(name, kind) for kind in kinds if is_asked(kind) and rewrites.get(kind)]
        rewrites = first.get((name, ALL), {}).get("rewrites", {})
        jobs += [(name, ADDED + kind) for kind in FUSIONS if is_asked(kind) and rewrites.get(kind)]
    rows = first | convert_all(jobs, options)
    return {name: [row for (model, _), row in rows.items() if model == name] for name in names}


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the record; a run adds to what is there")
    parser.add_argument("--models", nargs="+", default=[], help="parts of names (default: all)")
    parser.add_argument("--passes", nargs="+", default=[], help="names (default: all of the pipeline, and fusions)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--workers", type=int, default=6, help="conversions at once")
    parser.add_argument("--at-once", type=int, default=3, help="models that are converted before the clock runs")
    parser.add_argument("--no-clock", action="store_true", help="convert only: what builds, plugins, sizes; no GPU")
    parser.add_argument("--minutes", type=float, help="begin no turn that would end later")
    parser.add_argument("--repeats", type=int, default=9, help="batches of calls of each variant")
    parser.add_argument("--convert-timeout", type=float, default=300, metavar="S")
    parser.add_argument("--work", type=Path, help="folder of converted models (default: a temporary one)")
    parser.add_argument("--render", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--out", type=Path, help="the page (default: docs/bench-passes.md; with --cost, its own)")
    parser.add_argument("--cost", action="store_true", help="the pipeline's own time and memory")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        convert(*options.worker[:3], Path(options.worker[3]))
        return 0
    if options.render:
        page = options.out or ROOT / "docs" / "bench-passes.md"
        say(render([json.loads(path.read_text()) for path in options.render], page))
        return 0
    if options.cost:
        import bench_passes_cost

        return bench_passes_cost.main(options.json, options.out or ROOT / "docs" / "bench-passes-cost.md")
    if options.json is None:
        parser.error("--json FILE is needed")
    if options.work is not None:
        return bench(options)
    with tempfile.TemporaryDirectory(prefix="trtbridge-passes-bench-") as folder:
        options.work = Path(folder)
        return bench(options)


if __name__ == "__main__":
    sys.exit(main())
