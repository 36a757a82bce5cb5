"""A call captured as a CUDA graph, and what captures and times it. What needs CUDA stands here; the rules, by which
calls become graphs, in cuda_graphs.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..plugins.capture_gate import GATE
from ..plugins.captures import OwnGraph, capturing
from ..plugins.driver import DriverError
from ..plugins.streams import own_stream
from .cuda_driver import CopyNode, copy_nodes, wait_for_ends
from .lanes import Lane, LaneMaker, StreamOrder

logger = logging.getLogger(__name__)

_Run = Callable[[Sequence[torch.Tensor], Lane], list[torch.Tensor]]

_CALLS_TIMED = 10
_SECONDS_TIMED = 0.02  # that a round takes about, where calls are not shorter or longer anyway
_ROUNDS_TIMED = 3
_AS_FAST = 1.05  # two measurements of one thing differ by that


@dataclass
class Copies:
    """Copies that are parts of a graph.

    Attributes:
        inputs: one for each input, from the caller's tensor.
        outputs: one for each result, to a fresh tensor; none where results are the graph's own tensors.
        sources: what was read when they were captured, kept until a call names other tensors.
    """

    inputs: list[CopyNode]
    outputs: list[CopyNode]
    sources: Sequence[torch.Tensor] = ()


@dataclass
class Prepared:
    """What a call needs besides its graph.

    Attributes:
        inputs: of the call, each in one piece; kept until the replay was given to the device.
        results: fresh tensors, none where the graph does not write to such.
    """

    inputs: Sequence[torch.Tensor]
    results: list[torch.Tensor]


@dataclass
class Captured:
    """A graph with the tensors that it reads and writes.

    Attributes:
        replay: starts it on torch's current stream.
        inputs: copied into before a replay; the caller's own tensors for a bound call.
        outputs: what a replay writes.
        lane: the execution contexts that the graph's kernels belong to.
        copies: those that the graph makes by itself; None where the caller makes them.
        is_whole: a replay is all that a call gives to the device, and tells `StreamOrder` by itself that it was.
        last_used: number of the last call with it.
        token: stands for it where a reference would be a cycle.
    """

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    lane: Lane
    copies: Copies | None = None
    is_whole: bool = False
    last_used: int = 0
    token: object = field(default_factory=object)

    def prepare(self, inputs: Sequence[torch.Tensor]) -> Prepared:
        """Memory for a call, ahead of it: nothing here is of the graph, so no lock is needed."""
        if self.copies is None:
            return Prepared(inputs, [])
        results = [torch.empty_like(tensor) for tensor in self.outputs] if self.copies.outputs else []
        return Prepared([tensor.contiguous() for tensor in inputs], results)

    def aim(self, prepared: Prepared) -> None:
        """Let the next replay read and write what was prepared for it.

        Raises:
            DriverError: one of its own copies does not take a tensor's memory: the graph is of no use any more.
        """
        if self.copies is None:
            return
        for copy, tensor in zip(self.copies.inputs, prepared.inputs, strict=True):
            copy.read_from(tensor.data_ptr())
        self.copies.sources = ()
        for copy, tensor in zip(self.copies.outputs, prepared.results, strict=True):
            copy.write_to(tensor.data_ptr())

    def call(self, prepared: Prepared, fresh_outputs: bool) -> list[torch.Tensor]:
        """Replay it on torch's current stream.

        Args:
            prepared: what it was aimed at.
            fresh_outputs: results are copies.
        """
        if self.copies is None:
            _copy(self.inputs, prepared.inputs)
            self.replay()
            return [tensor.clone() for tensor in self.outputs] if fresh_outputs else list(self.outputs)
        self.replay()
        return prepared.results or list(self.outputs)


class Capturer:
    """Captures and times calls on one device.

    Args:
        run: a plain call on torch's current stream; like the next one it must not hold who has this, or only the
            garbage collector would free the graphs.
        lanes: makes the execution contexts of each graph, over scratch memory that all graphs share.
        device: where.
        overlap: kernels may begin before the one ahead has ended, where they were made so.

    Attributes:
        order: of the work that uses what the graphs share.
        copies_inside: whether graphs copy their inputs and results by themselves.
    """

    def __init__(self, run: _Run, lanes: LaneMaker, device: torch.device, overlap: bool = True) -> None:
        self.order = StreamOrder(device)
        self.copies_inside = hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec")
        self._overlap = overlap
        self._run = run
        self._lanes = lanes
        self._has_workspace = False  # made with the first graph; `order` has it
        self._device = device
        self._pool: Any = None
        self._pools_own: OwnGraph | None = None  # lives as long as the pool is used
        self._own = own_stream(device)
        self._spare: list[Lane] = []  # of graphs that are gone: contexts that have their kernels

    def capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True, fresh_outputs: bool = False) -> Captured:
        """A graph of a call.

        Args:
            inputs: on the device.
            own_inputs: the graph has input tensors of its own; else it reads these.
            fresh_outputs: results will be copies of the graph's own.

        Raises:
            Exception: something in the call cannot be captured; the device is as before.
        """
        with self._on_own_stream():
            static = [_own(tensor) for tensor in inputs] if own_inputs else list(inputs)
            lane = self._spare.pop() if self._spare else self._make_lane()
            seen = self._run(static, lane)  # kernels are compiled and sizes set here, which a capture does not allow
            self.order.leave()  # its event exists from here on
            self._own.stream.synchronize()
            results = seen if fresh_outputs else ()
            with GATE.capture():
                captured: Captured | None = None
                if own_inputs and self.copies_inside and all(map(_is_one_piece, results)):
                    captured = self._capture_with_copies(inputs, static, results, lane)
                    self.copies_inside = captured is not None
                if captured is None:
                    graph, outputs = self._captured(lambda: self._run(static, lane), not self._overlap, not own_inputs)
                    captured = Captured(graph.replay, static, outputs, lane, is_whole=not own_inputs)
                # The event that TensorRT-RTX records in each enqueue is a part of the graph until it is recorded anew.
                self._run(static, lane)
        return captured

    def _capture_with_copies(
        self,
        inputs: Sequence[torch.Tensor],
        static: list[torch.Tensor],
        results: Sequence[torch.Tensor],
        lane: Lane,
    ) -> Captured | None:
        """A graph that copies by itself; None where its copies cannot be found."""
        sources = [tensor.detach().contiguous() for tensor in inputs]
        ends: list[tuple[int, int]] = []

        def run() -> list[torch.Tensor]:
            # All of these live through the whole call, so that no other copy in it has the same ends.
            targets = [torch.empty_like(tensor) for tensor in results]
            for target, source in zip(static, sources, strict=True):
                target.copy_(source)
            outputs = self._run(static, lane)
            for target, source in zip(targets, outputs, strict=bool(targets)):
                target.copy_(source)
            pairs = [*zip(sources, static, strict=True), *zip(outputs, targets, strict=bool(targets))]
            ends.extend((source.data_ptr(), target.data_ptr()) for source, target in pairs)
            return outputs

        graph, outputs = self._captured(run, keep=True, is_whole=True)
        try:
            nodes = copy_nodes(graph, ends)
        except DriverError as error:
            logger.info("copies are no parts of CUDA graphs: %s", error)
            return None
        copies = Copies(nodes[: len(static)], nodes[len(static) :], sources)
        return Captured(graph.replay, static, outputs, lane, copies, is_whole=True)

    def _captured(
        self, run: Callable[[], list[torch.Tensor]], keep: bool, is_whole: bool = False
    ) -> tuple[OwnGraph, list[torch.Tensor]]:
        """Capture a call as a graph, and what it returns; `keep` for one that the driver can be asked about."""
        graph = OwnGraph(keep_graph=keep)
        try:
            if self._pools_own is None:
                # torch does not take up a pool again whose graphs are all gone, and keeps its memory for nothing.
                self._pool, own = torch.cuda.graph_pool_handle(), OwnGraph(keep_graph=True)
                with capturing(own, self._device, self._pool, self._own.stream):
                    torch.zeros(1, device=self._device)
                self._pools_own = own
            with capturing(graph, self._device, self._pool, self._own.stream):
                outputs = run()
                if is_whole:
                    graph.event = self.order.leave_in_capture()
        except BaseException:
            self._pools_own, self._own = None, own_stream(self._device)
            raise
        if not self._overlap:
            logger.debug("%d kernels of a CUDA graph wait for the one ahead", wait_for_ends(graph.raw_cuda_graph()))
        if keep:
            graph.instantiate()
        return graph, outputs

    def recycle(self, captured: Captured) -> None:
        """Take back the contexts of a graph that is not replayed any more, for another: making some takes long."""
        self._spare.append(captured.lane)

    def clear(self) -> None:
        """Let go of what was taken back, and of the pool, whose memory is free when its last graph goes."""
        self._spare.clear()
        self._pools_own = None

    def is_slower(self, captured: Captured) -> bool:
        """Whether a replay takes more time than a plain call, on the graph's own tensors.

        Where the device is what takes the time, both take the same: other sizes of the module may gain all the same.
        """

        def plain() -> None:
            self._run(captured.inputs, captured.lane)

        def seconds(call: Callable[[], None], calls: int) -> float:
            self._own.stream.synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                call()
            self._own.stream.synchronize()
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
        kept = self._own  # also where a capture fails, and the next one has another
        caller, own = torch.cuda.current_stream(self._device), kept.stream
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


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each tensor into another; in one kernel where that can be."""
    # Of tensors that want gradients only the values count.
    plain = [source.detach() if source.requires_grad else source for source in sources]
    if len(plain) == 1:
        targets[0].copy_(plain[0], non_blocking=True)
    elif plain:
        torch._foreach_copy_(list(targets), plain, non_blocking=True)


def _is_one_piece(tensor: torch.Tensor) -> bool:
    """Whether a copy of it is one of bytes in a row, which is a node of its own in a graph."""
    return tensor.numel() > 0 and tensor.is_contiguous()


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
