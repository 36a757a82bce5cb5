"""From a plan to a program: every segment built by one backend, several at a time where the backend can."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
import torch

from ..errors import BuildError, UnsupportedOpError
from .backends.base import Backend, BuildOptions, Engine, Progress, Refusal, Segment
from .dtypes import to_torch
from .engine_cache import EngineCache
from .graph_facts import KEY, gather
from .plan import Plan
from .program import EngineStep, Program, Step

T = TypeVar("T")

_BUILDER_BYTES = 1 << 30
"""What a process that builds takes beside what its weights do."""

_MOST_AT_ONCE = 8
"""Beyond this it is memory and the disk that builders wait for."""

_COPIES = 4
"""A builder holds its weights about so many times: the file, the network's, the engine's and what it hands out."""


def build_plan(
    plan: Plan,
    backend: Backend,
    options: BuildOptions,
    progress: Progress | None = None,
    cache: EngineCache | None = None,
) -> Program:
    """Build every segment of a plan, or take its engine from the cache.

    Raises:
        UnsupportedOpError, BuildError: as `Backend.build`, of the first segment that fails; ``segment`` says which.
    """
    segments = plan.segments
    shares = _Shares(progress, len(segments))

    def build(index: int) -> Engine:
        try:
            segment, share = segments[index], shares.of(index)
            if cache is None:
                engine = backend.build(segment, options, share)
            else:
                engine = cache.build(segment, backend, options, share)
            # Here and not in a backend: an engine may come from a cache, and its graph from other lines by now.
            return dataclasses.replace(engine, info={**engine.info, KEY: gather(segment)})
        except (UnsupportedOpError, BuildError) as error:
            error.segment = segments[index].name
            raise

    at_once = _at_once(segments) if backend.builds_apart(options, parse_only=False) else 1
    engines = iter(_for_each(build, len(segments), at_once, shares.stop))
    steps: list[Step] = [EngineStep(s.name, next(engines)) if isinstance(s, Segment) else s for s in plan.steps]
    left_out = plan.recipes.constants if plan.recipes is not None and options.strip_weights else ()
    constants = {name: snapshot(tensor) for name, tensor in plan.constants.items() if name not in left_out}
    return Program(
        backend.name, tuple(steps), plan.signature, constants, plan.aliases, plan.source, recipes=plan.recipes
    )


def check_plan(plan: Plan, backend: Backend, options: BuildOptions) -> dict[str, list[Refusal]]:
    """What a backend's parser refuses of every segment of a plan, by the segment's name, in the plan's order.

    Raises:
        BuildError: as `Backend.check`.
    """
    segments = plan.segments
    at_once = _at_once(segments) if backend.builds_apart(options, parse_only=True) else 1
    found = _for_each(lambda index: backend.check(segments[index], options), len(segments), at_once)
    return {segment.name: refusals for segment, refusals in zip(segments, found, strict=True)}


def _for_each(work: Callable[[int], T], count: int, at_once: int, stop: Callable[[], None] = lambda: None) -> list[T]:
    """The results of some work for 0, 1, ..., in order.

    Where any fails none is started anew, and the error is that of the lowest number: those before it had started.

    Args:
        work: called from threads where ``at_once`` is more than 1.
        count: how often.
        at_once: how many at the same time.
        stop: called when the caller, or any of the work, is interrupted, so that what runs ends.
    """
    at_once = min(at_once, count)
    if at_once <= 1:
        return [work(index) for index in range(count)]
    with ThreadPoolExecutor(at_once, thread_name_prefix="trtbridge-build") as pool:
        futures: Sequence[Future[T]] = [pool.submit(work, index) for index in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            interrupted = any(not isinstance(future.exception(), (Exception, type(None))) for future in done)
        except BaseException:
            interrupted = True
            raise
        finally:
            for future in futures:
                future.cancel()
            if interrupted:
                stop()
    return [future.result() for future in futures if not future.cancelled()]


def _at_once(segments: Sequence[Segment]) -> int:
    """How many segments the cores and the memory of this machine can build at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weights = max((sum(weight.nbytes for weight in s.weights.values()) for s in segments), default=0)
    return max(1, min(cores, _MOST_AT_ONCE, _free_bytes() // (_BUILDER_BYTES + _COPIES * weights)))


def _free_bytes() -> int:
    """Memory that this process can have, in bytes; 0 where the system does not tell."""
    try:
        words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(words["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:  # a container may have less than its machine
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # "max" is no number: no limit
        return free
    return max(0, min(free, limit))


class _Shares:
    """The progress of each engine as a share of all; engines may report from threads of their own."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress = progress
        self._done = [0.0] * count
        self._lock = threading.Lock()
        self._stopped = False

    def of(self, index: int) -> Progress:
        """What one engine reports to."""

        def report(phase: str, fraction: float) -> None:
            with self._lock:
                if self._stopped:
                    raise BuildError("The conversion was interrupted.", graph_at_fault=False)
                self._done[index] = max(self._done[index], fraction)
                if self._progress is not None:
                    self._progress(f"build: {phase}", sum(self._done) / len(self._done))

        return report

    def stop(self) -> None:
        """Let every engine that is being built fail with its next report."""
        self._stopped = True


def snapshot(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy, so that later changes of the module's weights do not reach the program."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().cpu().clone()
    data = bytearray(tensor.tobytes())
    dtype = to_torch(tensor.dtype)
    shape = tensor.shape.numpy()
    return (
        torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)
        if data
        else torch.empty(shape, dtype=dtype)
    )
