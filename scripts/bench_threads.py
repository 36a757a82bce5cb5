#!/usr/bin/env python3
"""How threads that call at once get on: each on its own, one at a time, as the runtime does it, and as it might.

    python scripts/bench_threads.py                              stand-ins of calls, anywhere
    python scripts/bench_threads.py --model resnet50 --work DIR  calls of a model of scripts/bench.py, converted in DIR

Calls a second of all threads together, in many short rounds of all ways: what a host does in a second changes by a
third from one second to the next. Of a model on one module and on a module for each thread, without CUDA graphs or with
them (`--graphs`). `bridge/host_thread.py` says what the runtime does, and docs/runtime.md has what came out on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import bench_models as models
import torch
from bench_common import BACKEND, DRY_RUN, Example, Settings, program_file

import trtbridge as tb
from trtbridge.bridge import host_thread
from trtbridge.bridge.runtime import RunningProgram

Call = Callable[[], Any]

STAND_INS = {"like an engine": (1, 800_000), "like twelve plugins": (13, 100_000)}
"""How often a call launches kernels, and how many bytes SHA-256 takes as long as that (some 400 and 50 us)."""
_OUTSIDE, _AROUND = 7500, 300
"""Rounds of a Python loop, some 80 and 3 us: what a caller does besides, and what a call does between two releases."""


@contextmanager
def _instead(call: Callable[[Call], Any]) -> Iterator[None]:
    """Calls are made by this, in the thread that makes them."""

    def made(self: host_thread.HostCalls, shapes: Hashable, work: Call, stream: Any = None) -> Any:
        return call(work)

    with mock.patch.object(host_thread.HostCalls, "__call__", made):
        yield


def _one_at_a_time() -> AbstractContextManager[None]:
    lock = threading.Lock()  # whoever has it mostly gets it again

    def call(work: Call) -> Any:
        with lock:
            return work()

    return _instead(call)


@contextmanager
def _woken_at_the_end() -> Iterator[None]:
    """Whoever asked goes on as soon as his call is over, not when the next one launches."""
    run, tell = host_thread._Request.run, host_thread._Request.tell

    def run_and_tell(self: host_thread._Request[Any]) -> None:
        run(self)
        tell(self)

    def told(self: host_thread._Request[Any]) -> None:
        pass

    request = host_thread._Request
    with mock.patch.object(request, "run", run_and_tell), mock.patch.object(request, "tell", told):
        yield


@contextmanager
def _one_lane() -> Iterator[None]:
    """A call takes a lane when its turn has come, so all take the same one: a host has its contexts in a cache."""
    in_lane = RunningProgram._run_in_lane

    def run(self: RunningProgram, inputs: Sequence[torch.Tensor], stream: Any = None) -> list[torch.Tensor]:
        if self._host is None:
            return in_lane(self, inputs, stream)

        def work() -> list[torch.Tensor]:
            lane = self._lanes.take()
            try:
                return self._run_in_order(inputs, lane)
            finally:
                self._lanes.give(lane)

        return self._host(tuple(tensor.shape for tensor in inputs), work, stream)

    with mock.patch.object(RunningProgram, "_run_in_lane", run):
        yield


@contextmanager
def _whole_calls() -> Iterator[None]:
    """The one thread also does what a call does besides, and replays CUDA graphs."""
    on_device = RunningProgram._call_on_device

    def call(self: RunningProgram, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._host is None:
            return on_device(self, inputs)
        return self._host.thread.call(lambda: on_device(self, inputs), torch.cuda.current_stream())

    with mock.patch.object(RunningProgram, "_call_on_device", call):
        yield


@contextmanager
def _whole_calls_in_one_lane() -> Iterator[None]:
    """The one thread does all, with the same contexts each time: as near to one thread that calls as this comes."""
    with _one_lane(), _whole_calls():
        yield


_MOST_WAITED_S = 0.02


class _LastFirst(deque[Any]):
    """Requests, of which the newest comes next unless the oldest has waited for long."""

    def append(self, request: Any) -> None:
        request.since = time.perf_counter()
        super().append(request)

    def popleft(self) -> Any:
        is_late = time.perf_counter() - self[0].since > _MOST_WAITED_S
        return super().popleft() if is_late else self.pop()


@contextmanager
def _last_first() -> Iterator[None]:
    """Whoever asked last is served next, as what his call needs is in caches, and others wait for 20 ms at most."""
    make, known = host_thread.HostThread.__init__, list(host_thread._threads.values())

    def init(self: host_thread.HostThread, *arguments: Any) -> None:
        make(self, *arguments)
        self._queue = _LastFirst()

    for one in known:
        one._queue = _LastFirst()
    try:
        with mock.patch.object(host_thread.HostThread, "__init__", init):
            yield
    finally:
        for one in host_thread._threads.values():
            one._queue = deque()


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "each on its own": lambda: _instead(lambda work: work()),
    "a lock": _one_at_a_time,
    "woken at the end": _woken_at_the_end,
    "last first": _last_first,
    "one lane": _one_lane,
    "whole calls": _whole_calls,
    "whole calls, one lane": _whole_calls_in_one_lane,
    "as it is": nullcontext,
}


def stand_ins(threads: int, kind: str) -> list[Call]:
    """Calls without a GPU, as programs of one device: hashlib lets go of Python's lock as launches do."""
    launches, size = STAND_INS[kind]
    short, long = b"x" * 6000, b"x" * size

    def part() -> None:
        for _ in range(_AROUND):
            pass
        hashlib.sha256(short).digest()

    def work() -> None:
        for _ in range(launches):
            part()
            part()
            host_thread.about_to_launch()
            hashlib.sha256(long).digest()
        part()

    def made() -> Call:
        calls = host_thread.HostCalls(-1)

        def call() -> None:
            for _ in range(_OUTSIDE):
                pass
            calls((), work)

        return call

    return [made() for _ in range(threads)]


