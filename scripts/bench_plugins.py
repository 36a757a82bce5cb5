"""What the ops that ship cost on a GPU: the Triton kernels beside the references in plain torch, and beside others.

    python scripts/bench_plugins.py [--ops NAME ...] [--repeats 7] [--dtypes float16 float32] [--json FILE]
    python scripts/bench_plugins.py --render FILE ...       docs/bench-plugins.md, of the records of one or more runs

Per op, size and dtype: milliseconds of one call of the reference, of the op, of the op replayed from a CUDA graph (as a
converted model runs it), and of another implementation where one is at hand: F.grid_sample per level for deformable
attention (as in transformers), torchvision for deformable convolution and non-maximum suppression. The results are
compared first. The variants take turns, each for a batch of calls between two CUDA events; medians are shown. TF32 is
off.

Exit status: 0 the op is faster than its reference everywhere, 1 it is not, or a result is wrong, 2 no GPU or no Triton.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from trtbridge.plugins import batched_nms, deformable_attention, deformable_convolution, selective_scan

ROOT = Path(__file__).resolve().parent.parent
BATCH_MS = 5.0
"""About how long a batch of calls between two events takes."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the reference, as a share of the largest number."""
OPS = torch.ops.trtbridge


@dataclass(frozen=True)
class Case:
    """One op on one size.

    Attributes:
        op: its name.
        size: in words.
        run: calls the op; returns its tensors.
        reference: calls the reference; returns the same.
        graph: whether the op can be captured in a CUDA graph.
        other: calls another implementation, or None.
        other_name: its name.
    """

    op: str
    size: str
    run: Callable[[], Any]
    reference: Callable[[], Any]
    graph: bool = True
    other: Callable[[], Any] | None = None
    other_name: str = ""


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Deformable DETR on 800 x 1066 pixels: the encoder, where each pixel is a query, and the decoder."""
    levels = [(100, 134), (50, 67), (25, 34), (13, 17)]
    sizes = [height * width for height, width in levels]
    shapes = torch.tensor(levels, device="cuda")
    starts = torch.tensor([sum(sizes[:level]) for level in range(len(levels))], device="cuda")
    for name, n, queries in (
        ("encoder", 1, sum(sizes)),
        ("encoder", 4, sum(sizes)),
        ("decoder", 1, 300),
        ("decoder", 8, 300),
    ):
        value = torch.randn(n, sum(sizes), 8, 32, device="cuda", dtype=dtype)
        locations = torch.rand(n, queries, 8, 4, 4, 2, device="cuda", dtype=dtype)
        weights = torch.rand(n, queries, 8, 16, device="cuda").softmax(-1).view(n, queries, 8, 4, 4).to(dtype)
        call = (value, shapes, starts, locations, weights)
        yield Case(
            "deformable_attention",
            f"{name}, batch {n}, {queries} queries, 8 heads of 32, 4 levels, 4 points",
            lambda call=call: OPS.deformable_attention(*call),  # type: ignore[misc]
            lambda call=call: deformable_attention.reference(*call),  # type: ignore[misc]
            other=lambda call=call: grid_sample_attention(call, levels, sizes),  # type: ignore[misc]
            other_name="grid_sample",
        )


def grid_sample_attention(call: Any, levels: list[tuple[int, int]], sizes: list[int]) -> torch.Tensor:
    """Deformable attention with one grid_sample a level, on sizes known to the host."""
    value, _, _, locations, weights = call
    n, _, heads, dim = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    samples = [
        F.grid_sample(
            part.permute(0, 2, 3, 1).reshape(n * heads, dim, *levels[level]),
            grids[:, :, :, level].transpose(1, 2).flatten(0, 1),
            align_corners=False,
        )
        for level, part in enumerate(value.split(sizes, dim=1))
    ]
    shares = weights.transpose(1, 2).reshape(n * heads, 1, queries, -1)
    total = (torch.stack(samples, dim=-2).flatten(-2) * shares).sum(-1)
    return total.view(n, heads * dim, queries).transpose(1, 2).contiguous()


def convolution_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Deformable convolutions of a ResNet with DCN v2."""
    for n, channels, size in ((1, 256, 56), (8, 256, 56), (1, 128, 100), (8, 512, 14)):
        tensors = (
            torch.randn(n, channels, size, size),
            torch.randn(channels, channels, 3, 3) / math.sqrt(channels * 9),
            torch.randn(n, 18, size, size),
            torch.rand(n, 9, size, size),
            torch.randn(channels),
        )
        image, weight, offset, mask, bias = (tensor.to("cuda", dtype) for tensor in tensors)
        call = (image, weight, offset, mask, bias, [1, 1], [1, 1], [1, 1], 1, 1)
        other = None
        if importlib.util.find_spec("torchvision"):
            from torchvision.ops import deform_conv2d

            theirs = (image, offset, weight, bias, 1, 1, 1, mask)
            other = lambda theirs=theirs: deform_conv2d(*theirs)  # noqa: E731
        yield Case(
            "deform_conv2d",
            f"batch {n}, {channels} channels, {size} x {size}, kernel 3 x 3",
            lambda call=call: OPS.deform_conv2d(*call),  # type: ignore[misc]
            lambda call=call: deformable_convolution.reference(*call),  # type: ignore[misc]
            other=other,
            other_name="torchvision",
        )


