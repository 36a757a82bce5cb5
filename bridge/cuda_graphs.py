"""CUDA graphs of whole calls: one for each combination of input shapes, bounded in number.

A graph holds addresses, so a call copies its inputs into the graph's own tensors, replays, and copies the results
out. Where torch hands out what that takes, these copies are parts of the graph, and a call tells them where its tensors
are: that takes the host a fraction of what giving a copy to the device takes. All graphs of a module share one scratch
memory and one memory pool, which is right because replays never overlap: a lock puts the calls of several threads in
order, and those of several streams CUDA itself, which lets replays of one graph wait for each other, or an event that
each graph records at its end. So what a call does under the lock lets go of Python's own once, to launch: whoever takes
that comes here, and each change from one thread to another takes as long as a small graph.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..plugins.capture_gate import GATE
from ..plugins.driver import DriverError
from .graph_capture import Captured, Capturer

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Key = tuple[torch.Size, ...]

_MOST_FAILURES = 3  # captures that fail one after the other, of different shapes, before none is tried any more
_ATTEMPTS = 2  # with the same shapes: what another thread does, as torch.cuda.synchronize, may have spoilt the first
_MOST_DEFERRED_S = 10.0  # what looks as if it compiled kernels may be a device with more work than it can queue
_PATIENCE = 16  # a graph makes room for another after so many calls without it, times the number of graphs


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
        # Shapes without a graph, whose calls were plain; and since when there would be one, were it not for others.
        self._seen: OrderedDict[_Key, float] = OrderedDict()
        self.lock = threading.RLock()
        self._calls = 0
        self._failed: Counter[_Key] = Counter()  # captures that failed, by shapes, with no success since
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
        key = tuple(tensor.shape for tensor in inputs)
        # While torch takes memory it lets go of Python's lock: whoever gets that would come here and wait for this one.
        known = self._graphs.get(key)
        prepared = None if known is None else known.prepare(inputs)
        with self.lock:
            self._calls += 1
            if self.refusal:
                return None
            captured = self._graphs.get(key)
            if captured is None:
                captured = self._admit(key, inputs)
                if captured is None:
                    return None
            else:
                self._graphs.move_to_end(key)
            captured.last_used = self._calls
            if prepared is None or captured is not known:
                prepared = captured.prepare(inputs)
            try:
                captured.aim(prepared)
            except DriverError as error:
                # Memory of some other kind than what was captured: from now on copies are made outside of graphs.
                logger.info("copies are no parts of CUDA graphs any more: %s", error)
                self._capturer.copies_inside = False
                self.clear()
                return None
            return self._in_order(captured, lambda: captured.call(prepared, self._fresh_outputs))

    def bind(self, inputs: Sequence[torch.Tensor]) -> Captured | None:
        """A graph that reads these very tensors, outside the cache; None where there can be none (`refusal`)."""
        with self.lock:
            return None if self.refusal else self._capture(inputs, own_inputs=False)

    def replay_bound(self, captured: Captured) -> list[torch.Tensor]:
        """Replay a graph of `bind` on torch's current stream; results are its own tensors."""
        with self.lock:
            self._in_order(captured, captured.replay)
            return captured.outputs

    def wait(self) -> None:
        """Wait on the host until all replays are done."""
        self._order.wait()

    def clear(self) -> None:
        """Forget all graphs; they are captured anew when they are needed."""
        with self.lock:
            self._graphs.clear()
            self._seen.clear()
            self._capturer.clear()

    def _in_order(self, captured: Captured, replay: Callable[[], T]) -> T:
        """What `replay` returns, which gives a graph to torch's current stream."""
        graph = captured.token if captured.is_whole else None
        self._order.enter(graph)
        try:
            result = replay()
        except BaseException:
            if graph is None:  # some of it may have been given to the device; of a replay nothing was
                self._order.leave()
            raise
        self._order.leave(graph)
        self.counters["graph_replays"] += 1
        return result

    def _admit(self, key: _Key, inputs: Sequence[torch.Tensor]) -> Captured | None:
        """A new graph, unless these shapes are new or there is no room."""
        if key not in self._seen or not all(tensor.numel() for tensor in inputs):
            # A first call is a plain one: most shapes of some programs come once only.
            self._seen[key] = 0.0
            while len(self._seen) > _PATIENCE * self._most:
                self._seen.popitem(last=False)
            return None
        if GATE.is_busy():  # nobody waits for kernels of another program: one of the next calls captures
            now = time.monotonic()
            wanted = self._seen[key] = self._seen[key] or now
            if now - wanted < _MOST_DEFERRED_S:
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
        if self._failed[key] == _ATTEMPTS:
            return None
        try:
            captured = self._capturer.capture(inputs, own_inputs, own_inputs and self._fresh_outputs)
        except Exception as error:
            # A plain call with these shapes shows whether they are the cause.
            self._failed[key] += 1
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
