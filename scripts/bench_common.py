"""What the parts of scripts/bench.py share: settings, children, the clock, and our four ways to call a program."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "gpu")]

from bench_passes import BACKEND, DRY_RUN, Row, say  # noqa: E402

__all__ = ["BACKEND", "DRY_RUN", "ROOT", "Row", "say"]

Call = Callable[[], Any]
Keep = Callable[[list[Row]], None]
"""Writes down the rows of a unit as they are so far."""

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"cuda_graphs": False},
    "graph": {"cuda_graphs": True},
    "reused": {"cuda_graphs": True, "reuse_outputs": True},
    "bound": {"cuda_graphs": True},
    "overlapped": {"cuda_graphs": True, "overlap_kernels": True},
}
"""How a program can be called, with the options of tb.load: the last two by `EngineModule.bind`."""
_BOUND = ("bound", "overlapped")


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark was asked for; defaults are small where this is a dry run.

    Attributes:
        work: folder of converted models and of what children leave.
        dtype: of models and inputs.
        repeats: batches of calls of each way; the median counts.
        batch_ms: length of such a batch, in milliseconds.
        host_calls: calls in a row for the host time.
        random_calls: calls with random shapes.
        thread_calls: calls of each thread, in each batch: few, as what a host does changes by a third within seconds.
        threads: how many.
        inductor: modes of torch.compile.
        rounds: how often the eight shapes come in turn.
    """

    work: Path
    dtype: str = "float32" if DRY_RUN else "float16"
    repeats: int = 2 if DRY_RUN else 11
    batch_ms: float = 2 if DRY_RUN else 30
    host_calls: int = 20 if DRY_RUN else 1000
    random_calls: int = 100 if DRY_RUN else 10_000
    thread_calls: int = 10 if DRY_RUN else 30
    threads: int = 4 if DRY_RUN else 8
    inductor: tuple[str, ...] = ("reduce-overhead", "max-autotune")
    rounds: int = 4 if DRY_RUN else 10

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, for a child."""
        return {**dataclasses.asdict(self), "work": str(self.work)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """What `to_json` wrote."""
        return cls(**{**data, "work": Path(data["work"]), "inductor": tuple(data["inductor"])})


def program_file(settings: Settings, model: str, suffix: str = ".trtb") -> Path:
    """Where a converted model lies, or what is known of it (".json")."""
    return settings.work / f"{stem(model)}_{settings.dtype}{suffix}"


def stem(text: str) -> str:
    """A name for files."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)


def run_child(command: Sequence[str], limit_s: float, threads: int = 0) -> str:
    """Run a command of this repository.

    Args:
        command: its words.
        limit_s: it is killed after so many seconds.
        threads: OMP_NUM_THREADS, 0 to leave it.

    Returns:
        What went wrong, "" for nothing.
    """
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if threads else dict(os.environ)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=environment, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:.0f} s"
    return "" if done.returncode == 0 else f"ended with status {done.returncode}: {done.stderr[-800:]}"


# The clock


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other unit that was given the same file in TRTBRIDGE_BENCH_LOCK is at it; then it is locked.

    So two runs may share a GPU: one imports what it needs while the other one measures.
    """
    path = os.environ.get("TRTBRIDGE_BENCH_LOCK")
    with FileLock(path) if path else nullcontext():
        yield


def milliseconds(call: Call, calls: int) -> float:
    """Time of one call of a batch of them, given without waiting in between; on a GPU by its events."""
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


@dataclass
class Timed:
    """Times of one way.

    Attributes:
        ms: median of the batches, in milliseconds a call.
        low, high: the quartiles.
    """

    ms: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Timed:
        """Median and quartiles of some times."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in vars(self).items()}


def in_turns(calls: Mapping[str, Call], settings: Settings) -> dict[str, Timed]:
    """Time several ways in turns, so that what drifts (clocks, heat) meets all of them alike."""
    counts = {}
    for name, call in calls.items():
        milliseconds(call, 3)
        counts[name] = max(2, min(500, round(settings.batch_ms / max(milliseconds(call, 3), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(settings.repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, counts[name]))
    return {name: Timed.of(values) for name, values in times.items()}


def host_us(call: Call, calls: int, rounds: int) -> float:
    """Microseconds that a call takes the host: the median of rounds of calls without waiting for the device."""
    for _ in range(20):
        call()
    found = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - started) * 1e6 / calls)
    synchronize()
    return statistics.median(found)


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if not DRY_RUN:
        torch.cuda.synchronize()


def capture(run: Callable[[], list[Any]], overlap: bool = True) -> tuple[Call, list[Any]]:
    """A function of fixed buffers as the replay of one CUDA graph; itself in a dry run.

    Args:
        run: what is captured.
        overlap: its kernels may overlap, where they were made so.

    Returns:
        The call, and the tensors that it writes.

    Raises:
        RuntimeError: it cannot be captured.
    """
    import torch

    from trtbridge.bridge.cuda_driver import wait_for_ends

    if DRY_RUN:
        return run, run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and sizes set here, which a capture does not allow
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    if not overlap:
        wait_for_ends(graph.raw_cuda_graph())
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()

    def replay() -> None:
        graph.replay()

    replay.held = (graph, run, outputs)  # type: ignore[attr-defined]  # the graph's kernels belong to these
    return replay, outputs


# Our own calls


@dataclass
class Ours:
    """A converted program in one way.

    Attributes:
        call: with the example.
        module: what is called.
        refusal: why there is no CUDA graph where one was asked for.
    """

    call: Call
    module: Any
    refusal: str = ""


@dataclass(frozen=True)
class Example:
    """One model's call.

    Attributes:
        args, kwargs: on the device.
        device: where.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    device: Any = None


def ours(file: Path, example: Example, ways: Sequence[str] = tuple(WAYS)) -> dict[str, Ours]:
    """A saved program, loaded once for each way and called often enough to have its graph."""
    import trtbridge as tb

    found = {}
    for way in ways:
        module = tb.load(file, example.device, **WAYS[way])
        call: Call
        if way in _BOUND:
            call = module.bind(*example.args, **example.kwargs)
        else:
            call = _call(module, example)
        for _ in range(3):
            call()
        synchronize()
        found[way] = Ours(call, module, _refusal(module) if WAYS[way]["cuda_graphs"] else "")
    return found


def _call(module: Any, example: Example) -> Call:
    args, kwargs = example.args, example.kwargs
    return lambda: module(*args, **kwargs)


def _refusal(module: Any) -> str:
    """Why no call of a module was a replay so far."""
    if DRY_RUN or module.stats().graph_replays:
        return ""
    running = module._running
    return running.graph_refusal or running._graphs.refusal or "no call was a replay"


def read(path: Path) -> Any:
    """A JSON file; None where there is none, or only a part of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, data: Any) -> None:
    """A JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