def nms_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Boxes on integer coordinates, as exact in every dtype as they can be."""
    for count, classes in ((1000, 1), (1000, 80), (2000, 1), (4000, 1), (4000, 80)):
        low = torch.randint(0, 900, (count, 2), device="cuda")
        boxes = torch.cat([low, low + torch.randint(20, 200, (count, 2), device="cuda")], 1).to(dtype)
        scores = (torch.randperm(count, device="cuda") / count).to(dtype)
        idxs = torch.randint(0, classes, (count,), device="cuda")
        call = (boxes, scores, idxs, 0.5)
        other = None
        if importlib.util.find_spec("torchvision"):
            from torchvision.ops import batched_nms as theirs

            other = lambda call=call: theirs(*call)  # noqa: E731
        size = f"{count} boxes, {classes} classes"

        def free(call: Any = call, count: int = count) -> torch.Tensor:
            indices, found = batched_nms.reference(*call, count)
            return indices[: int(found)]

        yield Case("batched_nms", size, lambda call=call: OPS.batched_nms(*call), free, False, other, "torchvision")  # type: ignore[misc]
        yield Case(
            "batched_nms_padded",
            f"{size}, best 300",
            lambda call=call: OPS.batched_nms_padded(*call, 300),  # type: ignore[misc]
            lambda call=call: batched_nms.reference(*call, 300),  # type: ignore[misc]
        )


def scan_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Layers of Mamba-130m (1536 channels) and Mamba-1.4b (4096), with 16 states a channel."""
    for n, dim, length in ((1, 1536, 2048), (8, 1536, 512), (1, 1536, 197), (1, 1536, 1), (1, 4096, 2048)):
        u, delta, z = (torch.randn(n, dim, length, device="cuda", dtype=dtype) for _ in range(3))
        b, c = (torch.randn(n, 16, length, device="cuda", dtype=dtype) for _ in range(2))
        a = -torch.arange(1.0, 17.0, device="cuda").expand(dim, 16).contiguous()
        d, bias = torch.ones(dim, device="cuda"), torch.rand(dim, device="cuda") * 4 - 7
        call = (u, delta, a, b, c, d, z, bias, True)
        yield Case(
            "selective_scan",
            f"batch {n}, {dim} channels, 16 states, {length} steps",
            lambda call=call: OPS.selective_scan(*call),  # type: ignore[misc]
            lambda call=call: selective_scan.reference(*call)[0],  # type: ignore[misc]
        )


GROUPS: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "deformable_attention": attention_cases,
    "deform_conv2d": convolution_cases,
    "batched_nms": nms_cases,
    "selective_scan": scan_cases,
}


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """A call as a replay of a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run()

    def replay() -> None:
        graph.replay()
        assert held is not None  # the graph writes to it

    return replay


def milliseconds(run: Callable[[], Any], calls: int) -> float:
    """Time of one call, from a batch of them between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls


