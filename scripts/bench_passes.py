"""What each graph pass does for latency, accuracy and size: the default pipeline beside it less that pass.

    python scripts/bench_passes.py --json FILE [--models NAME ...] [--passes NAME ...] [--dtype float16] [--workers 6]
    python scripts/bench_passes.py --render FILE ...       docs/bench-passes.md, of the records of one or more runs
    python scripts/bench_passes.py --cost [--json FILE]    docs/bench-passes-cost.md: the pipeline's own time and memory

Every model is converted with the default pipeline, twice (the second says what noise is), and once less each pass
that rewrote something in it: a pass that rewrote nothing cannot matter. Conversions run several at once, each in a
process of its own, and stay in --work, so that a run that was stopped goes on where it was. Then the clock: one model
after the other, its variants in turns, medians over --repeats batches of calls, replayed from a CUDA graph where that
works.

On a GPU the backend is TensorRT-RTX; with TRTBRIDGE_GPU_TESTS_ON_CPU=1 everything is a dry run of small models with
ONNX Runtime. Exit status: 0 no pass hurts by more than noise, 1 one does, or a conversion failed.
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
DRY_RUN = os.environ.get("TRTBRIDGE_GPU_TESTS_ON_CPU") == "1"
BACKEND = "onnxruntime" if DRY_RUN else "tensorrt_rtx"
BASE, AGAIN = "default", "default again"
NOISE = 0.02
"""Least difference of two medians that counts, on top of what converting twice shows."""

Row = dict[str, Any]

_LEGEND = (
    "Times are multiples of that with the default pipeline, whose second conversion gives the noise: above 1 the pass "
    "helps. Cosine is that to eager float32. A pass that rewrites nothing in a model is left out there. *Worse than "
    f"noise* is a time without the pass below 1 by more than its noise and {NOISE:.0%}, the least difference of two "
    "medians that counts."
)


# One conversion, in a process of its own.


def convert(model: str, variant: str, dtype: str, place: Path) -> None:
    """Convert a model with the default pipeline, or that less a pass; leaves ``place.json`` and ``place.trtb``."""
    import bench_passes_models as models
    import torch

    import trtbridge as tb

    case = models.case_named(model)
    passes = tb.DEFAULT
    if variant not in (BASE, AGAIN):
        passes = passes.without(next(type(item) for item in tb.DEFAULT if item.name == variant))
    device = torch.device("cpu" if DRY_RUN else "cuda")
    kind = models.zoo.DTYPES[dtype]
    row: Row = {"model": model, "variant": variant, "dtype": dtype, "error": ""}
    try:
        module = case.module().to(device, kind)
        args, kwargs = case.example(2, 0, kind, device)
        started = time.perf_counter()
        made = tb.convert(module, args, kwargs, dynamic_shapes=case.dynamic_shapes, backend=BACKEND, passes=passes)
        row["convert_s"] = time.perf_counter() - started
        info = made.program.info
        row |= {
            "stage_s": info["stage_seconds"],
            "rewrites": {item["name"]: item["rewrites"] for item in info["passes"]},
            "engine_bytes": made.program.size_bytes,
            "segments": len(made.program.engines),
            "plugins": len(made.program.plugin_calls),
        }
        made.save(place.with_suffix(".trtb"))
    except Exception as error:  # the words are the finding
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"
    place.with_suffix(".json").write_text(json.dumps(row))


def convert_all(jobs: Sequence[tuple[str, str]], options: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Convert what is not in the work folder yet, several at once."""

    def one(job: tuple[str, str]) -> Row:
        stem = "".join(letter if letter.isalnum() else "_" for letter in f"{job[0]} {options.dtype} {job[1]}")
        place = options.work / stem
        record = place.with_suffix(".json")
        if not record.exists():
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
    """Convert, measure, and write the record after each model."""
    import bench_passes_models as models
    from helpers import environment

    from trtbridge import DEFAULT

    options.work.mkdir(parents=True, exist_ok=True)
    wanted = options.models or [""]
    names = [case.name for case in models.CASES if not case.missing and any(part in case.name for part in wanted)]
    record: Row = {"rows": []}
    if options.json.exists():
        record = json.loads(options.json.read_text())
    record["environment"] = environment()
    measured = {(row["model"], row["dtype"], row["variant"]) for row in record["rows"]}
    base = convert_all([(name, BASE) for name in names], options)
    kinds = list(dict.fromkeys(item.name for item in DEFAULT if not options.passes or item.name in options.passes))
    jobs = []
    for name in names:
        rewrites = base[name, BASE].get("rewrites", {})
        jobs += [(name, AGAIN), *((name, kind) for kind in kinds if rewrites.get(kind))]
    others = convert_all([job for job in jobs if not base[job[0], BASE]["error"]], options)
    for name in names:
        rows = [base[name, BASE], *(row for (model, _), row in others.items() if model == name)]
        if all((name, options.dtype, row["variant"]) in measured for row in rows):
            continue
        measure(name, [row for row in rows if not row["error"]], options)
        record["rows"] = [row for row in record["rows"] if (row["model"], row["dtype"]) != (name, options.dtype)]
        record["rows"] += rows
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
        say(f"{name}: " + ", ".join(f"{row['variant']} {row.get('ms', float('nan')):.4f} ms" for row in rows))
    say(render([record], None))
    return int(bool(verdicts(record["rows"])))


