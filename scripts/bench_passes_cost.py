"""What the default pipeline itself costs, beside export and build; scripts/bench_passes.py --cost runs it.

A BERT-large (335 M parameters, random weights) and a module whose graph has 10,000 nodes are converted for
TensorRT-RTX, each in a process of its own. Seconds are those of the stages. Memory is the resident set of the process
and its children, sampled every 10 ms: the pipeline's is its growth while the passes run, the conversion's is the growth
from its beginning to its peak.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

LIMIT = 0.10
"""Most that the pipeline may take, as a share of export plus build."""
MODELS = ("bert_large", "10,000 nodes")


def make(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A module, arguments and dynamic shapes."""
    import torch

    import trtbridge as tb

    torch.manual_seed(0)
    batch = tb.Dim("batch", min=1, opt=8, max=32)
    if name == "bert_large":
        from transformers import BertConfig, BertModel

        config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        ids = torch.randint(1000, 30000, (2, 32))
        return (
            BertModel(config).eval(),
            (ids, torch.ones_like(ids)),
            {"input_ids": {0: batch}, "attention_mask": {0: batch}},
        )

    class Deep(torch.nn.Module):
        """Blocks of small products and elementwise ops, with shapes taken apart and put together again."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(16, 16) / 8) for _ in range(1000)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                y = torch.tanh(x @ weight).reshape(x.shape[0], 4, 4).transpose(1, 2)
                y = y.reshape(x.shape[0], -1) * 0.5
                x = torch.sigmoid(x) + y - torch.relu(y) * 0.25
            return x

    return Deep().eval(), (torch.randn(2, 16),), {"x": {0: batch}}


def resident_bytes(process: str = "self") -> int:
    """The resident set of a process and its children."""
    place = Path("/proc", process)
    try:
        pages = int((place / "statm").read_text().split()[1])
        children = [child for task in (place / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, IndexError):  # it ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident_bytes, children))


class Memory:
    """Samples memory by stage, in a thread."""

    def __init__(self) -> None:
        self.stage, self.begin, self.peak = "", {"": resident_bytes()}, {"": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def progress(self, stage: str, fraction: float) -> None:
        """Take a report of `convert`."""
        name = stage.partition(":")[0]
        if fraction == 0.0 and name != self.stage:
            self.begin.setdefault(name, resident_bytes())
            self.stage = name

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak[self.stage] = max(self.peak.get(self.stage, 0), resident_bytes())

    def stop(self) -> None:
        """End the sampling."""
        self._stop.set()
        self._thread.join()


def worker(name: str) -> None:
    """Convert one model and print what it cost as JSON."""
    import trtbridge as tb
    from trtbridge.bridge import convert as _pipeline  # noqa: F401  # its imports are no part of a conversion

    module, args, shapes = make(name)
    memory = Memory()
    start = memory.begin[""]
    program = tb.convert(module, args, dynamic_shapes=shapes, backend="tensorrt_rtx", progress=memory.progress).program
    memory.stop()
    seconds = program.info["stage_seconds"]
    spent = sum(seconds[stage] for stage in ("trace", "export", "parse", "build") if stage in seconds)
    row = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "stage_s": seconds,
        "pass_s": {item["name"]: item["seconds"] for item in program.info["passes"]},
        "share_of_time": seconds["passes"] / spent,
        "passes_bytes": max(0, memory.peak.get("passes", 0) - memory.begin["passes"]),
        "convert_bytes": max(memory.peak.values()) - start,
    }
    row["share_of_memory"] = row["passes_bytes"] / row["convert_bytes"]
    print(json.dumps(row))


def render(record: dict[str, Any]) -> str:
    """The page in Markdown."""
    lines = [
        "# Passes: what the default pipeline costs",
        "",
        f"Made by `scripts/bench_passes.py --cost` on {record['host']}, {record['date']}; {record['versions']}.",
        "",
        "Two models are converted for TensorRT-RTX, each in a process of its own. *Share of time* is that of the",
        "passes in trace, export and build. Memory is the resident set of the process and its children, sampled every",
        "10 ms: the passes' is its growth while they run, the conversion's that from its beginning to its peak. No",
        f"share may exceed {LIMIT:.0%}.",
        "",
        "| model | parameters | trace s | export s | passes s | build s | share of time | passes MiB | "
        "conversion MiB | share of memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        seconds = row["stage_s"]
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {seconds['trace']:.1f} | {seconds['export']:.1f} | "
            f"{seconds['passes']:.2f} | {seconds['build']:.1f} | {row['share_of_time']:.1%} | "
            f"{row['passes_bytes'] / 2**20:.0f} | {row['convert_bytes'] / 2**20:.0f} | {row['share_of_memory']:.1%} |"
        )
    wrong = too_much(record["rows"])
    lines += ["", f"Above {LIMIT:.0%}: " + ("; ".join(wrong) if wrong else "nothing") + "."]
    return "\n".join(lines) + "\n"


def too_much(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Shares above the limit, in words."""
    return [
        f"{row['model']}, {row[share]:.1%} of {share.rpartition('_')[2]}"
        for row in rows
        for share in ("share_of_time", "share_of_memory")
        if row[share] > LIMIT
    ]


def main(record_path: Path | None, page: Path) -> int:
    """Run all in processes of their own and write the page; 1 where a share exceeds the limit."""
    names = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "tensorrt-rtx-cu13", "transformers")
    record = {
        "host": f"{os.cpu_count()} CPUs, Python {platform.python_version()}",
        "date": f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in names),
        "rows": [],
    }
    for name in MODELS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            return 1
        record["rows"].append(json.loads(done.stdout.splitlines()[-1]))
        if record_path is not None:
            record_path.write_text(json.dumps(record, indent=1) + "\n")
    text = render(record)
    page.write_text(text)
    print(text)
    return int(bool(too_much(record["rows"])))


if __name__ == "__main__":
    worker(sys.argv[1])
