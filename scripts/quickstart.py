"""Converts a sentence encoder with real weights and compares it with PyTorch on real sentences.

    python scripts/quickstart.py [--sentences 256] [--seed 0] [--backend auto] [--json FILE]

The encoder (all-MiniLM-L6-v2) is converted with a dynamic batch and sequence length:

* with ONNX Runtime, which runs on the CPU of any machine: this checks the converted graph;
* with TensorRT-RTX or TensorRT, in float32 and float16. Where there is a CUDA GPU the engines run there and are
  compared, too; without one TensorRT-RTX builds them all the same, and the table says that they were not run.

Every comparison is with PyTorch in float32 on the same batches: the worst cosine similarity of any sentence's two
embeddings, and for how many sentences another one became the nearest neighbour.

Exit status: 0 all comparisons hold (worst cosine at least 0.99999 in float32, with no neighbour changed, and 0.999 in
float16), 1 one does not, 2 something needed is missing or a conversion failed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers loads: everything it needs is on this machine

import sentence_encoder
import torch
from rich.console import Console
from rich.table import Table
from sentence_encoder import MAX_BATCH, MIN_TOKENS, Batch, Encoder, Sentences

import trtbridge as tb
from trtbridge.bridge.backends import BACKENDS, choose_backend

TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
COSINE_LIMITS = {torch.float32: 0.99999, torch.float16: 0.999}
LATENCY_BATCHES = (1, MAX_BATCH)
LATENCY_TOKENS = 32


@dataclass
class Result:
    """One conversion and what came of it.

    Attributes:
        title: what ran, or was built, in which precision and where.
        stage_seconds: of each stage of convert().
        engine_bytes: size of the engines.
        ran: whether the embeddings below were computed; False for an engine without a GPU to run on.
        sentences: how many were compared.
        worst_cosine: smallest cosine similarity to PyTorch's embedding in float32.
        cosine_limit: what it must reach.
        neighbours_changed: sentences whose nearest neighbour is another one than with PyTorch's embeddings.
        neighbours_may_change: whether that is a failure.
        latency_ms, eager_latency_ms: median for each batch size, converted and with PyTorch in the same precision on
            the same device.
    """

    title: str
    stage_seconds: dict[str, float]
    engine_bytes: int
    cosine_limit: float
    neighbours_may_change: bool
    ran: bool = False
    sentences: int = 0
    worst_cosine: float = float("nan")
    neighbours_changed: int = 0
    latency_ms: dict[int, float] = field(default_factory=dict)
    eager_latency_ms: dict[int, float] = field(default_factory=dict)

    @property
    def failure(self) -> str:
        """What does not hold, or ""."""
        if not self.ran:
            return ""
        wrong = []
        if not self.worst_cosine >= self.cosine_limit:  # written so that NaN fails
            wrong.append(f"worst cosine similarity {self.worst_cosine:.9f} is below {self.cosine_limit}")
        if self.neighbours_changed and not self.neighbours_may_change:
            wrong.append(f"{self.neighbours_changed} nearest neighbours changed")
        return "; ".join(wrong)


def convert(encoder: Encoder, backend: str, max_tokens: int, example: Batch) -> tb.EngineModule:
    """The conversion that this script is about."""
    batch = tb.Dim("batch", min=1, opt=8, max=MAX_BATCH)
    tokens = tb.Dim("tokens", min=MIN_TOKENS, opt=LATENCY_TOKENS, max=max_tokens)
    shapes = {"ids": {0: batch, 1: tokens}, "mask": {0: batch, 1: tokens}}
    return tb.convert(encoder, example, dynamic_shapes=shapes, backend=backend)


def check(encoder: Encoder, backend: str, batches: Sequence[Batch], expected: torch.Tensor, max_tokens: int) -> Result:
    """Convert, and where the engine can run here, run all batches and compare.

    Args:
        encoder: in the precision to convert.
        backend: to convert with.
        batches: of tokenized sentences, on the CPU.
        expected: (sentences, width) float32, PyTorch's embeddings.
        max_tokens: longest sequence.
    """
    dtype = next(encoder.parameters()).dtype
    on_gpu = backend != "onnxruntime"
    runs = torch.cuda.is_available() or not on_gpu
    device = torch.device("cuda" if on_gpu and runs else "cpu")
    encoder = encoder.to(device)
    example = move(batches[0], device)
    fast = convert(encoder, backend, max_tokens, example)
    name = str(dtype).removeprefix("torch.")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU" if runs else "built, not run: no GPU here"
    result = Result(
        title=f"{TITLES[backend]}\n{name}\n{where}",
        stage_seconds=dict(fast.program.info["stage_seconds"]),
        engine_bytes=fast.program.size_bytes,
        cosine_limit=COSINE_LIMITS[dtype],
        neighbours_may_change=dtype is not torch.float32,
    )
    if not runs:
        return result
    embeddings = embed(fast, batches, device)
    result.ran = True
    result.sentences = len(embeddings)
    result.worst_cosine = worst_cosine(embeddings, expected)
    result.neighbours_changed = int((nearest(embeddings) != nearest(expected)).sum())
    for size in LATENCY_BATCHES:
        ids = torch.randint(1000, 20000, (size, LATENCY_TOKENS), device=device)
        batch = (ids, torch.ones_like(ids))
        result.latency_ms[size] = latency_ms(fast, batch)
        result.eager_latency_ms[size] = latency_ms(encoder, batch)
    return result


def move(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return batch[0].to(device), batch[1].to(device)


@torch.no_grad()
def embed(module: Callable[..., torch.Tensor], batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """All batches' embeddings as (sentences, width) float32 on the CPU."""
    return torch.cat([module(*move(batch, device)).float().cpu() for batch in batches])