def ratios(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """By model and dtype: the time of each variant as a multiple of that with the default pipeline."""
    base = {(row["model"], row["dtype"]): row["ms"] for row in rows if row["variant"] == BASE and "ms" in row}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["model"], row["dtype"])
        if row["variant"] != BASE and "ms" in row and key in base:
            found.setdefault(key, {})[row["variant"]] = row["ms"] / base[key]
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What is wrong: conversions that failed with the whole pipeline, and passes without which a model is faster."""
    wrong = [f"{row['model']}: {row['error']}" for row in rows if row["error"] and row["variant"] in (BASE, AGAIN)]
    for (model, dtype), by_variant in ratios(rows).items():
        noise = NOISE + abs(by_variant.get(AGAIN, 1.0) - 1)
        wrong += [f"{variant} hurts {model} ({dtype}): without it {ratio:.3f} of the time"
                  for variant, ratio in by_variant.items() if variant != AGAIN and ratio < 1 - noise]  # fmt: skip
    return wrong


def render(records: Sequence[Row], out: Path | None) -> str:
    """The tables in Markdown; the last record that has a model counts."""
    latest = {(row["model"], row["dtype"], row["variant"]): row for record in records for row in record["rows"]}
    rows = list(latest.values())
    known = ratios(rows)
    by_key = {(row["model"], row["dtype"], row["variant"]): row for row in rows}
    lines = ["| pass | model | dtype | rewrites | time without it | noise | size without it | cosine with | without |"
             " |", "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    order = list(dict.fromkeys(name for row in rows for name in row.get("rewrites", {})))
    for kind in order:
        for row in rows:
            if row["variant"] != kind:
                continue
            key = (row["model"], row["dtype"])
            base = by_key[(*key, BASE)]
            ratio, noise = known.get(key, {}).get(kind), abs(known.get(key, {}).get(AGAIN, 1.0) - 1)
            words = row["error"].partition("\n")[0][:80]
            if not words and row["plugins"] != base["plugins"]:
                words = f"{row['plugins']} plugins instead of {base['plugins']}"
            size = f"{row['engine_bytes'] / base['engine_bytes']:.3f}" if "engine_bytes" in row else "–"
            time_ = f"{ratio:.3f}" if ratio is not None else "–"
            cosines = [f"{one['cosine']:.6f}" if "cosine" in one else "–" for one in (base, row)]
            lines.append(
                f"| {kind} | {key[0]} | {key[1]} | {base['rewrites'][kind]} | {time_} | ±{noise:.3f} | {size} | "
                f"{cosines[0]} | {cosines[1]} | {words} |"
            )
        if not any(row["variant"] == kind for row in rows):
            lines.append(f"| {kind} | none | | 0 | | | | | | rewrites nothing in these models |")
    lines += ["", "| model | dtype | batch | ms | cosine | engine MiB | segments | plugins | build s | passes s |",
              "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        if row["variant"] == BASE and "ms" in row:
            lines.append(
                f"| {row['model']} | {row['dtype']} | {row['batch']} | {row['ms']:.4f} | {row['cosine']:.6f} | "
                f"{row['engine_bytes'] / 2**20:.1f} | {row['segments']} | {row['plugins']} | "
                f"{row['stage_s'].get('build', 0):.1f} | {row['stage_s'].get('passes', 0):.2f} |"
            )
    wrong = verdicts(rows)
    lines += ["", "Worse than noise: " + ("; ".join(wrong) if wrong else "nothing.")]
    text = "\n".join(lines) + "\n"
    if out is not None:
        about = records[-1].get("environment", {})
        where = about.get("device", "a CPU (a dry run of small models: times say nothing)")
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        head = f"Made by `scripts/bench_passes.py` on {where}, {about.get('date', '')}; {versions}."
        out.write_text(f"# Passes: what each is good for\n\n{head}\n\n{_LEGEND}\n\n{text}")
    return text


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the record; a run adds to what is there")
    parser.add_argument("--models", nargs="+", default=[], help="parts of names (default: all)")
    parser.add_argument("--passes", nargs="+", default=[], help="names (default: all of the pipeline)")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--workers", type=int, default=6, help="conversions at once")
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
