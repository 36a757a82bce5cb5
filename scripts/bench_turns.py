#!/usr/bin/env python3
"""How threads that call at once get on without CUDA graphs: without turns, with them, and with one thread for all.

    python scripts/bench_turns.py                              calls that let go of Python's lock 60 times, anywhere
    python scripts/bench_turns.py --model resnet50 --work DIR  calls of a model of scripts/bench.py, converted in DIR

Calls a second of all threads together, in turns of the ways, medians; `bridge/turns.py` says what turns are for, and
docs/runtime.md has what came out on a GPU. Of a model both on one module and on a module for each thread; and what
bench_turns_one_thread.py tries, with whole calls and with TensorRT's part of them.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import bench_models as models
import torch
from bench_common import BACKEND, DRY_RUN, Example, Settings, program_file
from bench_turns_one_thread import OneThread, enqueues, no_turns, whole_calls

import trtbridge as tb
from trtbridge.bridge import turns

LAUNCHES = 60
"""Of a call that stands for one of an engine: as often it lets go of Python's lock, for 5 to 10 us each time."""

ENQUEUES = "one thread for enqueues"
"""The way that only programs of TensorRT have."""

Call = Callable[[], Any]


def _in_turn(turn: turns.HostTurns, work: Call) -> None:
    with turn.turn(()):
        work()


@contextmanager
def _one_thread() -> Iterator[None]:
    one = OneThread()
    with whole_calls(one), mock.patch.dict(globals(), _in_turn=lambda turn, work: one.call(work)):
        yield


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no turns": no_turns,
    "a turn each call": lambda: mock.patch.object(turns, "TURN_S", 0.0),
    "as it is": nullcontext,
    "one thread for calls": _one_thread,
    ENQUEUES: lambda: enqueues(OneThread()),
}


def stand_ins(threads: int) -> list[Call]:
    """Calls without a GPU, each with its turn, as programs of one device."""
    data = b"x" * 8192  # hashlib lets go of Python's lock from 2 KiB on

    def made() -> Call:
        turn = turns.HostTurns(-1)

        def work() -> None:
            for _ in range(LAUNCHES):
                hashlib.sha256(data).digest()

        return lambda: _in_turn(turn, work)

    return [made() for _ in range(threads)]


def modules(model: str, settings: Settings) -> tuple[list[Call], list[Call]]:
    """Calls of one module, and of a module each, on streams of their own, batch 1."""
    if problem := models.convert_all([model], settings, 1, 600)[model]["error"]:
        raise SystemExit(f"{model} is not converted: {problem}")
    options = {"kernel_specialization": "eager"} if BACKEND == "tensorrt_rtx" else {}
    module = tb.load(program_file(settings, model), models.here(), cuda_graphs=False, **options)
    given = [models.example(model, settings, 1, seed) for seed in range(settings.threads)]

    def call_of(one: tb.EngineModule, example: Example) -> Call:
        stream = None if DRY_RUN else torch.cuda.Stream()

        def call() -> None:
            with torch.cuda.stream(stream):
                one(*example.args, **example.kwargs)

        return call

    several = [module, *(copy.deepcopy(module) for _ in given[1:])]
    return [call_of(module, one) for one in given], [call_of(*pair) for pair in zip(several, given, strict=True)]


def rate(calls: Sequence[Call], count: int) -> tuple[float, float]:
    """Calls a second of all of them, each in a thread of its own, and the longest call in seconds."""
    each = count // len(calls)
    ready = threading.Barrier(len(calls) + 1)
    longest = [0.0] * len(calls)

    def work(index: int) -> None:
        for _ in range(3):
            calls[index]()
        ready.wait()
        for _ in range(each):
            started = time.perf_counter()
            calls[index]()
            longest[index] = max(longest[index], time.perf_counter() - started)

    crowd = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in crowd:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in crowd:
        thread.join()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return each * len(calls) / (time.perf_counter() - started), max(longest)


def table(kinds: dict[str, Sequence[Call]], ways: Sequence[str], count: int, rounds: int) -> str:
    """Medians of ways, as text."""
    alone = next(iter(kinds.values()))[:1]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for way in ways:
            with WAYS[way]():
                found.setdefault((way, "one thread"), []).append(rate(alone, count))
                for kind, calls in kinds.items():
                    found.setdefault((way, kind), []).append(rate(calls, count))
    lines = [f"{len(os.sched_getaffinity(0))} cores", ""]
    lines += ["| turns | | calls a second | beside one thread | longest call, ms |", "|---|---|---:|---:|---:|"]
    for (way, kind), measured in found.items():
        median = statistics.median(one for one, _ in measured)
        beside = median / statistics.median(one for one, _ in found[way, "one thread"])
        slowest = 1000 * max(longest for _, longest in measured)
        lines.append(f"| {way} | {kind} | {median:.0f} | {beside:.3f} | {slowest:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="one of scripts/bench.py; needs a GPU")
    parser.add_argument("--work", type=Path, help="folder of converted models")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=4000, help="of all threads together, each time")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    kinds: dict[str, Sequence[Call]] = {}
    ways = [way for way in WAYS if way != ENQUEUES or (options.model and not DRY_RUN)]
    if options.model is None:
        kinds[f"{options.threads} threads"] = stand_ins(options.threads)
    else:
        if options.work is None:
            parser.error("--model needs --work DIR")
        options.work.mkdir(parents=True, exist_ok=True)
        one, several = modules(options.model, Settings(options.work, threads=options.threads))
        kinds |= {f"{options.threads} threads, one module": one, f"{options.threads} threads, a module each": several}
    print(table(kinds, ways, options.calls, options.rounds))


if __name__ == "__main__":
    main()
