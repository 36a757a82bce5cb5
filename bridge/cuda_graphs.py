"""CUDA graphs of whole calls: one for each combination of input shapes, bounded in number.

A graph holds addresses, so a call copies its inputs into the graph's own tensors, replays, and copies the results
out. All graphs of a module share one scratch memory and one memory pool, which is right because replays never overlap:
a lock puts the calls of several threads in order, and an event those of several streams.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..plugins.captures import end_failed_capture
from .lanes import Lane, LaneMaker, StreamOrder

logger = logging.getLogger(__name__)

_Run = Callable[[Sequence[torch.Tensor], Lane], list[torch.Tensor]]
_Key = tuple[torch.Size, ...]

_CALLS_TIMED = 10
_SECONDS_TIMED = 0.02  # that a round takes about, where calls are not shorter or longer anyway
_ROUNDS_TIMED = 3
_AS_FAST = 1.05  # two measurements of one thing differ by that
_MOST_FAILURES = 3  # captures that fail one after the other, of different shapes, before none is tried any more
_PATIENCE = 16  # a graph makes room for another after so many calls without it, times the number of graphs


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes.

    Attributes:
        replay: starts it on torch's current stream.
        inputs: copied into before a replay; the caller's own tensors for a bound call.
        outputs: what a replay writes.
        lane: the execution contexts that the graph's kernels belong to.
        last_used: number of the last call with it.
    """

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    lane: Lane
    last_used: int = 0


class Capturer:
    """Captures and times calls on one device. What needs CUDA stands here, apart from the rules of `GraphCache`.

    Args:
        run: a plain call on torch's current stream; like the next one it must not hold who has this, or only the
            garbage collector would free the graphs.
        lanes: makes the execution contexts of each graph, over scratch memory that all graphs share.
        device: where.

    Attributes:
        order: of the work that uses what the graphs share.
    """

    def __init__(self, run: _Run, lanes: LaneMaker, device: torch.device) -> None:
        self.order = StreamOrder(device)
        self._run = run
        self._lanes = lanes
        self._has_workspace = False  # made with the first graph; `order` has it
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._spare: list[Lane] = []  # of graphs that are gone: contexts that have their kernels

    def capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True) -> Captured:
        """A graph of a call.

        Args:
            inputs: on the device.
            own_inputs: copy them, so that the graph has input tensors of its own; else it reads these.

        Raises:
            Exception: something in the call cannot be captured; the device is as before.
        """
        with self._on_own_stream():
            static = [_own(tensor) for tensor in inputs] if own_inputs else list(inputs)
            lane = self._spare.pop() if self._spare else self._make_lane()
            self._run(static, lane)  # kernels are compiled and sizes set here, which a capture does not allow
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may allocate
                outputs = self._run(static, lane)
            except BaseException:
                try:
                    graph.capture_end()
                except RuntimeError as error:  # it says once more that the capture has failed
                    logger.debug("%s", error)
                end_failed_capture(self._device)
                # The allocator takes the capture for one that goes on, and refuses another one in the same pool.
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
                raise
            graph.capture_end()
        return Captured(graph.replay, static, outputs, lane)

    def recycle(self, captured: Captured) -> None:
        """Take back the contexts of a graph that is not replayed any more, for another: making some takes long."""
        self._spare.append(captured.lane)

    def clear(self) -> None:
        """Let go of what was taken back."""
        self._spare.clear()

    def is_slower(self, captured: Captured) -> bool:
        """Whether a replay takes more time than a plain call, on the graph's own tensors.

        Where the device is what takes the time, both take the same: other sizes of the module may gain all the same.
        """

        def plain() -> None:
            self._run(captured.inputs, captured.lane)

        def seconds(call: Callable[[], None], calls: int) -> float:
            self._stream.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                call()
            self._stream.synchronize()
            return (time.perf_counter() - started) / calls

        with self._on_own_stream():
            # Of a call that takes long one round tells enough: what a replay saves is microseconds a kernel.
            once = seconds(plain, 1)
            calls = max(1, min(_CALLS_TIMED, round(_SECONDS_TIMED / max(once, 1e-6))))
            rounds = _ROUNDS_TIMED if calls > 1 else 1
            best = [min(seconds(call, calls) for _ in range(rounds)) for call in (captured.replay, plain)]
        logger.info("a replay takes %.3f ms, a plain call %.3f ms", *(1e3 * t for t in best))
        return best[0] > _AS_FAST * best[1]

    def _make_lane(self) -> Lane:
        if not self._has_workspace:
            self.order.memory = self._lanes.workspace()
            self._has_workspace = True
        return self._lanes.over(self.order.memory, self.order)

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Work on the stream of captures, behind the caller's and before what comes after."""
        caller, own = torch.cuda.current_stream(self._device), self._stream
        # Tensors made in inference mode could not be copied into outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self._device):
            own.wait_stream(caller)
            try:
                with torch.cuda.stream(own):
                    self.order.enter()
                    try:
                        yield
                    finally:
                        self.order.leave()
            finally:
                caller.wait_stream(own)