def difference(case: Case) -> float:
    """Largest difference of op and reference, as a share of the largest number; infinite where shapes differ."""
    results = [run() for run in (case.run, case.reference)]
    ours, theirs = (result if isinstance(result, (tuple, list)) else (result,) for result in results)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel():
            scale = float(b.abs().max()) if b.is_floating_point() else 1.0
            worst = max(worst, float((a.double() - b.double()).abs().max()) / max(scale, 1e-30))
    return worst


def measure(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Compares and times one case."""
    worst = difference(case)
    variants: dict[str, Callable[[], Any]] = {"reference": case.reference, "op": case.run}
    if case.graph:
        variants["graph"] = captured(case.run)
    if case.other:
        variants["other"] = case.other
    calls = {}
    for name, run in variants.items():
        run()  # compiles, tunes
        calls[name] = max(1, min(200, round(BATCH_MS / max(milliseconds(run, 2), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(milliseconds(run, calls[name]))
    medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    return {
        "op": case.op,
        "size": case.size,
        "dtype": str(dtype).removeprefix("torch."),
        **medians,
        "ratio": medians["reference_ms"] / medians["op_ms"],
        "other": case.other_name if case.other else None,
        "difference": worst,
        "agrees": worst <= TOLERANCES[dtype],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| op | size | dtype | reference ms | op ms | ratio | op in a CUDA graph ms | another ms | difference |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        graph = f"{row['graph_ms']:.4f}" if "graph_ms" in row else "–"
        other = f"{row['other_ms']:.4f} ({row['other']})" if row["other"] else "–"
        numbers = f"{row['reference_ms']:.3f} | {row['op_ms']:.4f} | {row['ratio']:.1f} | {graph} | {other}"
        wrong = "" if row["agrees"] else " **wrong**"
        lines.append(f"| {row['op']} | {row['size']} | {row['dtype']} | {numbers} | {row['difference']:.1e}{wrong} |")
    return "\n".join(lines)


def page(records: list[dict[str, Any]]) -> str:
    """docs/bench-plugins.md: one table a run."""
    lines = [
        "# The ops that ship, against their torch references",
        "",
        "Written by `scripts/bench_plugins.py` from what it measured on a GPU; not edited by hand. Milliseconds of one",
        "call: medians, the variants in turn in one run, between two CUDA events. *ratio* is the reference over the",
        "op; *another* is an implementation that is at hand elsewhere. Plain calls of small sizes are as slow as the",
        "host, which had other work in some of these runs; a converted model can replay them from a CUDA graph.",
    ]
    for record in records:
        about = ", ".join(f"{key} {value}" for key, value in record.items() if key != "rows")
        lines += ["", f"## {', '.join(dict.fromkeys(row['op'] for row in record['rows']))}", "", about + ".", ""]
        lines.append(table(record["rows"]))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="default: all")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float16", "float32", "bfloat16"], default=["float16", "float32"]
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="batches of calls of each variant (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE", help="only write the page, of these records")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench-plugins.md", help="the page")
    options = parser.parse_args()
    if options.render:
        options.out.write_text(page([json.loads(path.read_text()) for path in options.render]))
        return 0
    if not torch.cuda.is_available():
        print(
            f"bench_plugins: torch {torch.__version__} sees no CUDA device; this benchmark needs one", file=sys.stderr
        )
        return 2
    if importlib.util.find_spec("triton") is None:
        print("bench_plugins: Triton is not installed, so there are no kernels to time", file=sys.stderr)
        return 2
    import triton

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    about = {
        "date": today,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows: list[dict[str, Any]] = []
    for name in options.ops:
        for dtype in (getattr(torch, text) for text in options.dtypes):
            with torch.no_grad():
                for case in GROUPS[name](dtype):
                    rows.append(measure(case, dtype, options.repeats))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(table(rows))
    slow = [f"{row['op']} ({row['size']}, {row['dtype']})" for row in rows if row["ratio"] <= 1]
    wrong = [f"{row['op']} ({row['size']}, {row['dtype']})" for row in rows if not row["agrees"]]
    for words, names in (("slower than the reference", slow), ("unlike the reference", wrong)):
        if names:
            print(f"bench_plugins: {words}: {'; '.join(names)}", file=sys.stderr)
    return int(bool(slow or wrong))


if __name__ == "__main__":
    sys.exit(main())
