"""A capturer of CUDA graphs that needs no GPU, for tests of which calls become graphs and which graphs are kept."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch

from trtbridge.bridge.graph_capture import Captured, Copies
from trtbridge.plugins.driver import DriverError


class Refusing:
    """A copy inside of a graph that takes no memory."""

    def read_from(self, address: int) -> None:
        raise DriverError("cuGraphExecMemcpyNodeSetParams failed with CUresult 1")


class Inside:
    """A copy inside of a graph, from or to memory of the host that a call names."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._bytes, self.address = tensor, tensor.nbytes, 0

    def read_from(self, address: int) -> None:
        self.address = address

    write_to = read_from

    def read(self) -> None:
        ctypes.memmove(self._tensor.data_ptr(), self.address, self._bytes)

    def write(self) -> None:
        ctypes.memmove(self.address, self._tensor.data_ptr(), self._bytes)


class Order:
    """Notes when the memory is in use, and by which graph where it was told."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.graphs: list[object] = []

    def enter(self, graph: object = None) -> None:
        self.log.append("enter")
        self.graphs.append(graph)

    def leave(self, graph: object = None) -> None:
        self.log.append("leave" if graph is None else "replayed")
        assert graph is self.graphs[-1]


class FakeCapturer:
    """Graphs that compute ``2 * x`` of their own tensors when they are replayed."""

    def __init__(self) -> None:
        self.order = Order()
        self.captured: list[tuple[int, ...]] = []
        self.failing: set[int] = set()  # batches that cannot be captured
        self.faster = True
        self.recycled = 0
        self.copies_inside = self.refuses = False

    def recycle(self, captured: Captured) -> None:
        self.recycled += 1

    def clear(self) -> None:
        self.recycled = 0

    def capture(self, inputs: Sequence[torch.Tensor], own_inputs: bool = True, fresh_outputs: bool = False) -> Captured:
        if inputs[0].shape[0] in self.failing:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(tuple(inputs[0].shape))
        static = [t.detach().clone() for t in inputs] if own_inputs else list(inputs)
        outputs = [torch.zeros_like(t) for t in static]
        is_whole = self.copies_inside and own_inputs
        read = [Inside(t) for t in static] if is_whole else []
        write = [Inside(t) for t in outputs] if is_whole and fresh_outputs else []

        def replay() -> None:
            for copy in read:
                copy.read()
            for target, source in zip(outputs, static, strict=True):
                target.copy_(source * 2)
            for copy in write:
                copy.write()

        copies = None
        if is_whole:
            copies = Copies(cast(Any, [Refusing()] if self.refuses else read), cast(Any, write))
        return Captured(replay, static, outputs, cast(Any, None), copies, is_whole=is_whole or not own_inputs)

    def is_slower(self, captured: Captured) -> bool:
        return not self.faster
