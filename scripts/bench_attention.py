"""Which form of attention is faster: whole models with ``attention="decomposed"``, ``"fused"`` and ``"auto"``.

    python scripts/bench_attention.py --json FILE [--models NAME ...] [--workers 8]
    python scripts/bench_attention.py --render FILE        docs/bench-attention.md, of the record of a run

Every model is converted in the three forms, several at once, each in a process of its own; those with "auto", which
time blocks on the GPU, one after the other. Then the clock: the three programs of a model in turns, medians over
--repeats batches of calls, replayed from a CUDA graph. Accuracy is the cosine to the module in eager float32. Weights
are random.

On a GPU the backend is TensorRT-RTX; with TRTBRIDGE_GPU_TESTS_ON_CPU=1 everything is a dry run of small models with
ONNX Runtime, in which "auto" leaves attention as it is and times say nothing. Exit status: 0 what "auto" chose is as
fast as the faster form and ViT-B/16 gains a tenth, 1 it is not, or a conversion failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "gpu")]

from bench_passes import BACKEND, DRY_RUN, _captured, _milliseconds, say  # noqa: E402

FORMS = ("decomposed", "fused", "auto")
NOISE = 0.03
"""How much slower than the faster form "auto" may be: what two measurements of one engine differ by."""
VIT, GAIN = "vit_b16", 0.9
"""The model whose time must shrink to this share of that in parts."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model of the benchmark.

    Attributes:
        name: as in the report.
        build: makes the float32 module; True asks for a small one.
        inputs: (batch, small) to arguments in float32 on the CPU.
        batch: examples a call.
        precision: of convert(); None for a module that is half by itself.
    """

    name: str
    build: Callable[[bool], Any]
    inputs: Callable[[int, bool], tuple[Any, ...]]
    batch: int
    precision: str | None = None

    def module(self) -> Any:
        """The module in float32, in eval mode; the same each time."""
        import torch

        torch.manual_seed(0)
        return self.build(DRY_RUN).eval()

    def example(self, seed: int) -> tuple[Any, ...]:
        """Arguments in float32."""
        import torch

        torch.manual_seed(seed)
        return self.inputs(2 if DRY_RUN else self.batch, DRY_RUN)


def _first_result(model: Any, *names: str) -> Any:
    """A transformers model as one of tensors: of the arguments named to the last hidden state."""
    from torch import nn

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any) -> Any:
            return self.model(**dict(zip(names, args, strict=True)), return_dict=False)[0]

    return First()


def _vit(small: bool) -> Any:
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128,
            "image_size": 32} if small else {}  # fmt: skip
    return _first_result(ViTModel(ViTConfig(**size), add_pooling_layer=False), "pixel_values")


def _pictures(batch: int, small: bool) -> tuple[Any, ...]:
    import torch

    edge = 32 if small else 224
    return (torch.randn(batch, 3, edge, edge),)


def _bert(small: bool) -> Any:
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128,
            "vocab_size": 100} if small else {}  # fmt: skip
    return _first_result(BertModel(BertConfig(**size), add_pooling_layer=False), "input_ids", "attention_mask")


def _words(batch: int, small: bool) -> tuple[Any, ...]:
    import torch

    length = 16 if small else 128
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    return torch.randint(0, 100, (batch, length)), mask


def _llama(small: bool) -> Any:
    from transformers import LlamaConfig, LlamaModel

    width, layers = (64, 2) if small else (1024, 12)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 64 or 1,
        num_key_value_heads=max(1, width // 256), vocab_size=1000, use_cache=False,
    )  # fmt: skip
    return _first_result(LlamaModel(config), "input_ids")


def _tokens(batch: int, small: bool) -> tuple[Any, ...]:
    import torch

    return (torch.randint(0, 1000, (batch, 16 if small else 512)),)


def _whisper(small: bool) -> Any:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    width, layers = (64, 2) if small else (512, 6)
    config = WhisperConfig(
        d_model=width, encoder_layers=layers, encoder_attention_heads=width // 64, encoder_ffn_dim=4 * width,
        max_source_positions=50 if small else 1500,
    )  # fmt: skip
    return _first_result(WhisperEncoder(config), "input_features")


def _sound(batch: int, small: bool) -> tuple[Any, ...]:
    import torch

    return (torch.randn(batch, 80, 100 if small else 3000),)


CASES = (
    Case(VIT, _vit, _pictures, 32),
    Case("vit_b16_mixed", _vit, _pictures, 32, "fp16"),
    Case("bert_base", _bert, _words, 1),
    Case("bert_base_32", _bert, _words, 32),
    Case("llama_512", _llama, _tokens, 1),
    Case("whisper_encoder", _whisper, _sound, 8),
)


def _cast(args: Sequence[Any], dtype: Any, device: Any) -> tuple[Any, ...]:
    return tuple(t.to(device, dtype if t.is_floating_point() else None) for t in args)


# One conversion, in a process of its own.


def convert(name: str, form: str, place: Path) -> None:
    """Convert a model in one form; leaves ``place.json`` and ``place.trtb``."""
    import torch

    import trtbridge as tb

    case = next(case for case in CASES if case.name == name)
    row: Row = {"model": name, "form": form, "batch": case.batch, "precision": case.precision, "error": ""}
    try:
        device = torch.device("cpu" if DRY_RUN else "cuda")
        kind = torch.float32 if case.precision else torch.float16
        module, args = case.module().to(device, kind), _cast(case.example(0), kind, device)
        started = time.perf_counter()
        made = tb.convert(  # what the export computes shows in the cosine
            module, args, backend=BACKEND, attention=form, precision=case.precision, check_export=False,
            cache_dir=place.parent / "cache",
        )  # fmt: skip
        row |= {
            "convert_s": time.perf_counter() - started,
            "stage_s": made.program.info["stage_seconds"],
            "attention": made.program.info["attention"],
            "plugins": len(made.program.plugin_calls),
            "segments": len(made.program.engines),
        }
        made.save(place.with_suffix(".trtb"))
    except Exception as error:  # the words are the finding
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}"
    place.with_suffix(".json").write_text(json.dumps(row))


def convert_all(options: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    """All models in all forms; with "auto", which measures, one at a time."""
    measuring = threading.Lock()

    def run(name: str, form: str) -> Row:
        place = options.work / f"{name}_{form}"
        record = place.with_suffix(".json")
        command = [sys.executable, __file__, "--worker", name, form, str(place)]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers)), **os.environ}
        problem = "left no record"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=options.convert_timeout, env=environment, check=False
            )
            problem = f"ended with status {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            problem = f"took longer than {options.convert_timeout:.0f} s"
        row: Row = {"model": name, "form": form, "error": problem}
        if record.exists():
            row = json.loads(record.read_text())
        outcome = row["error"].partition(chr(10))[0] or f"converted in {row['convert_s']:.1f} s"
        say(f"{name}, {form}: {outcome}")
        return row | {"file": str(place.with_suffix(".trtb"))}

    def one(job: tuple[str, str]) -> Row:
        if job[1] != "auto":
            return run(*job)
        with measuring:
            return run(*job)

    jobs = [(name, form) for form in ("auto", "decomposed", "fused") for name in names]
    with ThreadPoolExecutor(options.workers) as pool, ThreadPoolExecutor(1) as single:
        waiting = [(single if job[1] == "auto" else pool).submit(one, job) for job in jobs]
        return [each.result() for each in waiting]


# The clock.


def measure(name: str, rows: Sequence[Row], repeats: int) -> None:
    """Latency, and cosine to eager float32, of the forms of one model, written into their rows."""
    import torch
    from helpers import compare, leaves

    import trtbridge as tb

    case = next(case for case in CASES if case.name == name)
    device = torch.device("cpu" if DRY_RUN else "cuda")
    kind = torch.float32 if case.precision else torch.float16
    example = case.example(1)
    args = _cast(example, kind, device)
    with torch.no_grad():
        expected = leaves(case.module().to(device)(*_cast(example, torch.float32, device)))
    runs: list[tuple[Row, Callable[[], Any]]] = []
    for row in rows:
        try:
            fast = tb.load(row["file"], device)
            row |= compare([tensor.float() for tensor in leaves(fast(*args))], expected)
            runs.append((row, _captured(lambda fast=fast: fast(*args), row)))
        except Exception as error:  # one form that fails is a finding, too
            row["error"] = f"{type(error).__name__}: {error}"
    times: list[list[float]] = [[] for _ in runs]
    calls = [max(1, min(200, round(30 / max(_milliseconds(call, 3), 1e-3)))) for _, call in runs]
    for _ in range(repeats):
        for position, (_, call) in enumerate(runs):
            times[position].append(_milliseconds(call, calls[position]))
    for (row, _), values in zip(runs, times, strict=True):
        row["ms"] = statistics.median(values)


def bench(options: argparse.Namespace) -> int:
    """Convert, measure, write the record."""
    from helpers import environment

    options.work.mkdir(parents=True, exist_ok=True)
    known = [case.name for case in CASES]
    names = [name for name in known if name in options.models] or [  # whole names, else parts of names
        name for name in known if not options.models or any(part in name for part in options.models)
    ]
    rows = convert_all(options, names)
    record: Row = {"environment": environment(), "dry_run": DRY_RUN, "rows": rows}
    for name in names:
        measure(name, [row for row in rows if row["model"] == name and not row["error"]], options.repeats)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    text, wrong = render(record)
    say(text)
    return int(bool(wrong) and not (DRY_RUN and not any(row["error"] for row in rows)))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What is wrong with a run."""
    wrong = [f"{row['model']}, {row['form']}: {row['error'].partition(chr(10))[0]}" for row in rows if row["error"]]
    for name in dict.fromkeys(row["model"] for row in rows):
        times = {row["form"]: row["ms"] for row in rows if row["model"] == name and "ms" in row}
        if times.keys() != set(FORMS):
            continue
        best = min(times["fused"], times["decomposed"])
        if times["auto"] > best * (1 + NOISE):
            wrong.append(f"{name}: auto takes {times['auto'] / best:.3f} of the time of the faster form")
        if name == VIT and times["auto"] > times["decomposed"] * GAIN:
            wrong.append(f"{name}: auto takes {times['auto'] / times['decomposed']:.3f} of the time in parts")
    return wrong