class GraphCache:
    """The graphs of one module, least recently used first.

    Args:
        capturer: makes them.
        most: how many are kept.
        measure: use them only where a replay was measured to be no slower than a plain call.
        fresh_outputs: results are copies, which later calls leave alone.
    """

    def __init__(self, capturer: Capturer, most: int, measure: bool, fresh_outputs: bool) -> None:
        self._capturer = capturer
        self._order = capturer.order
        self._most = most
        self._measure = measure
        self._fresh_outputs = fresh_outputs
        self._graphs: OrderedDict[_Key, Captured] = OrderedDict()
        self._seen: OrderedDict[_Key, None] = OrderedDict()  # shapes of one call so far, which was plain
        self.lock = threading.RLock()
        self._calls = 0
        self._failed: list[_Key] = []  # shapes whose last capture failed, with no success since
        self.refusal = ""
        """Why there are no graphs (any more), "" where there are."""
        self.counters = {"graph_replays": 0, "graph_captures": 0, "graph_evictions": 0}

    def __len__(self) -> int:
        return len(self._graphs)

    def call(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Replay the graph for these shapes on torch's current stream; it is captured now if the time has come.

        Args:
            inputs: of the call.

        Returns:
            The results; None where the call is to be a plain one.
        """
        with self.lock:
            self._calls += 1
            if self.refusal:
                return None
            key = tuple(tensor.shape for tensor in inputs)
            captured = self._graphs.get(key)
            if captured is None:
                captured = self._admit(key, inputs)
                if captured is None:
                    return None
            else:
                self._graphs.move_to_end(key)
            captured.last_used = self._calls
            self._order.enter()
            _copy(captured.inputs, inputs)
            captured.replay()
            outputs = [t.clone() for t in captured.outputs] if self._fresh_outputs else list(captured.outputs)
            self._order.leave()
            self.counters["graph_replays"] += 1
            return outputs

    def bind(self, inputs: Sequence[torch.Tensor]) -> Captured | None:
        """A graph that reads these very tensors, outside the cache; None where there can be none (`refusal`)."""
        with self.lock:
            return None if self.refusal else self._capture(inputs, own_inputs=False)

    def replay_bound(self, captured: Captured) -> list[torch.Tensor]:
        """Replay a graph of `bind` on torch's current stream; results are its own tensors."""
        with self.lock:
            self._order.enter()
            captured.replay()
            self._order.leave()
            self.counters["graph_replays"] += 1
            return captured.outputs

    def clear(self) -> None:
        """Forget all graphs; they are captured anew when they are needed."""
        with self.lock:
            self._graphs.clear()
            self._seen.clear()
            self._capturer.clear()

    def _admit(self, key: _Key, inputs: Sequence[torch.Tensor]) -> Captured | None:
        """A new graph, unless these shapes are new or there is no room."""
        if key not in self._seen or not all(tensor.numel() for tensor in inputs):
            # A first call is a plain one: most shapes of some programs come once only.
            self._seen[key] = None
            while len(self._seen) > _PATIENCE * self._most:
                self._seen.popitem(last=False)
            return None
        while len(self._graphs) >= self._most:
            oldest, graph = next(iter(self._graphs.items()))
            if self._calls - graph.last_used <= _PATIENCE * self._most:
                return None  # all are in use: capturing now this one, now that one would cost more than it brings
            del self._graphs[oldest]
            self._capturer.recycle(graph)
            self.counters["graph_evictions"] += 1
        first = not self.counters["graph_captures"]
        captured = self._capture(inputs)
        if captured is None:
            return None
        if first and self._measure and self._capturer.is_slower(captured):
            self._give_up("a plain call was measured to be faster than a replay", logging.INFO)
            return None
        del self._seen[key]
        self._graphs[key] = captured
        return captured

    def _capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True) -> Captured | None:
        key = tuple(tensor.shape for tensor in inputs)
        if key in self._failed:
            return None
        try:
            captured = self._capturer.capture(inputs, own_inputs)
        except Exception as error:
            # A plain call with these shapes shows whether they are the cause.
            self._failed.append(key)
            why = f"a call cannot be captured: {type(error).__name__}: {error}"
            if len(self._failed) == _MOST_FAILURES:
                self._give_up(why)
            else:
                logger.info("inputs of shapes %s run without a CUDA graph: %s", [tuple(shape) for shape in key], why)
            return None
        self._failed.clear()
        self.counters["graph_captures"] += 1
        return captured

    def _give_up(self, why: str, level: int = logging.WARNING) -> None:
        self.refusal = why
        self._graphs.clear()
        self._capturer.clear()
        logger.log(level, "calls run without CUDA graphs: %s", why)


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each tensor into another; in one kernel where that can be."""
    # Of tensors that want gradients only the values count.
    plain = [source.detach() if source.requires_grad else source for source in sources]
    if len(plain) == 1:
        targets[0].copy_(plain[0], non_blocking=True)
    elif plain:
        torch._foreach_copy_(list(targets), plain, non_blocking=True)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def capture_id(stream: int) -> int:
    """The number of the capture that a stream takes part in, unique in the process; 0 without one.

    Args:
        stream: CUDA stream handle.
    """
    # torch does not tell, so the driver is asked: CUresult cuStreamGetCaptureInfo(stream, status*, id*), as v2 with the
    # optional outputs left out.
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    status, number = ctypes.c_int(), ctypes.c_uint64()
    driver.cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value
