"""Parts of scripts/bench.py: many shapes, and many threads."""

from __future__ import annotations

import copy
import itertools
import random
import resource
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import bench_models as models
import torch
from bench_common import BACKEND, DRY_RUN, Example, Keep, Row, Settings, program_file, synchronize
from helpers import compare, leaves

import trtbridge as tb

SHAPE_MODELS = ("resnet50", "all_minilm_l6_v2")
THREAD_MODELS = ("resnet50", "twelve_plugins")
_SHAPES = 8
_SAMPLES = 20
_OVERLAPPED = "True, overlapped"
_PARALLEL = "True, parallel_replays"
_ONE_SET = "True, one set"
_OWN = "own modules"
_IN_TURN = "one thread, own modules"  # each call is of another one, whose contexts are in no cache of the host
_CHECKED = 100  # results of each thread that are compared
FLAT_BYTES = 1 << 20
"""Most that allocated device memory may grow by after the first fifth of the calls."""
LEAST_THROUGHPUT = 0.97
"""Of one thread's, that several threads must reach: two measurements of one thing differ by that."""
LEAST_COSINE = 0.99


def shapes(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Eight shapes in turn, then calls with random shapes in range."""
    rows = [_turns(model, settings)]
    keep(rows)
    rows.append(_random(model, settings))
    keep(rows)
    return rows


def _turns(model: str, settings: Settings) -> Row:
    """Captures after each round of eight batch sizes: a shape's first call is a plain one, its second is captured."""
    module = tb.load(program_file(settings, model), models.here(), cuda_graphs=True)
    sizes = [1 + index * (models.MOST_BATCH - 1) // (_SHAPES - 1) for index in range(_SHAPES)]
    given = [models.example(model, settings, size) for size in sizes]
    captures, seconds = [], []
    for _ in range(settings.rounds):
        synchronize()
        started = time.perf_counter()
        for one in given:
            module(*one.args, **one.kwargs)
        synchronize()
        seconds.append(round(time.perf_counter() - started, 5))
        captures.append(module.stats().graph_captures or 0)
    return {"way": "in turn", "shapes": len(sizes), "captures": captures, "seconds": seconds}


def _random(model: str, settings: Settings) -> Row:
    """Memory over calls with random shapes: batch sizes of the whole range, and lengths where the model has them."""
    module = tb.load(program_file(settings, model), models.here(), cuda_graphs=True)
    full = models.example(model, settings, models.MOST_BATCH)
    dims = module.program.signature.dims
    pick = random.Random(0)
    every = max(1, settings.random_calls // _SAMPLES)
    samples: list[dict[str, float]] = []
    if not DRY_RUN:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for number in range(settings.random_calls):
        batch = pick.randint(1, models.MOST_BATCH)
        length = pick.randint(dims["length"][0], dims["length"][2]) if "length" in dims else 0
        module(
            *(_cut(v, batch, length) for v in full.args), **{k: _cut(v, batch, length) for k, v in full.kwargs.items()}
        )
        if (number + 1) % every == 0:
            synchronize()
            samples.append(_memory())
    synchronize()
    counted = module.stats()
    row: Row = {
        "way": "random",
        "calls": settings.random_calls,
        "seconds": round(time.perf_counter() - started, 2),
        "samples": samples,
        "grown_bytes": samples[-1]["allocated"] - samples[len(samples) // 5]["allocated"],
        "captures": counted.graph_captures or 0,
        "graphs": counted.captured_graphs or 0,
        "replays": counted.graph_replays or 0,
    }
    if not DRY_RUN:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def _cut(value: Any, batch: int, length: int) -> Any:
    """A part of a full argument, contiguous; another length by repetition where it is longer than the example."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value[:batch]
    if length and value.ndim == 2 and not value.is_floating_point():
        value = torch.cat([value] * -(-length // value.shape[1]), 1)[:, :length]
    return value.contiguous()


def _memory() -> dict[str, float]:
    """Bytes in use now: by torch's tensors, on the whole device, and the most that this process ever had."""
    found: dict[str, float] = {"allocated": 0, "device": 0, "rss": 0}
    if not DRY_RUN:
        free, total = torch.cuda.mem_get_info()
        found |= {"allocated": torch.cuda.memory_allocated(), "device": total - free}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["rss"] = pages * resource.getpagesize()
    except OSError:  # not Linux
        found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def threads(model: str, settings: Settings, keep: Keep) -> list[Row]:
    """Several threads on one module and on one each, beside one thread: calls a second, and every result compared."""
    eager = models.eager(model, settings)
    given = [models.example(model, settings, 1, seed) for seed in range(settings.threads)]
    with torch.no_grad():
        expected = [[t.clone() for t in leaves(eager(*one.args, **one.kwargs))] for one in given]
    rows: list[Row] = []
    # Kernels made for these very sizes from the first call on: others that come in the background have other bits.
    fixed = {"kernel_specialization": "eager"} if BACKEND == "tensorrt_rtx" else {}
    for mode, options in {
        "False": {"cuda_graphs": False, **fixed},
        "True": {"cuda_graphs": True},
        _PARALLEL: {"cuda_graphs": True, "parallel_replays": settings.threads},
        _ONE_SET: {"cuda_graphs": True, "parallel_replays": 1},
        _OVERLAPPED: {"cuda_graphs": True, "overlap_kernels": True},
    }.items():
        module = tb.load(program_file(settings, model), models.here(), **options)
        has_sets = mode in (_PARALLEL, _ONE_SET)
        others = 0 if has_sets else settings.threads - 1  # sets are of one module
        several = [module, *(copy.deepcopy(module) for _ in range(others))]
        crowds = {"one thread": [[module]], "one module": [[module]] * settings.threads}
        if not has_sets:
            crowds |= {_IN_TURN: [several], _OWN: [[one] for one in several]}
        with ExitStack() as pools:
            ways = {
                way: _Crowd(crowd, given, expected, settings, pools.enter_context(ThreadPoolExecutor(len(crowd))))
                for way, crowd in crowds.items()
            }
            # In turns, and beside the one thread of the same turn: a host changes by a third within seconds.
            rates = [{way: one.rate() for way, one in ways.items()} for _ in range(settings.repeats)]
            for way, one in ways.items():
                cosine, differ = one.check()
                rows.append({"way": way, "cuda_graphs": mode, "threads": len(crowds[way]),
                             "calls_per_s": round(statistics.median(each[way] for each in rates), 1),
                             "ratio": round(statistics.median(each[way] / each["one thread"] for each in rates), 4),
                             "cosine": cosine, "differ": round(differ, 5)})  # fmt: skip
                if way == _OWN:
                    beside = statistics.median(each[way] / each[_IN_TURN] for each in rates)
                    rows[-1]["beside_in_turn"] = round(beside, 4)
                keep(rows)
    return rows


class _Crowd:
    """Threads that call at once, each with its own arguments and on a stream of its own.

    Args:
        modules: of each thread, which calls them in turn.
        given: arguments, the first ones of the first thread.
        expected: results of eager PyTorch for them.
        settings: how many calls.
        pool: as many threads.
    """

    def __init__(
        self,
        modules: Sequence[Sequence[Any]],
        given: Sequence[Example],
        expected: Sequence[list[torch.Tensor]],
        settings: Settings,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._modules, self._given, self._expected, self._pool = modules, given, expected, pool
        self._calls = settings.thread_calls * settings.threads // len(modules)  # in all it is the same number
        self._alone: dict[int, list[list[torch.Tensor]]] = {}
        for module in {id(module): module for each in modules for module in each}.values():
            alone = self._alone[id(module)] = []
            for one in given:
                for _ in range(3):  # a graph comes with the second
                    result = leaves(module(*one.args, **one.kwargs))
                alone.append([tensor.clone() for tensor in result])
        synchronize()
        self._streams = [None if DRY_RUN else torch.cuda.Stream() for _ in modules]

    def rate(self) -> float:
        """Calls a second of all threads together."""
        ready = threading.Barrier(len(self._modules) + 1)
        waiting = [self._pool.submit(self._repeat, index, ready) for index in range(len(self._modules))]
        ready.wait()
        started = time.perf_counter()
        for each in waiting:
            each.result()
        return len(self._modules) * self._calls / (time.perf_counter() - started)

    def check(self) -> tuple[float, float]:
        """The least cosine to eager, and the share of results that are not bit by bit what the module gives alone."""
        checked = list(self._pool.map(self._check, range(len(self._modules))))
        differ = sum(number for _, number in checked) / (_CHECKED * len(self._modules))
        return min(cosine for cosine, _ in checked), differ

    def _repeat(self, index: int, ready: threading.Barrier) -> None:
        modules, given = self._modules[index], self._given[index]
        with self._stream(index):
            for _ in range(5):
                for module in modules:
                    module(*given.args, **given.kwargs)
            _wait()
            ready.wait()
            for _, module in zip(range(self._calls), itertools.cycle(modules), strict=False):
                module(*given.args, **given.kwargs)
            _wait()

    def _check(self, index: int) -> tuple[float, int]:
        least, differ, modules = 1.0, 0, self._modules[index]
        with self._stream(index):
            for turn in range(_CHECKED):
                which, module = (index + turn) % len(self._given), modules[turn % len(modules)]
                given = self._given[which]
                result = leaves(module(*given.args, **given.kwargs))
                _wait()
                least = min(least, compare(result, self._expected[which])["cosine"])
                differ += not all(map(torch.equal, result, self._alone[id(module)][which]))
        return least, differ

    def _stream(self, index: int) -> Any:
        return nullcontext() if DRY_RUN else torch.cuda.stream(self._streams[index])


def _wait() -> None:
    if not DRY_RUN:
        torch.cuda.current_stream().synchronize()


def shapes_wrong(rows: Sequence[Row]) -> list[str]:
    """Captures after each shape's second call, and memory that grows."""
    wrong = []
    for row in rows:
        if row["way"] == "in turn" and len(set(row["captures"][1:])) > 1:
            wrong.append(f"shapes, {row['unit']}: captured again after the first rounds: {row['captures']}")
        if row["way"] == "random" and row["grown_bytes"] > FLAT_BYTES:
            wrong.append(f"shapes, {row['unit']}: memory grew by {row['grown_bytes'] / 2**20:.1f} MiB")
    return wrong


def threads_wrong(rows: Sequence[Row]) -> list[str]:
    """Wrong results, and threads that are slower together than one of them; ways to be asked for are only shown."""
    wrong = []
    for row in rows:
        if row["cuda_graphs"] == _OVERLAPPED:
            continue
        name = f"threads, {row['unit']}, {row['way']}, cuda_graphs={row['cuda_graphs']}"
        if row["cosine"] < LEAST_COSINE:
            wrong.append(f"{name}: cosine to eager {row['cosine']:.6f}")
        if row.get("differ"):
            wrong.append(f"{name}: {100 * row['differ']:.2f} % of the results are not what the module gives alone")
        ratio = row.get("beside_in_turn", row["ratio"])
        if row["way"] != _IN_TURN and row["cuda_graphs"] != _ONE_SET and ratio < LEAST_THROUGHPUT:
            wrong.append(f"{name}: {ratio:.3f} of one thread's throughput")
    return wrong