def modules(model: str, settings: Settings, graphs: bool) -> tuple[list[Call], list[Call]]:
    """Calls of one module, and of a module each, on streams of their own, batch 1."""
    if problem := models.convert_all([model], settings, 1, 600)[model]["error"]:
        raise SystemExit(f"{model} is not converted: {problem}")
    graphs = graphs and not DRY_RUN
    options = {"kernel_specialization": "eager"} if BACKEND == "tensorrt_rtx" else {}
    module = tb.load(program_file(settings, model), models.here(), cuda_graphs=graphs, **options)
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


def in_turn(calls: Sequence[Call]) -> Call:
    """The next one of them each time."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def table(kinds: dict[str, tuple[Call, Sequence[Call]]], ways: Sequence[str], count: int, rounds: int) -> str:
    """Medians of ways, as text; what is beside one thread, with its quartiles, is within a round of a way.

    Args:
        kinds: what one thread calls, before the others do, and what these call, one a thread.
        ways: of `WAYS`.
        count: calls of each measurement.
        rounds: measurements of each.
    """
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for _ in range(rounds):
        for way in ways:
            with WAYS[way]():
                for kind, (one, calls) in kinds.items():
                    alone, _ = rate([one], count)
                    found.setdefault((way, kind), []).append((alone, *rate(calls, count)))
    lines = [f"{len(os.sched_getaffinity(0))} cores", ""]
    lines += ["| calls | | one thread, calls a second | all of them | beside one thread | longest call, ms |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for (way, kind), measured in found.items():
        alone, together = (statistics.median(one[index] for one in measured) for index in (0, 1))
        ratios = [one[1] / one[0] for one in measured]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        beside = f"{middle:.3f} ({low:.2f} to {high:.2f})"
        longest = 1000 * max(one[2] for one in measured)
        lines.append(f"| {way} | {kind} | {alone:.0f} | {together:.0f} | {beside} | {longest:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="one of scripts/bench.py; needs a GPU")
    parser.add_argument("--work", type=Path, help="folder of converted models")
    parser.add_argument("--graphs", action="store_true", help="calls of the model replay CUDA graphs, on a GPU")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=480, help="of all threads together, each time")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    options = parser.parse_args()
    kinds: dict[str, tuple[Call, Sequence[Call]]] = {}
    if options.model is None:
        for kind in STAND_INS:
            calls = stand_ins(options.threads, kind)
            kinds[f"{options.threads} threads, {kind}"] = calls[0], calls
    else:
        if options.work is None:
            parser.error("--model needs --work DIR")
        options.work.mkdir(parents=True, exist_ok=True)
        one, several = modules(options.model, Settings(options.work, threads=options.threads), options.graphs)
        kinds[f"{options.threads} threads, one module"] = one[0], one
        kinds[f"{options.threads} threads, a module each"] = in_turn(several), several
    print(table(kinds, options.ways, options.calls, options.rounds))


if __name__ == "__main__":
    main()
