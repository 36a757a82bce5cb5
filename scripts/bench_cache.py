"""What the cache saves: a conversion from the cache and a load from a file, each beside a full conversion.

    python scripts/bench_cache.py [--repeats 3] [--models resnet50 bert] [--backends onnxruntime tensorrt_rtx]
                                  [--write docs/bench-cache.md]

Each model and backend has a process of its own. In it the full conversion, the conversion that finds its engines in
the cache, and the load of a saved file take turns, after one round that is not counted; what is said are medians, and
ratios of medians of the same run. Without a GPU an engine of TensorRT-RTX is built, kept and read, and not made ready
to run: the time for that is missing from all three.

Exit status: 0 the cache gave every engine, 1 it did not.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WAYS = ("convert", "convert from the cache", "load")


def make_resnet50() -> tuple[Any, tuple[Any, ...], Any]:
    """ResNet-50 of transformers, with random weights."""
    import torch
    import transformers

    import trtbridge as tb

    model = transformers.ResNetForImageClassification(transformers.ResNetConfig()).eval()
    return model, (torch.randn(2, 3, 224, 224),), {"pixel_values": {0: tb.Dim("batch", min=1, opt=8, max=32)}}


def make_bert() -> tuple[Any, tuple[Any, ...], Any]:
    """BERT-base of transformers, with random weights."""
    import torch
    import transformers

    import trtbridge as tb

    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    sizes = {0: tb.Dim("batch", min=1, opt=8, max=32), 1: tb.Dim("sequence", min=8, opt=128, max=512)}
    tokens = torch.randint(0, 1000, (2, 16))
    return model, (tokens, torch.ones_like(tokens)), {"input_ids": sizes, "attention_mask": sizes}


MODELS: dict[str, Callable[[], tuple[Any, tuple[Any, ...], Any]]] = {"resnet50": make_resnet50, "bert": make_bert}


def measure(model_name: str, backend: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each way and bytes, in this process."""
    import torch

    import trtbridge as tb

    torch.manual_seed(0)
    model, args, dims = MODELS[model_name]()
    path = folder / "model.trtb"
    reports = []

    def convert(cache: bool) -> tb.EngineModule:
        return tb.convert(model, args, dynamic_shapes=dims, backend=backend, cache=cache, cache_dir=folder / "cache")

    def from_cache() -> None:
        reports.append(convert(cache=True).program.info["cache"])

    first = convert(cache=True)  # fills the cache, and pays for what is imported once
    tb.save(first, path)
    ways: dict[str, Callable[[], object]] = dict(
        zip(WAYS, (lambda: convert(cache=False), from_cache, lambda: tb.load(path)), strict=True)
    )
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stages: dict[str, list[float]] = {}
    for round_ in range(repeats + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            result = run()
            if round_:
                seconds[way].append(time.perf_counter() - started)
                if way == WAYS[0]:
                    assert isinstance(result, tb.EngineModule)
                    for stage, spent in result.program.info["stage_seconds"].items():
                        stages.setdefault(stage, []).append(spent)
            del result
    kept = sum(one.stat().st_size for one in (folder / "cache" / "engines").glob("*.engine"))
    return {
        "model": model_name,
        "backend": backend,
        "version": str(first.program.engines[0].info.get("version", first.program.engines[0].info.get("onnxruntime"))),
        "seconds": {way: statistics.median(spent) for way, spent in seconds.items()},
        "spread": {way: max(spent) - min(spent) for way, spent in seconds.items()},
        "stages": {stage: statistics.median(spent) for stage, spent in stages.items()},
        "all_hits": all(report["hits"] and not report["misses"] and not report["problems"] for report in reports),
        "engine_bytes": first.program.size_bytes,
        "cache_bytes": kept,
        "file_bytes": path.stat().st_size,
    }


def render(rows: list[dict[str, Any]], repeats: int) -> str:
    """The page."""
    import torch
    import transformers

    import trtbridge as tb

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        "# What the cache saves",
        "",
        "A conversion with `cache=True` that finds its engines, and `tb.load` of a saved file, each beside a full "
        "`tb.convert`. Written by `python scripts/bench_cache.py --write docs/bench-cache.md`; the script's head says "
        "how it measures.",
        "",
        f"- {dt.date.today()}; {platform.machine()}, {gpu}; trtbridge {tb.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, python {platform.python_version()}.",
        f"- Medians of {repeats} rounds in one process a row, random float32 weights. Times beside others on a shared "
        "machine: the ratios, which are of one run, tell more than the seconds.",
        "- A conversion from the cache still traces, exports and checks the module: that is what it needs to know "
        "what is asked for. What it leaves out is the parser and the builder. `tb.load` leaves out all.",
    ]
    if not torch.cuda.is_available():
        lines.append(
            "- Engines of TensorRT-RTX are built and read here, and not made ready to run, which takes a GPU; kernels "
            "that it compiles on the first run are a cache of their own."
        )
    heads = ["model", "backend", *WAYS, "cache ÷ convert", "load ÷ convert", "engine", "in the cache", "saved file"]
    lines += ["", f"| {' | '.join(heads)} |", f"|{' --- |' * 2}{' ---: |' * (len(heads) - 2)}"]
    for row in rows:
        seconds = row["seconds"]
        full = seconds[WAYS[0]]
        cells = [row["model"], f"{row['backend']} {row['version']}"]
        cells += [f"{seconds[way]:.2f} s (±{row['spread'][way] / 2:.2f})" for way in WAYS]
        cells += [f"{seconds[way] / full:.3f}" for way in WAYS[1:]]
        cells += [f"{row[name] / (1 << 20):.1f} MiB" for name in ("engine_bytes", "cache_bytes", "file_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Where a full conversion spends its time:", ""]
    names = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    lines += [f"| model | backend | {' | '.join(names)} |", f"|{' --- |' * 2}{' ---: |' * len(names)}"]
    for row in rows:
        cells = [f"{row['stages'][name]:.2f} s" if name in row["stages"] else "" for name in names]
        lines.append(f"| {row['model']} | {row['backend']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "tensorrt_rtx"])
    parser.add_argument("--write", type=Path, help="write the page here; else it is printed")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "BACKEND", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], given.repeats, Path(given.one[2]))))
        return 0
    rows = []
    for model in given.models:
        for backend in given.backends:
            with tempfile.TemporaryDirectory(prefix="trtbridge-bench-") as folder:
                command = [sys.executable, __file__, "--repeats", str(given.repeats), "--one", model, backend, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{model} on {backend}: {rows[-1]['seconds']}", file=sys.stderr, flush=True)
    page = render(rows, given.repeats)
    if given.write:
        given.write.write_text(page)
    else:
        print(page)
    return 0 if all(row["all_hits"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
