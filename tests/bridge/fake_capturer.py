"""A capturer of CUDA graphs that needs no GPU, for tests of which calls become graphs and which graphs are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from trtbridge.bridge.graph_capture import Captured, Copies
from trtbridge.plugins.driver import DriverError


class Refusing:
    """A copy inside of a graph that takes no memory."""

    def read_from(self, address: int) -> None:
        raise DriverError("cuGraphExecMemcpyNodeSetParams failed with CUresult 1")


class Order:
    """Notes when the memory is in use."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def enter(self, graph: object = None) -> None:
        self.log.append("enter")

    def leave(self) -> None:
        self.log.append("leave")


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

        def replay() -> None:
            for target, source in zip(outputs, static, strict=True):
                target.copy_(source * 2)

        copies = Copies(cast(Any, [Refusing()]), []) if self.copies_inside and self.refuses else None
        return Captured(replay, static, outputs, cast(Any, None), copies)

    def is_slower(self, captured: Captured) -> bool:
        return not self.faster
