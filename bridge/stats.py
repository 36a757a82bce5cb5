"""What ``module.stats()`` returns: calls so far, sizes and memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .graph_facts import read_weights
from .program import Program
from .runtime import RunningProgram
from .text import size_text


@dataclass(frozen=True)
class Stats:
    """Numbers of one module in this process; None where nobody counts.

    Attributes:
        calls: how many, failed ones included.
        graph_replays: calls that replayed a CUDA graph.
        plain_calls: calls that ran engines and plugins one by one.
        eager_calls: calls that the original module took.
        contexts: execution contexts that exist.
        captured_graphs: CUDA graphs that exist.
        graph_captures, graph_evictions: how many were captured, and made room for others.
        cache_hits: engines that came out of a cache.
        engines, plugin_calls: how many a call runs.
        engine_bytes: of all engines, as they are saved.
        weights_bytes: of the weights in them.
        workspace_bytes: device memory of all contexts for activations and scratch space.
        peak_memory_bytes: on CUDA the most that torch had allocated in this process on the device, with engines and
            workspace, which torch does not count, added; on a CPU the most resident memory that the process had.
    """

    calls: int
    graph_replays: int | None
    plain_calls: int | None
    eager_calls: int | None
    contexts: int | None
    captured_graphs: int | None
    graph_captures: int | None
    graph_evictions: int | None
    cache_hits: int | None
    engines: int
    plugin_calls: int
    engine_bytes: int
    weights_bytes: int | None
    workspace_bytes: int | None
    peak_memory_bytes: int | None

    def __str__(self) -> str:
        paths = {
            "replays of a CUDA graph": self.graph_replays,
            "plain": self.plain_calls,
            "eager": self.eager_calls,
        }
        known = ", ".join(f"{count} {name}" for name, count in paths.items() if count is not None)
        lines = [f"calls: {self.calls}" + (f" ({known})" if known else "")]
        lines.append(f"a call: {self.engines} engine(s), {self.plugin_calls} plugin call(s) between them")
        counts = {
            "execution contexts": self.contexts,
            "captured graphs": self.captured_graphs,
            "engines from a cache": self.cache_hits,
        }
        lines += [f"{name}: {count}" for name, count in counts.items() if count is not None]
        sizes = {
            "engines": self.engine_bytes,
            "weights": self.weights_bytes,
            "workspace": self.workspace_bytes,
            "peak memory": self.peak_memory_bytes,
        }
        lines += [f"{name}: {size_text(size)}" for name, size in sizes.items() if size is not None]
        return "\n".join(lines)


def gather_stats(program: Program, device: torch.device, running: RunningProgram | None, eager_calls: int) -> Stats:
    """The numbers of a program.

    Args:
        program: what runs.
        device: where.
        running: what counts; None where nothing could be loaded here yet.
        eager_calls: that the original module took.
    """
    counters: Mapping[str, int] = running.counters() if running is not None else {"calls": 0}
    found = [read_weights(engine.info) for engine in program.engines]
    weights = [facts.size_bytes for facts in found if facts is not None]
    workspace = counters.get("workspace_bytes")
    beside = sum(int(engine.info.get("weight_input_bytes", 0)) for engine in program.engines)  # torch allocates these
    return Stats(
        calls=counters["calls"],
        graph_replays=counters.get("graph_replays"),
        plain_calls=counters.get("plain_calls"),
        eager_calls=eager_calls,
        contexts=counters.get("contexts"),
        captured_graphs=counters.get("captured_graphs"),
        graph_captures=counters.get("graph_captures"),
        graph_evictions=counters.get("graph_evictions"),
        cache_hits=program.info.get("cache", {}).get("hits"),
        engines=len(program.engines),
        plugin_calls=len(program.plugin_calls),
        engine_bytes=program.size_bytes,
        weights_bytes=sum(weights) if len(weights) == len(found) else None,
        workspace_bytes=workspace,
        peak_memory_bytes=_peak(device, program.size_bytes - beside + (workspace or 0)),
    )


def _peak(device: torch.device, beside_torch: int) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) + beside_torch if torch.cuda.is_available() else None
    if sys.platform == "win32":
        return None
    import resource

    # In KiB, but for macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