def render(record: Row) -> tuple[str, list[str]]:
    """The page in Markdown, and what is wrong."""
    about = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    where = (
        "a CPU: a dry run of small models, whose times say nothing" if record["dry_run"] else about.get("device", "")
    )
    lines = [
        "# Attention: in parts, or as one node", "",
        f"Made by `scripts/bench_attention.py` on {where}, {about.get('date', '')}; {versions}.", "",
        "Whole models in float16 (`_mixed`: of float32, with `precision=\"fp16\"`), called as a CUDA graph; medians.",
        "Cosine is that to eager float32.", "",
        "| model | batch | in parts ms | one node ms | auto ms | auto / in parts | auto: as one node, in parts | "
        "cosine in parts | one node | auto |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]  # fmt: skip
    rows = record["rows"]
    for name in dict.fromkeys(row["model"] for row in rows):
        by_form = {row["form"]: row for row in rows if row["model"] == name}
        times = [by_form.get(form, {}).get("ms") for form in FORMS]
        cosines = [by_form.get(form, {}).get("cosine") for form in FORMS]
        ratio = f"{times[2] / times[0]:.3f}" if times[0] and times[2] else "–"
        groups = by_form.get("auto", {}).get("attention", {}).get("groups", [])
        counts = [sum(g["count"] for g in groups if g["form"].startswith(form)) for form in ("fused", "decomposed")]
        cells = [
            name,
            str(by_form.get("auto", {}).get("batch", "–")),
            *(f"{t:.4f}" if t else "–" for t in times),
            ratio,
        ]
        cells += [f"{counts[0]}, {counts[1]}", *(f"{c:.6f}" if c is not None else "–" for c in cosines)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Each kind of block alone, as `attention=\"auto\"` timed it:", "",
              "| model | blocks | kind | one node ms | in parts ms | chosen | why |",
              "|---|---:|---|---:|---:|---|---|"]  # fmt: skip
    for row in rows:
        if row["form"] == "auto":
            for g in row.get("attention", {}).get("groups", []):
                alone = [f"{g[key]:.4f}" if g[key] is not None else "–" for key in ("fused_ms", "decomposed_ms")]
                cells = [row["model"], str(g["count"]), g["kind"], *alone, g["form"], g["reason"]]
                lines.append(f"| {' | '.join(cells)} |")
    wrong = verdicts(rows)
    lines += ["", "Not as it should be: " + ("; ".join(wrong) if wrong else "nothing.")]
    return "\n".join(lines) + "\n", wrong


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the record")
    parser.add_argument("--models", nargs="+", default=[], help="names, or parts of names (default: all)")
    parser.add_argument("--workers", type=int, default=8, help="conversions at once")
    parser.add_argument("--repeats", type=int, default=9, help="batches of calls of each program")
    parser.add_argument("--convert-timeout", type=float, default=180, metavar="S")
    parser.add_argument("--work", type=Path, help="folder of converted models (default: a temporary one)")
    parser.add_argument("--render", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-attention.md")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        convert(*options.worker[:2], Path(options.worker[2]))
        return 0
    if options.render:
        text, wrong = render(json.loads(options.render.read_text()))
        options.out.write_text(text)
        return int(bool(wrong))
    if options.json is None:
        parser.error("--json FILE is needed")
    if options.work is not None:
        return bench(options)
    with tempfile.TemporaryDirectory(prefix="trtbridge-attention-") as folder:
        options.work = Path(folder)
        return bench(options)


if __name__ == "__main__":
    sys.exit(main())