def worst_cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The smallest cosine similarity of two rows of (sentences, width), computed in float64."""
    return float(torch.cosine_similarity(actual.double(), expected.double(), dim=1).min())


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """For each row of (sentences, width) the index of the most similar other one."""
    similar = embeddings.double() @ embeddings.double().T
    return similar.fill_diagonal_(-float("inf")).argmax(dim=1)


@torch.no_grad()
def latency_ms(module: Callable[..., torch.Tensor], batch: Batch) -> float:
    """Median milliseconds of a call: CUDA events on a GPU, the clock on a CPU."""
    on_gpu = batch[0].is_cuda
    calls = 200 if on_gpu else 20
    for _ in range(20 if on_gpu else 3):
        module(*batch)
    times = []
    for _ in range(calls):
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            module(*batch)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            module(*batch)
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def make_table(results: Sequence[Result]) -> Table:
    """A column for each conversion."""
    shown = Table("", title="all-MiniLM-L6-v2, converted")
    for result in results:
        shown.add_column(result.title, justify="right")
    for stage in dict.fromkeys(stage for result in results for stage in result.stage_seconds):
        shown.add_row(stage, *(f"{result.stage_seconds.get(stage, 0):.2f} s" for result in results))
    shown.add_row("all stages", *(f"{sum(r.stage_seconds.values()):.2f} s" for r in results), end_section=True)
    shown.add_row("engine size", *(f"{r.engine_bytes / 2**20:.1f} MiB" for r in results), end_section=True)

    def row(label: str, cell: Callable[[Result], str], end_section: bool = False) -> None:
        shown.add_row(
            label, *(cell(result) if result.ran else "not run" for result in results), end_section=end_section
        )

    row("sentences compared", lambda r: str(r.sentences))
    row("worst cosine similarity", lambda r: f"{r.worst_cosine:.9f}")
    row("nearest neighbours changed", lambda r: f"{r.neighbours_changed or 'none'}", end_section=True)
    for size in LATENCY_BATCHES:
        row(f"latency, batch {size} × {LATENCY_TOKENS} tokens", lambda r, size=size: f"{r.latency_ms[size]:.2f} ms")
        row("  PyTorch eager, same device and dtype", lambda r, size=size: f"{r.eager_latency_ms[size]:.2f} ms")
    return shown


def run(sentences: Sentences, texts: Sequence[str], backend: str, console: Console) -> list[Result]:
    """Convert and compare with every backend in turn.

    Args:
        sentences: the encoder and its tokenizer.
        texts: to embed.
        backend: beside ONNX Runtime.
        console: where to say what is going on.
    """
    batches = list(sentences.batches(texts))
    tokens = [int(mask.sum(dim=1).max()) for _, mask in batches]
    console.print(
        f"{len(texts)} sentences in {len(batches)} batches of 1 to {max(len(ids) for ids, _ in batches)}, "
        f"padded to {min(tokens)} to {max(tokens)} tokens"
    )
    encoder = sentences.encoder
    expected = embed(encoder, batches, torch.device("cpu"))
    wanted = [("onnxruntime", encoder)]
    if backend != "onnxruntime":
        wanted += [(backend, copy.deepcopy(encoder)), (backend, copy.deepcopy(encoder).half())]
    results = []
    for name, module in wanted:
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
        with console.status(f"{TITLES[name]}, {dtype}: converting"):
            results.append(check(module, name, batches, expected, sentences.max_tokens))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sentences", type=int, default=256, help="how many to compare; default 256")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sentences; default 0")
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), default="auto", help="beside ONNX Runtime; default auto"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(argv)
    if options.sentences < 2:
        parser.error("--sentences must be at least 2: a neighbour is another sentence")
    console = Console()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # on long texts before they are cut
    try:
        sentences = sentence_encoder.load()
        texts = sentence_encoder.read_texts(options.sentences, options.seed)
    except ModuleNotFoundError as error:
        console.print(f"{error.name} is missing: pip install 'trtbridge\\[demo]'", style="red")
        return 2
    torch.manual_seed(options.seed)
    try:
        backend, reason = choose_backend(options.backend)
        console.print(f"Backend {backend.name}: {reason}", markup=False)
        results = run(sentences, texts, backend.name, console)
    except tb.TrtBridgeError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    console.print(make_table(results))
    built_only = [result for result in results if not result.ran]
    if built_only:
        title = TITLES[backend.name]
        console.print(
            f"{title}'s engines were built but not run: torch {torch.__version__} sees no CUDA GPU here. "
            f"All comparisons and latencies above are ONNX Runtime's and PyTorch's on the CPU, not {title}'s."
        )
    if backend.name == "onnxruntime":
        console.print("No engine was built: only ONNX Runtime was used, and all numbers are of the CPU.")
    failures = [f"{' '.join(result.title.split())}: {result.failure}" for result in results if result.failure]
    for failure in failures:
        console.print(f"FAILED: {failure}", style="red", markup=False)
    if options.json:
        numbers = [dataclasses.asdict(result) | {"failure": result.failure} for result in results]
        options.json.write_text(json.dumps({"results": numbers, "passed": not failures}, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
