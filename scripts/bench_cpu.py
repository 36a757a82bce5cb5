#!/usr/bin/env python3
"""What ONNX Runtime's waiting threads cost torch's on a CPU: calls of programs with and without plugins.

    python scripts/bench_cpu.py --output docs/bench-cpu.md

A transformer encoder is converted as a whole, with its norms, and with its linear layers as plugins (`as_plugins`), and
called alone and with a torch module behind it: as it is, and with sessions as ONNX Runtime makes them by default, whose
threads spin while they wait. Each way has processes of its own, in turns, as spinning threads disturb whatever else
there is. Times are medians and means, as a collision shows in some calls only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import torch
from torch import nn

import trtbridge as tb
from trtbridge.bridge.backends import onnxruntime as backend
from trtbridge.bridge.backends import ort_session

PROGRAMS = {"no plugins": (), "norms as plugins": "aten::layer_norm", "linear layers as plugins": "aten::linear"}
WAYS = ("ours", "default")

Key = tuple[str, int, bool]
"""Program, plugins in it, torch module behind it."""


def by_default(ort: Any) -> Any:
    """Options of a session as they are, but for its messages."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def seconds(call: Callable[[], Any], count: int) -> list[float]:
    """Of each of some calls."""
    found = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def measure(way: str, count: int, layers: int) -> list[tuple[Key, list[float]]]:
    """Seconds of calls in this process."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    after = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128)).eval()
    x = torch.randn(2, 64, 128)
    spins = way == "default"
    found = []
    for name, entries in PROGRAMS.items():
        with (
            mock.patch.object(ort_session, "session_options", by_default) if spins else nullcontext(),
            mock.patch.object(backend, "never_spin", None) if spins else nullcontext(),
        ):
            module = tb.convert(model, (x,), backend="onnxruntime", as_plugins=entries)
        plugins = len(module.program.plugin_calls)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
            seconds(lambda module=module: module(x), 5)
            found.append(((name, plugins, False), seconds(lambda module=module: module(x), count)))
            seconds(lambda module=module: after(module(x)), 5)
            found.append(((name, plugins, True), seconds(lambda module=module: after(module(x)), count)))
    return found


def all_ways(count: int, layers: int, turns: int) -> dict[Key, dict[str, list[float]]]:
    """Seconds of calls by way, in processes of their own."""
    found: dict[Key, dict[str, list[float]]] = {}
    for _ in range(turns):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--calls", str(count), "--layers", str(layers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for (name, plugins, behind), times in json.loads(done.stdout.splitlines()[-1]):
                found.setdefault((name, plugins, behind), {}).setdefault(way, []).extend(times)
    return found


def page(found: dict[Key, dict[str, list[float]]], turns: int) -> str:
    """The table with what it is of."""
    head = ["program", "plugins", "torch behind it", "ours, median ms", "default, median ms", "ours, mean ms"]
    head += ["default, mean ms", "default / ours, medians", "default / ours, means"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for (name, plugins, behind), times in found.items():
        line = [name, str(plugins), "yes" if behind else "no"]
        ratios = []
        for average in (statistics.median, statistics.mean):
            ours, default = (average(times[way]) for way in WAYS)
            line += [f"{1000 * ours:.2f}", f"{1000 * default:.2f}"]
            ratios.append(f"{default / ours:.2f}")
        lines.append([*line, *ratios])
    return "\n".join(
        [
            "# Calls on a CPU",
            "",
            f"Made by `python scripts/bench_cpu.py` with ONNX Runtime {onnxruntime.__version__} on {os.cpu_count()} "
            f"cores; torch {torch.__version__} with {torch.get_num_threads()} threads, Python "
            f"{platform.python_version()}. Each way in {turns} processes.",
            "",
            "*Default* are sessions whose threads wait by spinning, as ONNX Runtime makes them. OpenMP's threads, "
            "which are torch's, do so too, and where both spin on the same cores what the one waits for gets none. "
            "*Ours* stop when they have run; in programs with plugins they never spin.",
            "",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the page; default: it is printed")
    parser.add_argument("--calls", type=int, default=60, help="in each process")
    parser.add_argument("--turns", type=int, default=3, help="processes of each way")
    parser.add_argument("--layers", type=int, default=4, help="of the encoder")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(measure(options.way, options.calls, options.layers)))
        return
    text = page(all_ways(options.calls, options.layers, options.turns), options.turns)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
